"""The commit protocol: whatever dies, a file under its final name is whole and no row is lost."""

import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import time
from contextlib import suppress

import polars as pl
import pyarrow.parquet as pq
import pytest
from conftest import python

from mpd_data.common.errors import ConfigError, DataError, MPDError
from mpd_data.inspect.stats import scan_round
from mpd_data.inspect.validate import validate_round
from mpd_data.select.pass_rates import PassRates
from mpd_data.store.round import RoundDir, scratch_of
from mpd_data.store.shards import read_metadata
from mpd_data.store.writer import ShardWriter, commit_file

METADATA = {"eos_token_id": 2, "vocab_size": 100_000}


def error_row(i):
    return {"row_id": f"{i:032x}", "stage": "rollouts", "prompt_id": str(i), "message": "m" * 50}


def rollout_row(i, tokens=5):
    return {
        "row_id": f"{i:032x}", "prompt_id": str(i), "round": 1, "sample_idx": 0, "prompt": "p",
        "completion": "c", "prompt_ids": [1, 2], "completion_ids": list(range(tokens)),
        "num_prompt_tokens": 2, "num_completion_tokens": tokens, "finish_reason": "stop",
        "problem": "p", "answer": None, "gold_answer": None, "is_correct": None,
        "check_error": None, "repetition": 0.0, "metadata": None, "seed": i,
        "num_thinking_tokens": None, "sampled_logprobs": None,
    }  # fmt: skip


def write(path, rows, **options):
    round_dir = RoundDir(path)
    with (
        round_dir.lock(),
        ShardWriter(round_dir, "rollouts", METADATA, **options) as writer,
    ):
        for row in rows:
            writer.add(row)
    return round_dir


def test_rows_come_back_and_polars_reads_the_folder(tmp_path):
    round_dir = write(tmp_path / "r", map(rollout_row, range(650)), rows_per_shard=300)
    assert [shard.rows for shard in round_dir.manifest("rollouts")] == [300, 300, 50]
    assert round_dir.keys("rollouts") == {f"{i:032x}" for i in range(650)}
    assert pl.scan_parquet(tmp_path / "r" / "rollouts").select(pl.len()).collect().item() == 650
    first = round_dir.shard_paths("rollouts")[0]
    groups = [shard.row_groups for shard in round_dir.manifest("rollouts")]
    assert groups == [[256, 44], [256, 44], [50]]
    assert read_metadata(first)["stage"] == "rollouts"
    assert validate_round(tmp_path / "r") == []


def test_all_null_columns_keep_their_type(tmp_path):
    """A schema inferred from the first batch would make `answer` null and not concatenate."""
    write(tmp_path / "r", [rollout_row(0)])
    write(tmp_path / "r", [rollout_row(1) | {"answer": "4", "is_correct": True}])
    frame = pl.scan_parquet(tmp_path / "r" / "rollouts").collect().sort("row_id")
    assert frame["answer"].to_list() == [None, "4"]


def test_a_round_begun_before_a_column_was_added_goes_on(tmp_path):
    """Older shards lack a nullable column; every reader takes it as null, beside new shards."""
    path, column = tmp_path / "r", "num_thinking_tokens"
    round_dir = write(path, [rollout_row(0)])
    (shard,) = round_dir.shard_paths("rollouts")
    older = pq.read_table(shard).drop_columns([column])
    pq.write_table(older, shard)
    round_dir.manifest_path("rollouts").unlink()
    write(path, [rollout_row(1) | {column: 3}])
    with round_dir.lock():
        round_dir.recover("rollouts")
    assert validate_round(path) == []
    assert scan_round(path).sort("row_id").collect()[column].to_list() == [None, 3]
    read = list(round_dir.rows("rollouts", ["row_id", column]))
    assert [row[column] for row in read] == [None, 3]
    # A column that cannot be null is no such column.
    pq.write_table(older.drop_columns(["seed"]), shard)
    assert any("columns or types" in problem for problem in validate_round(path))


def test_a_shard_closes_by_age(tmp_path):
    round_dir = RoundDir(tmp_path / "r")
    with round_dir.lock(), ShardWriter(round_dir, "rollouts", {}, seconds_per_shard=0.05) as writer:
        writer.add(rollout_row(0))
        time.sleep(0.06)
        writer.add(rollout_row(1))
        writer.add(rollout_row(2))
    assert [shard.rows for shard in round_dir.manifest("rollouts")] == [2, 1]


def test_wrong_rows_are_refused(tmp_path):
    with pytest.raises(DataError, match="missing.*seed"):
        write(tmp_path / "a", [{k: v for k, v in rollout_row(0).items() if k != "seed"}])
    with pytest.raises(DataError, match="finish_reason"):
        write(tmp_path / "b", [rollout_row(0) | {"finish_reason": "tired"}])


@pytest.mark.parametrize("hard_links", [True, False])
def test_commit_never_replaces(tmp_path, hard_links):
    folder = tmp_path / "folder"
    folder.mkdir()
    for text in ("one", "two"):
        staged = tmp_path / "staged"
        staged.write_text(text)
        commit_file(staged, folder, hard_links)
        assert not staged.exists()
    assert [p.read_text() for p in sorted(folder.iterdir())] == ["one", "two"]


@pytest.mark.parametrize("hard_links", [True, False])
def test_processes_racing_for_names_lose_no_file(tmp_path, hard_links):
    """Each process sees the same next name as free; every file must still find its own."""
    code = """
        import sys
        from pathlib import Path
        from mpd_data.store.writer import commit_file
        root = Path(sys.argv[1])
        for i in range(60):
            staged = root / f"staged-{sys.argv[2]}-{i}"
            staged.write_text(staged.name)
            commit_file(staged, root / "folder", sys.argv[3] == "True")
    """
    (tmp_path / "folder").mkdir()
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), tmp_path, str(n), str(hard_links)]
        )
        for n in range(4)
    ]
    assert [racer.wait() for racer in racers] == [0] * 4
    found = {path.read_text() for path in (tmp_path / "folder").iterdir()}
    assert found == {f"staged-{n}-{i}" for n in range(4) for i in range(60)}


@pytest.mark.parametrize("keep", [0, 1, 7, 0.1, 0.5, 0.9, -9, -8, -1])
def test_a_torn_shard_is_set_aside_and_its_rows_owed(tmp_path, keep):
    round_dir = write(tmp_path / "r", map(rollout_row, range(900)), rows_per_shard=300)
    victim = round_dir.shard_paths("rollouts")[1]
    size = victim.stat().st_size
    os.truncate(victim, int(size * keep) if isinstance(keep, float) else keep % size)
    with round_dir.lock():
        keys = round_dir.recover("rollouts")
    assert keys == {f"{i:032x}" for i in (*range(300), *range(600, 900))}
    assert len(list((tmp_path / "r" / ".quarantine").iterdir())) == 1
    assert validate_round(tmp_path / "r") == []


def test_manifest_is_rebuilt_from_the_folder(tmp_path):
    round_dir = write(tmp_path / "r", map(rollout_row, range(300)), rows_per_shard=100)
    whole = round_dir.manifest("rollouts")
    path = round_dir.manifest_path("rollouts")
    lines = path.read_bytes().splitlines(keepends=True)
    for broken in (
        None,  # lost
        b"".join(lines[:1]),  # killed between link and append
        b"".join(lines[:2]) + lines[2][:20],  # killed inside the append
        b"garbage\n" + b"".join(lines[1:]),
        b"".join(lines) + lines[2].replace(b"part-00002", b"part-00009"),  # names a lost file
    ):
        path.unlink(missing_ok=True)
        if broken is not None:
            path.write_bytes(broken)
        with round_dir.lock():
            assert len(round_dir.recover("rollouts")) == 300
        assert round_dir.manifest("rollouts") == whole


def test_append_after_a_torn_line_starts_a_new_one(tmp_path):
    round_dir = write(tmp_path / "r", [rollout_row(0)])
    with round_dir.manifest_path("rollouts").open("ab") as file:
        file.write(b'{"name":"part-0')
    write(tmp_path / "r", [rollout_row(1)])
    names = [shard.name for shard in round_dir.manifest("rollouts")]
    assert names == ["part-00000.parquet", "part-00001.parquet"]


def test_a_second_writer_is_refused(tmp_path):
    round_dir = RoundDir(tmp_path / "r")
    code = "from pathlib import Path; from mpd_data.store.round import RoundDir; import sys\n"
    code += "with RoundDir(Path(sys.argv[1])).lock(): pass"
    with round_dir.lock():
        other = python(code, tmp_path / "r", code=1)
        me = f"pid {os.getpid()} on {socket.gethostname()}"
        assert re.search(rf"another process is writing here \(\S+, {me}\)\. Wait", other.stderr)
        # One of an older version is empty; what else it holds is no name.
        (lock,) = (tmp_path / "r" / ".writers").iterdir()
        for said in ("", "\xff\n" * 300, "12 of these"):
            lock.write_text(said)
            other = python(code, tmp_path / "r", code=1)
            assert re.search(r"writing here \([^\s,]+\)\. Wait", other.stderr)
    python(code, tmp_path / "r")


def test_other_settings_are_refused_with_a_list(tmp_path):
    round_dir = RoundDir(tmp_path / "r")
    with round_dir.lock():
        round_dir.claim("rollouts", {"sampling": {"temperature": 1.0}, "seed": 0}, {})
        round_dir.claim("rollouts", {"sampling": {"temperature": 1.0}, "seed": 0}, {})
        with pytest.raises(ConfigError) as caught:
            round_dir.claim("rollouts", {"sampling": {"temperature": 0.7}, "seed": 0}, {})
    assert "sampling.temperature: saved 1.0 / now 0.7" in str(caught.value)
    assert "--overwrite" in str(caught.value)


def test_a_doubled_row_is_found(tmp_path):
    round_dir = write(tmp_path / "r", [rollout_row(0)])
    write(tmp_path / "r", [rollout_row(0)])
    with pytest.raises(DataError, match="twice"):
        round_dir.keys("rollouts")
    assert any("twice" in problem for problem in validate_round(tmp_path / "r"))


def test_validate_finds_strangers_and_changed_bytes(tmp_path):
    round_dir = write(tmp_path / "r", map(rollout_row, range(100)))
    (tmp_path / "r" / "rollouts" / "notes.txt").write_text("hello")
    path = round_dir.shard_paths("rollouts")[0]
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    problems = "\n".join(validate_round(tmp_path / "r"))
    assert "notes.txt" in problems
    assert "sha256" in problems


def test_a_full_disk_loses_nothing_committed(tmp_path):
    code = """
        import resource, sys, time
        from pathlib import Path
        sys.path.insert(0, "tests")
        from test_shards import rollout_row, write
        limit = int(sys.argv[2])
        def rows():
            for i in range(400):
                if i == 250:  # from here on the kernel refuses every write past the limit
                    while len(list((Path(sys.argv[1]) / "rollouts").glob("*"))) < 2:
                        time.sleep(0.01)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                yield rollout_row(i, tokens=2000 + i)
        write(Path(sys.argv[1]), rows(), rows_per_shard=100)
    """
    assert "writing a shard failed" in python(code, tmp_path / "r", 4096, code=1).stderr
    round_dir = RoundDir(tmp_path / "r")
    with round_dir.lock():
        assert len(round_dir.recover("rollouts")) == 200
    write(tmp_path / "r", map(rollout_row, range(200, 400)))
    assert len(round_dir.keys("rollouts")) == 400
    assert validate_round(tmp_path / "r") == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096


def test_an_unwritable_place_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MPDError, match="writable"), RoundDir(tmp_path / "file" / "r").lock():
        pass


def test_a_damaged_key_column_is_set_aside_too(tmp_path):
    """Whole footer, whole size, rotten bytes."""
    round_dir = write(tmp_path / "r", map(rollout_row, range(200)), rows_per_shard=100)
    victim = round_dir.shard_paths("rollouts")[0]
    column = pq.read_metadata(victim).row_group(0).column(0)
    content = bytearray(victim.read_bytes())
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    victim.write_bytes(content)
    with round_dir.lock():
        assert len(round_dir.recover("rollouts")) == 100


def test_rows_are_not_written_twice_when_the_manifest_fails(tmp_path):
    """The disk gives out between link and append: the rows are in the round, once."""
    round_dir = RoundDir(tmp_path / "r")
    with round_dir.lock():
        round_dir.manifest_path("rollouts").mkdir()
        with (
            pytest.raises(MPDError, match="writing a shard failed"),
            ShardWriter(round_dir, "rollouts", METADATA) as writer,
        ):
            writer.add(rollout_row(0))
    round_dir.manifest_path("rollouts").rmdir()
    write(tmp_path / "r", [rollout_row(1)])
    with round_dir.lock():
        assert len(round_dir.recover("rollouts")) == 2
    assert validate_round(tmp_path / "r") == []


def interrupted(path, pairs, at):
    """Writes pairs of rows that belong together, interrupted before line `at` of the writer that
    runs; says whether it came so far."""
    seen = 0

    def trace(frame, event, _):
        nonlocal seen
        if not frame.f_code.co_filename.endswith("mpd_data/store/writer.py"):
            return None
        if event == "line":
            seen += 1
            if seen == at:
                raise KeyboardInterrupt
        return trace

    round_dir = RoundDir(path)
    with round_dir.lock():
        done = round_dir.recover("rollouts")
        remaining = [pair for pair in pairs if pair[0]["row_id"] not in done]
        try:
            with ShardWriter(round_dir, "rollouts", METADATA, rows_per_shard=4) as writer:
                sys.settrace(trace)
                for pair in remaining:
                    writer.add(*pair)
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
    return False


@pytest.mark.slow
def test_an_interrupt_at_any_line_doubles_and_parts_no_rows(tmp_path):
    """Ctrl-C raises wherever the writer is, and leaving it commits what is there: no row twice, no
    pair in half, and the same command makes the rest."""
    pairs = [(rollout_row(2 * i), rollout_row(2 * i + 1)) for i in range(3)]
    at, went_on = 1, True
    while went_on:
        path = tmp_path / str(at)
        went_on = interrupted(path, pairs, at)
        with RoundDir(path).lock():
            found = RoundDir(path).recover("rollouts")
        for first, second in pairs:
            assert (first["row_id"] in found) == (second["row_id"] in found), at
        assert not interrupted(path, pairs, 0)
        assert validate_round(path) == [], at
        assert len(RoundDir(path).keys("rollouts")) == 6, at
        at += 1
    assert at > 100


def test_shards_of_unknown_settings_are_refused(tmp_path):
    round_dir = write(tmp_path / "r", [rollout_row(0)])
    with round_dir.lock(), pytest.raises(ConfigError, match="does not say how they were made"):
        round_dir.claim("rollouts", {"seed": 0}, {})


def test_discarding_leaves_nothing_of_a_stage(tmp_path):
    round_dir = RoundDir(tmp_path / "r")
    with round_dir.lock():
        round_dir.claim("rollouts", {"seed": 0}, {})
    write(tmp_path / "r", [rollout_row(0)])
    with round_dir.lock():
        round_dir.discard("rollouts")
        round_dir.claim("rollouts", {"seed": 1}, {})
        assert round_dir.recover("rollouts") == set()


@pytest.mark.parametrize(
    "stages, is_left",
    [(("rollouts",), True), (("distill",), False), (("rollouts", "distill"), False)],
)
def test_the_rows_of_a_killed_pass_go_with_the_rewrites(tmp_path, stages, is_left):
    round_dir = write(tmp_path / "r", [rollout_row(0)])
    scratch_of(round_dir).path.mkdir()
    with round_dir.lock():
        round_dir.discard(*stages)
    assert scratch_of(round_dir).path.exists() == is_left


@pytest.mark.parametrize("stage, rate", [("rollouts", 2 / 3), ("distill", None)])
def test_a_pass_rate_waits_for_samples_that_can_come(tmp_path, stage, rate):
    """A sample that failed for good will not come; a rewrite that failed says nothing of it."""
    rows = [rollout_row(i) | {"prompt_id": "p", "is_correct": i > 0} for i in range(3)]
    round_dir = RoundDir(tmp_path / "r")
    metadata = METADATA | {"num_samples": 4}
    with round_dir.lock():
        with ShardWriter(round_dir, "rollouts", metadata) as writer:
            for row in rows:
                writer.add(row)
        with ShardWriter(round_dir, "errors", {}) as writer:
            failed = {"row_id": f"{9:032x}", "stage": stage, "prompt_id": "p", "message": "m"}
            writer.add(failed)
    rates = PassRates(round_dir, round_dir.shard_paths("rollouts"))
    assert rates.of("p") == (None if rate is None else pytest.approx(rate))
    assert len(rates.waiting) == (3 if rate is None else 0)


# For each line of its input, a child that makes or completes a round. It dies at the n-th of its
# own system calls that change the disk.
FORKS = """
    import os, sys, traceback
    from pathlib import Path
    sys.path.insert(0, "tests")
    from test_shards import rollout_row
    from mpd_data.store.round import RoundDir
    from mpd_data.store.writer import ShardWriter

    def make(path, count, left):
        def die(event, arguments):
            nonlocal left
            changes = event in ("os.link", "os.rename", "os.remove", "os.mkdir", "os.truncate") or (
                event == "open" and path in str(arguments[0])
            )
            if changes:
                left -= 1
                if left < 0:
                    os._exit(9)
        round_dir = RoundDir(Path(path))
        sys.addaudithook(die)
        with round_dir.lock():
            round_dir.claim("rollouts", {"seed": 0}, {})
            done = round_dir.recover("rollouts")
            print("ready", flush=True)
            size = max(2, count // 100)
            settings = {"eos_token_id": 2, "vocab_size": 100_000}
            with ShardWriter(round_dir, "rollouts", settings, rows_per_shard=size) as writer:
                for i in range(count):
                    row = rollout_row(i)
                    if row["row_id"] not in done:
                        writer.add(row)

    for line in sys.stdin:
        path, count, left = line.split("\\t")
        pid = os.fork()
        if pid == 0:
            try:
                make(path, int(count), int(left))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print("pid", pid, flush=True)
        print("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture
def forks():
    """`forks(path, count, left)` makes a round of `count` rows in a process that dies at its change
    number `left`, or is killed after `seconds`. Return its exit code."""
    words = [sys.executable, "-c", textwrap.dedent(FORKS)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, text=True, bufsize=1, **pipes) as process:

        def fork(path, count, left=100_000, seconds=None):
            process.stdin.write(f"{path}\t{count}\t{left}\n")
            for line in process.stdout:
                word, *number = line.split()
                if word == "pid":
                    pid = int(*number)
                elif word == "ready" and seconds is not None:
                    time.sleep(seconds)
                    with suppress(ProcessLookupError):  # it was faster
                        os.kill(pid, signal.SIGKILL)
                elif word == "ended":
                    return int(*number)
            raise AssertionError("the forks' parent is dead")

        yield fork
        process.stdin.close()


@pytest.mark.slow
def test_death_between_any_two_system_calls(forks, tmp_path):
    """The same round, killed at its 1st, 2nd, 3rd … change of the disk, each time from anew and
    each time completed afterwards to the same rows."""
    expected = {f"{i:032x}" for i in range(4)}
    deaths = 0
    for n in range(0, 200, 2):
        path = tmp_path / f"r{n}"
        if forks(path, 4, n) != 9:
            break
        deaths += 1
        assert forks(path, 4) == 0, n
        assert RoundDir(path).keys("rollouts") == expected, n
        assert validate_round(path) == [], n
    else:
        raise AssertionError("it never finished")
    assert deaths > 10


@pytest.mark.slow
def test_sigkill_at_random_moments(forks, tmp_path):
    rng = random.Random(0)
    path = tmp_path / "r"
    codes = [forks(path, 700, seconds=rng.uniform(0, 0.15)) for _ in range(25)]
    assert codes.count(-signal.SIGKILL) >= 3
    assert forks(path, 700) == 0
    round_dir = RoundDir(path)
    assert round_dir.keys("rollouts") == {f"{i:032x}" for i in range(700)}
    assert validate_round(path) == []
    assert list(round_dir.staging.iterdir()) == []
