"""Evaluation prompts among training prompts: what is found, what is not, and by which command."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import run, write_jsonl

from mpd_data.inspect import contamination
from mpd_data.inspect.contamination import check_contamination

SHOP = "Natalia sold clips to 48 of her friends in April, and then half as many clips in May."
TALE = "One two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen."


def check(train, evaluation, n=13):
    return check_contamination(
        [(f"t{i}", text) for i, text in enumerate(train)],
        [(f"e{i}", text) for i, text in enumerate(evaluation)],
        n,
    )


def found(result):
    return [(m.evaluation_id, m.train_id, round(m.share, 3)) for m in result.matches]


def test_a_double_is_exact_but_for_spacing_and_case():
    result = check(["What is 2+2?", f"  {SHOP.upper()}\n"], [SHOP, "what is\n2+2?", "What is 2+3?"])
    assert (result.num_train, result.num_evaluation) == (2, 3)
    assert (result.exact, result.overlapping) == (2, 2)
    assert found(result) == [("e0", "t1", 1.0), ("e1", "t0", 1.0)]
    assert result.share == pytest.approx(2 / 3)


def test_punctuation_hides_an_exact_double_and_no_ngram():
    result = check([SHOP.replace(",", " --").replace(".", "!")], [SHOP])
    assert (result.exact, result.overlapping) == (0, 1)
    assert found(result) == [("e0", "t0", 1.0)]


def test_n_words_in_a_row_are_an_overlap_and_fewer_are_none():
    words = TALE.split()
    twelve, thirteen = " ".join(words[:12]), " ".join(words[2:])
    assert check([f"Count: {twelve} and stop."], [TALE]).overlapping == 0
    result = check([f"Count: {thirteen} And stop."], [TALE])
    assert (result.exact, result.overlapping) == (0, 1)
    # 15 words have three 13-grams, of which one stands there.
    assert found(result) == [("e0", "t0", 0.333)]
    assert result.matches[0].ngram == thirteen.lower().rstrip(".")
    assert check([f"Count: {twelve} and stop."], [TALE], n=8).overlapping == 1


def test_a_short_prompt_overlaps_only_where_it_is_exact():
    result = check(["Compute 3 + 4 and then 5 + 6.", "Compute 3 + 4."], ["Compute 3 + 4"])
    assert result.overlapping == 0
    result = check(["Compute 3 + 4 and then 5 + 6.", "compute 3 + 4"], ["Compute 3 + 4", SHOP])
    assert (result.exact, result.overlapping) == (1, 1)
    assert found(result) == [("e0", "t1", 1.0)]
    assert result.matches[0].ngram == "compute 3 4"


def test_ngrams_do_not_reach_from_one_prompt_into_the_next():
    words = SHOP.split()
    assert check([" ".join(words[:9]), " ".join(words[9:])], [SHOP]).overlapping == 0
    assert check([SHOP], [" ".join(words[:9]), " ".join(words[9:])]).overlapping == 0


def test_the_training_prompt_that_holds_most_is_named_and_the_worst_come_first():
    start, more = " ".join(TALE.split()[:13]), " ".join(TALE.split()[:14])
    other = "a b c d e f g h i j k l m n o p q r s t"
    train = [start, f"{more} {more}", start, " ".join(other.split()[:19])]
    result = check(train, [SHOP, TALE, other])
    # What a training prompt says twice counts once.
    assert found(result) == [("e2", "t3", 0.875), ("e1", "t1", 0.667)]
    # Two that hold a part each are no one that holds both.
    assert found(check([start, " ".join(TALE.split()[2:])], [TALE])) == [("e0", "t0", 0.333)]


def test_hashes_that_collide_report_nothing(monkeypatch):
    hashes_of = contamination._ngram_hashes

    def colliding(texts, n):
        hashes, owner, place = hashes_of(texts, n)
        return np.zeros_like(hashes), owner, place

    monkeypatch.setattr(contamination, "_ngram_hashes", colliding)
    assert check([TALE], [SHOP]).overlapping == 0
    assert found(check([SHOP, TALE], [TALE])) == [("e0", "t1", 1.0)]


def test_training_prompts_are_read_as_a_stream():
    """More than are looked up together, from an iterator that can be read once."""
    texts = (TALE if i == 3000 else f"problem {i}" for i in range(5000))
    result = check_contamination(((str(i), t) for i, t in enumerate(texts)), [("e", TALE)])
    assert result.num_train == 5000
    assert found(result) == [("e", "3000", 1.0)]


def test_the_command_reports_what_it_found(tmp_path):
    train = write_jsonl(tmp_path / "a.jsonl", [{"q": "no", "uid": 1}, {"q": SHOP, "uid": 2}])
    more = write_jsonl(tmp_path / "b.jsonl", [{"q": " ".join(TALE.split()[:10]), "uid": 3}])
    test = tmp_path / "test.parquet"
    pq.write_table(pa.table({"text": [TALE, SHOP, "no"], "name": ["x", "y", "z"]}), test)
    other = tmp_path / "other.csv"
    other.write_text("text,name\nyes,w\n", encoding="utf-8")
    given = ["--prompts", train, more, "--against", test, "--against", other]
    columns = ["--prompt-column", "q", "--against-prompt-column", "text"]
    names = ["--id-column", "uid", "--against-id-column", "name"]

    said = run("mpd-gen", "contamination", *given, *columns, *names, "--json").stdout
    assert json.loads(said) == {
        "n": 13,
        "num_train": 3,
        "num_evaluation": 4,
        "exact": 2,
        "overlapping": 2,
        "matches": [
            {
                "evaluation_id": "y",
                "train_id": "2",
                "share": 1.0,
                "ngram": "natalia sold clips to 48 of her friends in april and then half",
            },
            {"evaluation_id": "z", "train_id": "1", "share": 1.0, "ngram": "no"},
        ],
    }
    table = run("mpd-gen", "contamination", *given, *columns, "--n", 10).stdout
    assert "75.0%" in table
    assert f"{test}, row 1  {more}, row 1" in table
    run("mpd-gen", "contamination", *given, *columns, "--fail-above", 0.5)
    failed = run("mpd-gen", "contamination", *given, *columns, "--fail-above", 0.49, code=1)
    assert "2 of 4 evaluation prompts overlap" in failed.stderr


def test_the_evaluation_has_the_training_columns_unless_told(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", [{"q": SHOP}])
    test = write_jsonl(tmp_path / "test.jsonl", [{"q": SHOP}])
    given = ["--prompts", train, "--against", test]
    assert "100.0%" in run("mpd-gen", "contamination", *given, "--prompt-column", "q").stdout
    refused = run("mpd-gen", "contamination", *given, code=1).stderr
    assert "no column 'problem'" in refused
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    given = ["--prompts", train, "--against", empty, "--prompt-column", "q"]
    assert "empty.jsonl: no prompts" in run("mpd-gen", "contamination", *given, code=1).stderr
