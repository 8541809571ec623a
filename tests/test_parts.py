"""One stage in several processes: parts, workers, job arrays, and what `mpd-gen status` says."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import click
import pytest
from conftest import (
    ROOT,
    SCORES,
    edit_rows,
    environment,
    finish,
    invoke,
    num_shards,
    rewrite_arguments,
    rollout_arguments,
    rows,
    run,
    started,
    without_rewrites,
    write_jsonl,
)

from mpd_data.cli import cli
from mpd_data.common.errors import ConfigError, MPDError
from mpd_data.config import PartsConfig
from mpd_data.inspect.status import round_status
from mpd_data.parts.workers import _shares, slurm_part
from mpd_data.store.locks import Part, is_held
from mpd_data.store.round import RoundDir


def writers(folder):
    return {said["writer"]: said for said in round_status(folder)["writers"]}


def test_parts_are_disjoint_and_whole():
    keys = [f"prompt {i}" for i in range(2000)]
    parts = [Part(index, 7) for index in range(7)]
    held = [[key for key in keys if part.holds(key)] for part in parts]
    assert sorted(key for own in held for key in own) == sorted(keys)
    assert all(200 < len(own) < 380 for own in held)
    # The same on every machine and in every version: a part that is resumed is the part it was.
    assert [Part(i, 4).holds("a") for i in range(4)] == [False, False, False, True]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"shard_index": 0}, "go together"),
        ({"num_shards": 2}, "go together"),
        ({"shard_index": 2, "num_shards": 2}, "counted from 0"),
    ],
)
def test_a_part_is_an_index_and_a_count(values, message):
    with pytest.raises(ValueError, match=message):
        PartsConfig(**values)


@pytest.mark.slow
def test_workers_make_the_rows_of_one_process(round_dir, prompts, tmp_path):
    out = tmp_path / "r"
    said = run("mpd-gen", *rollout_arguments(prompts, out), "--workers", 2).stderr
    assert "worker 0 | " in said
    assert "worker 1 | " in said
    assert rows(out, "rollouts").equals(rows(round_dir, "rollouts"))
    assert sorted(writers(out)) == ["rollouts-0-of-2", "rollouts-1-of-2"]
    assert {said["state"] for said in writers(out).values()} == {"finished"}
    run("mpd-gen", *rewrite_arguments(out), "--workers", 2)
    ours, theirs = rows(out, "distill"), rows(round_dir, "distill")
    assert ours.drop(SCORES).equals(theirs.drop(SCORES))
    assert {"rewrite-0-of-2", "rewrite-1-of-2"} < writers(out).keys()
    run("mpd-gen", "validate", out)
    again = run("mpd-gen", *rollout_arguments(prompts, out)).stderr
    assert re.search(
        r"240 rollouts, 0 of them new, [\d.]+ tokens on average, [\d.]+% correct, [\d.]+% trunc",
        again,
    )


@pytest.mark.slow
def test_a_limit_is_shared_among_workers(prompts, tmp_path):
    out = tmp_path / "r"
    run("mpd-gen", *rollout_arguments(prompts, out), "--workers", 2, "--limit", 5)
    assert sorted(said["rows"] for said in writers(out).values()) == [2, 3]
    assert rows(out, "rollouts").height == 5


def held_by(key, last):
    return any(Part(index, 3).holds(key) for index in range(last + 1))


@pytest.mark.slow
def test_one_part_after_another_makes_the_round(round_dir, prompts, tmp_path):
    out, of_three = tmp_path / "r", ["--num-shards", 3]
    for index in range(3):
        invoke(cli, *rollout_arguments(prompts, out), "--shard-index", index, *of_three)
        done = rows(out, "rollouts")
        every = rows(round_dir, "rollouts")["prompt_id"]
        assert set(done["prompt_id"]) == {p for p in every if held_by(p, index)}
    assert done.equals(rows(round_dir, "rollouts"))
    for index in range(3):
        invoke(cli, *rewrite_arguments(out), "--shard-index", index, *of_three)
        held = sorted(key for key in done["row_id"] if held_by(key, index))
        assert sorted(rows(out, "distill")["rollout_id"]) == held


def test_a_dry_run_plans_its_part(prompts, tmp_path, capsys):
    arguments = rollout_arguments(prompts, tmp_path / "r")
    rows = []
    for index in range(2):
        part = ["--shard-index", index, "--num-shards", 2, "--dry-run", "--json"]
        invoke(cli, *arguments, *part)
        rows.append(json.loads(capsys.readouterr().out)["rows"])
    assert sum(rows) == 240
    assert 0 < rows[0] < 240


@pytest.mark.slow
def test_a_job_array_is_the_default(prompts, tmp_path, monkeypatch, capsys):
    out = tmp_path / "r"
    for name, value in {"ID": 11, "MIN": 5, "STEP": 3, "COUNT": 4}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert slurm_part() == (2, 4)
    invoke(cli, *rollout_arguments(prompts, out))
    assert "part 2 of 4" in capsys.readouterr().err
    assert set(writers(out)) == {"rollouts-2-of-4"}
    assert all(Part(2, 4).holds(prompt) for prompt in rows(out, "rollouts")["prompt_id"])
    # What is given goes before what is found.
    invoke(cli, *rollout_arguments(prompts, out), "--shard-index", 0, "--num-shards", 1)
    assert rows(out, "rollouts").height == 240
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "17")
    with pytest.raises(ConfigError, match="without gaps"):
        invoke(cli, *rollout_arguments(prompts, out))


@pytest.mark.slow
def test_the_shipped_job_script_makes_the_round_task_by_task(round_dir, prompts, tmp_path):
    """As SLURM runs it: bash, one task after another, the array in its environment."""
    out = tmp_path / "r"
    script = ROOT / "mpd_data" / "init" / "slurm" / "mpd-gen.sbatch"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for task in range(2):
        array = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": "2"}
        words = ["bash", script, *rollout_arguments(prompts, out)]
        finish(words, env=environment() | array | {"PATH": path})
    assert rows(out, "rollouts").equals(rows(round_dir, "rollouts"))
    assert sorted(writers(out)) == ["rollouts-0-of-2", "rollouts-1-of-2"]


def test_outside_an_array_a_job_is_whole(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert slurm_part() is None


HOLDER = """
    import sys, time
    from pathlib import Path
    from mpd_data.store.locks import Part
    from mpd_data.store.round import RoundDir
    with RoundDir(Path(sys.argv[1])).lock("rollouts", Part(0, 2)):
        (Path(sys.argv[1]) / ".staging" / "mine").touch()
        print("held", flush=True)
        time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that writes part 0 of 2 of the rollouts in tmp_path/r."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), tmp_path / "r"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def _named(process):
    return re.escape(f"pid {process.pid} on {socket.gethostname()}")


def test_only_the_other_parts_of_a_division_write_beside_a_part(tmp_path, holder):
    round_dir = RoundDir(tmp_path / "r")
    for label, part in [
        ("rollouts", Part(0, 2)),
        ("rollouts", Part(1, 3)),
        ("rollouts", Part()),
        ("rewrite", Part(1, 2)),
    ]:
        with (
            pytest.raises(
                ConfigError, match=rf"writing here \(rollouts-0-of-2, {_named(holder)}\)"
            ),
            round_dir.lock(label, part),
        ):
            pass
    mine = round_dir.staging / "mine"
    with round_dir.lock("rollouts", Part(1, 2)):
        assert mine.exists(), "what a living writer has half-written is its own"
    assert is_held(tmp_path / "r" / ".writers" / "rollouts-0-of-2")
    holder.kill()
    holder.wait()
    with round_dir.lock("rollouts", Part(0, 3)):
        assert not mine.exists()
    assert not is_held(tmp_path / "r" / ".writers" / "rollouts-0-of-2")


def test_parts_cannot_overwrite_or_refilter(prompts, tmp_path):
    part = ["--shard-index", 0, "--num-shards", 2]
    for extra in (part, ["--workers", 2]):
        with pytest.raises(click.UsageError, match="deletes the rows of all parts"):
            invoke(cli, *rollout_arguments(prompts, tmp_path), "--overwrite", *extra)
        with pytest.raises(click.UsageError, match="deletes the rows of all parts"):
            invoke(cli, *rewrite_arguments(tmp_path), "--overwrite", *extra)
        with pytest.raises(click.UsageError, match="no parts or workers"):
            invoke(cli, *rewrite_arguments(tmp_path), "--refilter", *extra)


def test_object_stores_are_refused(prompts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for asked in (rollout_arguments(prompts, "s3://b/r"), rewrite_arguments("gs://b/r")):
        with pytest.raises(click.UsageError, match="object stores are not supported"):
            invoke(cli, *asked)
    assert list(tmp_path.iterdir()) == []


def test_gpus_are_shared_out(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 3,GPU-4,5")
    assert _shares(2, 2) == ["2,3", "GPU-4,5"]
    assert _shares(3, 1) == ["2", "3", "GPU-4"]
    with pytest.raises(ConfigError, match="need 6 GPUs, but this machine has 4"):
        _shares(3, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert _shares(3, 2) == [None, None, None]


@pytest.mark.slow
def test_a_worker_that_is_killed_stops_the_rest_and_loses_nothing(round_dir, prompts, tmp_path):
    out = tmp_path / "r"
    arguments = [*rollout_arguments(prompts, out), "--workers", 2, "--rows-per-shard", 5]
    two = {"until": lambda: num_shards(out) >= 2, "stderr": subprocess.PIPE}
    process = started("mpd-gen", *arguments, **two)
    first = next(said for name, said in writers(out).items() if name == "rollouts-0-of-2")
    os.kill(first["pid"], signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == 1
    assert "worker 0 was killed (SIGKILL), as the kernel does where memory runs out" in said
    assert writers(out)["rollouts-0-of-2"]["state"] == "died"
    assert writers(out)["rollouts-1-of-2"]["state"] in ("interrupted", "finished")
    run("mpd-gen", *arguments)
    assert rows(out, "rollouts").equals(rows(round_dir, "rollouts"))
    run("mpd-gen", "validate", out)


@pytest.mark.slow
def test_a_scheduler_that_ends_a_job_loses_no_finished_row(prompts, tmp_path):
    out = tmp_path / "r"

    def first_row():
        found = round_status(out)["writers"] if (out / "run.json").exists() else []
        return any(said["rows"] for said in found)

    arguments = [*rollout_arguments(prompts, out), "--rows-per-shard", 200]
    process = started("mpd-gen", *arguments, until=first_row, stderr=subprocess.PIPE)
    process.terminate()
    _, said = process.communicate()
    assert process.returncode == 130
    assert "interrupted" in said
    assert 0 < rows(out, "rollouts").height < 240
    status = json.loads(run("mpd-gen", "status", out, "--json").stdout)[str(out)]
    (writer,) = status["writers"]
    assert writer["state"] == "interrupted"
    assert writer["rows"] == status["stages"][0]["rows"] == rows(out, "rollouts").height
    assert status["stages"][0]["asked"] == 240


@pytest.mark.slow
def test_workers_of_a_job_in_the_background_end_with_it(prompts, tmp_path):
    """A shell makes its background jobs ignore SIGINT, and they hand that on."""
    out = tmp_path / "r"
    words = [*rollout_arguments(prompts, out), "--workers", 2, "--rows-per-shard", 1]
    process = subprocess.Popen(
        [sys.executable, "-m", "mpd_data.cli", *map(str, words)],
        env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    while not list(out.glob("rollouts/*.parquet")):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "interrupted" in said
    # Not told, they would go on to the end.
    assert 0 < rows(out, "rollouts").height < 240
    assert {one["state"] for one in round_status(out)["writers"]} == {"interrupted"}


def test_status_is_for_people_too(round_dir, tmp_path, capsys):
    other = without_rewrites(round_dir, tmp_path / "other")
    invoke(cli, "status", round_dir, other)
    said = capsys.readouterr().out
    assert "rewrite-0-of-1" in said
    assert "240/240" in said
    assert said.index(str(round_dir)) < said.index(str(other))
    with pytest.raises(ConfigError, match=f"not a round. The rounds in it: {other}"):
        invoke(cli, "status", tmp_path)
    with pytest.raises(ConfigError, match="no round here"):
        round_status(tmp_path)


def test_a_hopeless_job_stops_early(tmp_path):
    """Beyond --max-error-rate; what failed is in errors/, and a higher rate goes on from there."""
    problem = "Dan has 22 shells . on Mon Dan wins 7 . how many shells ?"
    path = write_jsonl(
        tmp_path / "p.jsonl",
        # Two of three are too long for the context.
        [{"id": f"{i}", "problem": f"{problem} {i}" * (99 if i % 3 else 1)} for i in range(300)],
    )
    out = tmp_path / "r"
    arguments = ["--id-column", "id", "--max-tokens", 5]
    asked = rollout_arguments(path, out)[:7] + arguments
    with pytest.raises(MPDError, match=r"of 50 requests failed, more than --max-error-rate 0\.5"):
        invoke(cli, *asked)
    there = rows(out, "errors")
    assert 30 < there.height < 40
    assert invoke(cli, *asked, "--max-error-rate", 0.7) == 3
    assert rows(out, "errors").height == 200
    assert rows(out, "rollouts").height == 100
    # What failed before is no news.
    assert invoke(cli, *asked) == 3


def test_a_hopeless_rewrite_stops_early(round_dir, tmp_path):
    """Problems that spell a control token cannot be put before the teacher."""
    folder = without_rewrites(round_dir, tmp_path / "r")

    def spell(row):
        row["problem"] += " <|im_end|>"

    edit_rows(folder, "rollouts", spell)
    asked = rewrite_arguments(folder)
    with pytest.raises(MPDError, match="50 of 50 requests failed"):
        invoke(cli, *asked)
    assert rows(folder, "errors").height == 50
    with pytest.raises(MPDError, match="no rewrite was kept"):
        invoke(cli, *asked, "--max-error-rate", 1)
    assert rows(folder, "errors").height == 240
