"""Trackers get what metrics.jsonl gets."""

import json
import os
import sqlite3
import struct
import sys
import textwrap
from contextlib import closing
from pathlib import Path

import polars as pl
import pytest
from conftest import ROOT, STUDENT, environment, metrics, python, train_config

from mpd_data.common.errors import ConfigError
from mpd_data.inspect.stats import scan_round
from mpd_train.loop import train
from mpd_train.tracking import TRACES


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
    assert events.Scalars("rewrites/ok")[0].step == 0
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
    first, *others = ((step, json.loads(values)) for _, step, values in found)
    assert first[0] == 0
    assert len(first[1]["traces"]["_value"]) == TRACES
    assert [values | {"step": step} for step, values in others] == records


def in_wandb(folder, source, *arguments, **variables):
    """Run Python source with wandb offline; return its runs in the order of their beginning: the
    run's record, its values by step, its tables."""
    folder.mkdir(exist_ok=True)
    offline = {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "WANDB_SILENT": "true"}
    before = "import os, sys\nfrom pathlib import Path\nimport wandb\n"
    before += "from mpd_train.tracking import Trackers\n"
    program = before + textwrap.dedent(source)
    python(program, *map(str, arguments), env=environment() | offline | variables)
    runs = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        kinds = {kind: [] for kind in ("run", "history")}
        for record in wandb_records(path):
            kind = record.WhichOneof("record_type")
            if kind in kinds:
                kinds[kind].append(getattr(record, kind))
        values = [
            {item.key or item.nested_key[0]: item.value_json for item in line.item}
            for line in kinds["history"]
        ]
        steps = {
            int(line["_step"]): {
                name: json.loads(value) for name, value in line.items() if name[0] != "_"
            }
            for line in values
        }
        tables = [json.loads(p.read_text()) for p in path.parent.glob("files/media/table/*.json")]
        runs.append((kinds["run"][0], steps, tables))
    return runs


def wandb_records(path):
    """Yield the records of a wandb file: LevelDB's log format, after a head of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


@pytest.mark.slow
def test_a_wandb_run_is_named_by_its_own_variables(tmp_path):
    pytest.importorskip("wandb")
    source = """
        os.chdir(sys.argv[1])
        out = Path("runs/round1")
        out.mkdir(parents=True, exist_ok=True)
        Trackers({"wandb": wandb}, out, {}, 0, 0).close()
        """
    ((run, *_),) = in_wandb(tmp_path / "a", source, tmp_path)
    assert (run.project, run.display_name, run.run_group) == ("mpd", "runs/round1", "")
    told = {"WANDB_PROJECT": "team", "WANDB_NAME": "mine", "WANDB_RUN_GROUP": "pipeline"}
    ((run, *_),) = in_wandb(tmp_path / "b", source, tmp_path, **told)
    assert (run.project, run.display_name, run.run_group) == ("team", "mine", "pipeline")


@pytest.mark.slow
def test_a_resumed_training_goes_on_in_its_run(tmp_path):
    pytest.importorskip("wandb")
    source = """
        records = [{"step": step, "loss": float(step)} for step in (1, 2, 2, 3)]
        done, repeated, first, last = map(int, sys.argv[2:])
        trackers = Trackers({"wandb": wandb}, Path(sys.argv[1]), {}, done, repeated)
        for record in records[first:last]:
            trackers.log(record)
        trackers.close()
        """
    # Killed after three records, resumed after the first step; then begun anew in its place.
    for told in ((0, 0, 0, 3), (1, 2, 1, 4), (0, 0, 0, 1)):
        runs = in_wandb(tmp_path / "w", source, tmp_path, *told)
    assert [list(steps) for _, steps, _ in runs] == [[1, 2], [3], [1]]
    first, resumed, anew = (run.run_id for run, *_ in runs)
    assert first == resumed != anew


@pytest.mark.slow
def test_a_round_its_traces_and_its_evaluation_are_in_the_run(round_dir, tmp_path):
    pytest.importorskip("wandb")
    source = """
        import json
        from mpd_train.config import TrainConfig
        from mpd_train.loop import train
        from mpd_train.metrics import record_evaluation
        train(TrainConfig(**json.loads(sys.argv[1])))
        for accuracy in (0.5, 0.5, 0.6):
            found = {"accuracy": accuracy, "mean_tokens": 40.0, "truncated": None}
            record_evaluation(Path(sys.argv[2]), {"test": found})
        """
    out = tmp_path / "run"
    options = config(round_dir, out, "wandb").model_dump(mode="json")
    runs = in_wandb(tmp_path / "w", source, json.dumps(options), out)
    assert len({run.run_id for run, *_ in runs}) == 1
    (_, training, (table,)), *evaluations = runs
    last = metrics(out)[-1]["step"]
    # The same result is sent once.
    sent = [{last + 1: {"test/accuracy": x, "test/mean_tokens": 40.0}} for x in (0.5, 0.6)]
    assert [steps for _, steps, _ in evaluations] == sent
    statuses = scan_round(round_dir, "distill").collect()["status"].value_counts(normalize=True)
    shares = {f"rewrites/{status}": share for status, share in statuses.rows()}
    first = training.pop(0)
    assert {name: first[name] for name in shares} == pytest.approx(shares)
    assert set(training) == set(range(1, last + 1))
    row = dict(zip(table["columns"], table["data"][0], strict=True))
    assert len(table["data"]) == TRACES
    assert row["num_rewritten_tokens"] <= row["num_completion_tokens"]
    kept = scan_round(round_dir, "distill").filter(pl.col("rewrite") == row["rewrite"]).collect()
    drafts = scan_round(round_dir).filter(pl.col("completion") == row["completion"]).collect()
    assert set(kept["rollout_id"]) & set(drafts["row_id"])


@pytest.mark.parametrize("tracker", ["wandb", "trackio", "tensorboard"])
def test_a_missing_tracker_is_refused_before_training(round_dir, tmp_path, tracker, monkeypatch):
    monkeypatch.setitem(sys.modules, tracker, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ConfigError, match=rf"mixed-policy-distillation\[{tracker}\]"):
        train(config(round_dir, tmp_path / "run", tracker))
    assert not (tmp_path / "run" / "run.json").exists()


MLFLOW = ROOT / "build" / "mlflow"


@pytest.mark.slow
def test_mlflow_holds_the_metrics_and_a_resumed_training_goes_on_in_its_run(round_dir, tmp_path):
    if not (MLFLOW / "mlflow").exists():
        how = "no mlflow: make build/mlflow/.installed"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(how)
    # What it needs besides comes with vLLM.
    pytest.importorskip("opentelemetry.proto")
    out, store = tmp_path / "run", tmp_path / "mlflow"
    options = config(round_dir, out, "mlflow").model_dump(mode="json")
    told = {"MLFLOW_TRACKING_URI": store.as_uri(), "MLFLOW_EXPERIMENT_NAME": "team"}
    told |= {"MLFLOW_ALLOW_FILE_STORE": "1", "WANDB_RUN_GROUP": "pipeline"}
    program = f"import sys, json; sys.path.append({str(MLFLOW)!r});"
    program += "from mpd_train.config import TrainConfig; from mpd_train.loop import train;"
    begin = program + "train(TrainConfig(**json.loads(sys.argv[1])))"
    python(begin, json.dumps(options), env=environment() | told)
    more = program + (
        "from pathlib import Path; from mpd_train.tracking import Trackers, load_trackers;"
        "t = Trackers(load_trackers(['mlflow']), Path(sys.argv[1]), {}, 1, 0);"
        "t.log({'step': 99, 'loss': 0.5}); t.close()"
    )
    python(more, out, env=environment() | told)
    (run,) = (path.parent for path in store.glob("*/*/metrics"))
    assert "name: team" in (run.parent / "meta.yaml").read_text()
    assert (run / "tags" / "group").read_text() == "pipeline"
    assert (run / "params" / "loss.divergence").read_text() == options["loss"]["divergence"]
    for name in ("loss", "kl", "validation_loss"):
        lines = [line.split() for line in (run / "metrics" / name).read_text().splitlines()]
        found = [(int(step), float(value)) for _, value, step in lines]
        expected = [(r["step"], r[name]) for r in metrics(out) if name in r]
        assert found == expected + [(99, 0.5)] * (name == "loss")
    (traces,) = run.glob("artifacts/traces.json")
    assert len(json.loads(traces.read_text())["rewrite"]) == TRACES
    nowhere = environment() | {"MLFLOW_TRACKING_URI": "sqlite:///x.db"}
    look = program + (
        "from mpd_train import tracking; tracking.find_spec = lambda name: None;"
        "tracking.load_trackers(['mlflow'])"
    )
    assert "Name a server in MLFLOW_TRACKING_URI" in python(look, code=1, env=nowhere).stderr
