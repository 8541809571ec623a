"""Read rows of JSONL, CSV and Parquet files and of datasets on the Hugging Face hub.

Every source yields rows with their cells by column. Only the needed columns are read if the format
allows it. A row that cannot be read is a row with a flaw; the others are read all the same.
"""

import contextlib
import csv
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import parse_qsl

import pyarrow as pa
import pyarrow.parquet as pq

from mpd_data.common.errors import ConfigError, DataError, did_you_mean, requires
from mpd_data.common.models import hub_failures
from mpd_data.prompts.files import EXPECTED, KINDS, ending_of, local_files, open_text
from mpd_data.prompts.values import CUT_SHORT, is_unicode, not_unicode, short_floats

HUB = "hf://"
HUB_FILES = f"{HUB}datasets/"
# Bytes that are not UTF-8 become lone surrogates, so that one bad row does not stop the file. The
# reader of the cell finds them.
_KEEP = "surrogateescape"
_FORM = "hf://OWNER/NAME[@REVISION]?split=SPLIT[&config=CONFIG]"
_FILES_FORM = f"{HUB_FILES}OWNER/NAME[@REVISION]/PATH"
_HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+)(?:@(refs/[^/]+/[^/]+|[^/]+))?/(.+)")
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "pipes"}
_MANY = 100  # columns, or rows to find them in


class Row(NamedTuple):
    """A row, named by its `place` (source and number). `flaw` says why it cannot be read; it has no
    `cells` then."""

    place: str
    cells: Mapping[str, Any]
    flaw: str | None = None


Rows = Iterator[Row]


@dataclass(frozen=True)
class Unreadable:
    """Stands for a cell that Python cannot hold. `reason` completes "holds …"."""

    reason: str


def read_rows(source: str | Path, columns: list[str] | None) -> Rows:
    """Return the rows of what `source` names: a file, a folder, a glob or a dataset of the hub.

    Each readable row has at least `columns`, or all columns if None. A key that a JSON object lacks
    and another has is None. Raise DataError, which names source and row, for a missing column or a
    damaged file. Raise ConfigError if the source does not exist or is of an unknown kind.
    """
    if isinstance(source, str) and source.startswith(HUB):
        if source.startswith(HUB_FILES):
            return _file_rows(source, hub_files(source), columns)
        return _hub_rows(source, columns)
    files = local_files(source, also=f", or {_FORM}")
    return _file_rows(source, {str(file): file for file in files}, columns)


def _file_rows(source: str | Path, files: Mapping[str, Path], columns: list[str] | None) -> Rows:
    """Yield the rows of `files`, by the names that messages give them."""
    found: dict[str, None] = {}  # of JSON objects, of which each has its own
    missing = set(columns or ())
    any_json = False
    for name, path in files.items():
        kind = KINDS[ending_of(path)]
        if kind == "parquet":
            yield from _parquet_rows(name, path, columns)
        elif kind == "csv":
            yield from _csv_rows(name, path, columns)
        else:
            for row in _json_rows(name, path):
                any_json = any_json or row.flaw is None
                missing -= row.cells.keys()
                if len(found) < _MANY:
                    found |= dict.fromkeys(row.cells)
                if columns is not None:
                    row = row._replace(cells={c: row.cells.get(c) for c in columns})
                yield row
    if any_json:
        _require(source, [c for c in columns or () if c in missing], list(found))


def columns_of(source: str | Path) -> list[str]:
    """Return the names of a source's columns; those of JSON are the keys of its first rows. Raise
    DataError or ConfigError as `read_rows` does, and ConfigError for a source without rows."""
    names: dict[str, None] = {}
    for row in itertools.islice(read_rows(source, None), _MANY):
        names |= dict.fromkeys(row.cells)
    if names:
        _require_names(source, names)
        return list(names)
    raise ConfigError(f"{source}: no prompts. Expected at least one row.")


def _require(where: object, columns: Iterable[str], found: list[str]) -> None:
    for column in columns:
        if column not in found:
            _require_names(where, found)
            hint = did_you_mean(column, found)
            raise DataError(
                f"{where}: no column {column!r}; found {', '.join(map(repr, found)) or 'none'}."
                f"{hint} Name the columns with --prompt-column, --id-column,"
                " --answer-column, --metadata-columns and --examples-column."
            )


def _require_names(where: object, found: Iterable[str]) -> None:
    """Raise DataError for a name of a column that is not Unicode."""
    for name in found:
        if not is_unicode(name):
            shown = name.encode("utf-8", "surrogatepass").decode("utf-8", "backslashreplace")
            with contextlib.suppress(UnicodeEncodeError):
                shown = name.encode("utf-8", _KEEP).decode("utf-8", "backslashreplace")
            raise DataError(f"{where}: the name of the column '{shown}' {not_unicode(name)}.")


def _require_delimiter(where: object, name: str, delimiter: str) -> None:
    """Raise DataError where `name`, that of a table's only column, seems to be several."""
    found = max(_DELIMITERS, key=name.count)
    if name.count(found):
        remedy = {"\t": "Name it *.tsv", ",": "Name it *.csv"}.get(found, "Save it as *.csv")
        remedy += "." if found in "\t," else ", with commas between cells."
        raise DataError(
            f"{where}: found one column, {name!r}. Its cells seem to be divided by"
            f" {_DELIMITERS[found]}, expected {_DELIMITERS[delimiter]}. {remedy}"
        )


def _require_once(where: object, columns: Iterable[str], found: list[str]) -> None:
    for column in columns:
        if (count := found.count(column)) > 1:
            raise DataError(
                f"{where}: names the column {column!r} {count} times. Rename all but one."
            )


def _parquet_rows(name: str, path: Path, columns: list[str] | None) -> Rows:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{name}: not a whole Parquet file ({error}).") from error
    with file:
        found = file.schema_arrow.names
        _require(name, columns or (), found)
        _require_once(name, found if columns is None else columns, found)
        number = 0
        try:
            for batch in file.iter_batches(4096, columns=columns):
                for row in _batch_rows(name, number, batch):
                    number += 1
                    yield row
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{name}, after row {number}: damaged Parquet file ({error}). Make it again."
            ) from error


def _batch_rows(name: str, before: int, batch: pa.RecordBatch | pa.Table) -> Rows:
    """Yield the rows of a batch; `before`: how many rows come before it."""
    names, columns = batch.schema.names, map(_cells, batch.columns)
    for number, cells in enumerate(zip(*columns, strict=True), start=before + 1):
        yield Row(f"{name}, row {number}", dict(zip(names, cells, strict=True)))


# What Arrow raises for a value that Python cannot hold: far dates, unknown time zones, text that is
# not UTF-8, fields of one name.
_NOT_HELD = (ArithmeticError, LookupError, ValueError, TypeError, ImportError, pa.ArrowException)


def _cells(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    if pa.types.is_float16(column.type) or pa.types.is_float32(column.type):
        return short_floats(column)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        # Arrow checks that text is UTF-8 when it writes; other writers do not.
        raw = column.cast(pa.large_binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", _KEEP) for value in raw]
    try:
        cells: list[Any] = column.to_pylist()
    except _NOT_HELD:
        cells = [_cell(value) for value in column]
    return cells


def _cell(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except _NOT_HELD as error:
        return Unreadable(f"a value of the type {value.type} that Python cannot hold ({error})")


def _json_rows(name: str, path: Path) -> Rows:
    """Yield the objects of a file that has one on each line, or is one array of them."""
    with open_text(path) as file:
        for number, value in _json_values(name, file):
            place = f"{name}, row {number}"
            if isinstance(value, ValueError | RecursionError):
                yield Row(place, {}, f"not a JSON object ({value}){_cut_short(value)}")
            elif not isinstance(value, dict):
                yield Row(place, {}, f"found {type(value).__name__}, expected an object")
            else:
                yield Row(place, value)


def _json_values(name: str, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """Yield each value of JSON lines or of an array with its number, or the error that it gives."""
    lines: Iterable[bytes] = file
    start, first = 1, file.readline()
    while first and not first.strip():
        start, first = start + 1, file.readline()
    value = _json_value(first)
    if isinstance(value, list | Exception):
        # Perhaps its first line alone is no value: an array, or objects over several lines.
        rest = file.read()
        whole = _json_value(first + rest)
        if isinstance(whole, list) and (isinstance(value, Exception) or not rest.strip()):
            yield from enumerate(whole, start=1)
            return
        if isinstance(value, Exception) and first.lstrip().startswith(b"["):
            raise DataError(
                f"{name}: begins as a JSON array and is not a whole one ({whole}). Make it again."
            )
        if isinstance(value, Exception) and _goes_on(first, rest):
            raise DataError(
                f"{name}: its first JSON object stands on several lines. Expected one object a"
                " line, or one array of objects. Put each on a line: jq -c . OLD > NEW, or, where"
                " they are in a list inside it, jq -c '.NAME[]' OLD > NEW."
            )
        lines = io.BytesIO(rest)
    for number, line in enumerate(itertools.chain([first], lines), start=start):
        if line.strip():
            yield number, _json_value(line)


def _json_value(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8", _KEEP), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        return error


def _cut_short(error: Exception) -> str:
    """Return a hint where a line gave `error` because it ends too early."""
    if not isinstance(error, json.JSONDecodeError):
        return ""
    # Within a text the line's end is a character that JSON does not allow there.
    at_end = error.pos >= len(error.doc.rstrip())
    return CUT_SHORT if at_end or error.msg.startswith("Unterminated string") else ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"it has the key {next(k for k in names if names.count(k) > 1)!r} twice")
    return made


def _goes_on(first: bytes, rest: bytes) -> bool:
    """Return whether a JSON object begins in the line `first` and ends in the `rest`."""
    text = (first + rest).decode("utf-8", _KEEP).lstrip()
    try:
        value, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and "\n" in text[:end]


_DECODER = json.JSONDecoder()


def _csv_rows(name: str, path: Path, columns: list[str] | None) -> Rows:
    """Yield cells as text; an empty one is None, since CSV has no other way to omit a value."""
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, would refuse long solutions
    number, comma = 0, "\t" if ending_of(path) == ".tsv" else ","
    with open_text(path) as file:
        lines = (line.decode("utf-8", _KEEP) for line in file)
        reader = csv.reader(lines, strict=True, delimiter=comma)
        try:
            header = next(reader, None)
            if not header:
                raise DataError(f"{name}: no header. The first line must name the columns.")
            if columns is None or not set(columns) <= set(header):
                _require_names(name, header)
                if len(header) == 1:
                    _require_delimiter(name, header[0], comma)
            columns = header if columns is None else columns
            _require(name, columns, header)
            _require_once(name, columns, header)
            for cells in reader:
                if not cells:  # a blank line
                    continue
                number += 1
                place = f"{name}, row {number} (line {reader.line_num})"
                if len(cells) != len(header):
                    flaw = (
                        f"found {len(cells)} cells, expected {len(header)} as in the header. Put"
                        " cells with commas or line breaks into double quotes"
                    )
                    yield Row(place, {}, flaw)
                    continue
                row = dict(zip(header, cells, strict=True))
                place = f"{name}, row {number}"
                yield Row(place, {column: row[column] or None for column in columns})
        except csv.Error as error:
            raise DataError(
                f"{name}, row {number + 1} (line {reader.line_num}): not CSV ({error}). Expected"
                f" {_DELIMITERS[comma]} between cells, and double quotes inside a"
                " quoted cell doubled."
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


def hub_files(url: str) -> dict[str, Path]:
    """Return the files of hf://datasets/OWNER/NAME[@REVISION]/PATH, the form of Polars, DuckDB and
    fsspec, in the cache, by their addresses. PATH may be a glob. Raise ConfigError."""
    match = _HUB_FILE.fullmatch(url.removeprefix(HUB_FILES))
    if match is None:
        raise ConfigError(
            f"{url}: expected {_FILES_FORM} for files of a dataset, or {_FORM} for one of its"
            " splits."
        )
    repo, revision, pattern = match.groups()
    revision = {"~parquet": "refs/convert/parquet"}.get(revision, revision)
    with requires("hub", f"{url}: reading a dataset of the hub"):
        from huggingface_hub import HfApi, hf_hub_download
    failures: tuple[type[Exception], ...] = (*hub_failures(), ValueError)
    try:
        names = [pattern]
        if any(sign in pattern for sign in "*?["):
            every = HfApi().list_repo_files(repo, repo_type="dataset", revision=revision)
            names = sorted(name for name in every if _matches(name, pattern))
        base = url[: -len(pattern)]
        files = {
            base + name: Path(hf_hub_download(repo, name, repo_type="dataset", revision=revision))
            for name in names
            if ending_of(Path(name)) in KINDS
        }
    except failures as error:
        raise ConfigError(
            f"{url}: not to be had from the hub ({_first_line(error)}). Check the name, path and"
            " revision, the network, and HF_TOKEN for gated datasets."
        ) from error
    if not files:
        raise ConfigError(f"{url}: no such file there. Expected {EXPECTED}.")
    return files


def _matches(name: str, pattern: str) -> bool:
    """Return whether a path matches a glob, in which ** is any number of folders."""
    return _parts_match(name.split("/"), pattern.split("/"))


def _parts_match(parts: list[str], wanted: list[str]) -> bool:
    if not wanted:
        return not parts
    if wanted[0] == "**":
        return any(_parts_match(parts[i:], wanted[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], wanted[0]) and _parts_match(parts[1:], wanted[1:])


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
    columns = data.column_names if columns is None else list(dict.fromkeys(columns))
    _require(url, columns, data.column_names)
    # As Arrow's columns: `datasets` would open images, and stops at values that Python cannot hold.
    return _dataset_rows(url, data.select_columns(columns).with_format("arrow"))


def _dataset_rows(url: str, data: Any) -> Rows:
    number = 0
    try:
        for table in data.iter(4096):
            yield from _batch_rows(url, number, table)
            number += len(table)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{url}, after row {number}: cannot be read ({error}).") from error


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
