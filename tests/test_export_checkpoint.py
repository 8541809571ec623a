"""`mpd-export`: the model of a training that has not finished, and the training none the wiser."""

import json
import shutil
import signal

import pytest
import torch
from conftest import (
    STUDENT,
    invoke,
    logits,
    metrics_lines,
    run,
    saved_weights,
    started,
    train_config,
    until_a_checkpoint,
    weights,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpd_data.common.errors import ConfigError, DataError
from mpd_train import checkpoint
from mpd_train.export_cli import cli
from mpd_train.loop import train


def arguments(round_dir, student, out, *more):
    return [
        "--shards", round_dir, "--student", student, "--out", out, "--pack-length", 600,
        "--save-steps", 4, "--dtype", "float32", "--learning-rate", 1e-3, *more,
    ]  # fmt: skip


def stopped_after(steps, words, out):
    """A training that has done so many steps and stands still."""
    enough = lambda: len(metrics_lines(out)) >= steps  # noqa: E731
    process = started("mpd-train", *words, until=enough, fresh=True)
    process.send_signal(signal.SIGSTOP)
    return process


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def undisturbed(round_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run("mpd-train", *arguments(round_dir, STUDENT, out))
    return out


@pytest.mark.slow
def test_of_a_training_that_runs_is_killed_and_goes_on(undisturbed, round_dir, tmp_path):
    out, words = tmp_path / "run", arguments(round_dir, STUDENT, tmp_path / "run")
    process = stopped_after(6, words, out)
    before = files_of(out)
    # It lives, and holds its folder.
    said = run("mpd-export", out, "--out", tmp_path / "running").stderr
    chosen = checkpoint.checkpoints(out / "checkpoints")[-1]
    assert str(chosen) in said
    assert files_of(out) == before
    process.kill()
    process.wait()
    run("mpd-export", chosen, "--out", tmp_path / "killed")
    for name in ("running", "killed"):
        found, saved = weights(tmp_path / name), saved_weights(chosen)
        assert same(found, {name: weight.bfloat16() for name, weight in saved.items()})
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["model"]
    planned = json.loads((out / "run.json").read_text())["details"]["steps"]
    card = (tmp_path / "killed" / "model" / "README.md").read_text()
    assert "\n# killed\n" in card
    assert f"* Training: step {int(chosen.name[5:])} of {planned} planned, learning" in card
    # All that a finished run leaves, and loaded as it is.
    ours, theirs = tmp_path / "running" / "model", undisturbed / "model"
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    assert (ours / "config.json").read_text() == (theirs / "config.json").read_text()
    template = AutoTokenizer.from_pretrained(STUDENT).chat_template
    assert AutoTokenizer.from_pretrained(ours).chat_template == template
    start = load_file(STUDENT / "model.safetensors")
    assert not same(found, start)
    assert not same(found, weights(undisturbed))
    assert "resuming after step" in run("mpd-train", *words).stderr
    assert same(weights(out), weights(undisturbed))


@pytest.mark.slow
def test_of_adapters_the_adapter_and_the_merged_model(round_dir, exact_student, tmp_path):
    peft = pytest.importorskip("peft")
    out, lora = tmp_path / "run", ("--lora-r", 4, "--lora-dropout", 0.1)
    words = arguments(round_dir, exact_student, out, *lora)
    process = stopped_after(6, words, out)
    process.kill()
    process.wait()
    run("mpd-export", out, "--out", tmp_path / "exported")
    chosen = checkpoint.checkpoints(out / "checkpoints")[-1]
    exported = tmp_path / "exported"
    for name in ("adapter", "model"):
        card = (exported / name / "README.md").read_text()
        assert "\n# exported\n" in card and "* Adapters: LoRA of rank 4\n" in card
        assert f"* Training: step {int(chosen.name[5:])} of " in card
    saved = saved_weights(chosen)
    adapter = load_file(exported / "adapter" / "adapter_model.safetensors")
    assert adapter and same(
        adapter,
        {f"base_model.model.{name.replace('.default', '')}": x for name, x in saved.items()},
    )
    base = AutoModelForCausalLM.from_pretrained(exact_student)
    plain = logits(base)
    merged = peft.PeftModel.from_pretrained(base, exported / "adapter").merge_and_unload()
    found = logits(AutoModelForCausalLM.from_pretrained(exported / "model"))
    assert torch.equal(found, logits(merged))
    assert (found - plain).abs().max() > 0.01
    run("mpd-train", *words)
    run("mpd-train", *arguments(round_dir, exact_student, tmp_path / "one", *lora))
    assert same(weights(out), weights(tmp_path / "one"))


@pytest.fixture(scope="module")
def interrupted(round_dir, tmp_path_factory):
    """A run with a step's checkpoint and the best one's, on a student that lies beside it."""
    folder = tmp_path_factory.mktemp("interrupted")
    shutil.copytree(STUDENT, folder / "student")
    validation = {"validation_fraction": 0.2, "eval_steps": 2, "early_stopping_patience": 9}
    settings = {"save_steps": 4, "optimizer": {"learning_rate": 1e-3}, "validation": validation}
    with until_a_checkpoint():
        train(train_config(round_dir, folder / "student", folder / "run", **settings))
    return folder


def test_the_best_weights_too(interrupted, tmp_path):
    (best,) = (interrupted / "run" / "checkpoints").glob("best-*")
    assert invoke(cli, best, "--out", tmp_path / "out") == 0
    saved = {name: weight.bfloat16() for name, weight in saved_weights(best).items()}
    assert same(weights(tmp_path / "out"), saved)
    usual = tmp_path / "usual"
    usual.touch()
    modes = {file.stat().st_mode for file in (tmp_path / "out" / "model").iterdir()}
    assert modes == {usual.stat().st_mode}
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert f"* Training: step {int(best.name[5:])} of " in card


def test_a_student_that_has_moved_is_named(interrupted, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(interrupted / "run", moved / "run")
    info = json.loads((moved / "run" / "run.json").read_text())
    info["details"]["config"]["student"] = str(moved / "nowhere")
    (moved / "run" / "run.json").write_text(json.dumps(info))
    with pytest.raises(ConfigError, match="nowhere: no such folder(?s:.*)place with --student"):
        invoke(cli, moved / "run", "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == [moved]
    invoke(cli, moved / "run", "--out", tmp_path / "out", "--student", interrupted / "student")
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


def test_another_student_is_refused(interrupted, exact_student, tmp_path):
    with pytest.raises(ConfigError, match="not the student that .*run was started with"):
        invoke(cli, interrupted / "run", "--out", tmp_path / "out", "--student", exact_student)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(interrupted, tmp_path):
    """Least of all the run: a model in its folder would say that it has finished."""
    (tmp_path / "kept").write_text("")
    for out in (tmp_path, interrupted / "run", tmp_path / "kept"):
        with pytest.raises(ConfigError, match="not empty"):
            invoke(cli, interrupted / "run", "--out", out)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert not (interrupted / "run" / "model").exists()


def test_what_is_no_checkpoint_is_said(interrupted, undisturbed, tmp_path):
    def refused(given, message, error=ConfigError):
        with pytest.raises(error, match=message):
            invoke(cli, given, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused(STUDENT, "not a checkpoint. Expected a folder such as")
    command = f"mpd-gen push {undisturbed / 'model'} OWNER/NAME"
    refused(undisturbed, f"has finished.* is in {undisturbed / 'model'}. To upload it: {command}")
    card = (undisturbed / "model" / "README.md").read_text()
    assert "\n# run\n" in card and "* Training: 1 epoch(s), learning" in card
    (saved,) = checkpoint.checkpoints(interrupted / "run" / "checkpoints")
    alone = shutil.copytree(saved, tmp_path / "elsewhere" / "checkpoints" / saved.name)
    refused(alone, "run.json: does not exist")
    (tmp_path / "elsewhere" / "run.json").write_text('{"identity": {}}')
    refused(alone, "expected the settings and the student that mpd-train records", DataError)
    shutil.copy(interrupted / "run" / "run.json", tmp_path / "elsewhere")
    # Half deleted by a training that goes on.
    next(alone.glob("*.safetensors")).unlink()
    refused(alone, "deletes all but its newest two", DataError)
    shutil.rmtree(alone)
    refused(tmp_path / "elsewhere", "no checkpoint of a training in .*--save-steps")
