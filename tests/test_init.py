"""`mpd-gen init`: what it guesses, how it splits, what it refuses, and that the file runs."""

import dataclasses
import json
import os
import shutil
import subprocess
import tomllib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import STUDENT, TEACHER, TEMPLATE, python, run, write_jsonl
from hub import Hub
from safetensors.torch import load_file, save_file

from mpd_data.common.errors import ConfigError, DataError, MPDError
from mpd_data.common.hashing import content_key
from mpd_data.common.machine import idle_cores, product_speeds, usable_cores
from mpd_data.common.models import resolve_model
from mpd_data.common.weights import skeleton
from mpd_data.config import InitConfig
from mpd_data.init.detect import held_out, look_at_models, plan_budget
from mpd_data.init.pipeline import run_init, toml_value
from mpd_data.prompts.reader import load_prompts
from mpd_data.prompts.template import load_template
from mpd_rounds.run.layout import Plan
from mpd_rounds.run.steps import load_pipeline


def rows(count, **more):
    return [
        {"id": f"p{i}", "problem": f"Dan has {i} shells .", "answer": str(i), **more}
        for i in range(count)
    ]


def made(folder, **changed):
    """The pipeline that init writes, through the real reader and planner."""
    settings = {"student": str(STUDENT), "teacher": str(TEACHER), **changed}
    notes = run_init(folder, InitConfig(**{k: str(v) for k, v in settings.items()}))
    pipeline = load_pipeline(folder / "pipeline.toml", ())
    assert len(Plan(pipeline, folder / "out").all_steps()) >= 5
    return pipeline, "\n".join(notes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """init on 60 prompts in a folder of an awkward name; other tests only read it."""
    home = tmp_path_factory.mktemp("init")
    prompts = write_jsonl(home / "p.jsonl", rows(60))
    folder = home / 'a "b" \\c é'
    return folder, made(folder, prompts=prompts)


def changed_model(source, out, tokenizer=None, template=None, **config):
    """A model folder, its configuration and tokenizer changed."""
    shutil.copytree(source, out)
    values = json.loads((out / "config.json").read_text()) | config
    (out / "config.json").write_text(json.dumps(values))
    if tokenizer:
        text = (out / "tokenizer.json").read_text()
        assert tokenizer[0] in text
        (out / "tokenizer.json").write_text(text.replace(*tokenizer))
    if template:
        with (out / "chat_template.jinja").open("a") as file:
            file.write(template)
    return out


def with_weights_of_its_config(folder):
    """A model folder with weights of the shapes that its configuration gives, without content: the
    file has holes and takes no room."""
    header, end = {}, 0
    model = skeleton(resolve_model(str(folder), weights=False), False, None)
    for name, tensor in model.state_dict().items():
        begin, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": [*tensor.shape], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


# Of a model of some six billion weights.
SIZES = {
    "num_hidden_layers": 40, "hidden_size": 4096, "intermediate_size": 12_288, "head_dim": 128,
    "layer_types": ["full_attention"] * 40,
}  # fmt: skip


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A machine whose nvidia-smi names one GPU."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'NVIDIA X, 81559 MiB, 580.1'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")


# -- columns ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "columns, found",
    [
        (["problem", "answer", "id"], ("problem", "answer", "id")),
        (["Question", "Expected_Answer", "IDX"], ("Question", "Expected_Answer", "IDX")),
        # A solution is second to an answer, a text to a problem.
        (["solution", "text", "problem", "answer"], ("problem", "answer", None)),
        (["prompt", "solution", "unique_id", "idx"], ("prompt", "solution", "unique_id")),
        (["text"], ("text", None, None)),
    ],
)
def test_columns_are_found_by_their_usual_names(tmp_path, columns, found):
    path = write_jsonl(tmp_path / "p.jsonl", [{c: f"{c} {i}" for c in columns} for i in range(4)])
    pipeline, notes = made(tmp_path / "o", prompts=path)
    for section in (pipeline.rollouts, pipeline.evaluation[0].rollouts):
        names = tuple(section.get(f"{kind}_column") for kind in ("prompt", "answer", "id"))
        assert names == found
    assert f"problem {found[0]!r}" in notes


@pytest.mark.parametrize(
    "row, options, message",
    [
        ({"problem": "a", "question": "b"}, {}, "'problem', 'question' could each.*--prompt-col"),
        ({"problem": "a", "gold": "1", "answer": "2"}, {}, "'gold', 'answer'.*--answer-column"),
        ({"Problem": "a", "problem": "b"}, {}, "could each be meant"),
        ({"q": "a", "gold": "1"}, {}, "none of the columns 'q', 'gold'.*--prompt-column"),
        ({"problem": "a"}, {"prompt_column": "problme"}, "no column 'problme'.*mean 'problem'"),
        ({"problem": "a"}, {"answer_column": "gold"}, "found 'problem'. .*--answer-column"),
        ({"problem": "a", "x": None}, {"id_column": "x"}, "'x' is no id.*another --id-column"),
        ({"problem": ["a"]}, {}, "row 1: column 'problem' holds list.*--prompt-column"),
        ({"problem": "a", "label": {}}, {}, "'label' holds dict.*--answer-column"),
        ({"problem": "a"}, {"checker": "nunber"}, "Did you mean 'number'"),
        ({"problem": "a"}, {"test": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"problem": "a"}, {}, "only one problem.*--test"),
        ({"problem": "a <|im_end|>"}, {"test": "SAME"}, "chat templates of .* can lay out none"),
        ({"problem": "Dan " * 900}, {"test": "SAME"}, "row 1: the longest prompt leaves no room"),
        ({"problem": "a"}, {"test": "SAME", "teacher": "no/where"}, "no/where: not a folder"),
    ],
)
def test_what_cannot_be_told_is_refused_and_leaves_nothing(tmp_path, row, options, message):
    path = write_jsonl(tmp_path / "p.jsonl", [row])
    options = {k: path if v == "SAME" else v for k, v in options.items()}
    with pytest.raises((ConfigError, DataError), match=message):
        made(tmp_path / "o", prompts=path, **options)
    assert not (tmp_path / "o").exists()


def test_ids_that_do_not_tell_rows_apart_are_not_taken(tmp_path):
    """An `id` that counts within each subject is a common trap: the text's hash is the id then."""
    path = write_jsonl(tmp_path / "p.jsonl", [r | {"id": "1"} for r in rows(6)])
    pipeline, notes = made(tmp_path / "o", prompts=path)
    assert "id_column" not in pipeline.rollouts
    assert "'id' gives different problems one value" in notes
    with pytest.raises(ConfigError, match="column 'id' is no id: '1' is given to different"):
        made(tmp_path / "o2", prompts=path, id_column="id")


def test_test_prompts_may_have_columns_of_their_own(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"my": f"a {i}", "x": str(i)} for i in range(3)])
    test = write_jsonl(tmp_path / "t.jsonl", [{"question": q, "x": "1"} for q in ("A  1", "c")])
    out = tmp_path / "o"
    pipeline, notes = made(out, prompts=path, test=test, prompt_column="my", answer_column="x")
    measured = pipeline.evaluation[0].rollouts
    assert (measured["prompt_column"], measured["answer_column"]) == ("question", "x")
    assert measured["prompts"] == [str(test)]
    assert pipeline.rollouts["prompts"] == [str(path)]
    assert not (out / "train.jsonl").exists()
    assert "1 of the test problems are in the training prompts" in notes


def test_columns_are_those_that_are_named(tmp_path):
    """Also where others have the usual names."""
    usual = {"problem": "a", "answer": "1", "id": "i"}
    given = [{**usual, "text": f"b {i}", "gold": str(i), "key": f"k{i}"} for i in range(4)]
    path = write_jsonl(tmp_path / "p.jsonl", given)
    named = {"prompt_column": "text", "answer_column": "gold", "id_column": "key"}
    pipeline, _ = made(tmp_path / "o", prompts=path, **named)
    assert named.items() <= pipeline.rollouts.items()


# -- the split ----------------------------------------------------------------------------


@pytest.mark.parametrize("count, kept", [(2, 1), (30, 15), (60, 20), (1000, 50), (30_000, 500)])
def test_the_size_of_the_held_out_share(count, kept):
    texts = [f"p {i}" for i in range(count)]
    found = held_out(texts)
    assert len(found) == kept
    assert found == held_out(texts[::-1])
    # By hash: in the order of nothing that the texts have.
    assert found == set(sorted(texts, key=content_key)[:kept]) != set(sorted(texts)[:kept])


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_the_split_loses_nothing_and_shares_nothing(tmp_path, suffix):
    given = rows(50, level=3, note="ü\u2028")
    # The same problem in other spacing and case goes to the same side.
    given += [r | {"id": f"again{i}", "problem": r["problem"].replace("Dan", "DAN ")}
              for i, r in enumerate(given[:25])]  # fmt: skip
    path = tmp_path / f"p.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, given)
    elif suffix == "csv":
        given = [r | {"level": "3"} for r in given]
        lines = [",".join(f'"{v}"' for v in r.values()) for r in given]
        path.write_text("\n".join([",".join(given[0]), *lines]), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(given), path)
    made(tmp_path / "o", prompts=path)
    made(tmp_path / "o2", prompts=path)
    sides = []
    for name in ("train.jsonl", "test.jsonl"):
        content = (tmp_path / "o" / name).read_bytes()
        assert content == (tmp_path / "o2" / name).read_bytes()
        sides.append([json.loads(line) for line in content.decode().split("\n")[:-1]])
    train, test = sides
    assert sorted(train + test, key=lambda r: r["id"]) == sorted(given, key=lambda r: r["id"])
    problems = [{" ".join(r["problem"].lower().split()) for r in side} for side in sides]
    assert not problems[0] & problems[1]
    assert len(problems[1]) == 20


def test_a_row_that_lacks_a_key_is_left_out_of_the_split(tmp_path):
    given = rows(50)
    (lacking := dict(given[0])).pop("problem")
    path = write_jsonl(tmp_path / "p.jsonl", [lacking, *given[1:]])
    _, said = made(tmp_path / "o", prompts=path)
    names = ("train.jsonl", "test.jsonl")
    lines = [line for n in names for line in (tmp_path / "o" / n).read_text().splitlines()]
    assert sorted(json.loads(line)["id"] for line in lines) == sorted(r["id"] for r in given[1:])
    assert "1 rows cannot be used" in said, said


def test_doubled_problems_are_taken_once(tmp_path):
    given = [{"problem": r["problem"]} for r in rows(20)]
    path = write_jsonl(tmp_path / "p.jsonl", given + given)
    pipeline, _ = made(tmp_path / "o", prompts=path)
    for section in (pipeline.rollouts, pipeline.evaluation[0].rollouts):
        assert section["duplicates"] == "first"
        loaded = load_prompts(section["prompts"], "problem", duplicates="first")
        assert len(loaded) == section["num_prompts"] == 10


# -- models and machine -------------------------------------------------------------------


@pytest.mark.parametrize("context, draft, rewrite", [(40_960, 28_000, 10_000), (8192, 5600, 2000)])
def test_the_budget_fits_both_contexts(tmp_path, gpu, context, draft, rewrite):
    path = write_jsonl(tmp_path / "p.jsonl", rows(60))
    models = {
        "student": changed_model(STUDENT, tmp_path / "s", max_position_embeddings=context),
        "teacher": changed_model(TEACHER, tmp_path / "t", max_position_embeddings=2 * context),
    }
    # The teacher's larger context helps rewrites only as far as a draft is long.
    pipeline, _ = made(tmp_path / "wide", prompts=path, **models)
    if 2 * context <= 40_960:
        assert pipeline.rollouts["sampling"]["max_tokens"] < context
        assert pipeline.rewrite["sampling"]["max_tokens"] > rewrite
    models["teacher"] = changed_model(TEACHER, tmp_path / "t2", max_position_embeddings=context)
    pipeline, _ = made(tmp_path / "o", prompts=path, **models)
    found = [s["sampling"]["max_tokens"] for s in (pipeline.rollouts, pipeline.rewrite)]
    assert found == [draft, rewrite]
    assert sum(found) < context
    assert pipeline.train["pack_length"] >= rewrite
    assert "max_model_len" not in pipeline.rewrite["engine"]
    text = (tmp_path / "o" / "pipeline.toml").read_text()
    assert f"+ {draft:,} + {rewrite:,} (rewrite)" in " ".join(text.replace("# ", "").split())


def test_the_sentence_of_a_baseline_has_room_beside_the_longest_draft(tmp_path):
    """Whatever is left of the student's context by rounding."""
    path = write_jsonl(tmp_path / "p.jsonl", rows(4))
    names = {"student": str(STUDENT), "teacher": str(TEACHER), "prompts": str(path)}
    models, prompts = look_at_models(InitConfig(**names)), load_prompts([path], "problem")
    for context in range(300, 330):
        files = dataclasses.replace(models.student.files, context=context)
        student = dataclasses.replace(models.student, files=files)
        budget = plan_budget(dataclasses.replace(models, student=student), prompts)
        assert 250 < budget.prompt + budget.draft <= context - 16


def test_settings_for_a_gpu(tmp_path, gpu):
    path = write_jsonl(tmp_path / "p.jsonl", rows(60))
    pipeline, notes = made(tmp_path / "o", prompts=path)
    assert "NVIDIA X" in notes
    assert pipeline.rewrite["engine"] == {
        "dtype": "bfloat16", "max_num_seqs": 128, "max_num_batched_tokens": 2048,
        "gpu_memory_utilization": 0.8,
    }  # fmt: skip
    assert pipeline.train["lora"] == {"lora_r": 64, "lora_alpha": 128}
    assert pipeline.train["optimizer"] == {"learning_rate": 1e-4}
    assert pipeline.train["gradient_checkpointing"] is True
    assert pipeline.environment == {}
    assert pipeline.rollouts["num_prompts"] == 40


def test_memory_that_others_hold_on_a_gpu_is_left_to_them(tmp_path, gpu):
    says = "case $1 in *free*) echo '40780 MiB, 81559 MiB';; *) echo 'NVIDIA X';; esac"
    (tmp_path / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\n{says}\n")
    path = write_jsonl(tmp_path / "p.jsonl", rows(60))
    pipeline, _ = made(tmp_path / "o", prompts=path)
    for section in (pipeline.rollouts, pipeline.rewrite):
        assert section["engine"]["gpu_memory_utilization"] == 0.45


@pytest.mark.parametrize("faster", ["float32", "bfloat16"])
def test_precision_and_threads_are_the_machines(tmp_path, monkeypatch, faster):
    """bfloat16 where this CPU has products for it, and for models that are large enough to gain."""
    speeds = {"float32": 0.05, "bfloat16": 0.05}
    speeds[faster] = 0.15
    monkeypatch.setattr("mpd_data.init.pipeline.product_speeds", lambda: speeds)
    monkeypatch.setattr("mpd_data.init.pipeline.idle_cores", lambda: 7)
    path = write_jsonl(tmp_path / "p.jsonl", rows(60))
    pipeline, _ = made(tmp_path / "tiny", prompts=path)
    assert pipeline.rollouts["engine"]["dtype"] == "float32"
    assert pipeline.environment["OMP_NUM_THREADS"] == "1"
    assert "OMP_WAIT_POLICY" not in pipeline.environment
    teacher = with_weights_of_its_config(changed_model(TEACHER, tmp_path / "t", **SIZES))
    pipeline, _ = made(tmp_path / "large", prompts=path, teacher=teacher)
    for section in (pipeline.rollouts, pipeline.rewrite):
        assert section["engine"]["dtype"] == faster
    assert pipeline.train.get("dtype") == (None if faster == "float32" else "bfloat16")
    assert pipeline.environment["OMP_NUM_THREADS"] == "7"
    assert pipeline.environment["OMP_WAIT_POLICY"] == "PASSIVE"
    text = " ".join((tmp_path / "large" / "pipeline.toml").read_text().replace("# ", "").split())
    found = [f"{speeds[dtype]:.2f}" for dtype in ("float32", "bfloat16")]
    assert f"makes {found[0]} TFLOP/s in float32 and {found[1]} in bfloat16" in text


def test_what_the_machine_can_do_is_measured():
    speeds = product_speeds()
    assert set(speeds) == {"float32", "bfloat16"}
    assert all(0 < speed < 1000 for speed in speeds.values())
    assert 1 <= idle_cores() <= usable_cores() <= os.cpu_count()


def test_a_long_context_is_cut_on_a_cpu(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", rows(60))
    large = {"max_position_embeddings": 131_072}
    student = changed_model(STUDENT, tmp_path / "s", **large)
    teacher = with_weights_of_its_config(changed_model(TEACHER, tmp_path / "t", **SIZES, **large))
    pipeline, notes = made(tmp_path / "o", prompts=path, student=student, teacher=teacher)
    assert pipeline.rollouts["engine"]["max_model_len"] == 2048
    assert pipeline.rewrite["engine"]["max_model_len"] == 2048
    # 4 sequences x 2048 tokens x (2 x 40 layers x 4 heads x 128) x 4 bytes = 1.25 GiB
    assert pipeline.rewrite["engine"]["kv_cache_gib"] == 2.0
    assert "tags. `tags`, for a teacher of about 6." in notes


def test_small_teachers_get_examples_where_the_student_does_not_think(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", rows(60))
    renamed = ("</think>", "</thank>")
    models = {
        "student": changed_model(STUDENT, tmp_path / "s", renamed),
        "teacher": changed_model(TEACHER, tmp_path / "t", renamed),
    }
    pipeline, _ = made(tmp_path / "o", prompts=path, **models)
    rewrite = pipeline.rewrite
    # Its words are to be replaced, because the tokenizer cannot spell them: a copy is there.
    assert rewrite["template"] == str(tmp_path / "o" / "rewrite.toml")
    assert load_template(rewrite["template"]) == load_template("examples")
    # Its whole turn is the trace.
    assert rewrite["score_context"] == "rewrite"
    assert rewrite["filters"] == {"max_overlap": 0.9}
    assert pipeline.train["loss"]["divergence"] == "forward_kl"
    # Its own teacher: under its own prompt there is nothing to learn.
    pipeline, _ = made(tmp_path / "o1", prompts=path, **models | {"teacher": models["student"]})
    assert pipeline.rewrite["score_context"] == "rewrite"
    assert pipeline.train["loss"]["divergence"] == "reverse_kl"
    pipeline, notes = made(tmp_path / "o3", prompts=path, student=STUDENT, teacher=STUDENT)
    assert pipeline.rewrite["score_context"] == "problem"
    assert "is its own teacher" in notes
    pipeline, notes = made(tmp_path / "o2", prompts=path)
    assert "filters" not in pipeline.rewrite
    assert "`examples` cannot write the" in notes
    assert "cannot spell the words of the built-in templates" in notes
    assert pipeline.rewrite["template"] == str(tmp_path / "o2" / "rewrite.toml")
    assert load_template(pipeline.rewrite["template"]) == load_template("tags")
    # A chat template without a system message.
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    teacher = changed_model(models["teacher"], tmp_path / "t1", template=no_system)
    pipeline, notes = made(tmp_path / "o4", prompts=path, **models | {"teacher": teacher})
    assert load_template(pipeline.rewrite["template"]) == load_template("plain")
    assert "does not take the system message" in notes
    # Without the usual fields in its config, a model's files say its size.
    config = models["teacher"] / "config.json"
    config.write_text(config.read_text().replace('"hidden_size"', '"n_embd"'))
    with_weights_of_its_config(models["teacher"])
    pipeline, notes = made(tmp_path / "o5", prompts=path, **models)
    assert load_template(pipeline.rewrite["template"]) == load_template("examples")


def test_thinking_is_set_where_there_is_a_switch(tmp_path, whole):
    switch = "{% if enable_thinking is defined and not enable_thinking %}{% endif %}"
    path = write_jsonl(tmp_path / "p.jsonl", rows(60))
    student = changed_model(STUDENT, tmp_path / "s", template=switch)
    pipeline, _ = made(tmp_path / "o", prompts=path, student=student)
    assert pipeline.rollouts["thinking"] == pipeline.evaluation[0].rollouts["thinking"] == "on"
    assert [baseline.kind for baseline in pipeline.baseline] == ["no_thinking"]
    assert "thinking" not in pipeline.rewrite
    teacher = changed_model(TEACHER, tmp_path / "t", template=switch)
    pipeline, _ = made(tmp_path / "o2", prompts=path, teacher=teacher)
    assert "thinking" not in pipeline.rollouts
    assert pipeline.rewrite["thinking"] == "off"
    assert "thinking" not in whole[1][0].rollouts


def test_sampling_is_the_makers(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", rows(60))
    student = changed_model(STUDENT, tmp_path / "s")
    said = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    (student / "generation_config.json").write_text(json.dumps(said))
    pipeline, _ = made(tmp_path / "o", prompts=path, student=student)
    assert said.items() <= pipeline.rollouts["sampling"].items()


def test_different_tokenizers_are_refused(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", rows(60))
    teacher = changed_model(TEACHER, tmp_path / "t", ("shells", "shillings"))
    said = r"have different tokenizers \(.*; id \d+ is 'shillings' in one and 'shells' in the other"
    with pytest.raises(ConfigError, match=said):
        made(tmp_path / "o", prompts=path, teacher=teacher)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("of", ["student", "teacher"])
def test_a_model_that_is_not_whole_is_refused(tmp_path, of):
    path = write_jsonl(tmp_path / "p.jsonl", rows(60))
    model = changed_model({"student": STUDENT, "teacher": TEACHER}[of], tmp_path / "m")
    file = model / "model.safetensors"
    content, tensors = file.read_bytes(), load_file(file)
    save_file({f"module.{name}": tensor for name, tensor in tensors.items()}, file)
    with pytest.raises(ConfigError, match="behind a prefix, 'module.'"):
        made(tmp_path / "o", prompts=path, **{of: model})
    file.write_bytes(content[:-100])
    with pytest.raises(ConfigError, match="bytes, its header says"):
        made(tmp_path / "o", prompts=path, **{of: model})
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "golds, checker",
    [
        (["1", "-2.5", "$1,000"], "number"),
        (["so 3 + 4\n#### 7", "\\boxed{8}"], "number"),
        (["A", "(b)", "J."], "choice"),
        (["\\frac{1}{2}", "x^2 + 1", "3"], "math"),
        (["Paris", "3", "the Nile"], "text"),
        (["no", "up"], "text"),
        ([None, None], "text"),
    ],
)
def test_the_checker_is_found_by_the_gold_answers(tmp_path, golds, checker):
    given = [{"problem": f"p {i}", "answer": gold} for i, gold in enumerate(golds * 2)]
    path = write_jsonl(tmp_path / "p.jsonl", given)
    pipeline, notes = made(tmp_path / "o", prompts=path, test=path)
    assert pipeline.rollouts["checker"] == pipeline.evaluation[0].rollouts["checker"] == checker
    assert f"checker: {checker}. " in notes


def test_what_is_lost_without_gold_answers_is_said(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"text": f"p {i}"} for i in range(4)])
    pipeline, _ = made(tmp_path / "o", prompts=path, checker="math")
    assert "answer_column" not in pipeline.rollouts
    assert pipeline.rollouts["checker"] == "math"
    assert "accuracy cannot be measured" in (tmp_path / "o" / "pipeline.toml").read_text()


# -- the file -----------------------------------------------------------------------------


def test_awkward_names_come_back_from_the_file(whole, tmp_path):
    folder, (pipeline, _) = whole
    assert pipeline.name == folder.name
    assert pipeline.rollouts["prompts"] == [str(folder / "train.jsonl")]
    column = 'q"\\\n\t\x7f\x1b{{}} é \U0001f600'
    path = write_jsonl(tmp_path / "p.jsonl", [{column: "a"}, {column: "b"}])
    pipeline, notes = made(tmp_path / "o", prompts=path, prompt_column=column)
    assert pipeline.rollouts["prompt_column"] == column
    assert "\x1b" not in notes
    assert "\x1b" not in (tmp_path / "o" / "pipeline.toml").read_text()
    student = changed_model(STUDENT, tmp_path / "s\x1b\n", max_position_embeddings=900)
    pipeline, _ = made(tmp_path / "o\n\x1b", prompts=path, prompt_column=column, student=student)
    assert pipeline.student == str(student)
    assert "\x1b" not in (tmp_path / "o\n\x1b" / "pipeline.toml").read_text()
    for value in (column, ["", "a'b"], 1e-5, 0.0, True, 7):
        assert tomllib.loads(f"x = {toml_value(value)}")["x"] == value


def test_every_setting_has_its_reason(whole):
    lines = (whole[0] / "pipeline.toml").read_text().splitlines()
    settings = [i for i, line in enumerate(lines) if " = " in line and line[0] != "#"]
    assert len(settings) > 40
    for i in settings:
        assert lines[i - 1].startswith("# "), lines[i]
    # Commands are not broken, so that they can be copied.
    assert max(len(line) for line in lines if line[:1] == "#" and line[:4] != "#   ") <= 100


@pytest.mark.parametrize("name", ["pipeline.toml", "train.jsonl", "test.jsonl"])
def test_nothing_is_overwritten(tmp_path, name):
    """Nor the prompts themselves, where they lie in the folder under the split's name."""
    folder = tmp_path / "o"
    folder.mkdir()
    path = write_jsonl(folder / name, rows(60))
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=f"{name}: exists, and is not.*another folder, or remove"):
        made(folder, prompts=path if name != "pipeline.toml" else tmp_path / "p.jsonl")
    assert path.read_bytes() == before
    assert list(folder.iterdir()) == [path]


def test_ones_own_split_may_lie_in_the_folder(tmp_path):
    folder = tmp_path / "o"
    folder.mkdir()
    train = write_jsonl(folder / "train.jsonl", rows(4))
    test = write_jsonl(folder / "test.jsonl", [{"problem": "another"}])
    pipeline, _ = made(folder, prompts=train, test=test)
    assert pipeline.evaluation[0].rollouts["prompts"] == [str(test)]
    assert "answer_column" not in pipeline.evaluation[0].rollouts
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["pipeline.toml", "rewrite.toml", "test.jsonl", "train.jsonl"]


def test_job_scripts_are_written_when_asked_for(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", rows(60))
    made(tmp_path / "without", prompts=path)
    made(tmp_path / "with", prompts=path, slurm=True)
    scripts = ["mpd-gen.sbatch", "mpd-train.sbatch"]
    files = [path.name for path in (tmp_path / "without").iterdir()]
    assert sorted([*files, *scripts]) == sorted(p.name for p in (tmp_path / "with").iterdir())
    for name in scripts:
        subprocess.run(["bash", "-n", tmp_path / "with" / name], check=True)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", rows(4))
    with pytest.raises(MPDError, match="p.jsonl/o: cannot be written: Not a directory"):
        made(path / "o", prompts=path)


@pytest.mark.slow
def test_a_dataset_of_the_hub_needs_test_prompts(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        write_jsonl(data / f"{split}.jsonl", rows(30))
    source = "import sys; sys.argv[0] = 'mpd-gen'; from mpd_data.cli import main; main()"
    url = "hf://owner/sums?split="
    arguments = ["init", tmp_path / "o", "--student", STUDENT, "--teacher", TEACHER]
    arguments += ["--prompts", f"{url}train"]
    with Hub() as hub:
        hub.add("datasets", "owner/sums", data)

        def ask(*more, code=0):
            env = hub.environment(tmp_path / "home")
            return python(source, *arguments, *more, code=code, env=env)

        refused = ask(code=1)
        assert "--test, such as another of its splits (train, test)" in refused.stderr
        assert not (tmp_path / "o").exists()
        ask("--test", f"{url}test")
    pipeline = load_pipeline(tmp_path / "o" / "pipeline.toml", ())
    assert pipeline.rollouts["prompts"] == [f"{url}train"]
    assert pipeline.evaluation[0].rollouts["prompts"] == [f"{url}test"]
    assert pipeline.rollouts["id_column"] == "id"
    names = sorted(path.name for path in (tmp_path / "o").iterdir())
    assert names == ["pipeline.toml", "rewrite.toml"]


@pytest.mark.slow
def test_the_pipeline_runs(prompts, tmp_path):
    """With the real models; only what the pocket teacher was taught to read is set beside it."""
    folder = tmp_path / "my run"
    arguments = ["--student", STUDENT, "--teacher", TEACHER, "--prompts", prompts]
    said = run("mpd-gen", "init", folder, *arguments).stderr
    assert f"next: mpd-rounds '{folder}/pipeline.toml' --out '{folder}/out' --dry-run" in said
    settings = [f"rewrite.template={TEMPLATE}", "rollouts.num_prompts=12"]
    sets = [part for setting in settings for part in ("--set", setting)]
    run("mpd-rounds", folder / "pipeline.toml", "--out", folder / "out", *sets)
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert summary["base"]["problems"] == 20
    assert summary["base"]["accuracy"] > 0.3
    assert summary["final"]["samples"] == 40
    run("mpd-gen", "validate", folder / "out" / "data" / "round1")
