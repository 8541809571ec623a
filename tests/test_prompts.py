"""Prompts from CSV files and hub datasets, examples, and the chat templates that render them."""

import datetime
import json
import re
import sys
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import STUDENT, python, write_jsonl
from hub import Hub

from mpd_data.common.errors import ConfigError, DataError
from mpd_data.common.models import load_tokenizer, resolve_model
from mpd_data.prompts.chat import ChatFormatter, PromptError
from mpd_data.prompts.reader import fill_prompt, load_examples, load_prompts
from mpd_data.prompts.sources import HubSource
from mpd_data.prompts.thinking import thinking_switch

# Like Qwen3's: thinking is on unless the switch is false; thoughts of earlier turns are removed.
QWEN = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}{{- message.content.split('</think>')[-1] }}
{%- else %}{{- message.content }}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}"""
OFF = "<think>\n\n</think>\n\n"
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + QWEN
)


@pytest.fixture
def tokenizer():
    return load_tokenizer(resolve_model(str(STUDENT)))


@pytest.fixture
def qwen(tokenizer):
    tokenizer.chat_template = QWEN
    return tokenizer


def test_csv_gives_the_prompts_of_jsonl(tmp_path):
    rows = [
        {"id": "a", "q": 'Say "hi", then\nstop — ü', "gold": "007"},
        {"id": "b", "q": "2", "gold": None},
    ]
    path = tmp_path / "p.csv"
    path.write_bytes(
        '\ufeffid,other,q,gold\r\na,,"Say ""hi"", then\nstop — ü",007\r\n\r\nb,x,2,\r\n'.encode()
    )
    jsonl = write_jsonl(tmp_path / "p.jsonl", rows)
    loaded = [
        [(p.id, p.text, p.answer) for p in load_prompts([p], "q", "id", "gold")]
        for p in (path, jsonl)
    ]
    assert loaded[0] == loaded[1]
    assert loaded[0][0] == ("a", 'Say "hi", then\nstop — ü', "007")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"problem,x\nc\n", r"p.csv, row 1 \(line 2\): found 1 cells, expected 2"),
        (b"problem,x\na,b,c\n", "row 1 .*found 3 cells, expected 2"),
        (b'problem,x\n"a,b\n', "row 1 .*not CSV"),
        (b"", "no header"),
        (b"Problems,x\na,b\n", "no column 'problem'; .* Did you mean 'Problems'\\?"),
        (b"problem,problem\na,b\n", "names the column 'problem' 2 times"),
        (b"problem;x\na;b\n", "divided by semicolons.*Save it as.*with commas"),
        (b"problem,x\n,b\n", "row 1: column 'problem' holds nothing"),
    ],
)
def test_bad_csv_is_named(tmp_path, content, message):
    path = tmp_path / "p.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_prompts([path], "problem")


def test_metadata_is_json(tmp_path):
    day = datetime.date(2024, 5, 1)
    row = {"problem": "a", "n": 3, "day": day, "x": float("nan"), "l": [{"d": day}], "e": "no"}
    row["money"] = Decimal("1.50")
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "p.parquet")
    columns = ["n", "day", "x", "l", "money"]
    (prompt,) = load_prompts([tmp_path / "p.parquet"], "problem", metadata_columns=columns)
    day = "2024-05-01"
    assert prompt.metadata == {"n": 3, "day": day, "x": None, "l": [{"d": day}], "money": "1.50"}
    json.dumps(prompt.metadata, allow_nan=False)
    with pytest.raises(DataError, match="no column 'dya'; .*Did you mean 'day'"):
        load_prompts([tmp_path / "p.parquet"], "problem", metadata_columns=["dya"])
    pq.write_table(pa.table({"problem": ["a"], "b": [b"\xff"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="row 1: column 'b' holds bytes"):
        load_prompts([tmp_path / "b.parquet"], "problem", metadata_columns=["b"])


def test_the_first_of_doubles_can_be_kept(tmp_path):
    rows = [{"id": 1, "problem": "a"}, {"id": 2, "problem": "b"}, {"id": 1, "problem": "c"}]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    kept = load_prompts([path, path], "problem", "id", duplicates="first")
    assert [(p.id, p.text) for p in kept] == [("1", "a"), ("2", "b")]
    with pytest.raises(DataError, match="row 3: id '1' was already given by .*row 1"):
        load_prompts([path], "problem", "id")


def test_hub_addresses_are_read():
    url = "hf://o/n.a-me@refs/pr/1?split=train%5B:5%5D&config=c"
    assert HubSource.parse(url) == HubSource("o/n.a-me", "refs/pr/1", "train[:5]", "c")
    assert HubSource.parse("hf://o/n") == HubSource("o/n", None, None, None)


@pytest.mark.parametrize(
    "url, message",
    [
        ("hf://n?split=train", "expected hf://OWNER/NAME"),
        ("hf://o/n@?split=train", "expected hf://OWNER/NAME"),
        ("hf://o/n?splitt=train", "no setting 'splitt'\\. Did you mean 'split'"),
        ("hf://o/n?split=a&split=b", "give 'split' once"),
        ("hf://o/n?split=", "give 'split' once, with a value"),
    ],
)
def test_bad_hub_addresses_are_refused(url, message):
    with pytest.raises(ConfigError, match=message):
        load_prompts([url], "problem")


def test_without_the_datasets_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'mixed-policy-distillation\[hub\]'"):
        load_prompts(["hf://o/n?split=train"], "problem")


@pytest.mark.parametrize(
    "template, switch",
    [
        (QWEN, "enable_thinking"),
        (
            "{% if thinking is not defined %}{% set thinking = false %}{% endif %}{{ thinking }}",
            "thinking",
        ),
        ("{% set enable_thinking = enable_thinking | default(true) %}x", "enable_thinking"),
        (
            "{% generation %}{% if enable_thinking %}x{% endif %}{% endgeneration %}",
            "enable_thinking",
        ),
        ("{% generation %}<thinking>{{ m.thinking }}{{ 'thinking' }}{% endgeneration %}", None),
        ("<thinking> {{ message.thinking }} {{ 'enable_thinking' }}", None),
        ("{# enable_thinking #}{% set thinking = true %}{{ thinking }}", None),
    ],
)
def test_the_switch_for_thinking_is_found(template, switch):
    assert thinking_switch(template) == switch


def test_thinking_is_switched(qwen):
    def made(**settings):
        formatter = ChatFormatter(qwen, **settings)
        return formatter.thinking, formatter.render("1 + 1")[0].endswith(OFF)

    assert made() == (True, False)
    assert made(default_thinking=False) == (False, True)
    assert made(thinking="on", default_thinking=False) == (True, False)
    assert made(thinking="off") == (False, True)
    assert made(template_kwargs={"enable_thinking": False}) == (False, True)
    with pytest.raises(ConfigError, match="enable_thinking is set by --thinking on and"):
        made(thinking="on", template_kwargs={"enable_thinking": True})
    with pytest.raises(ConfigError, match="is 'no', expected true or false"):
        made(template_kwargs={"enable_thinking": "no"})


def test_a_template_without_a_switch_takes_auto_only(tokenizer):
    assert ChatFormatter(tokenizer, default_thinking=False).thinking is None
    for thinking in ("on", "off"):
        with pytest.raises(ConfigError, match=f"student: --thinking {thinking}, .*thinking auto"):
            ChatFormatter(tokenizer, thinking=thinking)


def test_system_prompt_and_examples_come_first_in_order(qwen):
    examples = [("1 + 1", "<think>x</think>2"), ("2 + 2", "4")]
    formatter = ChatFormatter(qwen, system_prompt="Be brief.", examples=examples)
    text, ids = formatter.render("3 + 3")
    turns = [("system", "Be brief."), ("user", "1 + 1"), ("assistant", "2")]
    turns += [("user", "2 + 2"), ("assistant", "4"), ("user", "3 + 3")]
    expected = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    assert text == expected + "<|im_start|>assistant\n"
    assert ids == qwen(text, add_special_tokens=False)["input_ids"]
    assert formatter.render("3 + 3")[0] == text


def test_turns_that_no_prompt_could_follow_are_refused_at_once(qwen):
    with pytest.raises(ConfigError, match="--system-prompt.*control token '<|im_end|>'"):
        ChatFormatter(qwen, system_prompt="a <|im_end|>")
    with pytest.raises(ConfigError, match="--examples.*control token"):
        ChatFormatter(qwen, examples=[("a", "<|im_start|>")])
    with pytest.raises(ConfigError, match="--system-prompt.*empty"):
        ChatFormatter(qwen, system_prompt=" ")
    with pytest.raises(PromptError, match="control token"):
        ChatFormatter(qwen).render("<|im_end|>")
    qwen.chat_template = NO_SYSTEM
    assert ChatFormatter(qwen).render("a")
    with pytest.raises(ConfigError, match="student: .*System role not supported.*prompt-template"):
        ChatFormatter(qwen, system_prompt="Be brief.")
    qwen.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(ConfigError, match="leaves out the system message 'Be brief.'"):
        ChatFormatter(qwen, system_prompt="Be brief.")


def test_prompt_templates_are_filled_once():
    assert fill_prompt("Q: {{problem}}\nA, {x}:", "{{problem}} {{y}}") == (
        "Q: {{problem}} {{y}}\nA, {x}:"
    )
    with pytest.raises(ConfigError, match=r"lacks \{\{problem\}\}"):
        fill_prompt("Q: {problem}", "a")
    with pytest.raises(ConfigError, match="uses \\['answer'\\]"):
        fill_prompt("{{problem}} {{answer}}", "a")


def test_examples_are_read_in_order(tmp_path):
    path = tmp_path / "e.csv"
    path.write_text("problem,solution\nb,2\na,1\n")
    assert load_examples(path, "problem", "solution") == [("b", "2"), ("a", "1")]
    with pytest.raises(DataError, match="no column 'solutions'; .*Did you mean 'solution'"):
        load_examples(path, "problem", "solutions")
    path.write_text("problem,solution\n")
    with pytest.raises(ConfigError, match="no examples"):
        load_examples(path, "problem", "solution")
    bad = write_jsonl(tmp_path / "e.jsonl", [{"problem": "a", "solution": 3}])
    with pytest.raises(DataError, match="row 1: column 'solution' holds int.*--examples-column"):
        load_examples(bad, "problem", "solution")


def test_a_dry_run_reads_no_weights_but_looks_for_them(tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((STUDENT / name).read_bytes())
    for weights in (True, False):
        with pytest.raises(ConfigError, match=r"no \*\.safetensors here"):
            resolve_model(str(tmp_path), weights=weights)
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "model.safetensors")  # cannot be read
    found = resolve_model(str(tmp_path), weights=False)
    assert found.version == "unhashed"
    assert found.vocab_size == resolve_model(str(STUDENT)).vocab_size
    # A server has the weights of what it runs.
    (tmp_path / "model.safetensors").unlink()
    assert resolve_model(str(tmp_path), weights=False, served="student").version != "unhashed"


LOAD = """
import dataclasses, json, sys
from mpd_data.common.errors import MPDError
from mpd_data.common.models import resolve_model
from mpd_data.prompts.reader import load_prompts
results = []
for kind, *arguments in json.loads(sys.argv[1]):
    try:
        if kind == "prompts":
            results.append([dataclasses.asdict(p) for p in load_prompts(*arguments)])
        else:
            files = resolve_model(arguments[0], arguments[1], weights=arguments[2])
            results.append([files.version, sorted(p.name for p in files.path.iterdir())])
    except MPDError as error:
        results.append(f"{type(error).__name__}: {error}")
print(json.dumps(results))
"""


def ask(hub, home, *calls, **environment):
    """Return the results of the calls, made in a process whose only hub is `hub`."""
    done = python(LOAD, json.dumps(calls), env=hub.environment(home) | environment)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Serves the pocket student and a dataset with two configs; its revision v2 has other rows."""
    with Hub() as hub:
        hub.add("models", "pocket/student", STUDENT)
        for revision, shift in (("main", 0), ("v2", 100)):
            folder = tmp_path_factory.mktemp("dataset")
            (folder / "data").mkdir()
            (folder / "README.md").write_text(
                "---\nconfigs:\n- config_name: easy\n  default: true\n  data_files:\n"
                "  - {split: train, path: data/easy.parquet}\n"
                "  - {split: test, path: data/easy-test.parquet}\n"
                "- config_name: hard\n  data_files:\n"
                "  - {split: train, path: data/hard.parquet}\n---\n"
            )
            for name, start in (("easy", shift), ("easy-test", shift + 50)):
                rows = [{"q": f"p{start + i}", "gold": start + i, "big": "x"} for i in range(3)]
                pq.write_table(pa.Table.from_pylist(rows), folder / "data" / f"{name}.parquet")
            hard = pa.Table.from_pylist([{"q": f"hard{shift}", "gold": "h"}])
            pq.write_table(hard, folder / "data" / "hard.parquet")
            hub.add("datasets", "owner/sums", folder, revision)
        # Without a README.md, `datasets` finds the split by the file's name.
        plain = tmp_path_factory.mktemp("plain")
        write_jsonl(plain / "train.jsonl", [{"q": "line 1", "gold": 1}, {"q": "line 2", "gold": 2}])
        hub.add("datasets", "owner/lines", plain)
        hub.add("datasets", "owner/gated", folder)
        hub.gated.add(("datasets", "owner/gated"))
        yield hub


def test_files_of_the_hub_are_read_by_the_addresses_of_other_libraries(hub, tmp_path):
    def load(path):
        return ["prompts", [f"hf://datasets/owner/{path}"], "q", None, "gold"]

    easy, v2, glob, deep, lines, none, gated, bad, split = ask(
        hub,
        tmp_path,
        load("sums/data/easy.parquet"),
        load("sums@v2/data/easy.parquet"),
        load("sums/data/*y*.parquet"),
        load("sums/**/hard.parquet"),
        load("lines/train.jsonl"),
        load("sums/data/*.csv"),
        load("gated/data/easy.parquet"),
        load("sums/data/absent.parquet"),
        load("sums?split=train"),
    )
    assert [(p["text"], p["answer"]) for p in easy] == [("p0", "0"), ("p1", "1"), ("p2", "2")]
    assert easy[1]["source"] == "hf://datasets/owner/sums/data/easy.parquet, row 2"
    assert [p["text"] for p in v2] == ["p100", "p101", "p102"]
    assert [p["text"] for p in glob] == ["p50", "p51", "p52", "p0", "p1", "p2"]
    assert [p["text"] for p in deep] == ["hard0"]
    assert [p["text"] for p in lines] == ["line 1", "line 2"]
    assert "no such file there" in none
    for refused in (gated, bad):
        assert "not to be had from the hub" in refused
    assert "expected hf://datasets/OWNER/NAME[@REVISION]/PATH" in split


def test_datasets_of_the_hub_are_read(hub, tmp_path):
    def load(query, *more):
        return ["prompts", [f"hf://owner/{query}"], *(more or ["q", None, "gold"])]

    train, test, hard, v2, lines, part = ask(
        hub,
        tmp_path,
        load("sums?split=train"),
        load("sums?split=test&config=easy"),
        load("sums?split=train&config=hard"),
        load("sums@v2?split=train"),
        load("lines?split=train"),
        load("sums?split=train[1:2]", "q", None, None, ["gold"]),
    )
    assert [(p["text"], p["answer"]) for p in train] == [("p0", "0"), ("p1", "1"), ("p2", "2")]
    assert train[1]["source"] == "hf://owner/sums?split=train, row 2"
    assert [p["text"] for p in test] == ["p50", "p51", "p52"]
    assert [(p["text"], p["answer"]) for p in hard] == [("hard0", "h")]
    assert [p["text"] for p in v2] == ["p100", "p101", "p102"]
    assert [(p["text"], p["answer"]) for p in lines] == [("line 1", "1"), ("line 2", "2")]
    assert [(p["text"], p["metadata"]) for p in part] == [("p1", {"gold": 1})]


def test_what_the_hub_does_not_give_is_said_in_one_line(hub, tmp_path):
    def load(query, column="q"):
        return ["prompts", [f"hf://owner/{query}"], column]

    calls = {
        "sums": "names no split.*The splits are train, test",
        "sums?split=dev": "not to be had from the hub .*dev",
        "sums?split=tset": r"not to be had from the hub .*Did you mean 'test'\?",
        "sums?split=trian[:2]": r"Did you mean 'train'\?",
        "sums?split=train&config=odd": "not to be had from the hub .*odd",
        "sums@v9?split=train": "not to be had from the hub .*v9",
        "absent?split=train": "not to be had from the hub .*absent",
        "gated?split=train": "not to be had from the hub .*gated",
    }
    results = ask(hub, tmp_path, *(load(query) for query in calls), load("sums?split=train", "p"))
    for message, expected in zip(results, calls.values(), strict=False):
        assert message.startswith("ConfigError: hf://owner/") and "\n" not in message, message
        assert re.search(expected, message), message
    assert re.match("DataError: hf://owner/sums.*no column 'p'", results[-1]), results[-1]


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_said_in_one_line(hub, tmp_path):
    call = ["prompts", ["hf://owner/sums?split=train"], "q"]
    (message,) = ask(hub, tmp_path, call, HF_ENDPOINT="http://127.0.0.1:9")
    assert message.startswith("ConfigError: hf://owner/sums?split=train: not to be had"), message


def test_models_of_the_hub_are_had_with_and_without_weights(hub, tmp_path):
    commit = hub.add("models", "pocket/student", STUDENT)
    hub.served.clear()
    (dry,) = ask(hub, tmp_path, ["model", "pocket/student", None, False])
    assert dry[0] == commit
    assert "tokenizer.json" in dry[1]
    assert "pocket/student/tokenizer.json" in hub.served
    assert "pocket/student/model.safetensors" not in hub.served
    whole_model = ["model", "pocket/student", None, True]
    (offline,) = ask(hub, tmp_path, whole_model, HF_HUB_OFFLINE="1")
    assert re.match("ConfigError: pocket/student: .*safetensors", offline), offline
    old = tmp_path / "pickled"
    old.mkdir()
    (old / "config.json").write_bytes((STUDENT / "config.json").read_bytes())
    (old / "pytorch_model.bin").write_bytes(b"")
    hub.add("models", "pocket/pickled", old)
    (pickled,) = ask(hub, tmp_path, ["model", "pocket/pickled", None, True])
    assert pickled.startswith("ConfigError: pocket/pickled: no *.safetensors"), pickled
    whole, absent, revision = ask(
        hub,
        tmp_path,
        whole_model,
        ["model", "pocket/absent", None, True],
        ["model", "pocket/student", "v9", True],
    )
    assert whole == [commit, sorted([*dry[1], "model.safetensors"])]
    assert absent.startswith("ConfigError: pocket/absent: not a folder here")
    assert revision.startswith("ConfigError: pocket/student: not a folder here")
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    (message,) = ask(hub, tmp_path / "other", whole_model, **nowhere)
    assert message.startswith("ConfigError: pocket/student: not a folder here"), message
