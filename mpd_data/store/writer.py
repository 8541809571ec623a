"""The shard writer: rows in, committed Parquet files out.

A shard is staged, closed, fsynced, linked under the first free name, then added to the manifest:
see docs/contract.md. A thread does this, row group by row group, so that the engine does not wait
for the disk and a shard is never whole in memory.
"""

import contextlib
import dataclasses
import errno
import json
import os
import sys
import time
import uuid
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from mpd_data.common.errors import DataError, MPDError
from mpd_data.common.files import fsync_directory
from mpd_data.store.locks import short_lock
from mpd_data.store.manifest import append_manifest
from mpd_data.store.round import RoundDir
from mpd_data.store.schema import ENUMS, METADATA_KEY, SCHEMA_VERSION, SCHEMAS, Stage
from mpd_data.store.shards import ROWS_PER_GROUP, describe

BYTES_PER_GROUP = 16 << 20
# The trainer reads rewrites at random. Queries read rollouts from end to end, where each row group
# costs some 3 us a column: for small groups that is more than reading the values.
_ROLLOUTS_PER_GROUP = 256
# At most this many row groups wait for the disk; then the engine waits too.
_WAITING_GROUPS = 4
# Numbers compress better split by byte than by dictionary.
_SPLIT_COLUMNS = {
    "prompt_ids", "completion_ids", "input_ids", "teacher_prompt_ids",
    "topk_ids", "topk_logprobs", "tail_logprobs",
    "draft_topk_ids", "draft_topk_logprobs", "draft_tail_logprobs",
}  # fmt: skip
_DICTIONARY_COLUMNS = {"finish_reason", "rewrite_finish_reason", "status", "prompt", "problem"}


def commit_file(staged: Path, folder: Path, hard_links: bool) -> Path:
    """Give a closed, fsynced `staged` file the first free name in `folder`, and return that; never
    replace a file. Without hard links an empty file reserves the name and is then replaced: a kill
    between the two leaves an empty shard, which the next run quarantines like any torn file."""
    names = (path.stem.removeprefix("part-") for path in folder.glob("part-*.parquet"))
    # A file that somebody named otherwise takes no number.
    index = max((int(name) for name in names if name.isdecimal()), default=-1) + 1
    while True:
        final = folder / f"part-{index:05d}.parquet"
        try:
            if hard_links:
                os.link(staged, final)
            else:
                os.close(os.open(final, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
                staged.replace(final)
        except FileExistsError:
            index += 1
            continue
        fsync_directory(folder)
        staged.unlink(missing_ok=True)
        return final


def has_hard_links(staging: Path) -> bool:
    """Return whether the file system of `staging` has hard links, by making one."""
    probe = staging / f"probe-{uuid.uuid4().hex}"
    target = probe.with_suffix(".link")
    probe.touch()
    try:
        os.link(probe, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        return False
    finally:
        probe.unlink()
        target.unlink(missing_ok=True)
    return True


@dataclasses.dataclass
class _Staged:
    """A shard that is being written."""

    path: Path
    sink: IO[bytes]
    parquet: pq.ParquetWriter

    def drop(self) -> None:
        """Delete the file; its rows stay missing."""
        with contextlib.suppress(OSError, pa.ArrowInvalid):
            self.parquet.close()
        with contextlib.suppress(OSError):
            self.sink.close()
        self.path.unlink(missing_ok=True)


class ShardWriter:
    """Write rows of one stage into committed shards.

    A shard is committed when it has `rows_per_shard` rows or is `seconds_per_shard` old. A kill
    loses the open Parquet file, so both bound what it can cost. Use as a context manager: leaving
    it, also by an exception, commits the rows that it has.

    Raise MPDError where the disk is full or the folder read-only, from the call that wrote or from
    a later one.
    """

    def __init__(
        self,
        round_dir: RoundDir,
        stage: Stage,
        metadata: Mapping[str, Any],
        rows_per_shard: int = 1024,
        seconds_per_shard: float = 300.0,
    ) -> None:
        self._round = round_dir
        self._stage: Stage = stage
        self._schema = SCHEMAS[stage]
        self._rows_per_group = _ROLLOUTS_PER_GROUP if stage == "rollouts" else ROWS_PER_GROUP
        text = json.dumps({"schema_version": SCHEMA_VERSION, "stage": stage, **metadata})
        self._file_schema = self._schema.with_metadata({METADATA_KEY: text.encode()})
        self._rows_per_shard = rows_per_shard
        self._seconds_per_shard = seconds_per_shard
        self._rows: list[dict[str, Any]] = []
        self._group_bytes = 0
        self._in_shard = 0  # rows of the shard that is being written, those in `_rows` too
        self._oldest = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"{stage}-writer")
        self._pending: deque[Future[None]] = deque()
        # The thread's own:
        self._staged: _Staged | None = None
        self._broken = False
        self.rows_committed = 0
        round_dir.folder(stage).mkdir(parents=True, exist_ok=True)
        fsync_directory(round_dir.path)
        self._hard_links = has_hard_links(round_dir.staging)
        if not self._hard_links:
            print(
                f"{round_dir.path}: no hard links on this file system; shards are committed by"
                " reserving their name instead.",
                file=sys.stderr,
            )

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.commit()
        finally:
            self._thread.shutdown()

    def add(self, *rows: dict[str, Any]) -> None:
        """Take rows (exactly the stage's columns) that belong together: they go into one shard.
        Commit a shard where one is due."""
        for row in rows:
            self._check(row)
        if not self._in_shard:
            self._oldest = time.monotonic()
        if len(self._rows) + len(rows) > self._rows_per_group:
            self._close_group()
        # All at once: an interrupt must not leave a part of them here to be committed.
        self._rows.extend(rows)
        self._in_shard += len(rows)
        self._group_bytes += sum(
            4 * len(value) for row in rows for value in row.values() if hasattr(value, "__len__")
        )
        if len(self._rows) >= self._rows_per_group or self._group_bytes >= BYTES_PER_GROUP:
            self._close_group()
        self.commit_if_due()

    def _check(self, row: dict[str, Any]) -> None:
        columns = set(self._schema.names)
        if row.keys() != columns:
            missing, extra = columns - row.keys(), row.keys() - columns
            raise DataError(f"{self._stage} row: columns missing {missing}, unknown {extra}")
        for name, allowed in ENUMS.items():
            if row.get(name) is not None and row[name] not in allowed:
                raise DataError(f"{self._stage} row: {name} is {row[name]!r}, not one of {allowed}")

    def commit_if_due(self) -> None:
        """Commit a shard that is large or old enough; call it also while waiting for results."""
        if self._in_shard >= self._rows_per_shard or (
            self._in_shard and time.monotonic() - self._oldest >= self._seconds_per_shard
        ):
            self._close_shard()
        self._collect(_WAITING_GROUPS)

    def commit(self) -> None:
        """Commit the gathered rows as one shard, durable when this returns."""
        self._close_shard()
        self._collect(0)

    def _close_group(self) -> None:
        if self._rows:
            rows = self._rows
            # Forgotten here before they are submitted: an interrupt in between leaves the rows
            # missing, never doubled.
            self._rows, self._group_bytes = [], 0
            self._pending.append(self._thread.submit(self._write_group, rows))

    def _close_shard(self) -> None:
        self._close_group()
        self._in_shard = 0
        self._pending.append(self._thread.submit(self._commit_staged))

    def _collect(self, waiting: int) -> None:
        """Wait until no more than `waiting` pieces of work are left to the thread; raise the first
        error of those that have ended."""
        while self._pending and (len(self._pending) > waiting or self._pending[0].done()):
            done = self._pending[0]
            done.exception()  # waits: after an interrupt here, leaving the writer waits for it
            self._pending.popleft()
            try:
                done.result()
            except OSError as error:
                raise MPDError(
                    f"{self._round.path}: writing a shard failed: {error.strerror or error}. Every"
                    " row committed before is safe; free space or give a writable place, then run"
                    " the same command again."
                ) from error

    # -- in the thread ----------------------------------------------------------------

    def _write_group(self, rows: list[dict[str, Any]]) -> None:
        if self._broken:
            return  # the caller is about to get the error; these rows stay missing
        try:
            self._write_table(pa.Table.from_pylist(rows, schema=self._schema))
        except BaseException:
            self._break()
            raise

    def _write_table(self, table: pa.Table) -> None:
        if self._staged is None:
            self._staged = self._stage_shard()
        self._staged.parquet.write_table(table, row_group_size=self._rows_per_group)

    def _stage_shard(self) -> _Staged:
        path = self._round.staging / f"{self._stage}-{os.getpid()}-{uuid.uuid4().hex}.parquet"
        sink = path.open("wb")
        parquet = pq.ParquetWriter(
            sink,
            self._file_schema,
            compression="zstd",
            compression_level=3,
            use_dictionary=[f.name for f in self._schema if f.name in _DICTIONARY_COLUMNS],
            use_byte_stream_split=[
                f"{f.name}.list.element" for f in self._schema if f.name in _SPLIT_COLUMNS
            ],
            write_page_checksum=True,
        )
        return _Staged(path, sink, parquet)

    def _commit_staged(self) -> None:
        staged = self._staged
        if self._broken or staged is None:
            return
        try:
            staged.parquet.close()
            staged.sink.flush()
            os.fsync(staged.sink.fileno())
            staged.sink.close()
            shard = describe(staged.path, self._stage)
            folder = self._round.folder(self._stage)
            # Both under one lock: a writer that starts now finds folder and manifest in step.
            with short_lock(self._round.path):
                if not self._round.is_locked:
                    # An interrupt released the round's lock while this writer was closing: another
                    # process may have begun to make these rows.
                    problem = "the lock was released before the last shard was written."
                    raise MPDError(f"{self._round.path}: {problem}")
                # The link commits the rows, whatever happens to the manifest afterwards.
                self._staged = None
                final = commit_file(staged.path, folder, self._hard_links)
                self.rows_committed += shard.rows
                shard = dataclasses.replace(shard, name=final.name)
                append_manifest(self._round.manifest_path(self._stage), shard)
        except BaseException:
            self._break()
            raise

    def _break(self) -> None:
        """Write nothing more after an error: a disk that is full now and not a second later would
        leave gaps that look intended."""
        self._broken = True
        if self._staged is not None:
            staged, self._staged = self._staged, None
            staged.drop()
