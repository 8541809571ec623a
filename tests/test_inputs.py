"""Prompts, answers and templates: which inputs are accepted, and the messages for the others."""

import json
import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import STUDENT, TEACHER, TEMPLATE, write_jsonl

from mpd_data.checkers.builtin import NumberChecker
from mpd_data.common.errors import ConfigError, DataError
from mpd_data.common.models import load_tokenizer, resolve_model, tokenizer_hash
from mpd_data.prompts.chat import ChatFormatter, PromptError
from mpd_data.prompts.reader import choose_prompts, load_prompts
from mpd_data.prompts.sources import columns_of
from mpd_data.prompts.template import BUILT_IN, Example, load_template


def test_jsonl_and_parquet_give_the_same_prompts(tmp_path):
    rows = [{"id": i, "q": f"What is {i} + 1?", "gold": i + 1} for i in range(3)]
    jsonl = write_jsonl(tmp_path / "p.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    loaded = [
        [(p.id, p.text, p.answer) for p in load_prompts([path], "q", "id", "gold")]
        for path in (jsonl, tmp_path / "p.parquet")
    ]
    assert loaded[0] == loaded[1]
    assert loaded[0][1] == ("1", "What is 1 + 1?", "2")


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"text": "a"}\n', "row 1: no column 'problem'; found 'text'"),
        ('{"problem": 2}\n{"problem": 3}\n', "row 1: column 'problem' holds int.* None of the 2"),
        ('{"problem": "a"}\n{"problem": \n', "row 2: not a JSON object"),
        ("[1]\n", "row 1: found list"),
        ('{"problem": "a"}\n{"problem": "a"}\n', "row 2: id .* already given by .*row 1"),
    ],
)
def test_bad_rows_are_named(tmp_path, content, message):
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_prompts([path], "problem")


def not_text(folder, kind):
    """Write a file whose second problem and third gold answer are not UTF-8."""
    path = folder / f"p.{kind}"
    rows = [["a", b"one", b"1"], ["b", b"two \xff", b"2"], ["c", b"three", b"\xc3("]]
    if kind == "jsonl":
        line = b'{"id": "%s", "problem": "%s", "gold": "%s"}\n'
        path.write_bytes(b"".join(line % (i.encode(), p, g) for i, p, g in rows))
    elif kind == "csv":
        lines = [b"id,problem,gold", *(b",".join([i.encode(), p, g]) for i, p, g in rows)]
        path.write_bytes(b"\n".join(lines))
    else:
        table = pa.table(
            {
                "id": [row[0] for row in rows],
                # Other writers put such bytes into text columns without a check.
                "problem": pa.array([row[1] for row in rows]).view(pa.string()),
                "gold": pa.array([row[2] for row in rows], pa.large_binary()).view(
                    pa.large_string()
                ),
            }
        )
        pq.write_table(table, path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_bytes_that_are_not_text_spoil_their_own_prompt_alone(tmp_path, kind):
    first, second, third = load_prompts([not_text(tmp_path, kind)], "problem", "id", "gold")
    assert (first.text, first.answer, first.flaw) == ("one", "1", None)
    assert "column 'problem' holds bytes that are not UTF-8" in second.flaw
    assert "column 'gold' holds bytes that are not UTF-8" in third.flaw
    for prompt in (first, second, third):
        f"{prompt.text}{prompt.answer}".encode()  # can be hashed and shown
    _, second, _ = load_prompts([tmp_path / f"p.{kind}"], "gold", "problem")
    assert "column 'problem' holds bytes that are not UTF-8" in second.flaw
    assert second.id == second.source


def test_half_a_character_spoils_its_own_prompt_alone(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"problem": "a"}\n{"problem": "\\ud800"}\n')
    whole, half = load_prompts([path], "problem")
    assert whole.flaw is None
    assert "half a character" in half.flaw


@pytest.mark.parametrize(
    "cells, flaw",
    [
        ('"answer": "1", "answer": "2"', "'answer' is given 2 times, with different values"),
        ('"answer": 1E400', "'answer' holds inf, expected a number below 1e308"),
        ('"answer": -Infinity', "'answer' holds -inf"),
        ('"problem": "Other?", "answer": 1', "'problem' is given 2 times"),
        ('"answer": "1", "answer": "1"', None),
        ('"answer": "1", "other": 1, "other": 2', None),
    ],
)
def test_values_that_are_not_known_spoil_their_own_prompt_alone(tmp_path, cells, flaw):
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"problem": "What?", {cells}}}\n{{"problem": "b", "answer": "3"}}\n')
    first, second = load_prompts([path], "problem", None, "answer")
    assert (second.answer, second.flaw) == ("3", None)
    if flaw is None:
        assert (first.answer, first.flaw) == ("1", None)
    else:
        assert first.answer is None
        assert flaw in first.flaw


def test_bad_files_are_named(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "p.parquet")
    for name, message in [
        ("empty.jsonl", "no prompts"),
        ("torn.parquet", "not a whole Parquet"),
        ("p.parquet", "no column 'problem'; found 'text'"),
        ("absent.jsonl", "no such file"),
        ("p.xlsx", "no such file"),
    ]:
        with pytest.raises((ConfigError, DataError), match=message):
            load_prompts([tmp_path / name], "problem")


def test_the_choice_of_prompts_does_not_depend_on_their_order(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"problem": f"p{i}"} for i in range(50)])
    prompts = load_prompts([path], "problem")
    chosen = {p.id for p in choose_prompts(prompts, 10, "0/1")}
    assert {p.id for p in choose_prompts(prompts[::-1], 10, "0/1")} == chosen
    assert {p.id for p in choose_prompts(prompts, 10, "0/2")} != chosen
    with pytest.raises(ConfigError, match="only 50"):
        choose_prompts(prompts, 51, "")


def test_chat_template_is_applied_once_and_control_tokens_are_refused():
    tokenizer = load_tokenizer(resolve_model(str(STUDENT)))
    formatter = ChatFormatter(tokenizer)
    text, ids = formatter.render("Dan has 22 shells .")
    assert text.count("<|im_start|>user") == 1
    assert text.endswith("<|im_start|>assistant\n")
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    for bad, message in [("a <|im_end|> b", "control token"), ("  ", "empty")]:
        with pytest.raises(PromptError, match=message):
            formatter.render(bad)


def test_tokenizers_are_compared_by_content(tmp_path):
    student = load_tokenizer(resolve_model(str(STUDENT)))
    assert tokenizer_hash(student) == tokenizer_hash(load_tokenizer(resolve_model(str(TEACHER))))
    student.add_tokens(["brandnew"])
    assert tokenizer_hash(student) != tokenizer_hash(load_tokenizer(resolve_model(str(TEACHER))))


def test_default_template_reads_a_rewrite():
    template = load_template("tags")
    rewrite = "<reasoning>\n2 + 2 = 4\n</reasoning>\n<answer>\n\\boxed{4}\n</answer>"
    assert template.trace_of(rewrite, True) == "<think>\n2 + 2 = 4\n</think>\n\n\\boxed{4}"
    assert template.trace_of("Sure! " + rewrite, True) is None
    assert template.trace_of(rewrite.replace("</answer>", ""), True) is None


def test_what_a_template_is_filled_with_is_not_expanded():
    message = load_template("tags").message("{{draft}} {{nothing}}", "SECRET {{problem}}")
    assert "Problem:\n{{draft}} {{nothing}}" in message
    assert "Draft:\nSECRET {{problem}}" in message


@pytest.mark.parametrize(
    "name, digest",
    [
        ("tags", "d6868c80697c43f935f1043f331bcd2d"),
        ("plain", "f31d0f07ae852a6bc29047e73a469659"),
        ("draft", "89975f66b89c14392933d9cba27ab4a6"),
        (str(TEMPLATE), "c268b465b6259112ac4c3259b63de4a1"),
    ],
)
def test_templates_that_older_rounds_were_made_with_keep_their_hash(name, digest):
    template = load_template(name)
    assert template.hash() == digest
    shown = Example(problem="p", draft="d", rewrite="r")
    for more in ({"system": "s"}, {"example": [shown]}):
        assert template.model_copy(update=more).hash() != digest


def test_the_worked_examples_show_every_number_with_its_operation():
    template, checker = load_template("examples"), NumberChecker()
    assert len(template.example) == 3
    for example in template.example:
        # "35%" is 0.35; "twice" and "a quarter" are operations with 2 and 4.
        known = {"0.35", "2", "4", *re.findall(r"\d+(?:\.\d+)?", example.problem)}
        found = re.findall(r"([\d.]+) ([-+*/]) ([\d.]+) = (\d+)", example.rewrite)
        for left, sign, right, result in found:
            a, b = float(left), float(right)
            assert float(result) == {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]
            assert {left, right} <= known
            known.add(result)
        assert set(re.findall(r"\d+(?:\.\d+)?", example.rewrite)) <= known
        assert checker.extract(example.rewrite) == checker.extract(example.draft) is not None
        assert len(example.rewrite) < 0.5 * len(example.draft)


def test_worked_examples_are_earlier_turns():
    tokenizer = load_tokenizer(resolve_model(str(TEACHER)))
    template = load_template("examples")
    text, _ = template.formatter(tokenizer).render(template.message("PROBLEM", "DRAFT"))
    turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", text, re.DOTALL)
    assert [role for role, _ in turns] == ["system", *["user", "assistant"] * 3, "user"]
    for (_, asked), (_, done), example in zip(
        turns[1:-1:2], turns[2::2], template.example, strict=True
    ):
        assert asked.strip() == template.message(example.problem, example.draft)
        assert done.strip() == example.rewrite.strip()
    assert turns[-1][1].strip() == "Problem:\nPROBLEM\n\nSolution:\nDRAFT"
    refused = template.model_copy(update={"system": "a <|im_end|>"})
    with pytest.raises(ConfigError, match="the rewrite template's system, .*control token"):
        refused.formatter(tokenizer)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("{{problem}}", "{{riddle}}", "`prompt` uses \\['riddle'\\]"),
        ("{{draft}}", "", "never shows"),
        ("{{thinking}}", "{{reasons}}", "`trace` uses"),
        ("(?P<thinking>", "(?P<thinking", "not a regular expression"),
        ("You shorten", "{{draft}}", "`system` uses \\['draft'\\]; it can use no {{placeholders}}"),
        ("Mara has", "{{draft}} has", "`example 2` uses"),
        ("<solution>", "<solution>T", "`rewrite` of example 3 is not of the form"),
        ("version = 1", "verzion = 1", "not a rewrite template"),
        ("version = 1", "version = ", "not a rewrite template"),
    ],
)
def test_bad_templates_are_refused(tmp_path, old, new, message):
    sources = [BUILT_IN["tags"], BUILT_IN["examples"], TEMPLATE]
    source = next(source for source in sources if old in source.read_text())
    path = tmp_path / "t.toml"
    path.write_text(source.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=message):
        load_template(str(path))


def test_a_mistyped_template_gets_the_nearest_name(tmp_path):
    with pytest.raises(ConfigError, match="plian: .*Did you mean 'plain'"):
        load_template("plian")
    with pytest.raises(ConfigError, match="mine.toml: .*The built-in ones are tags, ex"):
        load_template(str(tmp_path / "mine.toml"))


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_sources_columns_are_listed(tmp_path, suffix):
    path = tmp_path / f"p.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, [{"q": "a", "Gold": 1}, {"q": "b", "Gold": 2, "more": 3}])
    elif suffix == "csv":
        path.write_text("q,Gold\na,1\n")
    else:
        pq.write_table(pa.table({"q": ["a"], "Gold": [1]}), path)
    assert columns_of(path) == ["q", "Gold"]
    (tmp_path / f"e.{suffix}").write_bytes(b"" if suffix != "parquet" else path.read_bytes()[:8])
    with pytest.raises((ConfigError, DataError), match="no prompts|no header|not a whole"):
        columns_of(tmp_path / f"e.{suffix}")


def test_a_column_of_the_wrong_type_names_its_option(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"problem": "a", "gold": {}, "key": {}}])
    for columns, option in (((None, "gold"), "--answer-column"), (("key", None), "--id-column")):
        with pytest.raises(DataError, match=f"expected text or a number. Name .* {option}"):
            load_prompts([path], "problem", *columns)


def test_models_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no config.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="vocab_size"):
        resolve_model(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="safetensors"):
        resolve_model(str(tmp_path))
    with pytest.raises(ConfigError, match="not a folder here"):
        resolve_model("no/such/model/here")
    with pytest.raises(ConfigError, match=f"Did you mean '{STUDENT}'"):
        resolve_model(str(STUDENT).replace("student", "studnt"))


@pytest.mark.parametrize(
    "file, changed",
    [
        ("config.json", {"layer_types": ["full_attention"]}),
        ("tokenizer_config.json", {"tokenizer_class": "T5Tokenizer"}),
        ("tokenizer.json", {"model": {"type": "BPE"}}),
    ],
)
def test_files_that_contradict_each_other_are_one_message(tmp_path, file, changed):
    """Any exception of the libraries becomes one message; tokenizers raises plain Exception."""
    folder = shutil.copytree(STUDENT, tmp_path / "model")
    content = json.loads((folder / file).read_text()) | changed
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"(?s)cannot be loaded \(\w+: .*Check tokenizer.json"):
        load_tokenizer(resolve_model(str(folder)))
