"""Read rows of JSONL, CSV and Parquet files and of datasets on the Hugging Face hub.

Every source yields rows as (number from 1, {column: value}). Only the needed columns are read if
the format allows it.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pyarrow as pa
import pyarrow.parquet as pq

from mpd_data.common.errors import ConfigError, DataError, did_you_mean, requires
from mpd_data.common.models import hub_failures
from mpd_data.prompts.values import Repeated, short_floats

Rows = Iterator[tuple[int, Mapping[str, Any]]]

HUB = "hf://"
# Bytes that are not UTF-8 become lone surrogates, so that one bad row does not stop the file. The
# reader of the cell finds them.
_KEEP = "surrogateescape"
_FORM = "hf://OWNER/NAME[@REVISION]?split=SPLIT[&config=CONFIG]"


def read_rows(source: str | Path, columns: list[str] | None) -> Rows:
    """Return the rows of a *.jsonl, *.csv or *.parquet file or of hf://OWNER/NAME?split=...

    Each row has at least `columns`, or all columns if None. Raise DataError, which names source and
    row, for a missing column or a damaged file. Raise ConfigError if the source does not exist or
    is of an unknown kind.
    """
    if isinstance(source, str) and source.startswith(HUB):
        return _hub_rows(source, columns)
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. Expected JSONL, CSV or Parquet, or {_FORM}.")
    readers = {"parquet": _parquet_rows, "jsonl": _json_rows, "json": _json_rows, "csv": _csv_rows}
    reader = readers.get(path.suffix[1:])
    if reader is None:
        raise ConfigError(f"{path}: prompts are read from *.jsonl, *.csv and *.parquet files.")
    return reader(path, columns)


def columns_of(source: str | Path) -> list[str]:
    """Return the names of a source's columns; those of a JSONL file are its first row's. Raise
    DataError or ConfigError as `read_rows` does, and ConfigError for a source without rows."""
    for _, row in read_rows(source, None):
        return list(row)
    raise ConfigError(f"{source}: no prompts. Expected at least one row.")


def _require(where: object, columns: Iterable[str], found: list[str]) -> None:
    for column in columns:
        if column not in found:
            raise DataError(
                f"{where}: no column {column!r}; found {', '.join(map(repr, found)) or 'none'}."
                f"{did_you_mean(column, found)} Name the columns with --prompt-column, --id-column,"
                " --answer-column, --metadata-columns and --examples-column."
            )


def _parquet_rows(path: Path, columns: list[str] | None) -> Rows:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a whole Parquet file ({error}).") from error
    with file:
        _require(path, columns or (), file.schema_arrow.names)
        number = 0
        try:
            for batch in file.iter_batches(4096, columns=columns):
                names = batch.schema.names
                for cells in zip(*map(_cells, batch.columns), strict=True):
                    number += 1
                    yield number, dict(zip(names, cells, strict=True))
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(
                f"{path}, after row {number}: damaged Parquet file ({error}). Make it again."
            ) from error


def _cells(column: pa.Array) -> list[Any]:
    if pa.types.is_float16(column.type) or pa.types.is_float32(column.type):
        return short_floats(column)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        cells: list[Any] = column.to_pylist()
        return cells
    # Arrow checks that text is UTF-8 when it writes; other writers do not.
    raw = column.cast(pa.large_binary()).to_pylist()
    return [None if value is None else value.decode("utf-8", _KEEP) for value in raw]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, with all values of a key that has several."""
    row = dict(pairs)
    if len(row) < len(pairs):
        for key, last in row.items():
            values = [value for name, value in pairs if name == key]
            if any(value != last for value in values):
                row[key] = Repeated(values)
    return row


def _json_rows(path: Path, columns: list[str] | None) -> Rows:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}, row {number}"
            try:
                row = json.loads(line.decode("utf-8", _KEEP), object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place}: not a JSON object ({error}).") from error
            if not isinstance(row, dict):
                raise DataError(f"{place}: found {type(row).__name__}, expected an object.")
            _require(place, columns or (), list(row))
            yield number, row


def _csv_rows(path: Path, columns: list[str] | None) -> Rows:
    """Yield cells as text; an empty one is None, since CSV has no other way to omit a value."""
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, would refuse long solutions
    number = 0
    with path.open("rb") as file:
        lines = (
            line.decode("utf-8-sig" if i == 0 else "utf-8", _KEEP) for i, line in enumerate(file)
        )
        reader = csv.reader(lines, strict=True)
        try:
            header = next(reader, None)
            if not header:
                raise DataError(f"{path}: no header. The first line must name the columns.")
            columns = header if columns is None else columns
            _require(path, columns, header)
            for column in columns:
                if (count := header.count(column)) > 1:
                    problem = f"the header names {column!r} {count} times. Rename all but one."
                    raise DataError(f"{path}: {problem}")
            for cells in reader:
                if not cells:  # a blank line
                    continue
                number += 1
                if len(cells) != len(header):
                    raise DataError(
                        f"{path}, row {number} (line {reader.line_num}): found {len(cells)} cells,"
                        f" expected {len(header)} as in the header. Put cells with commas or line"
                        " breaks into double quotes."
                    )
                row = dict(zip(header, cells, strict=True))
                yield number, {column: row[column] or None for column in columns}
        except csv.Error as error:
            raise DataError(
                f"{path}, row {number + 1} (line {reader.line_num}): not CSV ({error}). Expected"
                " commas between cells, and double quotes inside a quoted cell doubled."
            ) from error


@dataclass(frozen=True)
class HubSource:
    """A dataset on the Hugging Face hub, one split of it."""

    repo: str
    revision: str | None
    split: str | None
    config: str | None

    @classmethod
    def parse(cls, url: str) -> "HubSource":
        """Parse hf://OWNER/NAME[@REVISION][?split=SPLIT&config=CONFIG]. Raise ConfigError."""
        place, _, query = url.removeprefix(HUB).partition("?")
        repo, at, revision = place.partition("@")
        if re.fullmatch(r"[\w.-]+/[\w.-]+", repo) is None or (at and not revision):
            raise ConfigError(f"{url}: expected {_FORM}, found the name {place!r}.")
        given: dict[str, str] = {}
        for key, value in parse_qsl(query, keep_blank_values=True):
            if key not in ("split", "config"):
                hint = did_you_mean(key, ("split", "config")) or " There are 'split' and 'config'."
                raise ConfigError(f"{url}: no setting {key!r}.{hint} Expected {_FORM}.")
            if key in given or not value:
                raise ConfigError(f"{url}: give {key!r} once, with a value. Expected {_FORM}.")
            given[key] = value
        return cls(repo, revision or None, given.get("split"), given.get("config"))

    @property
    def place(self) -> str:
        """The address, with a prefix that stops `datasets` from using a local OWNER/NAME."""
        return f"hf://datasets/{self.repo}"


def _datasets(url: str) -> tuple[Any, tuple[type[Exception], ...]]:
    """Return the package `datasets`, and the errors by which it says that something is missing."""
    with requires("hub", f"{url}: reading a dataset of the hub"):
        import datasets
    # RuntimeError: for repositories that are scripts, which are never run here.
    others = (*hub_failures(), pa.ArrowInvalid, ValueError, RuntimeError)
    return datasets, (datasets.exceptions.DatasetsError, *others)


def hub_splits(url: str) -> list[str]:
    """Return the splits of the dataset of `url`, which need not name one. Raise ConfigError."""
    source = HubSource.parse(url)
    datasets, failures = _datasets(url)
    try:
        names: list[str] = datasets.get_dataset_split_names(
            source.place, source.config, revision=source.revision
        )
    except failures as error:
        raise ConfigError(
            f"{url}: its splits cannot be listed ({_first_line(error)}). Check the name, config and"
            " revision, the network, and HF_TOKEN for gated datasets."
        ) from error
    return names


def _hub_rows(url: str, columns: list[str] | None) -> Rows:
    source = HubSource.parse(url)
    datasets, failures = _datasets(url)
    if source.split is None:
        splits = ", ".join(hub_splits(url))
        raise ConfigError(f"{url}: names no split; expected {_FORM}. The splits are {splits}.")
    try:
        data = datasets.load_dataset(
            source.place, source.config, split=source.split, revision=source.revision
        )
    except failures as error:
        hint = _split_hint(url, error)
        raise ConfigError(
            f"{url}: not to be had from the hub ({_first_line(error)}).{hint} Check the name,"
            " split, config and revision, the network, and HF_TOKEN for gated datasets."
        ) from error
    if columns is None:
        return enumerate(data, start=1)
    _require(url, columns, data.column_names)
    return enumerate(data.select_columns(list(dict.fromkeys(columns))), start=1)


def _split_hint(url: str, error: BaseException) -> str:
    """Return, as a sentence, what the split of `url` may be a misspelling of; "" if `error` is not
    about it."""
    split = (HubSource.parse(url).split or "").partition("[")[0]  # of train[:100], train
    if split not in str(error):
        return ""  # asking for the splits would only wait for the same failure again
    try:
        splits = hub_splits(url)
    except ConfigError:
        return ""
    return "" if split in splits else did_you_mean(split, splits)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
