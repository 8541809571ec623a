"""What others do with a round: open it with `datasets`, see it on the Hub."""

import json
import os
import re
import shutil

import pytest
from conftest import (
    STUDENT,
    command,
    edit_rows,
    finish,
    python,
    rewrite_arguments,
    rows,
    run,
    slow,
    train_config,
    until_a_checkpoint,
    with_adapter,
)
from hub import Hub
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mpd_data.common.hub import dataset_of
from mpd_data.common.models import resolve_model
from mpd_data.inspect.compare import evaluate
from mpd_data.inspect.stats import scan_round
from mpd_data.store.round import RoundDir
from mpd_data.store.schema import SCHEMAS
from mpd_train import train
from mpd_train.card import Trained, add_results, write_card

# The port of discard, where nothing listens.
NOBODY = "http://127.0.0.1:9"


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


@pytest.mark.slow
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


def pushed(hub, folder, name, *options, token=Hub.token, code=0, **env):
    """Push `folder` as a user with `token`; return the command's result."""
    env = {**hub.environment(hub.uploads / "home"), "HF_TOKEN": token, **env}
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


def changed_byte(round_dir, folder):
    copy = shutil.copytree(round_dir, folder)
    path = sorted((copy / "distill").iterdir())[0]
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)


def cut_short(_, folder):
    path = shutil.copytree(STUDENT, folder) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def with_a_prefix(_, folder):
    path = shutil.copytree(STUDENT, folder) / "model.safetensors"
    tensors = {f"_orig_mod.{name}": tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def without_its_base(_, folder):
    pytest.importorskip("peft")
    with_adapter(AutoModelForCausalLM.from_pretrained(STUDENT), ["q_proj"]).save_pretrained(folder)
    file = folder / "adapter_config.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps({**told, "base_model_name_or_path": str(folder / "nowhere")}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (changed_byte, "its bytes have changed(?s:.*)breaches of the contract"),
        (cut_short, "bytes, its header says"),
        slow(with_a_prefix, "behind a prefix, '_orig_mod.'"),
        slow(without_its_base, "is an adapter, and its base is not available"),
    ],
)
def test_what_is_damaged_is_not_pushed(hub, round_dir, tmp_path, damage, message):
    damage(round_dir, tmp_path / "damaged")
    said = pushed(hub, tmp_path / "damaged", "team/damaged", code=1)
    assert re.search(message, said.stdout + said.stderr)
    assert not hub.private


@pytest.mark.parametrize(
    ("env", "remedy"),
    [
        slow({"HF_HUB_OFFLINE": "1"}, "Unset HF_HUB_OFFLINE .*reached"),
        ({"HF_ENDPOINT": NOBODY}, f"network and that {NOBODY} .*try again"),
        slow({"HF_TOKEN": "hf_another"}, "Log in to http.* `hf auth login`"),
    ],
    ids=["offline", "no network", "no right"],
)
def test_the_remedy_fits_the_error_of_an_upload(hub, env, remedy):
    said = pushed(hub, STUDENT, "team/x", "--public", code=1, **env).stderr
    assert re.search(remedy, said)
    assert ("hf auth login" in said) == ("HF_TOKEN" in env)
    assert said.strip().endswith(f"Then: mpd-gen push {STUDENT} team/x --public")
    assert not hub.private


@pytest.mark.parametrize(
    ("name", "message"),
    [("mine", "Give OWNER/mine."), ("bad//x", "Give one of the form OWNER/NAME")],
)
def test_a_name_that_the_hub_cannot_have_is_said_first(tmp_path, name, message):
    for words in (
        ["mpd-gen", "push", tmp_path, name],
        ["mpd-export", tmp_path, "--out", tmp_path / "out", "--push-to-hub", name],
    ):
        assert message in run(*words, code=1).stderr


@pytest.mark.slow
def test_after_a_failed_upload_the_export_says_how_to_upload_it(hub, round_dir, tmp_path):
    with until_a_checkpoint():
        train(train_config(round_dir, STUDENT, tmp_path / "run", save_steps=1))
    out = tmp_path / "out"
    words = ["mpd-export", tmp_path / "run", "--out", out, "--push-to-hub", "team/tried"]
    env = {**hub.environment(hub.uploads / "home"), "HF_TOKEN": "hf_another"}
    failed = finish(command(*words), 1, env).stderr
    assert f"Then: mpd-gen push {out / 'model'} team/tried" in failed
    again = finish(command(*words), 1, env).stderr
    assert "overwrites nothing" in again and f"mpd-gen push {out / 'model'} OWNER/NAME" in again
    pushed(hub, out / "model", "team/tried")
    assert hub.private == {"models/team/tried": True}


def test_a_card_says_how_many_problems_its_accuracy_is_over(round_dir, tmp_path):
    copy, model = shutil.copytree(round_dir, tmp_path / "round"), tmp_path / "model"
    ids = sorted(set(rows(copy)["prompt_id"]))

    def forget(row):
        if row["prompt_id"] in ids[:2]:
            row["is_correct"] = None

    edit_rows(copy, "rollouts", forget)
    model.mkdir()
    config = train_config(round_dir, STUDENT, tmp_path / "run")
    write_card(model, resolve_model(str(STUDENT)), Trained(config, "mine"))
    found = {"test": evaluate(copy)}
    add_results(model, "mine", found, found)
    card = (model / "README.md").read_text()
    assert f"| test: {len(ids)}, {len(ids) - 2} with gold answers | accuracy | " in card
    assert "Accuracy is that of the problems with gold answers." in card


def test_a_card_has_the_prompt_and_results_that_come_twice_stand_once(round_dir, tmp_path):
    copy, model = shutil.copytree(round_dir, tmp_path / "round"), tmp_path / "model"
    told = json.loads((copy / "run.json").read_text())
    template = "# Task\n{{problem}}\n\n## Results\n\n```"
    told["stages"]["rollouts"]["details"]["config"] |= {
        "prompt_template": template,
        "system_prompt": "Be exact.",
    }
    (copy / "run.json").write_text(json.dumps(told))
    model.mkdir()
    config = train_config(copy, STUDENT, tmp_path / "run")
    write_card(model, resolve_model(str(STUDENT)), Trained(config, "mine"))
    found = {"test": evaluate(copy)}
    for name in ("first", "second"):
        add_results(model, name, found, found)
    text = (model / "README.md").read_text()
    assert "\n# second\n" in text and "first" not in text
    assert "System message:\n\n    Be exact.\n" in text
    shown = "    # Task\n    {{problem}}\n\n    ## Results\n\n    ```\n"
    assert f"User's message:\n\n{shown}" in text
    assert text.count("\n## Results\n") == 1


def test_who_may_not_write_is_told_how(hub, round_dir, tmp_path):
    refused = pushed(hub, round_dir, "team/round1", token="hf_another", code=1)
    assert "cannot be pushed to team/round1" in refused.stderr and "hf auth login" in refused.stderr
    assert "neither a round nor a model" in pushed(hub, tmp_path, "team/x", code=1).stderr
    assert not hub.private
