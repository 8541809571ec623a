"""Control tokens, the end of a turn, and a trace in its place, with tokenizers of many kinds. Each
is built here as real ones are."""

import json
import shutil

import pytest
from conftest import ROOT, STUDENT, TEACHER, TEMPLATE, edit_rows, invoke, rows
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from mpd_data.cli import cli
from mpd_data.common.errors import ConfigError
from mpd_data.common.models import load_tokenizer, resolve_model
from mpd_data.config import RolloutsConfig
from mpd_data.engines.protocol import Completion, RequestError
from mpd_data.engines.stop_strings import ended
from mpd_data.prompts.chat import ChatFormatter, PromptError
from mpd_data.prompts.special import Spelling, control_tokens, turn_of
from mpd_data.rollouts import run_rollouts, setup
from mpd_data.select.support import NOWHERE, Measure

ENGINE = ("--backend", "transformers", "--dtype", "float32")
CORPUS = ["The answer is 5 .", "what is 2 + 3 ?", "plan in order : x = 4", "a b\n\nThe 12"] * 20
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BYTES = [f"<0x{i:02X}>" for i in range(256)]
MARKS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>"]
UNMARKED = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


def trained(bpe, special, alphabet=(), template=CHATML, **named):
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=list(alphabet), show_progress=False
    )
    bpe.train_from_iterator(CORPUS, trainer)
    bpe.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    bpe.add_tokens(["<think>", "</think>", "<|User|>", "loud"])
    named = {"eos_token": "</s>", "bos_token": "<s>", "chat_template": template, **named}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **named)


def byte_level(prefix=False, normalizer=None, **settings):
    """Of the kind of GPT-2, Qwen and SmolLM."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    bpe.decoder = decoders.ByteLevel()
    if normalizer is not None:
        bpe.normalizer = normalizer
    return trained(bpe, [], pre_tokenizers.ByteLevel.alphabet(), **settings)


def metaspace(scheme, **settings):
    """Of the kind of Llama 2, as newer files spell it. The bytes are marked special, too."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    bpe.decoder = decoders.Sequence([*UNMARKED, decoders.Strip(" ", 1, 0)])
    return trained(bpe, ["<unk>", *BYTES], **settings)


def prepending(**settings):
    """Of the kind of Llama 2, as older files spell it."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([*UNMARKED, decoders.Strip(" ", 1, 0)])
    return trained(bpe, ["<unk>", *BYTES], **settings)


# Turns that begin right after a control token, so that the tokenizer puts its space there.
TIGHT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
KINDS = {
    "byte level": lambda: byte_level(),
    "byte level, prefix": lambda: byte_level(prefix=True),
    "byte level, prefix, tight": lambda: byte_level(prefix=True, template=TIGHT),
    "first": lambda: metaspace("first"),
    "first, tight": lambda: metaspace("first", template=TIGHT),
    "always": lambda: metaspace("always"),
    "always, tight": lambda: metaspace("always", template=TIGHT),
    "prepend": lambda: prepending(),
    "prepend, tight": lambda: prepending(template=TIGHT),
}
TEXTS = ["The answer is 5 .", " The", "\n\nThe answer", "a  b\tc", "12", "é — 漢\r\n", "x²", ""]


def model_with(folder, tokenizer=None, generation=None, **settings):
    """Write the pocket student's folder with other files. Return what the code reads of it: files,
    tokenizer, turn."""
    path = shutil.copytree(STUDENT, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    (path / "generation_config.json").unlink()
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    config = path / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    model = resolve_model(str(path), weights=False)
    tokenizer = load_tokenizer(model)
    return model, tokenizer, turn_of(model, tokenizer)


def prompt_of(tokenizer):
    text, ids = ChatFormatter(tokenizer).render("what is 2 + 3 ?")
    return text, ids


# -- a trace in its place -------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_decodes_to_its_own_text_after_the_prompt(kind, tmp_path):
    tokenizer = KINDS[kind]()
    _, tokenizer, turn = model_with(tmp_path / "m", tokenizer, tokenizer.eos_token_id)
    text, before = prompt_of(tokenizer)
    # Where the whole layout is tokenised, such a tokenizer puts one space before the turn's words.
    assert turn.lead == (" " if kind.endswith("tight") and kind != "first, tight" else "")
    shown = tokenizer.decode(before, clean_up_tokenization_spaces=False)
    end = tokenizer.decode([turn.end_id])
    for trace in TEXTS:
        written, ids = turn.write(text, before, trace)
        whole = tokenizer.decode([*before, *ids], clean_up_tokenization_spaces=False)
        assert written == trace
        assert whole == f"{shown}{turn.lead}{trace}{end}", trace
        assert turn.read(ids[:-1], before) == trace


@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_ends_before_a_stop_string(kind, tmp_path):
    """Whether the engine stopped there, or went on to an end token or its limit."""
    _, tokenizer, turn = model_with(tmp_path / "m", KINDS[kind]())
    _, before = prompt_of(tokenizer)
    said = "The answer is 5 .\n\nThe é — 漢 answer"
    ids = turn.spelling.place(before, said).ids
    for stop in (
        ["\n\n"],
        ["swer is"],
        ["Nothing", "5", " is"],
        ["漢"],
        ["é — 漢 ", "e é"],
        [said],
    ):
        at = min(said.index(one) for one in stop if one in said)
        for completion in (
            Completion("k", [*ids, turn.stop_ids[0]], "stop", [-1.0] * (len(ids) + 1)),
            Completion("k", ids, "length"),
            Completion("k", ids, "stop"),
        ):
            found = ended(completion, before, stop, turn)
            assert found.finish_reason == "stop"
            assert found.token_ids[-1] == turn.end_id
            assert found.logprobs is None
            assert turn.spelling.decode(found.token_ids[:-1], before) == said[:at]
            # The ids that lie before it are those of the completion.
            same = sum(a == b for a, b in zip(found.token_ids, ids, strict=False))
            assert same >= len(turn.spelling.place(before, said[:at]).ids) - 2
    whole = Completion("k", [*ids, turn.stop_ids[0]], "stop")
    assert ended(whole, before, ["Nothing"], turn) is whole
    with pytest.raises(RequestError, match="stopped at the token .* no end token"):
        ended(Completion("k", ids, "stop"), before, ["Nothing"], turn)


def test_ids_stay_where_nothing_was_wrong():
    tokenizer = byte_level()
    spelling, (_, before) = Spelling(tokenizer), prompt_of(tokenizer)
    for text in TEXTS:
        alone = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert spelling.place(before, text).ids == alone
    # What an earlier version wrote, trace by trace.
    model = resolve_model(str(STUDENT), weights=False)
    turn = turn_of(model, load_tokenizer(model))
    recorded = ROOT / "tests" / "data" / "recorded" / "round"
    prompts = dict(rows(recorded).select("row_id", "prompt").iter_rows())
    kept = [row for row in rows(recorded, "distill").iter_rows(named=True) if row["input_ids"]]
    assert kept
    for row in kept:
        ids, start = row["input_ids"], row["loss_start"]
        written = turn.write(prompts[row["rollout_id"]], ids[:start], row["rewrite"])
        assert written == (row["rewrite"], ids[start:])
        assert turn.read(ids[start:-1], ids[:start]) == row["rewrite"]


@pytest.mark.parametrize(
    "normalizer, changed",
    [
        (normalizers.NFKC(), "x²"),
        (normalizers.Replace("\r\n", "\n"), "a\r\nb"),
        (normalizers.Lowercase(), "The"),
    ],
    ids=["NFKC", "line breaks", "case"],
)
def test_a_text_that_the_tokenizer_changes_has_no_place(normalizer, changed):
    tokenizer = byte_level(normalizer=normalizer)
    spelling, (_, before) = Spelling(tokenizer), prompt_of(tokenizer)
    assert spelling.place(before, changed) is None
    assert spelling.decode(spelling.place(before, "x = 4").ids) == "x = 4"


def test_what_a_tokenizer_adds_to_a_text_is_in_no_prompt_and_no_trace():
    tokenizer = byte_level(template="{{ bos_token }}" + CHATML)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[(x, tokenizer.convert_tokens_to_ids(x)) for x in MARKS[:2]]
    )
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    _, before = prompt_of(tokenizer)
    assert before.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in before
    ids = Spelling(tokenizer).place(before, "The answer").ids
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids)


def test_decoding_is_exact_whatever_the_tokenizers_settings_say():
    tokenizer = load_tokenizer(resolve_model(str(STUDENT), weights=False))
    tokenizer.clean_up_tokenization_spaces = True
    ids = tokenizer("check yes .", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == "check yes."
    assert Spelling(tokenizer).decode(ids) == "check yes ."
    # A first space is lost without what stands before it.
    tokenizer = metaspace("first")
    spelling, (_, before) = Spelling(tokenizer), prompt_of(tokenizer)
    ids = tokenizer("The", add_special_tokens=False)["input_ids"]
    assert (tokenizer.decode(ids), spelling.decode(ids, before)) == ("The", " The")


def test_half_a_character_and_unknown_ids_are_only_read(tmp_path):
    tokenizer = metaspace("first")
    _, tokenizer, turn = model_with(tmp_path / "m", tokenizer, tokenizer.eos_token_id)
    text, before = prompt_of(tokenizer)
    _, ids = turn.write(text, before, "x 漢")
    assert turn.read(ids[:-2], before).startswith("x ")
    assert "漢" not in turn.read(ids[:-2], before)
    # A model may have more embedding rows than its tokenizer has tokens.
    assert turn.read([*ids[:-1], len(tokenizer) + 3], before) == "x 漢"
    # An id of its own for each byte: the same text has ids that it does not encode to.
    byte = tokenizer.convert_tokens_to_ids("<0x78>")
    other = [byte, *turn.spelling.place([*before, byte], " 漢").ids]
    assert turn.read(other, before) == "x 漢"
    assert other != ids[:-1]


def test_the_student_measures_a_trace_in_its_place():
    tokenizer = metaspace("first")
    spelling, (_, before) = Spelling(tokenizer), prompt_of(tokenizer)
    ids = spelling.place(before, "x = 4\nThe answer is 5 .").ids
    places = Measure(tokenizer).places(before, ids, "5")
    assert places is not NOWHERE
    (answer,) = places.answers
    assert "5" in spelling.decode(ids[answer.start : answer.stop], ids[: answer.start])
    alone = tokenizer("x = 4", add_special_tokens=False)["input_ids"]
    assert Measure(tokenizer).places(before, alone, "4").steps


# -- control tokens -------------------------------------------------------------------------


def test_all_marked_tokens_and_the_templates_headers_are_control_tokens(tmp_path):
    template = TIGHT.replace("<|{{ m.role }}|>", "<|User|>loud ")
    tokenizer = metaspace("first", template=template, extra_special_tokens=["<|tool|>"])
    found = set(control_tokens(tokenizer).values())
    assert {*MARKS, "<unk>", "<|tool|>", "<|User|>"} == found
    assert "<|User|>" not in control_tokens(metaspace("first")).values()
    for word in ("<|im_start|>", "<|User|>", "<|tool|>"):
        with pytest.raises(PromptError, match="control token"):
            ChatFormatter(tokenizer).render(f"a {word} b")
    _, tokenizer, turn = model_with(tmp_path / "m", tokenizer, tokenizer.eos_token_id)
    text, before = prompt_of(tokenizer)
    for word in ("<|im_start|>", "<|User|>", "<|tool|>", "</s>"):
        assert turn.write(text, before, f"The {word} answer") is None
    ids = tokenizer("The <|User|> answer\n", add_special_tokens=False)["input_ids"]
    assert turn.shown(ids, before) == " The  answer\n"
    assert turn.write(text, before, "<think>\nThe\n</think>\nloud")


# -- the end of a turn ----------------------------------------------------------------------

GLM = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
FRAGILE = "{{ raise_exception('one turn') if messages[1:] }}" + CHATML


@pytest.mark.parametrize(
    "template, named, stops, end, told",
    [
        (CHATML, "</s>", ["</s>", "<|im_end|>"], "<|im_end|>", None),  # as Gemma's
        (CHATML, "<|im_end|>", None, "<|im_end|>", None),
        (CHATML, "</s>", None, "<|im_end|>", "ends a turn with '<|im_end|>'"),
        (CHATML, "</s>", "</s>", "<|im_end|>", "ends a turn with '<|im_end|>'"),
        # As Phi-3's: the first that generation stops at.
        (CHATML + "</s>", "</s>", ["</s>", "<|im_end|>"], "<|im_end|>", None),
        (GLM, "</s>", ["</s>", "<|user|>"], "<|user|>", None),
        (GLM, "</s>", "</s>", "</s>", "shows no end"),
        (LLAMA, "</s>", "</s>", "</s>", None),
        (FRAGILE, "</s>", "</s>", "</s>", "shows no end"),
    ],
)
def test_a_turn_ends_with_what_its_template_writes(template, named, stops, end, told, tmp_path):
    tokenizer = byte_level(template=template, eos_token=named)
    ids = tokenizer.convert_tokens_to_ids(stops) if stops else None
    _, tokenizer, turn = model_with(tmp_path / "m", tokenizer, ids)
    assert turn.end_id == tokenizer.convert_tokens_to_ids(end)
    assert {turn.end_id, tokenizer.eos_token_id} <= set(turn.stop_ids)
    assert turn.lead == (" " if template == LLAMA else "")
    assert told in (turn.note or "") if told else turn.note is None


def test_older_rounds_have_no_record_of_the_turn(tmp_path):
    _, _, turn = model_with(tmp_path / "m", None, [0, 2], eos_token="<|endoftext|>")
    assert (turn.end_id, turn.stop_ids) == (2, [0, 2])
    old = {"eos_token_id": 0, "chat_template": "one"}
    assert turn.recorded(old, "one") == turn
    assert turn.recorded(old, "another").end_id == 0
    new = {**old, "turn": {**turn.record(), "end_id": 7, "lead": " "}}
    other = turn.recorded(new, "another")
    assert (other.end_id, other.lead, other.stop_ids) == (7, " ", [0, 2])


@pytest.fixture(scope="module")
def renamed(tmp_path_factory):
    """Both pocket models with another `eos_token`, which their turns never end with, and without a
    generation config; and the first of the recorded prompts."""
    folder = tmp_path_factory.mktemp("renamed")
    for name, model in (("student", STUDENT), ("teacher", TEACHER)):
        path = shutil.copytree(model, folder / name)
        (path / "generation_config.json").unlink()
        for file, key, value in (
            ("config.json", "eos_token_id", 0),
            ("tokenizer_config.json", "eos_token", "<|endoftext|>"),
            ("tokenizer_config.json", "pad_token", "<unk>"),
        ):
            content = json.loads((path / file).read_text())
            (path / file).write_text(json.dumps(content | {key: value}))
    source = ROOT / "tests" / "data" / "recorded" / "prompts.jsonl"
    lines = source.read_text().splitlines(keepends=True)
    (folder / "p.jsonl").write_text("".join(lines[:3]))
    return folder


def test_a_round_goes_on_with_the_end_tokens_that_it_began_with(renamed, tmp_path):
    student = shutil.copytree(renamed / "student", tmp_path / "student")
    out, generation = tmp_path / "round", student / "generation_config.json"
    prompts = [str(renamed / "p.jsonl")]
    config = RolloutsConfig(
        model=str(student), prompts=prompts, out=out, sampling={"max_tokens": 5},
        engine={"backend": "transformers", "dtype": "float32"},
    )  # fmt: skip

    def stopping_at(*ids):
        generation.write_text(json.dumps({"eos_token_id": list(ids)}))
        return config

    run_rollouts(stopping_at(0, 2), limit=1)
    record = out / "run.json"
    began = record.read_text()
    for older in (False, True):
        if older:
            # The shards say it, too.
            info = json.loads(began)
            del info["stages"]["rollouts"]["identity"]["stop_ids"]
            record.write_text(json.dumps(info))
        for use in (lambda c: setup(c, weights=False), run_rollouts):
            with pytest.raises(ConfigError, match=r"stop_ids: saved \[0, 2\] / now \[0, 7, 2\]"):
                use(stopping_at(7))
    assert run_rollouts(stopping_at(0, 2)).total == 3


def test_a_base_models_end_is_told_first_and_all_stop_at_the_templates(renamed, tmp_path, capfd):
    def said(*arguments):
        assert invoke(cli, *arguments) == 0
        found = capfd.readouterr()
        return found.out + found.err

    out, told = tmp_path / "r", "ends a turn with '<|im_end|>'"
    sampling = ("rollouts", "--model", renamed / "student", "--prompts", renamed / "p.jsonl")
    sampling += ("--out", out, "--id-column", "id", "--answer-column", "answer", *ENGINE)
    sampling += ("--max-tokens", 300)
    assert told in said(*sampling, "--dry-run")
    assert said(*sampling).count(told) == 1
    assert rows(out)["finish_reason"].to_list() == ["stop"] * 3
    assert rows(out)["completion_ids"].list.last().to_list() == [2] * 3
    rewriting = ("rewrite", "--teacher", renamed / "teacher", "--shards", out, *ENGINE)
    rewriting += ("--template", TEMPLATE, "--score-context", "rewrite", "--max-tokens", 200)
    assert told in said(*rewriting, "--dry-run")
    assert said(*rewriting).count(told) == 1
    kept = [row for row in rows(out, "distill").iter_rows(named=True) if row["status"] == "ok"]
    assert kept
    for row in kept:
        assert row["input_ids"][-1] == 2
        assert row["topk_ids"][-64] == 2  # the teacher's best for the last position
    assert said("validate", out).endswith("sound\n")
    made = ("init", tmp_path / "my", "--student", renamed / "student")
    made += ("--teacher", renamed / "teacher", "--prompts", renamed / "p.jsonl")
    assert f"{renamed / 'student'}: its chat template {told}" in said(*made)


def test_a_draft_that_is_its_own_rewrite_may_end_as_it_was_sampled(renamed, tmp_path):
    out = tmp_path / "r"
    sampling = ("rollouts", "--model", renamed / "student", "--prompts", renamed / "p.jsonl")
    invoke(cli, *sampling, "--out", out, "--id-column", "id", "--max-tokens", 300, *ENGINE)

    def end_otherwise(row):
        row["completion_ids"][-1] = 0

    edit_rows(out, "rollouts", end_otherwise)
    (out / "rollouts.manifest.jsonl").unlink()
    drafts = ("rewrite", "--teacher", renamed / "teacher", "--shards", out, *ENGINE)
    invoke(cli, *drafts, "--template", "draft", "--score-context", "problem", "--max-tokens", 200)
    kept = rows(out, "distill").filter(status="ok")
    assert kept["input_ids"].list.last().to_list() == [0] * 3
    invoke(cli, "validate", out)
