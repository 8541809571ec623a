"""Whatever dies, no row is lost and none is doubled: real commands, real engines, real kills.

Each case ends the same way: the same command runs again and completes, and the round has the rows
of an undisturbed run, by key and by token ids. `pytest -s` shows the counts.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
from conftest import (
    SCORES,
    assert_near,
    environment,
    killed,
    num_shards,
    rewrite_arguments,
    rollout_arguments,
    rows,
    slow,
    started,
)
from nursery import Death

from mpd_data.inspect.validate import validate_round
from mpd_data.store.locks import is_held
from mpd_data.store.round import RoundDir

# Kills for each stage and engine. vLLM takes three times as long to start.
# With --all-cases; else a third of them.
KILLS = {
    ("rollouts", "vllm"): 12,
    ("rewrite", "vllm"): 12,
    ("rollouts", "transformers"): 48,
    ("rewrite", "transformers"): 36,
}
# After this many kills a round may finish.
KILLS_PER_ROUND = 6
# These change no row, so they vary from one attempt to the next.
SHARD_SIZES = (1, 2, 3, 7)
SEQUENCES = (4, 8, 16)
FOLDERS = {"rollouts": "rollouts", "rewrite": "distill"}
# Functions in which a writer's thread is killed.
COMMIT = ("_commit_staged", "commit_file", "describe", "fsync_directory", "short_lock", "_hold")
APPEND = ("append_manifest",)


@dataclass(frozen=True)
class Job:
    """A command that makes 24 rows."""

    stage: str
    backend: str
    prompts: object

    def arguments(self, out, **changed):
        settings = {
            "--backend": self.backend,
            "--max-tokens": 100,
            "--max-num-seqs": 8,
            "--rows-per-shard": 3,
            "--checker-processes": 1,
            **changed,
        }
        if self.stage == "rewrite":
            return rewrite_arguments(out, **settings)
        settings = {"--num-prompts": 8, "-n": 3, "--checker": "number", **settings}
        return rollout_arguments(self.prompts, out, **{**settings, "--max-tokens": 160})


def table(round_dir, stage):
    """Return all rows in the folder, doubled ones too."""
    return rows(round_dir, FOLDERS[stage])


def differences(expected, round_dir, stage):
    """Return the numbers of lost and doubled rows, after checking that the round is sound."""
    found = table(round_dir, stage)
    keys = Counter(found["row_id"])
    lost = len(set(expected["row_id"]) - set(keys))
    doubled = found.height - len(keys)
    if not lost and not doubled:
        same_rows(found, expected, stage)
    assert validate_round(round_dir) == []
    assert list(RoundDir(round_dir).staging.iterdir()) == []
    return lost, doubled


def same_rows(found, expected, stage):
    if stage == "rollouts":
        assert found.equals(expected)
        return
    assert found.drop(SCORES).equals(expected.drop(SCORES))
    assert_near(found, expected)


@dataclass
class Undisturbed:
    """A job that nothing disturbed: its rows, its seconds, and how often it passes each place."""

    job: Job
    path: object
    source: object  # the round whose rollouts it rewrites; None for rollouts
    rows: pl.DataFrame
    seconds: float
    passes: dict


@pytest.fixture(scope="module")
def undisturbed(nursery, prompts, tmp_path_factory):
    """The undisturbed run of each job, made at its first use."""
    made = {}

    def of(stage, backend):
        if (stage, backend) in made:
            return made[stage, backend]
        job = Job(stage, backend, prompts)
        source = of("rollouts", backend).path if stage == "rewrite" else None
        out = tmp_path_factory.mktemp("undisturbed") / "r"
        fresh(out, source)
        begun = time.monotonic()
        ways = deaths(out)
        counts = nursery.count(job.arguments(out), *ways.values())
        seconds = time.monotonic() - begun
        passes = dict(zip(ways, counts, strict=True))
        made[stage, backend] = Undisturbed(job, out, source, table(out, stage), seconds, passes)
        return made[stage, backend]

    return of


def fresh(out, source):
    """Make a round in which the stage has not run; to rewrite, it has the rollouts of `source`."""
    if source is not None:
        shutil.copytree(source, out)


def deaths(out):
    """The ways to die, except by the clock."""
    return {
        "change": Death(0, folder=str(out.parent)),
        "commit": Death(0, functions=COMMIT),
        "append": Death(0, functions=APPEND),
    }


@dataclass
class Figures:
    kills: Counter = field(default_factory=Counter)
    rounds: int = 0
    rows: int = 0
    lost: int = 0
    doubled: int = 0


def kill_rounds(nursery, truth, kills, folder, seed):
    """Kill rounds of one job several times each, then complete them, until there are `kills`."""
    rng = random.Random(seed)
    job, figures = truth.job, Figures()
    while figures.kills.total() < kills:
        out = folder / f"r{figures.rounds}"
        fresh(out, truth.source)
        # Each way at least once.
        every = ["clock", "change", "commit", "append"]
        more = rng.choices(every, [4, 2, 2, 2], k=KILLS_PER_ROUND - len(every))
        for how in rng.sample(every + more, KILLS_PER_ROUND):
            death = deaths(out).get(how)
            if death is not None:
                # In the first third of the run, so that most kills leave work.
                death.at = rng.randint(1, max(1, truth.passes[how] // 3))
            changed = {
                "--rows-per-shard": rng.choice(SHARD_SIZES),
                "--max-num-seqs": rng.choice(SEQUENCES),
            }
            child = nursery.start(job.arguments(out, **changed), *filter(None, [death]))
            if death is None:
                time.sleep(rng.uniform(0, truth.seconds))
                child.kill()
            code = child.wait()
            assert code in (0, -signal.SIGKILL), f"exit {code}\n{child.said()}"
            figures.kills[how] += code == -signal.SIGKILL
        nursery.finish(job.arguments(out))
        lost, doubled = differences(truth.rows, out, job.stage)
        figures.rounds += 1
        figures.rows += truth.rows.height
        figures.lost += lost
        figures.doubled += doubled
        shutil.rmtree(out)
    return figures


@pytest.mark.slow
def test_a_hundred_kills_lose_and_double_nothing(nursery, undisturbed, tmp_path, request):
    share = 1 if request.config.getoption("all_cases") else 3
    jobs = {name: undisturbed(*name) for name in KILLS}
    with ThreadPoolExecutor(2) as pool:
        running = {
            name: pool.submit(
                kill_rounds,
                nursery,
                truth,
                KILLS[name] // share,
                tmp_path / "-".join(name),
                str(name),
            )
            for name, truth in jobs.items()
        }
        figures = {name: future.result() for name, future in running.items()}
    print(
        f"\n{'stage':9} {'engine':13} {'rounds':>6} {'kills':>6} {'rows':>5} lost doubled  kills by"
    )
    for (stage, backend), f in figures.items():
        by = ", ".join(f"{how} {n}" for how, n in sorted(f.kills.items()))
        print(
            f"{stage:9} {backend:13} {f.rounds:6} {f.kills.total():6} {f.rows:5} {f.lost:4}"
            f" {f.doubled:7}  {by}"
        )
    kills = sum((f.kills for f in figures.values()), Counter())
    lost, doubled = (sum(getattr(f, n) for f in figures.values()) for n in ("lost", "doubled"))
    print(f"all: kills {kills.total()}, lost {lost}, doubled {doubled}")
    assert (lost, doubled) == (0, 0)
    assert kills.total() >= sum(KILLS.values()) // share
    assert all(kills[how] >= 5 // share for how in ("clock", "change", "commit", "append")), kills


# -- disks ---------------------------------------------------------------------------------


def refused(nursery, arguments, message, **limits):
    """Run a command that cannot write: one message, exit code 1, no traceback."""
    said = nursery.finish(arguments, code=1, **limits)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == said.count("error: ") == 1, said
    assert message in errors[0]
    assert "Traceback" not in said


def mount(*arguments):
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    return done.stderr.strip() if done.returncode else None


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own: `disk.mount("size=64k")`, then again to change it."""

    class Disk:
        path = tmp_path / "disk"
        mounted = False

        def mount(self, options):
            how = f"remount,{options}" if self.mounted else options
            refusal = mount("-t", "tmpfs", "-o", how, "tmpfs", self.path)
            if refusal is not None:
                assert not self.mounted, refusal
                pytest.skip(
                    f"no disk of our own, since mounting is not permitted here ({refusal});"
                    " the test with a limit on file sizes covers the same"
                )
            self.mounted = True

    disk = Disk()
    disk.path.mkdir()
    yield disk
    if disk.mounted:
        subprocess.run(["umount", disk.path], check=True)


# From no room for run.json to none for the last shards (24 of them, a page or two each).
@pytest.mark.parametrize("size", [*map(slow, ["4k", "12k", "24k", "96k", "160k"]), "48k"])
def test_a_full_disk_is_one_message_and_the_rest_follows(nursery, undisturbed, disk, size):
    truth = undisturbed("rollouts", "transformers")
    disk.mount(f"size={size}")
    out = disk.path / "r"
    arguments = truth.job.arguments(out, **{"--rows-per-shard": 1})
    refused(nursery, arguments, "No space left on device")
    disk.mount("size=64m")
    nursery.finish(arguments)
    assert differences(truth.rows, out, "rollouts") == (0, 0)
    assert [p.name for p in out.glob(".*.tmp")] == []


@pytest.mark.parametrize("size", [slow("200k"), "300k"])
def test_a_disk_that_fills_while_rewriting(nursery, undisturbed, disk, size):
    truth = undisturbed("rewrite", "transformers")
    disk.mount(f"size={size}")
    out = disk.path / "r"
    fresh(out, truth.source)
    arguments = truth.job.arguments(out, **{"--rows-per-shard": 1})
    refused(nursery, arguments, "No space left on device")
    disk.mount("size=64m")
    nursery.finish(arguments)
    assert differences(truth.rows, out, "rewrite") == (0, 0)


@pytest.mark.parametrize("limit", [slow(3000), 6500])
def test_a_file_that_cannot_grow_is_one_message_and_the_rest_follows(
    nursery, undisturbed, tmp_path, limit
):
    """A full disk for machines that cannot mount one: the kernel refuses every write past a size,
    that of run.json or that of a shard."""
    truth = undisturbed("rollouts", "transformers")
    out = tmp_path / "r"
    arguments = truth.job.arguments(out, **{"--rows-per-shard": 12})
    refused(nursery, arguments, "File too large", limit=limit)
    nursery.finish(arguments)
    assert differences(truth.rows, out, "rollouts") == (0, 0)


def test_a_read_only_disk_is_one_message_and_the_rest_follows(nursery, undisturbed, disk):
    truth = undisturbed("rollouts", "transformers")
    disk.mount("size=64m")
    out = disk.path / "r"
    arguments = truth.job.arguments(out)
    nursery.finish([*arguments, "--limit", 7])
    before = table(out, "rollouts")
    disk.mount("ro")
    refused(nursery, arguments, "Read-only file system")
    assert table(out, "rollouts").equals(before)
    disk.mount("rw")
    nursery.finish(arguments)
    assert differences(truth.rows, out, "rollouts") == (0, 0)


@pytest.mark.parametrize("closed", ["", slow("rollouts"), slow(".staging"), slow(".status")])
def test_a_folder_of_somebody_else_is_one_message_and_the_rest_follows(
    nursery, undisturbed, tmp_path, closed
):
    """As a user who may not write: root may write everywhere."""
    truth = undisturbed("rollouts", "transformers")
    tmp_path.chmod(0o755)
    out = tmp_path / "r"
    arguments = truth.job.arguments(out)
    nursery.finish([*arguments, "--limit", 7])
    before = table(out, "rollouts")
    for path in out.rglob("*"):
        path.chmod(0o777 if path.is_dir() else 0o666)
    out.chmod(0o777)
    (out / closed).chmod(0o555)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.getuid():
            parent.chmod(parent.stat().st_mode | 0o055)
    refused(nursery, arguments, "Permission denied", user=None if os.getuid() else 65534)
    assert table(out, "rollouts").equals(before)
    (out / closed).chmod(0o777)
    nursery.finish(arguments)
    assert differences(truth.rows, out, "rollouts") == (0, 0)


# -- torn shards ---------------------------------------------------------------------------


def places(shard):
    """Return where a Parquet file may break: its magic bytes, its columns' pages, its footer."""
    metadata, size = pq.read_metadata(shard), shard.stat().st_size
    footer = size - 8 - int.from_bytes(shard.read_bytes()[-8:-4], "little")
    found = {0, 1, 3, 4, footer - 1, footer, footer + 1, (footer + size) // 2}
    found |= {size - 9, size - 8, size - 7, size - 5, size - 4, size - 1}
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            column = metadata.row_group(group).column(index)
            first = column.data_page_offset
            if column.has_dictionary_page:
                first = min(first, column.dictionary_page_offset)
            last = first + column.total_compressed_size
            found |= {first, first + 1, (first + last) // 2, last - 1}
    return sorted(at for at in found if at < size), footer, size


def test_a_shard_torn_anywhere_is_set_aside_and_made_anew(nursery, undisturbed, tmp_path):
    truth = undisturbed("rollouts", "transformers")
    names = [path.name for path in RoundDir(truth.path).shard_paths("rollouts")]
    victim = names[1]
    whole = set(truth.rows["row_id"])
    whole -= set(pl.read_parquet(truth.path / "rollouts" / victim)["row_id"])
    cuts, _, _ = places(truth.path / "rollouts" / victim)
    assert len(cuts) > 60
    for cut in cuts:
        out = shutil.copytree(truth.path, tmp_path / "cut")
        os.truncate(out / "rollouts" / victim, cut)
        with RoundDir(out).lock():
            assert set(RoundDir(out).recover("rollouts")) == whole, cut
        assert validate_round(out) == [], cut
        assert len(list((out / ".quarantine").iterdir())) == 1, cut
        shutil.rmtree(out)
    # And the command itself, on a round where several are torn, each in another way.
    out = shutil.copytree(truth.path, tmp_path / "r")
    for name, cut in zip(names, (0, 4, cuts[len(cuts) // 2], -8, -1), strict=False):
        path = out / "rollouts" / name
        os.truncate(path, cut % path.stat().st_size)
    said = nursery.finish(truth.job.arguments(out))
    assert said.count("torn; moved to .quarantine") == 5
    assert differences(truth.rows, out, "rollouts") == (0, 0)


@pytest.mark.slow
def test_a_flipped_bit_anywhere_is_found(undisturbed, tmp_path):
    """A start sets aside a shard whose footer or key column is damaged; `validate` names the
    others."""
    truth = undisturbed("rollouts", "transformers")
    victim = RoundDir(truth.path).shard_paths("rollouts")[1].name
    at_places, footer, size = places(truth.path / "rollouts" / victim)
    rng = random.Random(0)
    for at in sorted(
        {*at_places, *rng.sample(range(footer, size), 150), *rng.sample(range(4, footer), 150)}
    ):
        out = shutil.copytree(truth.path, tmp_path / "r")
        path = out / "rollouts" / victim
        content = bytearray(path.read_bytes())
        content[at] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        with RoundDir(out).lock():
            keys = set(RoundDir(out).recover("rollouts"))
        assert keys <= set(truth.rows["row_id"]), at
        set_aside = len(keys) < truth.rows.height
        assert set_aside == (out / ".quarantine").exists(), at
        assert set_aside or any(victim in problem for problem in validate_round(out)), at
        shutil.rmtree(out)


# -- several writers -----------------------------------------------------------------------


def test_of_two_that_start_at_once_one_is_refused(nursery, undisturbed, tmp_path):
    truth = undisturbed("rollouts", "transformers")
    for attempt in range(2):
        out = tmp_path / f"r{attempt}"
        arguments = truth.job.arguments(out)
        racers = [nursery.start(arguments) for _ in range(2)]
        codes = [racer.wait() for racer in racers]
        said = [racer.said() for racer in racers]
        assert sorted(codes) in ([0, 1], [0, 0]), said
        if 1 in codes:
            assert "another process is writing here" in said[codes.index(1)]
        else:
            # On a busy machine one may begin when the other has ended.
            assert sum("24 rollouts, 0 of them new" in one for one in said) == 1, said
        assert not any("Traceback" in one for one in said)
        assert differences(truth.rows, out, "rollouts") == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["rollouts", "rewrite"])
def test_parts_that_start_at_once_while_one_is_killed(nursery, undisturbed, tmp_path, stage):
    truth = undisturbed(stage, "transformers")
    rng = random.Random(stage)
    for attempt in range(3):
        out = tmp_path / f"r{attempt}"
        fresh(out, truth.source)

        def part(index, out=out):
            settings = {"--num-shards": 3, "--shard-index": index, "--rows-per-shard": 1}
            return truth.job.arguments(out, **settings)

        passes = truth.passes["commit"] // 6
        dying = Death(rng.randint(1, passes), functions=COMMIT)
        parts = [nursery.start(part(0), dying), nursery.start(part(1)), nursery.start(part(2))]
        codes = [process.wait() for process in parts]
        assert codes[1:] == [0, 0], [process.said() for process in parts]
        assert codes[0] == -signal.SIGKILL
        nursery.finish(part(0))
        assert differences(truth.rows, out, stage) == (0, 0)


def test_a_whole_stage_beside_a_part_is_refused(nursery, undisturbed, tmp_path):
    truth = undisturbed("rollouts", "transformers")
    out = tmp_path / "r"
    half = truth.job.arguments(out, **{"--num-shards": 2, "--shard-index": 0})
    first = nursery.start(half)
    while not list((out / ".writers").glob("rollouts-0-of-2")):
        assert first.running, first.said()
        time.sleep(0.005)
    second = nursery.start(truth.job.arguments(out))
    assert (second.wait(), first.wait()) == (1, 0)
    assert "rollouts-0-of-2" in second.said()
    nursery.finish(truth.job.arguments(out))
    assert differences(truth.rows, out, "rollouts") == (0, 0)


@pytest.mark.slow
def test_workers_end_with_the_command_that_started_them(nursery, undisturbed, tmp_path):
    """Otherwise they would keep the round locked, and the same command would be refused."""
    truth = undisturbed("rollouts", "transformers")
    out = tmp_path / "r"
    slowly = {"--rows-per-shard": 1, "--max-num-seqs": 1, "--workers": 2}
    arguments = truth.job.arguments(out, **slowly)
    killed("mpd-gen", *arguments, until=lambda: num_shards(out) >= 2)
    until = time.monotonic() + 120  # not a time limit: with enough work they would go on for ever
    while any(is_held(path) for path in (out / ".writers").iterdir()):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert table(out, "rollouts").height < truth.rows.height
    nursery.finish(truth.job.arguments(out))
    assert differences(truth.rows, out, "rollouts") == (0, 0)


# -- the same rows by every way ------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["vllm", "transformers"])
def test_the_order_of_the_input_changes_no_row(nursery, undisturbed, tmp_path, backend):
    truth = undisturbed("rollouts", backend)
    lines = truth.job.prompts.read_text().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    shuffled = tmp_path / "prompts.jsonl"
    shuffled.write_text("".join(lines))
    out = tmp_path / "r"
    changed = {"--rows-per-shard": 5, "--max-num-seqs": 3}
    job = Job("rollouts", backend, shuffled)
    nursery.finish([*job.arguments(out, **changed), "--limit", 5])
    nursery.finish(truth.job.arguments(out))
    assert differences(truth.rows, out, "rollouts") == (0, 0)


# -- engines that die ----------------------------------------------------------------------


def engine_of(pid):
    """Return the pid of vLLM's engine process below `pid`, or None."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(status.read_text().rpartition(") ")[2].split()[1])
            # Its title; the name in `stat` is cut at 15 characters.
            if parent == pid and b"EngineCore" in (status.parent / "cmdline").read_bytes():
                return int(status.parent.name)
    return None


@pytest.mark.slow
def test_an_engine_process_that_is_killed_ends_the_job_at_once(nursery, undisturbed, tmp_path):
    """As the kernel kills it when memory runs out: it cannot report its own death."""
    truth = undisturbed("rollouts", "vllm")
    out = tmp_path / "r"
    arguments = truth.job.arguments(out, **{"--rows-per-shard": 1})
    apart = {"env": environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}}
    two = {"until": lambda: num_shards(out) >= 2, "stderr": subprocess.PIPE, "fresh": True}
    process = started("mpd-gen", *arguments, **two, **apart)
    os.kill(engine_of(process.pid), signal.SIGKILL)
    _, said = process.communicate(timeout=60)  # not a speed: without an end it would hang for ever
    assert process.returncode == 1
    assert said.count("error: ") == 1
    assert "the engine died" in said
    assert "Traceback" not in said
    assert 2 <= table(out, "rollouts").height < truth.rows.height
    nursery.finish(arguments)
    assert differences(truth.rows, out, "rollouts") == (0, 0)
