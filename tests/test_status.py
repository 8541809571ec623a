"""`mpd-gen status`: how far a round, a training or a pipeline run is, and whether it is alive."""

import json
import os
import shutil

import pytest
from conftest import ROOT, STUDENT, rollout_arguments, run, started

from mpd_data.common.models import resolve_model
from mpd_data.config import EngineConfig, SamplingConfig
from mpd_data.engines.start import start_engine
from mpd_data.inspect import status
from mpd_data.inspect.status import round_status, show_status, status_of
from mpd_data.store import progress
from mpd_data.store.locks import WHOLE, folder_lock
from mpd_data.store.progress import Progress
from mpd_data.store.round import RoundDir

TRAINING = ROOT / "tests" / "data" / "recorded" / "training"


def writer(folder):
    (said,) = round_status(folder)["writers"]
    return said


def test_tokens_are_counted_before_their_row_ends():
    engine = start_engine(resolve_model(str(STUDENT)), EngineConfig(dtype="float32"))
    assert engine.underway() == (0, 0)
    for number in range(3):
        sampling = SamplingConfig(max_tokens=40)
        engine.submit_generate(str(number), list(range(3, 20 + number)), sampling, number)
    assert not engine.step()
    assert engine.underway() == (3, 3)
    made = 0
    while engine.in_flight:
        made += sum(len(done.token_ids) for done in engine.step())
        assert made + engine.underway()[1] <= 120
    assert engine.underway() == (0, 0)
    assert made >= 3
    engine.close()


def test_a_status_tells_work_from_silence_and_death(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_PER_LOOK", 0.0)
    monkeypatch.setattr(progress, "_SECONDS_PER_STATUS", 0.0)
    round_dir = RoundDir(tmp_path)
    path = round_dir.status_path("rewrite", WHOLE)
    with round_dir.lock("rewrite", WHOLE), Progress("rewrite", 4, path) as shown:
        assert writer(tmp_path)["state"] == "starting"
        shown.engine_started()
        shown.tick(4, lambda: (3, 57))
        said = writer(tmp_path)
        assert (said["state"], said["rows"], said["tokens"]) == ("running", 0, 57)
        assert (said["running"], said["in_flight"], said["kept"]) == (3, 4, None)
        # The last token of a row of 40 came, and the row waits for its check.
        shown.tick(3, lambda: (2, 30))
        assert writer(tmp_path)["tokens"] == 57
        shown.update(40, 0, kept=1)
        shown.tick(3, lambda: (2, 31))
        said = writer(tmp_path)
        assert (said["rows"], said["tokens"], said["kept"]) == (1, 71, 1)
        assert None not in [status._cells(said)[name] for name in ("tok/s", "left", "running")]
        monkeypatch.setattr(status, "_SILENT_SECONDS", -1.0)
        assert writer(tmp_path)["state"] == "silent"
        # An old speed is none.
        cells = status._cells(writer(tmp_path))
        assert (cells["tok/s"], cells["left"], cells["running"]) == (None, None, None)
        monkeypatch.setattr(status, "_STALLED_SECONDS", -1.0)
        assert writer(tmp_path)["state"] == "stalled"
        assert "stalled" in show_status(round_status(tmp_path))
        # A line that is wider than the terminal would break anywhere.
        narrow = show_status(round_status(tmp_path), 80).splitlines()
        assert max(map(len, narrow)) <= 80
        assert any("state: stalled" in line and "tokens: 71" in line for line in narrow)
        report = path.read_text()
    assert writer(tmp_path)["state"] == "finished"
    path.write_text(report)
    assert writer(tmp_path)["state"] == "died"
    assert "The same command as before goes on" in show_status(round_status(tmp_path))


def test_the_status_of_a_training(tmp_path):
    folder = shutil.copytree(TRAINING, tmp_path / "training")
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    record = json.loads((folder / "run.json").read_text())
    record["details"]["steps"] = len(steps) + 10
    (folder / "run.json").write_text(json.dumps(record))
    said = status_of(folder)
    assert (said["kind"], said["state"], said["step"]) == ("training", "stopped", len(steps))
    assert said["loss"] == steps[-1]["loss"]
    with folder_lock(folder):
        assert status_of(folder)["state"] == "starting"
        (folder / "metrics.jsonl").touch()
        said = status_of(folder)
        assert said["state"] == "running"
        pace = sum(step["seconds"] for step in steps[-20:]) / len(steps[-20:])
        assert said["seconds_left"] == pytest.approx(10 * pace, abs=0.1)
        os.utime(folder / ".lock", (0, 0))
        os.utime(folder / "metrics.jsonl", (1, 1))
        assert status_of(folder)["state"] == "stalled"
    (folder / "model").mkdir(exist_ok=True)
    assert status_of(folder)["state"] == "finished"
    assert f"{len(steps)}/{len(steps) + 10}" in show_status(said)


@pytest.mark.slow
def test_watch_ends_with_the_work(tmp_path, prompts):
    out = tmp_path / "r"
    arguments = [*rollout_arguments(prompts, out), "--rows-per-shard", 200]
    job = started("mpd-gen", *arguments, until=lambda: (out / ".status").exists())
    watched = run("mpd-gen", "status", out, "--watch").stdout
    assert job.wait() == 0
    assert "240/240" in watched
    assert watched.index("running") < watched.rindex("finished")
