"""`--ray` on a real cluster of two nodes on this machine: real commands, real engines, a node that
dies."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import polars as pl
import pytest
from conftest import (
    ROOT,
    SCORES,
    STUDENT,
    environment,
    invoke,
    num_shards,
    rewrite_arguments,
    rollout_arguments,
    rows,
    run,
    started,
    write_jsonl,
)

from mpd_data import rollouts
from mpd_data.checkers.pool import CheckPool
from mpd_data.cli import cli
from mpd_data.common.errors import ConfigError
from mpd_data.common.options import build
from mpd_data.config import RolloutsConfig
from mpd_data.inspect.status import round_status, show_status
from mpd_data.parts import ray as ray_parts
from mpd_data.parts.ray import BLOCKS_PER_ACTOR, EngineActor, Job
from mpd_data.store.locks import Part
from mpd_data.store.progress import Progress
from mpd_data.store.round import RoundDir

# A node is a raylet with room for one actor.
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}
# A node that does not answer for two seconds is dead.
MISSED = {"health_check_period_ms": 1000, "health_check_failure_threshold": 2}
TWO = ["--ray", "--workers", 2]
NOTHING = {"written": 0, "failed": 0, "remaining": 0, "error": None}


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        made = Cluster(initialize_head=True, head_node_args={**NODE, "_system_config": MISSED})
        made.add_node(**NODE)
        yield made
        made.shutdown()


@pytest.fixture
def on_cluster(cluster, monkeypatch):
    """Commands that a test starts go to the cluster."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    return cluster


def writers(out, label):
    """What the blocks of a stage last said of themselves."""
    return {
        path.stem: json.loads(path.read_text())
        for path in RoundDir(out).statuses()
        if path.stem.startswith(label)
    }


def at_work(out):
    """Processes whose engines have started."""
    said = writers(out, "rollouts").values()
    return {each["pid"] for each in said if each["state"] in ("running", "finished")}


@pytest.mark.slow
def test_two_nodes_make_the_rows_of_one_process(on_cluster, round_dir, prompts, tmp_path):
    out = tmp_path / "round1"
    run("mpd-gen", *rollout_arguments(prompts, out), *TWO)
    assert rows(out, "rollouts").equals(rows(round_dir, "rollouts"))
    run("mpd-gen", *rewrite_arguments(out), *TWO)
    ours, theirs = rows(out, "distill"), rows(round_dir, "distill")
    assert ours.drop(SCORES).equals(theirs.drop(SCORES))
    run("mpd-gen", "validate", out)
    for label in ("rollouts", "rewrite"):
        said = writers(out, label)
        assert set(said) == {
            Part(i, 2 * BLOCKS_PER_ACTOR).name(label) for i in range(2 * BLOCKS_PER_ACTOR)
        }
        assert {each["state"] for each in said.values()} == {"finished"}
        assert len({each["pid"] for each in said.values()}) == 2


@pytest.mark.slow
def test_a_node_that_dies_costs_and_doubles_no_row(on_cluster, round_dir, prompts, tmp_path):
    """The command goes on by itself: what the node had begun is finished elsewhere."""
    out = tmp_path / "round1"
    before = set()

    def both_work():
        if len(before) < 2:
            before.update(at_work(out))
        return len(before) == 2 and num_shards(out) >= 2

    arguments = [*rollout_arguments(prompts, out), *TWO, "--rows-per-shard", 4]
    process = started("mpd-gen", *arguments, until=both_work, stderr=subprocess.PIPE)
    (other,) = on_cluster.worker_nodes
    on_cluster.remove_node(other, allow_graceful=False)
    _, said = process.communicate()
    on_cluster.add_node(**NODE)
    assert process.returncode == 0, said
    # What the dead one was at was done by another than those who were there.
    assert {each["pid"] for each in writers(out, "rollouts").values()} - before
    assert rows(out, "rollouts").equals(rows(round_dir, "rollouts"))
    run("mpd-gen", "validate", out)


@pytest.mark.slow
def test_an_interrupt_commits_what_is_finished(on_cluster, round_dir, prompts, tmp_path):
    out = tmp_path / "round1"
    arguments = [*rollout_arguments(prompts, out), *TWO, "--rows-per-shard", 8]
    two = {"until": lambda: num_shards(out) >= 2, "stderr": subprocess.PIPE}
    process = started("mpd-gen", *arguments, **two)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    assert "run the same command again" in said
    # Those at work heard of it, and of their open shards nothing is lost.
    stopped = [each for each in writers(out, "rollouts").values() if each["state"] != "finished"]
    assert {each["state"] for each in stopped} == {"interrupted"}
    kept, whole = rows(out, "rollouts"), rows(round_dir, "rollouts")
    assert kept.height == sum(each["rows"] for each in writers(out, "rollouts").values()) < 240
    assert kept.equals(whole.join(kept, on="row_id", how="semi"))
    run("mpd-gen", "validate", out)


def test_an_actors_error_is_one_message(on_cluster, prompts, tmp_path):
    """Here of weights, which the command itself does not read."""
    student = tmp_path / "student"
    shutil.copytree(STUDENT, student, ignore=shutil.ignore_patterns("*.safetensors"))
    arguments = rollout_arguments(prompts, tmp_path / "r", **{"--model": student})
    said = run("mpd-gen", *arguments, *TWO, code=1).stderr
    assert said.splitlines()[-1].startswith(f"error: {student}: no *.safetensors here")
    assert "Traceback" not in said


@pytest.mark.slow
def test_overwrite_and_limit(on_cluster, round_dir, prompts, tmp_path):
    out = shutil.copytree(round_dir, tmp_path / "round1")
    fewer = rollout_arguments(prompts, out, **{"-n": 3})
    said = run("mpd-gen", *fewer, "--ray", "--overwrite", "--limit", 9).stderr
    assert "9 rollouts, 9 of them new" in said
    assert "171 remaining" in said
    assert rows(out, "rollouts").height == 9
    assert not (out / "distill").exists()


@pytest.mark.slow
def test_a_bad_prompt_fails_alone(on_cluster, round_dir, prompts, tmp_path):
    """The row is in errors/ and exit code 3 says so, the second time too."""
    with prompts.open(encoding="utf-8") as lines:
        good = [json.loads(line) for line in lines]
    bad = {**good[0], "id": "control", "problem": "ignore <|im_end|> this"}
    out = tmp_path / "round1"
    arguments = rollout_arguments(write_jsonl(tmp_path / "p.jsonl", [*good, bad]), out)
    for _ in range(2):
        assert "1 rows failed" in run("mpd-gen", *arguments, *TWO, code=3).stderr
        assert rows(out, "errors")["prompt_id"].to_list() == ["control"]
    answers = pl.col("prompt_id", "completion_ids")
    ours, theirs = (rows(folder, "rollouts").select(answers) for folder in (out, round_dir))
    assert ours.equals(theirs)


# -- an actor by itself ---------------------------------------------------------------


@pytest.fixture
def job(prompts, tmp_path):
    """A job of two blocks, whose command is here."""
    arguments = rollout_arguments(prompts, tmp_path / "r", **{"--num-prompts": 20, "-n": 2})[1:]
    context = cli.commands["rollouts"].make_context("rollouts", arguments)
    config = build(RolloutsConfig, context.params)
    return Job(config, tmp_path / "r", str(ROOT), 2, None)


def told(job):
    """The command's lock, as an actor looks for it."""
    return RoundDir(job.folder).lock("rollouts", job.command)


def do(actor, block):
    (result,) = actor({"item": [block]})["result"]
    return json.loads(result)


def test_an_actor_keeps_its_engine_and_stops_when_told(job, monkeypatch):
    started = []

    def counted(*arguments):
        started.append(start_engine(*arguments))
        return started[-1]

    start_engine = ray_parts.start_engine
    monkeypatch.setattr(ray_parts, "start_engine", counted)
    monkeypatch.setattr(ray_parts, "_SECONDS_PER_LOOK", 0.0)
    ready = CheckPool.ready
    # A sample without its verdict is no row yet: here each waits for it.
    monkeypatch.setattr(CheckPool, "ready", lambda pool, _: ready(pool, 60 * pool.in_flight))
    actor = EngineActor(job)
    with contextlib.ExitStack() as held:
        held.enter_context(told(job))
        first = do(actor, 0)
        assert first["error"] is None
        assert do(actor, 0) == NOTHING
        engine = started[0]
        step = engine.step

        def stepped():
            finished = step()
            if finished:
                held.close()
            return finished

        engine.step = stepped
        second = do(actor, 1)
    assert len(started) == 1
    assert second == NOTHING
    assert first["written"] < rows(job.folder, "rollouts").height < 40
    states = {name: said["state"] for name, said in writers(job.folder, "rollouts").items()}
    assert states == {"rollouts-0-of-2": "finished", "rollouts-1-of-2": "interrupted"}


def test_a_node_that_does_not_share_the_folder_is_told(job):
    said = do(EngineActor(job), 0)
    assert "All nodes must share the round's folder" in said["error"]
    assert not list(job.folder.glob("rollouts/*"))


def test_a_block_waits_for_its_earlier_attempt(job, monkeypatch):
    """A process that Ray has given up and that lives on still holds its block."""
    monkeypatch.setattr(ray_parts, "_LOCK_WAIT_SECONDS", 0.5)
    monkeypatch.setattr(ray_parts, "_SECONDS_PER_LOOK", 0.1)
    began = time.monotonic()
    with told(job), RoundDir(job.folder).lock("rollouts", Part(1, 2)):
        said = do(EngineActor(job), 1)
    assert time.monotonic() - began > 0.5
    assert "rollouts-1-of-2: an earlier attempt at this block still holds the lock" in said["error"]


def test_a_block_that_takes_its_process_along_ends_the_job(job, monkeypatch):
    """Ray would run it again for ever, with an engine's start each time."""

    def die(config):
        raise SystemExit

    monkeypatch.setattr(rollouts, "setup", die)
    with told(job):
        for _ in range(4):
            with pytest.raises(SystemExit):
                do(EngineActor(job), 0)
        assert "4 processes died on this block" in do(EngineActor(job), 0)["error"]
    with told(job), pytest.raises(SystemExit):
        do(EngineActor(job), 0)


def test_of_many_blocks_the_status_lists_those_that_are_not_done(tmp_path):
    round_dir = RoundDir(tmp_path)
    round_dir.path.joinpath(".status").mkdir()
    for block in range(20):
        with Progress("rollouts", 4, round_dir.status_path("rollouts", Part(block, 20))):
            pass
    path = round_dir.status_path("rollouts", Part(7, 20))
    path.write_text(json.dumps({**json.loads(path.read_text()), "state": "failed"}))
    said = show_status(round_status(tmp_path))
    assert "19 writers have finished." in said
    assert "rollouts-7-of-20" in said
    assert "rollouts-8-of-20" not in said


# -- refusals -------------------------------------------------------------------------


def test_without_ray_the_extra_is_named(prompts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"--ray .*not installed.*\[ray\]"):
        invoke(cli, *rollout_arguments(prompts, tmp_path / "r"), "--ray")
    assert not Path(tmp_path / "r").exists()


@pytest.mark.parametrize("more", [["--refilter"], ["--shard-index", 0, "--num-shards", 2]])
def test_what_does_not_go_with_ray(round_dir, more):
    with pytest.raises(click.UsageError, match="--refilter|--ray divides the work itself"):
        invoke(cli, *rewrite_arguments(round_dir), "--ray", *more)
