"""The Qwen2.5-Coder pipeline: the split, the parts of a model file, and what the teacher is shown.

The packages of the models have 1.6 GB and are never downloaded for a test.
"""

import json
import re

import polars as pl
import pytest
from click.testing import CliRunner
from conftest import ROOT

from mpd_data.checkers.builtin import NumberChecker
from mpd_data.common.errors import ConfigError
from mpd_data.prompts.template import load_template
from pipelines import gguf, gsm8k

FOLDER = ROOT / "pipelines" / "qwen2.5-coder"


def test_the_split_is_disjoint_and_does_not_change(tmp_path):
    source = tmp_path / "train.jsonl"
    lines = [
        {"question": f"What is {n} + 1?", "answer": f"It is.\n#### {n + 1:,}"} for n in range(1500)
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for out in ("first", "second"):
        done = CliRunner().invoke(gsm8k.main, [str(source), "--out", str(tmp_path / out)])
        assert done.exit_code == 0, done.output
    rows = {}
    for name, count in (("test", 500), ("validation", 300), ("train", 700)):
        text = (tmp_path / "first" / f"{name}.jsonl").read_text()
        assert text == (tmp_path / "second" / f"{name}.jsonl").read_text()
        rows[name] = [json.loads(line) for line in text.splitlines()]
        assert len(rows[name]) == count
    ids = [row["id"] for split in rows.values() for row in split]
    assert len(set(ids)) == len(ids) == 1500
    assert all(row["problem"] == f"What is {int(row['answer']) - 1} + 1?" for row in rows["train"])
    source.write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(ConfigError, match="1 problems, expected some thousands"):
        gsm8k.split(str(source))


def test_parts_are_joined_in_the_order_of_their_numbers(tmp_path):
    parts = []
    for number in (1, 2, 10, 9, 3, 4, 5, 6, 7, 8):
        part = tmp_path / f"model_part{number}" / "data" / f"part{number:02}.bin"
        part.parent.mkdir(parents=True)
        part.write_bytes(bytes([number]))
        parts.append(part)
    gguf.join(parts, tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == bytes(range(1, 11))
    with pytest.raises(ConfigError, match="no part 3 of the file"):
        gguf.join([part for part in parts if "part3/" not in str(part)], tmp_path / "whole")


def test_the_examples_calculate_what_they_state():
    checker = NumberChecker()
    template = load_template(str(FOLDER / "rewrite.toml"))
    for example in template.example:
        equations = re.findall(r"\\\((.+?) = (\d+)\\\)", example.rewrite)
        assert len(equations) >= 2
        for left, result in equations:
            sql = re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", r"\1/\2", left).replace(r"\times", "*")
            assert pl.select(pl.sql_expr(sql)).item() == int(result), left
        assert checker.extract(example.rewrite) == equations[-1][1]
        assert len(example.rewrite) < 0.5 * len(example.draft)
