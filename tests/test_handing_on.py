"""What others do with a round: open it with `datasets`, see it on the Hub."""

import json
import os
import shutil

import pytest
from conftest import (
    STUDENT,
    command,
    finish,
    python,
    rewrite_arguments,
    run,
    train_config,
    until_a_checkpoint,
)
from hub import Hub
from huggingface_hub import ModelCard

from mpd_data.common.hub import dataset_of
from mpd_data.inspect.stats import scan_round
from mpd_data.store.round import RoundDir
from mpd_data.store.schema import SCHEMAS
from mpd_train import train


def loaded(round_dir, tmp_path):
    """Return the number of rows and the columns that `datasets` finds by stage, and by default."""
    out = python(
        """
        import sys
        from datasets import load_dataset
        for name in (*sys.argv[2:], None):
            data = load_dataset(sys.argv[1], name, split="train")
            print(name, len(data), "|".join(data.column_names))
        """,
        round_dir,
        "rollouts",
        "distill",
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
    ).stdout
    rows = (line.split(" ", 2) for line in out.strip().splitlines())
    return {name: (int(count), columns.split("|")) for name, count, columns in rows}


def test_datasets_opens_each_stage_of_a_round(round_dir, tmp_path):
    found = loaded(round_dir, tmp_path)
    for stage in ("rollouts", "distill"):
        rows = scan_round(round_dir, stage).select("row_id").collect().height
        assert found[stage] == (rows, SCHEMAS[stage].names)
    assert found["None"] == found["distill"]
    card = (round_dir / "README.md").read_text()
    assert (
        "`student` sampled" in card and "by `teacher`" in card and "/" not in card.split("---")[2]
    )


def test_the_card_follows_the_stages_until_someone_changes_it(round_dir, tmp_path):
    copy = shutil.copytree(round_dir, tmp_path / "round")
    path = copy / "README.md"
    with RoundDir(copy).lock():
        RoundDir(copy).discard("distill")
    assert "config_name: distill" not in path.read_text()
    path.write_text(path.read_text() + "licence: mine\n")
    run("mpd-gen", *rewrite_arguments(copy), "--limit", "2")
    assert path.read_text().endswith("licence: mine\n")


@pytest.fixture
def hub(tmp_path):
    with Hub(tmp_path / "hub") as serving:
        yield serving


def pushed(hub, folder, name, *options, token=Hub.token, code=0):
    """Push `folder` as a user with `token`; return the command's result."""
    env = {**hub.environment(hub.uploads / "home"), "HF_TOKEN": token}
    return finish([*command("mpd-gen", "push", folder, name, *options)], code, env)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_round_is_pushed_as_a_private_dataset_and_opens_there(hub, round_dir, tmp_path):
    result = pushed(hub, round_dir, "team/round1")
    assert result.stdout.strip() == f"{hub.url}/datasets/team/round1"
    assert hub.private == {"datasets/team/round1": True}
    there = hub.uploads / "datasets" / "team" / "round1"
    here = contents(round_dir)
    found = contents(there)
    assert found == {name: here[name] for name in found}
    assert set(found) > {"README.md", "run.json", "rollouts.manifest.jsonl"}
    assert loaded(there, tmp_path) == loaded(round_dir, tmp_path)
    # A second push sends what is new to the repository that is there.
    pushed(hub, round_dir, "team/round1", "--public")
    assert hub.private == {"datasets/team/round1": True}


def test_a_model_is_pushed_whole(hub):
    pushed(hub, STUDENT, "team/student", "--public")
    assert hub.private == {"models/team/student": False}
    assert contents(hub.uploads / "models" / "team" / "student") == contents(STUDENT)


@pytest.mark.parametrize(
    ("source", "expected"),
    {
        "hf://team/sums?split=train": "team/sums",
        "hf://team/sums@main?split=train&config=main": "team/sums",
        "hf://datasets/team/sums/data/*.parquet": "team/sums",
        "hf://datasets/team/sums@1.0/train.jsonl": "team/sums",
        "hf://datasets/sums?split=train": "datasets/sums",
        "data/team/sums.jsonl": None,
        "s3://team/sums": None,
    }.items(),
)
def test_the_dataset_of_a_source(source, expected):
    assert dataset_of(source) == expected


def test_an_export_is_pushed_as_a_private_model(hub, round_dir, tmp_path):
    copy = shutil.copytree(round_dir, tmp_path / "round1")
    told = json.loads((copy / "run.json").read_text())
    sources = ["hf://team/sums?split=train", "more.jsonl", "hf://datasets/team/sums/b.jsonl"]
    told["stages"]["rollouts"]["details"]["config"]["prompts"] = sources
    (copy / "run.json").write_text(json.dumps(told))
    with until_a_checkpoint():
        train(train_config(copy, STUDENT, tmp_path / "run", save_steps=1))
    out = tmp_path / "out"
    words = ["mpd-export", tmp_path / "run", "--out", out, "--push-to-hub", "team/tried"]
    env = {**hub.environment(hub.uploads / "home"), "HF_TOKEN": Hub.token}
    assert finish(command(*words), env=env).stdout.strip() == f"{hub.url}/team/tried"
    assert hub.private == {"models/team/tried": True}
    assert contents(hub.uploads / "models" / "team" / "tried") == contents(out / "model")
    assert ModelCard.load(out / "model" / "README.md").data.datasets == ["team/sums"]


def test_who_may_not_write_is_told_how(hub, round_dir, tmp_path):
    refused = pushed(hub, round_dir, "team/round1", token="hf_another", code=1)
    assert "cannot be pushed to team/round1" in refused.stderr and "hf auth login" in refused.stderr
    assert "neither a round nor a model" in pushed(hub, tmp_path, "team/x", code=1).stderr
    assert not hub.private
