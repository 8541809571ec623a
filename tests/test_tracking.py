"""Trackers get what metrics.jsonl gets."""

import json
import sqlite3
import sys
from contextlib import closing
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
    assert {name for name, *_ in found} == {"run"}
    assert [json.loads(values) | {"step": step} for _, step, values in found] == records


def test_wandb_is_named_by_its_own_variables(tmp_path, monkeypatch):
    begun = []
    tracker = SimpleNamespace(init=lambda **settings: begun.append(settings))
    names = [("mpd", "run"), ("team", "mine")]
    for _ in names:
        Trackers({"wandb": tracker}, tmp_path / "run", {}, 0)
        Trackers({"trackio": tracker}, tmp_path / "run", {}, 0)
        monkeypatch.setenv("WANDB_PROJECT", "team")
        monkeypatch.setenv("WANDB_NAME", "mine")
    assert [(s["project"], s["name"]) for s in begun] == [names[0], names[0], names[1], names[0]]


@pytest.mark.parametrize("tracker", ["wandb", "trackio", "tensorboard"])
def test_a_missing_tracker_is_refused_before_training(round_dir, tmp_path, tracker, monkeypatch):
    monkeypatch.setitem(sys.modules, tracker, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ConfigError, match=rf"mixed-policy-distillation\[{tracker}\]"):
        train(config(round_dir, tmp_path / "run", tracker))
    assert not (tmp_path / "run" / "run.json").exists()
