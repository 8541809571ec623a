"""Writing shards: rows in, committed Parquet files out.

Staged, closed, fsynced, linked under the first free name, indexed: see docs/contract.md.
"""

import dataclasses
import errno
import json
import os
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mpd_data.errors import DataError, MPDError
from mpd_data.schema import ENUMS, SCHEMA_VERSION, SCHEMAS
from mpd_data.shards import (
    METADATA_KEY,
    ROWS_PER_GROUP,
    RoundDir,
    Stage,
    describe,
    fsync_directory,
)

BYTES_PER_GROUP = 16 << 20
# Numbers compress better split by byte than by dictionary.
_SPLIT_COLUMNS = {
    "prompt_ids",
    "completion_ids",
    "input_ids",
    "teacher_prompt_ids",
    "topk_ids",
    "topk_logprobs",
    "tail_logprobs",
}
_DICTIONARY_COLUMNS = {"finish_reason", "rewrite_finish_reason", "status", "prompt", "problem"}


def commit_file(staged: Path, folder: Path, hard_links: bool) -> Path:
    """Gives a closed, fsynced `staged` file the first free name in `folder`; never replaces.

    Without hard links the name is reserved by an empty file, then replaced: a kill between
    the two leaves an empty shard, which the next run quarantines like any torn file.
    """
    taken = [int(p.stem.removeprefix("part-")) for p in folder.glob("part-*.parquet")]
    index = max(taken, default=-1) + 1
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
    """Whether the file system of `staging` can link, tried with a file of our own."""
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


class ShardWriter:
    """Writes rows of one stage into committed shards.

    Rows gather in memory until a shard is due, by number or by age, since an open Parquet file
    is lost with its writer: what a kill can cost is bounded by both. Use as a context manager;
    leaving it, also by an exception, commits what is there.

    Raises MPDError where the disk is full or the folder read-only, naming what to do.
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
        self._metadata = {
            METADATA_KEY: json.dumps(
                {"schema_version": SCHEMA_VERSION, "stage": stage, **metadata}
            ).encode()
        }
        self._rows_per_shard = rows_per_shard
        self._seconds_per_shard = seconds_per_shard
        self._groups: list[pa.Table] = []
        self._rows: list[dict[str, Any]] = []
        self._group_bytes = 0
        self._oldest = 0.0
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
        self.commit()

    def add(self, *rows: dict[str, Any]) -> None:
        """Takes rows (exactly the stage's columns) that belong together: they go into one shard.
        Commits a shard where one is due."""
        for row in rows:
            self._check(row)
        if not self._rows and not self._groups:
            self._oldest = time.monotonic()
        if len(self._rows) + len(rows) > ROWS_PER_GROUP:
            self._close_group()
        # All at once: an interrupt must not leave a part of them here to be committed.
        self._rows.extend(rows)
        self._group_bytes += sum(
            4 * len(value) for row in rows for value in row.values() if hasattr(value, "__len__")
        )
        if len(self._rows) >= ROWS_PER_GROUP or self._group_bytes >= BYTES_PER_GROUP:
            self._close_group()
        self.commit_if_due()

    def _check(self, row: dict[str, Any]) -> None:
        if row.keys() != set(self._schema.names):
            missing, extra = (
                set(self._schema.names) - row.keys(),
                row.keys() - set(self._schema.names),
            )
            raise DataError(f"{self._stage} row: columns missing {missing}, unknown {extra}")
        for name, allowed in ENUMS.items():
            if row.get(name) is not None and row[name] not in allowed:
                raise DataError(f"{self._stage} row: {name} is {row[name]!r}, not one of {allowed}")

    def commit_if_due(self) -> None:
        """Commits by age too; call it while waiting for results."""
        pending = sum(table.num_rows for table in self._groups) + len(self._rows)
        if pending >= self._rows_per_shard or (
            pending and time.monotonic() - self._oldest >= self._seconds_per_shard
        ):
            self.commit()

    def _close_group(self) -> None:
        if self._rows:
            table = pa.Table.from_pylist(self._rows, schema=self._schema)
            # Out of one place before they are in the next: see _commit_groups.
            self._rows, self._group_bytes = [], 0
            self._groups.append(table)

    def commit(self) -> None:
        """Commits the gathered rows as one shard, durable when this returns."""
        self._close_group()
        if not self._groups:
            return
        try:
            self._commit_groups()
        except OSError as error:
            raise MPDError(
                f"{self._round.path}: writing a shard failed: {error.strerror or error}. Every row"
                " committed before is safe; free space or give a writable place, then run the same"
                " command again."
            ) from error

    def _commit_groups(self) -> None:
        staged = self._round.staging / f"{self._stage}-{os.getpid()}-{uuid.uuid4().hex}.parquet"
        schema = self._schema.with_metadata(self._metadata)
        numbers = [f"{f.name}.list.element" for f in self._schema if f.name in _SPLIT_COLUMNS]
        with (
            staged.open("wb") as sink,
            pq.ParquetWriter(
                sink,
                schema,
                compression="zstd",
                compression_level=3,
                use_dictionary=[f.name for f in self._schema if f.name in _DICTIONARY_COLUMNS],
                use_byte_stream_split=numbers,
                write_page_checksum=True,
            ) as writer,
        ):
            for table in self._groups:
                writer.write_table(table, row_group_size=ROWS_PER_GROUP)
            writer.close()
            sink.flush()
            os.fsync(sink.fileno())
        shard = describe(staged, self._stage)
        # Forgotten before they are linked: an error or an interrupt after the link would have the
        # rows written again on leaving. One before it leaves them owed, to be made anew.
        self._groups = []
        final = commit_file(staged, self._round.folder(self._stage), self._hard_links)
        self.rows_committed += shard.rows
        self._round.append_manifest(self._stage, dataclasses.replace(shard, name=final.name))
