"""Trackers get what metrics.jsonl gets."""

import json
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import STUDENT, environment, metrics, python, train_config

from mpd_data.common.errors import ConfigError
from mpd_train.loop import train
from mpd_train.metrics import Trackers


def config(round_dir, out, tracker):
    settings = {"report_to": [tracker], "pack_length": 2000}
    settings |= {"validation": {"validation_fraction": 0.25, "eval_steps": 2}}
    return train_config(round_dir, STUDENT, out, **settings)


def test_tensorboard_holds_the_metrics(round_dir, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "run"
    train(config(round_dir, out, "tensorboard"))
    events = accumulator.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    records = metrics(out)
    for name in ("loss", "kl", "grad_norm", "validation_loss"):
        written = [(r["step"], r[name]) for r in records if name in r]
        read = [(e.step, e.value) for e in events.Scalars(name)]
        assert written
        assert [s for s, _ in read] == [s for s, _ in written]
        assert [v for _, v in read] == pytest.approx([v for _, v in written], rel=1e-6)


def test_trackio_holds_the_metrics(round_dir, tmp_path):
    """In a process of its own: where its database lies is settled when it is imported."""
    pytest.importorskip("trackio")
    out, there = tmp_path / "run", tmp_path / "trackio"
    options = config(round_dir, out, "trackio").model_dump(mode="json")
    program = "import sys, json; from mpd_train.config import TrainConfig;"
    program += "from mpd_train.loop import train; train(TrainConfig(**json.loads(sys.argv[1])))"
    python(program, json.dumps(options), env=environment() | {"TRACKIO_DIR": str(there)})
    records = metrics(out)
    with closing(sqlite3.connect(there / "mpd.db")) as database:
        asked = "select run_name, step, metrics from metrics order by id"
        found = database.execute(asked).fetchall()
    assert [Path(name).name for name in {name for name, *_ in found}] == ["run"]
    assert [json.loads(values) | {"step": step} for _, step, values in found] == records


def test_trackers_are_named_by_their_own_variables(tmp_path, monkeypatch):
    begun = []
    module = SimpleNamespace(init=lambda **settings: begun.append(settings))
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "runs" / "round1"
    out.mkdir(parents=True)
    for _ in range(2):
        for tracker in ("wandb", "trackio"):
            Trackers({tracker: module}, out, {}, 0, 0)
        for name in ("WANDB", "TRACKIO"):
            monkeypatch.setenv(f"{name}_PROJECT", f"team {name}")
            monkeypatch.setenv(f"{name}_NAME", "mine")
    named = [(s["project"], s["name"]) for s in begun]
    default = ("mpd", "runs/round1")
    assert named == [default, default, ("team WANDB", "mine"), ("team TRACKIO", "mine")]


def test_a_resumed_training_goes_on_in_its_run(tmp_path):
    begun, sent = [], []
    module = SimpleNamespace(
        init=lambda **settings: begun.append(settings),
        log=lambda values, step: sent.append((step, values["loss"])),
    )
    records = [{"step": step, "loss": float(step)} for step in (1, 2, 2, 3)]
    # Killed after three records, resumed after the first step; then begun anew in its place.
    for done, repeated, todo in ((0, 0, records[:3]), (1, 2, records[1:]), (0, 0, records[:1])):
        trackers = Trackers({"wandb": module}, tmp_path, {}, done, repeated)
        for record in todo:
            trackers.log(record)
    assert sent == [(1, 1.0), (2, 2.0), (2, 2.0), (3, 3.0), (1, 1.0)]
    first, resumed, anew = (settings["id"] for settings in begun)
    assert first == resumed != anew


@pytest.mark.parametrize("tracker", ["wandb", "trackio", "tensorboard"])
def test_a_missing_tracker_is_refused_before_training(round_dir, tmp_path, tracker, monkeypatch):
    monkeypatch.setitem(sys.modules, tracker, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ConfigError, match=rf"mixed-policy-distillation\[{tracker}\]"):
        train(config(round_dir, tmp_path / "run", tracker))
    assert not (tmp_path / "run" / "run.json").exists()
