"""Processes that run one command after another and keep their engine."""

import json
import os
import signal
import subprocess
import time
from contextlib import closing, suppress

import pytest
from conftest import ROOT, STUDENT, TEACHER, command, environment, rows, run, small_pocket

from mpd_data.common.errors import MPDError
from mpd_data.common.models import resolve_model
from mpd_data.config import EngineConfig, SamplingConfig
from mpd_data.engines import start
from mpd_data.inspect.status import round_status


def processes(folder):
    """Return the processes that wrote a round's rows, by the stage and part of each."""
    return {one["writer"]: one["pid"] for one in round_status(folder)["writers"]}


@pytest.fixture(scope="module")
def finished(prompts, tmp_path_factory):
    """A pipeline of two rounds and two evaluation sets, with two workers in each step but the
    rewriting."""
    path = small_pocket(prompts, tmp_path_factory.mktemp("pipeline"))
    text = path.read_text().replace("num_prompts = 24", "num_prompts = 8").replace("5e-4", "2e-3")
    path.write_text("[[evaluation]]".join(text.split("[[evaluation]]")[:3]))
    out = tmp_path_factory.mktemp("run") / "out"
    two = "{workers=2}"
    parts = [f"{name}.parts={two}" for name in ("rollouts", "evaluation.0.rollouts")]
    words = [word for value in [*parts, "rounds=2"] for word in ("--set", value)]
    return out, run("mpd-rounds", path, "--out", out, *words)


@pytest.mark.slow
def test_one_engine_start_for_each_model_and_round(finished):
    out, _ = finished
    of = {path: processes(out / path) for path in (
        "eval/base-test", "eval/base-greedy", "data/round1", "eval/round1-test", "data/round2",
    )}  # fmt: skip
    base = of["eval/base-test"]
    assert set(base) == {"rollouts-0-of-2", "rollouts-1-of-2"}
    for folder in ("data/round1", "eval/round1-test", "data/round2"):
        assert base.items() <= of[folder].items()
    # What has no workers, and the teacher's, in the process that asks these.
    assert len({*base.values(), of["eval/base-greedy"]["rollouts-0-of-1"]}) == 3
    assert of["eval/base-greedy"]["rollouts-0-of-1"] == of["data/round1"]["rewrite-0-of-1"]


@pytest.mark.slow
def test_the_rows_are_those_of_the_commands(finished, tmp_path):
    """Bit for bit, by an engine that was used before or by a new one."""
    out, _ = finished
    for line in (out / "finished.jsonl").read_text().splitlines():
        words = json.loads(line)["command"]
        if words[1] != "rollouts" or "round2" in line:
            continue
        again = tmp_path / str(len(list(tmp_path.iterdir())))
        folder = words[words.index("--out") + 1]
        words[words.index("--out") + 1] = str(again)
        if "--workers" in words:
            words[words.index("--workers") + 1] = "1"
        run(*words)
        assert rows(again).equals(rows(ROOT / folder))


def test_a_kept_engine_is_taken_for_the_same_settings_alone(monkeypatch):
    monkeypatch.setattr(start, "_keeps", True)
    student, teacher = resolve_model(str(STUDENT)), resolve_model(str(TEACHER))
    config = EngineConfig(backend="transformers", dtype="float32")

    def sampled(engine):
        engine.submit_generate("a", [1, 2, 3], SamplingConfig(max_tokens=4), 0)
        (result,) = [result for _ in range(4) for result in engine.step()]
        return result.token_ids

    try:
        with closing(start.start_engine(student, config)) as first:
            found = sampled(first)
        assert start.start_engine(student, config) is first
        assert sampled(first) == found
        other = start.start_engine(student, config.model_copy(update={"max_num_seqs": 3}))
        assert other is not first
        assert start.start_engine(teacher, config) is not other
        last = start.start_engine(student, config)
        with pytest.raises(MPDError), closing(last):
            raise MPDError("of the engine")
        # It may be dead.
        assert start.start_engine(student, config) is not last
        # A request that nobody waits for stays in no engine.
        last = start.start_engine(student, config)
        last.submit_generate("b", [1, 2, 3], SamplingConfig(max_tokens=4), 0)
        last.close()
        assert start.start_engine(student, config) is not last
    finally:
        start.close_kept_engine()


def test_it_ends_with_the_pipeline_that_started_it(prompts, tmp_path):
    """Killed alone, the pipeline cannot end its step, which would hold the round's lock and work
    for nobody."""
    path, out = small_pocket(prompts, tmp_path), tmp_path / "out"
    many = "evaluation.0.rollouts.num_samples=64"
    parts = "evaluation.0.rollouts.parts={workers=1}"
    process = subprocess.Popen(
        command("mpd-rounds", path, "--out", out, "--set", many, "--set", parts),
        env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        folder = out / "eval" / "base-test"
        while not (folder / "run.json").exists():
            assert process.poll() is None
            time.sleep(0.05)
        while not processes_at_work(folder):
            time.sleep(0.05)
        process.kill()
        process.wait()
        until = time.monotonic() + 120  # not a time limit: with enough work it would not end
        while processes_at_work(folder):
            assert time.monotonic() < until
            time.sleep(0.05)
        assert not list(folder.glob("rollouts/*")) or rows(folder).height < 24 * 64
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def processes_at_work(folder):
    states = ("starting", "running")
    return [one for one in round_status(folder)["writers"] if one["state"] in states]
