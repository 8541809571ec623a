"""Prompts, answers and templates: which inputs are accepted, and the messages for the others."""

import gzip
import io
import json
import os
import re
import shutil
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import STUDENT, TEACHER, TEMPLATE, write_jsonl
from tokenizers import pre_tokenizers

from mpd_data.checkers.builtin import NumberChecker
from mpd_data.common.errors import ConfigError, DataError
from mpd_data.common.files import read_json, read_json_lines
from mpd_data.common.hashing import content_key
from mpd_data.common.models import load_tokenizer, resolve_model, tokenizer_hash
from mpd_data.config import RolloutsConfig, SamplingConfig
from mpd_data.inspect.status import round_status
from mpd_data.prompts.chat import ChatFormatter, PromptError
from mpd_data.prompts.reader import choose_prompts, load_prompts
from mpd_data.prompts.sources import columns_of
from mpd_data.prompts.template import BUILT_IN, Example, load_template
from mpd_data.rollouts import setup
from mpd_data.store.manifest import read_manifest
from mpd_data.store.run_record import kind_of


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
        ('{"text": "a"}\n', "p.jsonl: no column 'problem'; found 'text'"),
        (
            '{"problem": 2}\n{"problem": 3}\n',
            "(?s)no row can be used.*row 1: column 'problem' holds int.*row 2: ",
        ),
        ('{"problem": \n{"problem": \n', "row 1: not a JSON object"),
        ("[1]\n", "row 1: found int"),
        ("[1]\n[2]\n", "row 1: found list"),
        ('[{"problem": "a"},\n', "not a whole one"),
        ('{\n "problem": "a"\n}\n', "several lines.*jq -c"),
        ('{"problem": "a", "problem": "b"}\n', "the key 'problem' twice"),
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
    assert second.id != "two"


def test_half_a_character_spoils_its_own_prompt_alone(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"problem": "a"}\n{"problem": "\\ud800"}\n')
    whole, half = load_prompts([path], "problem")
    assert whole.flaw is None
    assert "half a character" in half.flaw


@pytest.mark.parametrize(
    "cells, flaw",
    [
        ('"answer": "1", "answer": "2"', "the key 'answer' twice"),
        ('"answer": 1E400', "'answer' holds inf, expected a number below 1e308"),
        ('"answer": -Infinity', "'answer' holds -inf"),
        ('"problem": "Other?", "answer": 1', "the key 'problem' twice"),
    ],
)
def test_values_that_are_not_known_spoil_their_own_prompt_alone(tmp_path, cells, flaw):
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"problem": "What?", {cells}}}\n{{"problem": "b", "answer": "3"}}\n')
    good, bad = sorted(load_prompts([path], "problem", None, "answer"), key=lambda p: p.flaw or "")
    assert (good.answer, good.flaw, bad.answer) == ("3", None, None)
    assert flaw in bad.flaw


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
    with pytest.raises(ConfigError, match=f"--num-prompts 51: only 50 prompts in {path}. Lower"):
        choose_prompts(prompts, 51, "")


def test_each_round_has_prompts_of_its_own(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"problem": f"{i} + 1"} for i in range(50)])

    def chosen(round_):
        config = RolloutsConfig(
            model=str(STUDENT), prompts=[str(path)], out=tmp_path / "out", num_prompts=10,
            round=round_, sampling=SamplingConfig(max_tokens=20),
        )  # fmt: skip
        return {prompt.id for prompt in setup(config, weights=False).prompts}

    assert chosen(1) == chosen(1) != chosen(2)


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
    divides = load_tokenizer(resolve_model(str(STUDENT)))
    divides.backend_tokenizer.pre_tokenizer = pre_tokenizers.Digits(individual_digits=True)
    assert tokenizer_hash(student) != tokenizer_hash(divides)
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
        ("version = 1", "verzion = 1", "verzion: unknown setting. Did you mean 'version'"),
        ("version = 1", "version = ", "not TOML"),
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
        write_jsonl(path, [{"q": "a"}, {"q": "b", "Gold": 2}])
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
    with pytest.raises(ConfigError, match=r"no config.json .*tokenizer.json\)\.$"):
        resolve_model(str(tmp_path))
    (tmp_path / "round1").mkdir()
    (tmp_path / "round1" / "model").symlink_to(STUDENT)
    with pytest.raises(ConfigError, match=f"Did you mean '{tmp_path}/round1/model'?"):
        resolve_model(str(tmp_path / "round1"), weights=False)
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


# -- files as people have them --------------------------------------------------------------------

ROWS = [{"id": f"i{n}", "problem": f"p{n} ü", "gold": str(n)} for n in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
TABLE = "id,problem,gold\n" + "".join(f"{r['id']},{r['problem']},{r['gold']}\n" for r in ROWS)
BOM = b"\xef\xbb\xbf"
FILES = {
    "plain.jsonl": LINES,
    "mark.jsonl": BOM + LINES,
    "windows.ndjson": LINES.replace(b"\n", b"\r\n"),
    "blank.jsonl": b"\n\n" + LINES.replace(b"\n", b"\n\n"),
    "array.json": b" " + json.dumps(ROWS, indent=1).encode(),
    "array_mark.json": BOM + json.dumps(ROWS).encode(),
    "gz.jsonl.gz": gzip.compress(LINES),
    "two_members.jsonl.gz": gzip.compress(LINES[:30]) + gzip.compress(LINES[30:]),
    "named_plainly.jsonl": gzip.compress(LINES),
    "zst.jsonl.zst": pa.compress(LINES, codec="zstd", asbytes=True),
    "array.json.zst": pa.compress(json.dumps(ROWS).encode(), codec="zstd", asbytes=True),
    "mark.csv": BOM + TABLE.encode(),
    "gz.csv.gz": gzip.compress(BOM + TABLE.encode()),
    "tabs.tsv": TABLE.replace(",", "\t").encode(),
}


def prompts_of(source):
    return [(p.id, p.text, p.answer) for p in load_prompts([source], "problem", "id", "gold")]


def test_every_form_of_a_file_gives_the_same_prompts(tmp_path):
    expected = [(row["id"], row["problem"], row["gold"]) for row in ROWS]
    for name, content in FILES.items():
        path = tmp_path / name
        path.write_bytes(content)
        assert prompts_of(path) == expected, name
        assert list(columns_of(path)) == ["id", "problem", "gold"], name


def test_folders_and_globs_are_read_in_order(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for number, row in enumerate(ROWS):
        folder = tmp_path / ("a" if number < 3 else "a/b")
        write_jsonl(folder / f"part-{number}.jsonl", [row])
    (tmp_path / "a" / "README.md").write_text("no prompts")
    (tmp_path / "a" / ".part-9.jsonl").write_text("{")
    texts = [row["problem"] for row in ROWS]
    assert [p[1] for p in prompts_of(tmp_path / "a")] == texts[:3]
    assert [p[1] for p in prompts_of(str(tmp_path / "**" / "*.jsonl"))] == texts[3:] + texts[:3]
    assert [p[1] for p in prompts_of(str(tmp_path / "a" / "part-[12].jsonl"))] == texts[1:3]
    (last,) = load_prompts([tmp_path / "a" / "b" / "part-4.jsonl"], "problem")
    assert last.source.endswith("part-4.jsonl, row 1")
    # A key that one file's rows lack is null there.
    write_jsonl(tmp_path / "a" / "part-0.jsonl", [{"id": "x", "problem": "no answer"}])
    assert prompts_of(tmp_path / "a")[0] == ("x", "no answer", None)


@pytest.mark.parametrize(
    "names, message",
    [
        ([], "a folder without prompts.*\\*\\*/\\*.jsonl"),
        (["a.jsonl", "b.csv"], "files of several kinds"),
        (["train-0.jsonl", "test.jsonl"], "training and test sets"),
    ],
)
def test_a_folder_that_is_not_one_set_is_refused(tmp_path, names, message):
    for name in names:
        (tmp_path / name).write_bytes(LINES)
    with pytest.raises(ConfigError, match=message):
        prompts_of(tmp_path)


def zipped(*names):
    """The bytes of a zip archive."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in names:
            archive.writestr(name, "<a/>")
    return content.getvalue()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("u16.csv", TABLE.encode("utf-16"), "UTF-16 text.*iconv"),
        ("u16.jsonl", LINES.decode().encode("utf-16-be"), "zero bytes"),
        ("u32.jsonl", LINES.decode().encode("utf-32"), "UTF-32"),
        ("torn.jsonl.gz", gzip.compress(LINES * 99, mtime=0)[:-20], "damaged"),
        ("torn.jsonl.zst", pa.compress(LINES * 9, codec="zstd", asbytes=True)[:-9], "damaged"),
        ("p.txt", LINES, r"prompts are read from .* files\.$"),
        ("p.xlsx", b"PK", "prompts are read from .*Save the sheet as .*CSV UTF-8"),
        ("book.csv", zipped("[Content_Types].xml", "xl/workbook.xml"), "Excel.*Save the sheet as"),
        ("old.csv", b"\xd0\xcf\x11\xe0\0\0", "Excel.*Save the sheet as"),
        ("zip.jsonl", zipped("p.jsonl"), "a zip archive.*Unpack it"),
        ("a.csv", b"Nr;Aufgabe\n1;a\n", "divided by semicolons, expected commas.*Save it as"),
        ("a.csv", b"Nr\tAufgabe\n1\ta\n", r"divided by tabs, expected commas. Name it \*.tsv"),
        ("a.csv", b"Nr|Aufgabe\n1|a\n", "divided by pipes, expected commas. Save it as"),
        ("a.tsv", b"Nr,Aufgabe\n1,a\n", r"divided by commas, expected tabs. Name it \*.csv"),
        ("a.csv", b"Nr,L\xf6sung\n1,a\n", r"column 'L\\xf6sung' holds bytes .*iconv -f WINDOWS"),
        ("a.jsonl", b'{"L\xf6sung": "a"}\n', r"column 'L\\xf6sung' holds bytes .*iconv"),
        ("a.jsonl", b'{"\\ud800": "a"}\n', "half a character. Write the character whole"),
        ("empty.jsonl", b"", "no prompts"),
        ("empty.json.gz", gzip.compress(b"", mtime=0), "no prompts"),
        ("empty.parquet", b"", "not a whole Parquet"),
        ("p.parquet", LINES, "not a whole Parquet"),
        ("p.jsonl", b"PAR1\0\0\0\0", "zero bytes"),
        ("deep.json", b"[" * 100_000, "not a whole one"),
    ],
)
def test_what_is_no_prompt_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    for read in (prompts_of, columns_of):
        with pytest.raises((ConfigError, DataError), match=f"{name}.*{message}"):
            read(tmp_path / name)


def test_a_column_with_a_delimiter_in_its_name_can_be_named(tmp_path):
    (tmp_path / "p.csv").write_text("a;b\nx\n")
    assert [p.text for p in load_prompts([tmp_path / "p.csv"], "a;b")] == ["x"]


def test_flaws_have_hints_that_are_no_part_of_ids(tmp_path):
    """Rounds that older versions began have the ids of flaws without hints."""
    path = tmp_path / "p.jsonl"
    lines = [
        b'{"problem": "whole"}', b'{"problem": "torn', b'{"problem": "torn",',
        b'{"problem": "a" 1}', b'{"problem": "\xff"}', b'{"problem": "\\ud800"}',
        b'{"problem": [{"role": "user", "content": "\xff"}]}',
    ]  # fmt: skip
    path.write_bytes(b"\n".join(lines) + b"\n")
    whole, torn, comma, wrong, byte, half, turn = load_prompts([path], "problem")
    assert whole.flaw is None
    for prompt in (torn, comma):
        bare, hint = prompt.flaw.split("). ")
        assert hint.startswith("The line ends inside an object or a text: was it cut short?")
        assert prompt.id == content_key(["unusable", f"{bare})"])
    assert "cut short" not in wrong.flaw
    assert "iconv -f WINDOWS-1252 -t UTF-8" in byte.flaw and "iconv" in turn.flaw
    assert "iconv" not in half.flaw and "Write the character whole" in half.flaw
    was = "column 'problem' holds bytes that are not UTF-8, or half a character"
    assert turn.id == content_key(["unusable", was])


def test_what_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "p.jsonl")
    with pytest.raises(ConfigError, match="neither a file nor a folder"):
        prompts_of(tmp_path / "p.jsonl")
    with pytest.raises(ConfigError, match=r"no such file.*a glob"):
        prompts_of(tmp_path / "*.csv")


def test_a_row_that_cannot_be_used_costs_itself_alone(tmp_path):
    lines = [
        '{"problem": "whole", "gold": "1"}', '{"problem": null, "gold": "2"}', '{"gold": "3"}',
        '{"problem": "torn', "[1]", '{"problem": "no answer"}', '{"problem": null, "gold": "2"}',
        '{"problem": ["x"]}',
    ]  # fmt: skip
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(lines))
    prompts = load_prompts([path], "problem", answer_column="gold")
    assert [(p.text, p.answer) for p in prompts[:2]] == [("whole", "1"), ("no answer", None)]
    assert all(p.flaw is None for p in prompts[:2])
    flaws = {int(p.source.rpartition(" ")[2]): p.flaw for p in prompts[2:]}
    assert len({p.id for p in prompts}) == len(lines)
    found = ["holds nothing", "holds nothing", "not a JSON object", "found list", "holds nothing"]
    for row, flaw in zip((2, 3, 4, 5, 7), found, strict=True):
        assert flaw in flaws[row]
    assert "holds list, expected text" in flaws[8]
    path.write_text("\n".join(lines[1:5]))
    with pytest.raises(DataError, match="(?s)no row can be used.*row 1: .*row 2: .*row 3: "):
        load_prompts([path], "problem", answer_column="gold")


def parquet(path, **columns):
    pq.write_table(pa.table({"problem": ["one", "two"], **columns}), path)
    return path


FAR = pa.array([3 * 10**14, 0], pa.timestamp("ms"))


@pytest.mark.parametrize(
    "column, reason",
    [
        (FAR, "column 'x' holds a value of the type timestamp"),
        (pa.array([0, None], pa.timestamp("us", "Mars/Base")), "timestamp"),
        (pa.array([{"d": 3 * 10**14}, {"d": 0}], pa.struct([("d", pa.timestamp("s"))])), "struct"),
        (pa.array([[b"\xff"], [b"a"]], pa.list_(pa.binary())).view(pa.list_(pa.string())), "list"),
        (pa.array([b"\x89PNG\xff", b"ok"]), "holds bytes"),
    ],
)
def test_a_cell_that_python_cannot_hold_costs_its_row_alone(tmp_path, column, reason):
    path = parquet(tmp_path / "p.parquet", x=column)
    by_row = sorted(load_prompts([path], "problem", metadata_columns=["x"]), key=lambda p: p.source)
    assert reason in by_row[0].flaw
    assert by_row[1].flaw is None
    assert [p.flaw for p in load_prompts([path], "problem")] == [None, None]


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pa.table([pa.array(["a"]), pa.array(["b"])], ["problem", "problem"])
    pq.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(DataError, match="p.parquet: names the column 'problem' 2 times"):
        load_prompts([tmp_path / "p.parquet"], "problem")


# -- conversations --------------------------------------------------------------------------------

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "1 + 1"}, {"type": "text", "text": "?"}]},
    {"role": "assistant", "content": "2", "tool_calls": None},
    {"role": "user", "content": "+ 3 ?"},
]
SHARED = [
    {"from": "system", "value": "Be brief."}, {"from": "human", "value": "1 + 1\n?"},
    {"from": "gpt", "value": "2"}, {"from": "human", "value": "+ 3 ?"},
    {"from": "gpt", "value": "5"},
]  # fmt: skip


def test_both_shapes_of_a_conversation_give_the_same_prompt(tmp_path, capsys):
    sources = [
        write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}]),
        write_jsonl(tmp_path / "b.jsonl", [{"messages": SHARED}]),
        tmp_path / "c.parquet",
    ]
    table = [{"messages": [turn | {"content": str(turn["value"])} for turn in SHARED]}]
    pq.write_table(pa.Table.from_pylist(table), sources[2])
    (ours,), (theirs,), (stored,) = (load_prompts([source], "messages") for source in sources)
    assert ours.message == theirs.message == stored.message == "+ 3 ?"
    earlier = (("system", "Be brief."), ("user", "1 + 1\n?"), ("assistant", "2"))
    assert ours.turns == theirs.turns == stored.turns == earlier
    assert ours.text == "User: 1 + 1\n?\n\nAssistant: 2\n\nUser: + 3 ?"
    assert ours.id == theirs.id == stored.id
    assert capsys.readouterr().err.count("1 conversations end with an answer") == 2
    formatter = ChatFormatter(load_tokenizer(resolve_model(str(STUDENT))), examples=[("e", "f")])
    text, ids = formatter.render(ours.message, ours.turns)
    order = [text.index(part) for part in ("Be brief.", "e<|", "f<|", "1 + 1", "2<|", "+ 3 ?")]
    assert order == sorted(order)
    assert text.endswith("assistant\n")
    assert ids == formatter.spelling.encode(text)


def test_a_single_message_is_the_prompt_that_its_text_is(tmp_path):
    chat = write_jsonl(tmp_path / "a.jsonl", [{"p": [{"role": "user", "content": "1 + 1"}]}])
    text = write_jsonl(tmp_path / "b.jsonl", [{"p": "1 + 1"}])
    (ours,), (theirs,) = load_prompts([chat], "p"), load_prompts([text], "p")
    assert (ours.id, ours.text, ours.message, ours.turns) == (theirs.id, "1 + 1", "1 + 1", ())
    other = [{"role": "system", "content": "x"}, {"role": "user", "content": "1 + 1"}]
    (spoken,) = load_prompts([write_jsonl(tmp_path / "c.jsonl", [{"p": other}])], "p")
    assert spoken.text == "1 + 1"
    assert spoken.id != ours.id


@pytest.mark.parametrize(
    "turns, message",
    [
        ([{"role": "assistant", "content": "a"}], "no turn is the user's"),
        ([{"role": "tool", "content": "a"}], "turn 1 has the role 'tool'"),
        ([{"content": "a"}], "the role None"),
        ([{"role": "user", "content": None}], "turn 1 holds nothing"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "part of the type 'image_url'"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "expected it fi"),
        ([{"role": "user", "content": "\ud800"}], "not UTF-8"),
        ([{"role": "user", "content": "a"}, "b"], "turn 2 is str"),
        (["a"], "holds list, expected text"),
    ],
)
def test_a_conversation_that_cannot_be_used_costs_its_row_alone(tmp_path, turns, message):
    rows = [{"m": turns}, {"m": [{"role": "user", "content": "whole"}]}]
    good, bad = load_prompts([write_jsonl(tmp_path / "p.jsonl", rows)], "m")
    assert (good.text, good.flaw) == ("whole", None)
    assert message in bad.flaw


def test_turns_that_a_template_cannot_take_are_refused():
    tokenizer = load_tokenizer(resolve_model(str(STUDENT)))
    system = (("system", "Be brief."),)
    with pytest.raises(PromptError, match="--system-prompt gives another"):
        ChatFormatter(tokenizer, system_prompt="Be long.").render("a", system)
    with pytest.raises(PromptError, match="control token"):
        ChatFormatter(tokenizer).render("a", (("user", "<|im_end|>"),))
    tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(PromptError, match="leaves out the system turn 'Be brief.'"):
        ChatFormatter(tokenizer).render("a", system)


# -- the other files of text ----------------------------------------------------------------------


GARBAGE = {
    "binary": b"\x89PNG\0\0\xff",
    "utf-16": '{"a": 1}\n'.encode("utf-16"),
    "latin-1": '{"ü": 1}\n'.encode("latin-1"),
    "torn": b'{"a": [1, {"b": \n',
    "list": b"[1, 2]\n",
    "number": b"3\n",
    "empty object": b"{}\n",
    "deep": b'{"a":' * 50_000 + b"\n",
    "words": b"hello\n",
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
def test_each_file_of_text_is_named_when_it_is_something_else(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    readers = [
        lambda: read_json(path, keys=["kind"]), lambda: read_json_lines(path, "Mend it.", ["kind"]),
        lambda: read_manifest(path), lambda: load_template(str(path)),
    ]  # fmt: skip
    for read in readers:
        with pytest.raises((ConfigError, DataError), match=str(path)):
            read()
    (tmp_path / "run.json").write_bytes(content)
    (tmp_path / ".status").mkdir()
    (tmp_path / ".status" / "rollouts-0-of-1.json").write_bytes(content)
    with pytest.raises((ConfigError, DataError), match=r"run\.json|\.status/rollouts-0-of-1"):
        round_status(tmp_path)
    if content != b"{}\n":
        with pytest.raises(DataError, match="run.json"):
            kind_of(tmp_path)


@pytest.mark.parametrize("record", [{"stages": 3}, {"stages": {"rollouts": {}}}, {"identity": 1}])
def test_a_record_of_another_shape_is_named(tmp_path, record):
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"run.json: (stages|identity).*found.*Restore it"):
        kind_of(tmp_path)


def test_a_byte_order_mark_is_passed_over(tmp_path):
    path = tmp_path / "t.toml"
    path.write_bytes(BOM + TEMPLATE.read_bytes())
    assert load_template(str(path)) == load_template(str(TEMPLATE))
    path.write_bytes(BOM + b'{"a": 1}\n')
    assert read_json(path) == {"a": 1}
    assert read_json_lines(path, "") == [{"a": 1}]
