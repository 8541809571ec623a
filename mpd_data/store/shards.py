"""Shards: the Parquet files of a round, how they are read and how a round lies on disk.

    data/round3/
      run.json                  settings and versions of each stage that ran here (run_record.py)
      rollouts.manifest.jsonl   one line per committed shard (manifest.py)
      rollouts/part-00000.parquet
      distill.manifest.jsonl, distill/, errors.manifest.jsonl, errors/   likewise
      .staging/                 half-written files; safe to delete when nothing runs
      .writers/, .lock          who is writing (locks.py)
      .status/                  the progress of each writer (progress.py)
      .quarantine/              torn shards; their rows are missing again

The folder is the truth and the manifest an index of it. A file under its final name is
whole: it is written in `.staging`, fsynced, then *linked* to its name, which never replaces
another file (writer.py). A row's key (`row_id`) is the hash of what determines the row: a restart
computes the missing rows by set difference, whatever the order of its input.
"""

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from mpd_data.common.errors import DataError
from mpd_data.common.files import json_object, sha256_of
from mpd_data.common.records import Record, require
from mpd_data.store.keys import KeySet, Packed, pack, twice
from mpd_data.store.schema import KEYS, METADATA_KEY, SCHEMA_VERSION, SCHEMAS, TOKEN_COLUMN, Stage

# Rewrites: a shuffled reader fetches whole row groups, and small ones keep a random read near
# 80 ms. Other stages: this many rows become Python objects at a time.
ROWS_PER_GROUP = 64
# Files that are read at the same time: opening them takes most of it.
_READERS = 8

_T = TypeVar("_T")

# What pyarrow raises for damaged bytes, also for a name in a footer that is missing or not UTF-8.
PARQUET_ERRORS = (pa.ArrowException, OSError, ValueError, KeyError, TypeError)


@dataclass(frozen=True)
class Shard:
    """One committed Parquet file as its manifest line states it."""

    name: str
    rows: int
    tokens: int
    bytes: int
    sha256: str
    row_groups: list[int]


def open_shard(path: Path) -> pq.ParquetFile:
    """Open a shard by its footer. Raise DataError for a file that is torn or no Parquet file."""
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except PARQUET_ERRORS as error:
        raise DataError(
            f"{path}: not a whole Parquet file ({error}). mpd-gen commits whole files, so this one"
            " was damaged afterwards. Run the stage that wrote it again: it sets the file aside and"
            " makes its rows anew."
        ) from error


class _Model(Record):
    name: str
    version: str


class _Metadata(Record):
    """What readers rely on, where a shard's metadata has it: that of a stage has not all of it."""

    model: _Model | None = None
    student: _Model | None = None
    teacher: _Model | None = None
    round: int = 0
    tokenizer: str = ""
    vocab_size: int = Field(2, ge=1)
    eos_token_id: int | None = None
    thinking: bool | None = None
    checker: str = ""
    answer_formats: list[str] = Field(default_factory=list)
    end_ids: list[int] | None = None
    num_logprobs: int = Field(1, ge=1)
    score_context: Literal["problem", "rewrite", "both"] = "problem"
    score_temperature: float = Field(1.0, gt=0)


class Metadata(dict[str, Any]):
    """A shard's metadata. Raise DataError, which names the file, for a name that it lacks."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        super().__init__(values)
        self._path = path

    def __missing__(self, name: str) -> Any:
        raise DataError(f"{self._path}: its `mpd` metadata lacks {name!r}. {_MAKE_ANEW}")


_MAKE_ANEW = (
    "Another tool wrote the file anew. Move it out of its folder and run the stage again: it makes"
    " the missing rows."
)


def read_metadata(path: Path) -> dict[str, Any]:
    """Return a shard's metadata (Parquet key `mpd`): models, settings, versions. Raise DataError
    for a file without it, and for one of another schema version."""
    with open_shard(path) as file:
        return metadata_of(path, file)


def metadata_of(path: Path, file: pq.ParquetFile) -> dict[str, Any]:
    """Return the metadata of a shard that is open. Raise as `read_metadata`."""
    raw = (file.metadata.metadata or {}).get(METADATA_KEY)
    if raw is None:
        raise DataError(
            f"{path}: no `mpd` metadata, so this Parquet file was not written by mpd-gen."
            " Expected a shard; move other files out of the shard folder."
        )
    place = f"{path}: its `mpd` metadata is damaged"
    metadata = json_object(raw, place, _MAKE_ANEW)
    require(_Metadata, metadata, place, _MAKE_ANEW)
    if metadata.get("schema_version") != SCHEMA_VERSION:
        raise DataError(
            f"{path}: schema version {metadata.get('schema_version')}, this version of the toolkit"
            f" reads {SCHEMA_VERSION}. Generate the round again or use the version that wrote it."
        )
    return Metadata(path, metadata)


def read_all(read: Callable[[Path], _T], paths: Iterable[Path]) -> Iterator[_T]:
    """Yield `read` of each path in order, reading several at the same time."""
    with ThreadPoolExecutor(_READERS) as pool:
        yield from pool.map(read, paths)


def with_added_columns(
    rows: pa.RecordBatch | pa.Table, path: Path, names: list[str]
) -> pa.RecordBatch | pa.Table:
    """Return the columns `names` of rows of the shard `path`, in the contract's types: another tool
    may have written the file anew. A nullable column that the shard lacks, because an older version
    wrote it, is all null.

    Raise KeyError for another column that it lacks or has twice, one of PARQUET_ERRORS for values
    of another kind, for nulls where the contract has none, and for a null in a list.
    """
    fields = {field.name: field for field in SCHEMAS[path.parent.name]}
    for name in names:
        if name not in rows.schema.names and name in fields and fields[name].nullable:
            rows = rows.append_column(fields[name], pa.nulls(rows.num_rows, fields[name].type))
    rows = rows.select(names)
    for at, name in enumerate(names):
        column, field = rows.column(at), fields[name]
        # Keys are looked at where they are packed.
        if column.null_count and not field.nullable and name not in KEYS:
            raise ValueError(f"{name} is null in {column.null_count} rows")
        if column.type != field.type:
            rows = rows.set_column(at, name, column.cast(field.type))
        if pa.types.is_list(field.type) and pc.list_flatten(rows.column(at)).null_count:
            raise ValueError(f"{name} has nulls in its lists")
    return rows


def read_columns(path: Path, names: list[str]) -> pa.Table:
    """Return light columns of a shard. Raise DataError where they cannot be read."""
    with open_shard(path) as file:
        try:
            table = with_added_columns(file.read(columns=names, use_threads=False), path, names)
            table.validate(full=True)
        except PARQUET_ERRORS as error:
            raise DataError(f"{path}: columns {names} cannot be read ({error})") from error
        # A checksum covers a page's data and not its header, which says how many values it has.
        if len(table) != file.metadata.num_rows:
            raise DataError(
                f"{path}: {names} have {len(table)} values, the footer says"
                f" {file.metadata.num_rows} rows"
            )
    return table


def read_batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yield a shard's rows, ROWS_PER_GROUP at a time. Raise DataError where it is damaged."""
    with open_shard(path) as file:
        try:
            for batch in file.iter_batches(ROWS_PER_GROUP, columns=columns):
                yield with_added_columns(batch, path, columns)
        except PARQUET_ERRORS as error:
            raise DataError(
                f"{path}: damaged ({error}). Move it out of its folder and run the stage that wrote"
                " it again: it makes the missing rows anew."
            ) from error


def read_rows(path: Path, numbers: Sequence[int], columns: list[str]) -> list[dict[str, Any]]:
    """Return the rows with these `numbers` in a shard, in their order, by reading the row groups in
    which they are. Raise DataError where they cannot be read."""
    with open_shard(path) as file:
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        ends = list(itertools.accumulate(sizes))
        groups: dict[int, pa.Table] = {}
        found = []
        try:
            for number in numbers:
                at = bisect.bisect_right(ends, number)
                if at not in groups:
                    table = file.read_row_group(at, columns=columns, use_threads=False)
                    groups[at] = with_added_columns(table, path, columns)
                first = ends[at] - sizes[at]
                found += groups[at].slice(number - first, 1).to_pylist()
        except PARQUET_ERRORS as error:
            raise DataError(
                f"{path}: row {number} cannot be read ({error}). mpd-gen validate says what is"
                " damaged."
            ) from error
    return found


def read_keys(path: Path, name: str = "row_id") -> Packed:
    """Return the keys in a column of a shard; S16 [n]. Raise DataError where there are none."""
    return pack_keys(path, name, read_columns(path, [name])[name])


def pack_keys(path: Path, name: str, column: pa.ChunkedArray) -> Packed:
    """Return the keys in the column `name` of the shard `path`. Raise DataError for other text."""
    try:
        return pack(column)
    except ValueError as error:
        raise DataError(
            f"{path}: {name} {error} (see docs/contract.md). The file is damaged, or mpd-gen did"
            " not write it."
        ) from error


def unique_keys(paths: list[Path], packed: list[Packed]) -> KeySet:
    """Return the keys of the shards at `paths`. Raise DataError where one occurs twice."""
    keys = KeySet.of(packed)
    if len(keys) < sum(map(len, packed)):
        part, index = twice(packed)[0]
        key = read_columns(paths[part], ["row_id"])["row_id"][index]
        raise DataError(
            f"{paths[part]}: row {key} is in this round twice. Rows are unique per folder;"
            " was a shard copied in by hand? Remove the copy."
        )
    return keys


def describe(path: Path, stage: Stage) -> Shard:
    """Return the manifest's line of a shard, by reading it. Raise DataError for damaged bytes."""
    column = TOKEN_COLUMN.get(stage)
    with open_shard(path) as file:
        metadata_of(path, file)
        try:
            table = file.read(columns=[column] if column else [], use_threads=False)
        except PARQUET_ERRORS as error:
            raise DataError(f"{path}: column {column!r} cannot be read ({error})") from error
        return line_of(path, file.metadata, tokens_of(table, stage), sha256_of(path))


def tokens_of(rows: pa.Table, stage: Stage) -> int:
    """Return the tokens that the manifest counts in rows of a stage."""
    column = TOKEN_COLUMN.get(stage)
    return (pc.sum(rows.column(column)).as_py() or 0) if column else 0


def line_of(path: Path, footer: pq.FileMetaData, tokens: int, sha256: str) -> Shard:
    """Return the manifest's line of a shard with this footer."""
    return Shard(
        name=path.name,
        rows=footer.num_rows,
        tokens=tokens,
        bytes=path.stat().st_size,
        sha256=sha256,
        row_groups=[footer.row_group(i).num_rows for i in range(footer.num_row_groups)],
    )
