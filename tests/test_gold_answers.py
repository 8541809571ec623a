"""Gold answers and missing values: what cells mean, what a checker cannot read, what is graded."""

import datetime
import decimal
import json
import uuid

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import STUDENT, invoke, rewrite_arguments, rollout_arguments, rows, write_jsonl

from mpd_data.checkers.builtin import CHECKERS, make_checker
from mpd_data.checkers.gold import read_gold_answers, unreadable_answers
from mpd_data.cli import cli
from mpd_data.common.errors import ConfigError, DataError
from mpd_data.common.hashing import content_key
from mpd_data.config import InitConfig, RolloutsConfig
from mpd_data.init.detect import read_prompt_set, split
from mpd_data.inspect.compare import compare, evaluate, show
from mpd_data.inspect.frontier import judge
from mpd_data.prompts.reader import load_prompts
from mpd_data.prompts.values import as_json, as_text, is_missing, short_floats, written
from mpd_data.rollouts import setup
from mpd_data.store.schema import ROLLOUT_SCHEMA, SCHEMA_VERSION
from mpd_data.store.shards import METADATA_KEY

# -- cells ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [None, "", " \t", float("nan"), decimal.Decimal("NaN"), "N/A", "n/a", " NaN", "#N/A",
              "<NA>", "null", "NULL", "\\N", []],
)  # fmt: skip
def test_these_are_missing(value):
    assert is_missing(value)
    assert as_text(value, "c", "--c", scalars=True) is None


@pytest.mark.parametrize("value", ["None", "none", "NA", "-", "?", "0", "nano", 0, False, 0.0, [0]])
def test_these_are_answers(value):
    assert not is_missing(value)
    assert as_text(value, "c", "--c", scalars=True) is not None


@pytest.mark.parametrize(
    "value, text",
    [
        (3, "3"),
        (2**60 + 1, "1152921504606846977"),
        (29.0, "29.0"),
        (decimal.Decimal("12.50"), "12.50"),
        (decimal.Decimal("1E+3"), "1000"),
        (True, "true"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (datetime.date(2024, 5, 1), "2024-05-01"),
        (
            datetime.datetime(
                2024, 5, 1, 12, tzinfo=datetime.timezone(datetime.timedelta(hours=2))
            ),
            "2024-05-01T12:00:00+02:00",
        ),
        (["7"], "7"),
        (b"\xc3\xbc", "ü"),
    ],
)
def test_what_is_no_text_becomes_text(value, text):
    assert as_text(value, "c", "--c", scalars=True) == text
    if not isinstance(value, list | int | float):
        assert as_json(value, "c") == text


def test_what_has_no_text_is_named():
    for value, message in (
        (["1", "2"], "column 'c' holds a list of 2 values"),
        ({"a": 1}, "column 'c' holds dict, expected text or a number.* --c"),
        (b"\xff", "column 'c' holds bytes that are not UTF-8"),
    ):
        with pytest.raises(DataError, match=message):
            as_text(value, "c", "--c", scalars=True)
    with pytest.raises(DataError, match="row 1: column 'c' holds object, not text"):
        as_json(object(), "p, row 1: column 'c'")


def test_narrow_floats_keep_their_decimals():
    for kind in (pa.float32(), pa.float16()):
        values = np.array([0.1, 3.0], kind.to_pandas_dtype())
        assert short_floats(pa.array([*values, None], kind)) == [0.1, 3.0, None]


MISSING = [("29", "29"), (None, None), ("", None), ("N/A", None), ("None", "None")]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_all_files_mean_the_same_by_a_missing_answer(tmp_path, kind):
    path = tmp_path / f"p.{kind}"
    given = [{"problem": f"p{i}", "answer": cell} for i, (cell, _) in enumerate(MISSING)]
    if kind == "jsonl":
        write_jsonl(path, given)
    elif kind == "csv":
        lines = [f"{row['problem']},{row['answer'] or ''}\n" for row in given]
        path.write_text("".join(["problem,answer\n", *lines]))
    else:
        pq.write_table(pa.Table.from_pylist(given), path)
    prompts = load_prompts([path], "problem", None, "answer", ["answer"])
    assert [p.answer for p in prompts] == [answer for _, answer in MISSING]
    assert [written(p.metadata)["answer"] for p in prompts] == [answer for _, answer in MISSING]


def test_columns_of_numbers_keep_their_value(tmp_path):
    columns = {
        "f32": pa.array([0.1, float("nan")], pa.float32()),
        "f64": pa.array([1e22, None], pa.float64()),
        "i": pa.array([2**53 + 1, None], pa.int64()),
        "d": pa.array([decimal.Decimal("12.50"), None], pa.decimal128(10, 2)),
    }
    pq.write_table(pa.table({"problem": ["a", "b"], **columns}), tmp_path / "p.parquet")
    number = make_checker("number")
    for name, gold in (("f32", "0.1"), ("f64", "10^22"), ("i", "9007199254740993"), ("d", "12.5")):
        first, second = load_prompts([tmp_path / "p.parquet"], "problem", None, name)
        assert number.equal(gold, first.answer), (name, first.answer)
        assert second.answer is None
    assert not number.equal("9007199254740992", "9007199254740993")


def test_a_row_that_cannot_be_used_costs_that_row(tmp_path):
    given = [
        {"id": 1, "problem": "a", "answer": "1"},
        {"id": None, "problem": "b", "answer": "2"},
        {"id": 3, "problem": float("nan"), "answer": "3"},
        {"id": 4, "problem": "d", "answer": ["4", "5"]},
        {"id": 5, "problem": " ", "answer": "6"},
    ]
    path = write_jsonl(tmp_path / "p.jsonl", given)
    prompts = load_prompts([path], "problem", "id", "answer")
    assert [p.flaw is None for p in prompts] == [True, False, False, False, False]
    assert [p.id for p in prompts if p.text != "b"] == ["1", "3", "4", "5"]
    assert "'id' holds nothing" in prompts[1].flaw and "--id-column" in prompts[1].flaw
    assert "'problem' holds nothing" in prompts[2].flaw == prompts[4].flaw
    assert "list of 2 values" in prompts[3].flaw


def test_several_rows_without_a_problem_stop_nothing(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"problem": p} for p in ("a", None, "", "N/A", None)])
    prompts = load_prompts([path], "problem")
    assert [p.flaw is None for p in prompts] == [True] + [False] * 4
    assert len({p.id for p in prompts}) == 5
    with pytest.raises(DataError, match="(?s)no row can.*row 1: column 'answer' holds nothing"):
        load_prompts(
            [write_jsonl(path, [{"problem": str(i), "answer": None} for i in range(5)])], "answer"
        )


def test_rounds_that_took_a_missing_answer_for_one_resume(tmp_path):
    """The identity of a round holds what older versions took for the gold answer."""
    for golds, old in (
        ([float("nan"), "N/A", " ", None, "3"], ["nan", "N/A", " ", "", "3"]),
        ([None] * 4 + ["3"], [""] * 4 + ["3"]),
    ):
        prepared = setup(config(tmp_path, golds), weights=False)
        pairs = zip(prepared.prompts, old, strict=True)
        then = sorted([p.id, p.text, gold, "{}"] for p, gold in pairs)
        assert prepared.identity["prompts"] == content_key(then)
        assert [p.answer for p in prepared.prompts] == [None] * 4 + ["3"]


def test_a_split_leaves_out_what_json_cannot_hold(tmp_path):
    columns = {"problem": ["a", "b"], "image": [{"bytes": b"\xff"}] * 2, "n": [1, None]}
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    source = str(tmp_path / "p.parquet")
    settings = InitConfig(student="s", teacher="t", prompts=source)
    train, test, files = split(read_prompt_set(source, settings, None), tmp_path)
    assert train.left_out == test.left_out == ("image",)
    written_rows = [json.loads(line) for line in "".join(files.values()).splitlines()]
    assert sorted(row["problem"] for row in written_rows) == ["a", "b"]
    assert all(row.keys() == {"problem", "n"} for row in written_rows)
    with pytest.raises(DataError, match="row 1: column 'image' holds bytes"):
        load_prompts([source], "problem", metadata_columns=["image"])


# -- what a checker cannot read --------------------------------------------------------------


@pytest.mark.parametrize(
    "name, readable, unreadable",
    [
        ("number", ["5", "1 1/2", "$1,234.50", "50%", "1e3"], ["x+1", "ten", "5 or 6", "1/0", "-"]),
        ("choice", ["B", "(c)", "\\textbf{(D)}"], ["None", "Paris", "7"]),
        ("math", ["x+1", "\\text{no solution}", "Paris"], ["9^{9^{9^{9}}}", "one two " * 9]),
        ("text", ["Paris", "-"], []),
        ("reasoning-gym", ["1 2\n3"], []),
    ],
)
def test_a_checker_says_what_it_can_read(name, readable, unreadable):
    checker = make_checker(name)
    assert [gold for gold in readable if not checker.can_read(gold)] == []
    assert [gold for gold in unreadable if checker.can_read(gold)] == []
    for gold in readable:  # what it can read is right where it is the answer
        assert name == "reasoning-gym" or checker.equal(gold, gold)
    assert set(CHECKERS) == {"number", "math", "text", "choice", "reasoning-gym"}


def config(tmp_path, golds, **changed):
    given = [{"problem": f"how many nuts ? {i}", "answer": g} for i, g in enumerate(golds)]
    path = write_jsonl(tmp_path / "p.jsonl", given)
    settings = {"model": str(STUDENT), "prompts": [str(path)], "answer_column": "answer"}
    return RolloutsConfig(out=tmp_path / "r", sampling={"max_tokens": 50}, **settings | changed)


def test_unreadable_gold_answers_are_named_before_the_first_sample(tmp_path, capsys):
    golds = ["1"] * 18 + ["x+1", "\\frac{x}{2}", None]
    message = r"number cannot read 2 of 20 gold answers \(10.0%\), such as 'x\+1' \(.*row 19\)"
    with pytest.raises(ConfigError, match=f"{message}.* More than --max-unreadable-answers 0.05"):
        setup(config(tmp_path, golds), weights=False)
    taken = config(tmp_path, golds, max_unreadable_answers=0.1)
    prepared = setup(taken, weights=False)
    assert "2 of 20" in unreadable_answers(prepared.prompts, "number")[1]
    assert setup(config(tmp_path, golds, checker="math"), weights=False).prompts
    words = ["--model", STUDENT, "--prompts", taken.prompts[0], "--answer-column", "answer"]
    words += ["--out", tmp_path / "r", "--max-tokens", 50, "--dry-run"]
    invoke(cli, "rollouts", *words, "--max-unreadable-answers", 0.1)
    assert "cannot read 2 of 20 gold answers" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="cannot read 2 of 20"):
        invoke(cli, "rollouts", *words)


OWN = """
from mpd_data.checkers import Checker

class Own(Checker):
    def equal(self, answer, gold):
        return answer == gold

class Picky:
    def extract(self, completion):
        return completion
    def equal(self, answer, gold):
        return answer == gold
    def can_read(self, gold):
        if gold == "raise":
            raise ValueError("no")
        return gold != "bad"
"""


def test_a_checker_of_ones_own_reads_all_unless_it_says_so(tmp_path, monkeypatch):
    (tmp_path / "own_checkers.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    path = write_jsonl(
        tmp_path / "p.jsonl", [{"problem": c, "answer": c} for c in ("good", "bad", "raise")]
    )
    prompts = load_prompts([path], "problem", None, "answer")
    own, picky = (make_checker(f"own_checkers:{name}") for name in ("Own", "Picky"))
    assert not any(p.unreadable for p in read_gold_answers(prompts, own, "own"))
    read = read_gold_answers(prompts[:2], picky, "picky")
    assert [p.unreadable for p in read] == [False, True]
    with pytest.raises(ConfigError, match="row 3: checker 'picky' raised ValueError: no .*'raise'"):
        read_gold_answers(prompts, picky, "picky")


def test_rows_without_a_gold_answer_are_neither_right_nor_wrong(prompts, tmp_path):
    given = [json.loads(line) for line in prompts.open()][:4]
    for row, gold in zip(
        given, (float(given[0]["answer"]), "N/A", float("nan"), "x+1"), strict=True
    ):
        row |= {"answer": gold, "family": "N/A"}
    path = write_jsonl(tmp_path / "p.jsonl", given)
    out = tmp_path / "r"
    small = {"--backend": "transformers", "-n": 1, "--temperature": 0}
    small["--max-unreadable-answers"] = 0.5
    assert invoke(cli, *rollout_arguments(path, out, **small)) == 0
    by_id = {row["prompt_id"]: row for row in rows(out).to_dicts()}
    known, *others = (by_id[row["id"]] for row in given)
    assert known["is_correct"] is not None and known["gold_answer"] == str(given[0]["answer"])
    assert [row["is_correct"] for row in others] == [None] * 3
    assert [row["gold_answer"] for row in others] == [None, None, "x+1"]
    assert json.loads(known["metadata"]) == {"family": None}
    assert invoke(cli, *rewrite_arguments(out, **{"--backend": "transformers"})) == 0
    found = [r for r in rows(out, "distill").to_dicts() if r["prompt_id"] != known["prompt_id"]]
    assert {row["is_correct"] for row in found} == {None}
    assert "incorrect" not in {row["status"] for row in found}


# -- what is graded --------------------------------------------------------------------------


def make(folder, rates, tokens):
    """Write a round: for each of `rates` a problem with two samples, right, wrong or (None) without
    a gold answer."""
    made = []
    for i, rate in enumerate(rates):
        for j in range(2):
            row = dict.fromkeys(ROLLOUT_SCHEMA.names)
            row |= {"row_id": f"{i}-{j}", "prompt_id": f"p{i:03}", "round": 0, "sample_idx": j}
            right = None if rate is None else j < 2 * rate
            row |= {"num_completion_tokens": tokens + i, "is_correct": right}
            row["metadata"] = json.dumps({"half": "first" if i < len(rates) // 2 else "second"})
            made.append(row | {"finish_reason": "stop"})
    metadata = {METADATA_KEY: json.dumps({"schema_version": SCHEMA_VERSION})}
    schema = pa.schema([field.with_nullable(True) for field in ROLLOUT_SCHEMA], metadata)
    (folder / "rollouts").mkdir(parents=True)
    pq.write_table(
        pa.Table.from_pylist(made, schema=schema), folder / "rollouts/part-00000.parquet"
    )
    return folder


def test_accuracy_is_that_of_the_problems_with_gold_answers(tmp_path):
    rates = [1, 1, 0.5, None, 0, 1, 1, 0.5, 0, 1, 1, 1]
    base = make(tmp_path / "base", rates, 100)
    new = make(tmp_path / "new", [1 if rate is not None else None for rate in rates], 50)
    side = evaluate(base)
    assert (side["problems"], side["graded"]) == (12, 11)
    assert side["accuracy"] == pytest.approx(8 / 11)
    assert side["mean_tokens"] == pytest.approx(105.5)
    result = compare(base, new, by="half")
    assert result["accuracy_difference"] == pytest.approx(3 / 11)
    low, high = result["accuracy_difference_interval"]
    assert low < 3 / 11 < high
    assert result["token_reduction"] == pytest.approx(50 / 105.5)
    assert result["hard_third"]["base"]["accuracy"] < 0.5
    first, second = result["groups"]
    assert (first["problems"], first["base"]["graded"], second["base"]["graded"]) == (6, 5, 6)
    assert first["base"]["accuracy"] == pytest.approx(3.5 / 5)
    assert first["accuracy_difference"] == pytest.approx(1.5 / 5)
    text = show(result, "half")
    assert "72.7%" in text and text.count("with gold answers") == 2
    judged = judge({"base": base}, {"model": new})
    assert judged["models"]["model"]["against"]["base"]["accuracy_difference"] > 0.2


def test_numbers_without_a_gap_are_what_they_were(tmp_path):
    rates = [1, 0.5, 0, 1, 0.5, 1]
    base, new = make(tmp_path / "a", rates, 100), make(tmp_path / "b", rates[::-1], 60)
    assert "with gold answers" not in show(compare(base, new), None)
    none = make(tmp_path / "c", [None] * 6, 100)
    side = evaluate(none)
    assert (side["graded"], side["accuracy"], side["accuracy_interval"]) == (0, None, None)
    result = compare(none, none)
    assert result["accuracy_difference"] is None and result["token_reduction"] == 0
    assert judge({"base": none}, {"model": none}) is None
