"""Rounds and trainings that an older version began are finished by this one, to the same result.

tests/data/recorded/README.md says how the folders were made.
"""

import hashlib
import json
import shutil

import pytest
from conftest import ROOT, STUDENT, TEACHER, TEMPLATE, rows, run
from golden import FIELDS

from mpd_data.inspect.stats import scan_round

RECORDED = ROOT / "tests" / "data" / "recorded"
ENGINE = ("--backend", "transformers", "--dtype", "float32", "--max-tokens", 200)
ENGINE += ("--rows-per-shard", 3)


def test_a_recorded_round_is_finished_with_the_same_rows(tmp_path):
    folder = tmp_path / "round"
    shutil.copytree(RECORDED / "begun", folder)
    committed = {
        path: hashlib.sha256(path.read_bytes()).digest() for path in folder.rglob("*.parquet")
    }
    sampling = ("--model", STUDENT, "--prompts", RECORDED / "prompts.jsonl", "--out", folder)
    columns = ("--id-column", "id", "--answer-column", "answer")
    run("mpd-gen", "rollouts", *ENGINE, *sampling, *columns, "-n", 2)
    rewriting = ("--teacher", TEACHER, "--template", TEMPLATE, "--shards", folder)
    scoring = ("--score-context", "rewrite", "--num-logprobs", 8)
    run("mpd-gen", "rewrite", *ENGINE, *rewriting, *scoring)

    for path, digest in committed.items():
        assert hashlib.sha256(path.read_bytes()).digest() == digest, path.name
    for stage in ("rollouts", "distill"):
        # The older shards lack columns that were added since.
        now = scan_round(folder, stage).sort("row_id").collect()
        then = rows(RECORDED / "round", stage)
        assert now.height == 6
        # Token ids are equal on any CPU. Another CPU changes a probability by about 1e-6, but here
        # each random number is at least 3e-4 away from the one where another token is sampled, and
        # the teacher's best token leads by at least 0.5 nats. Its log-probabilities may differ.
        exact = [name for name in then.columns if "logprobs" not in name and name != "topk_ids"]
        assert now.select(exact).equals(then.select(exact))


def test_a_recorded_training_goes_on_from_its_checkpoint(tmp_path):
    out = tmp_path / "training"
    shutil.copytree(RECORDED / "training", out)
    round_dir = shutil.copytree(RECORDED / "round", tmp_path / "round")
    done = (out / "metrics.jsonl").read_text(encoding="utf-8")
    run(
        "mpd-train", "--shards", round_dir, "--student", STUDENT, "--out", out,
        "--dtype", "float32", "--pack-length", 300, "--epochs", 4, "--save-steps", 3,
        "--lora-r", 1, "--lora-target-modules", "q_proj", "--learning-rate", 0.01,
    )  # fmt: skip
    text = (out / "metrics.jsonl").read_text(encoding="utf-8")
    assert text.startswith(done)  # with their seconds: the steps before the checkpoint did not run
    found, expected = (
        [json.loads(line) for line in lines.splitlines()]
        for lines in (text, (RECORDED / "curve.jsonl").read_text(encoding="utf-8"))
    )
    assert [step["step"] for step in found] == [step["step"] for step in expected]
    for now, then in zip(found, expected, strict=True):
        # The tolerance of test_golden.py.
        values = {name: then[name] for name in FIELDS}
        assert {name: now[name] for name in FIELDS} == pytest.approx(values, rel=1e-3, abs=1e-6)
    assert (out / "model" / "model.safetensors").is_file()
