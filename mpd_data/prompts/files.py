"""Find and open the local files that a source of prompts names, as people have them: folders and
globs, compressed, with a byte order mark."""

import contextlib
import glob
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

from mpd_data.common.errors import ConfigError, DataError
from mpd_data.common.files import BOM, SAVE_THE_SHEET, other_encoding

# The reader of each ending. A file of text may be compressed: .gz or .zst follows.
KINDS = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv",
    ".parquet": "parquet",
}  # fmt: skip
_COMPRESSED = (".gz", ".zst")
_WORKBOOKS = (".xlsx", ".xlsm", ".xlsb", ".xls", ".ods", ".numbers")
EXPECTED = "*.jsonl, *.json, *.csv, *.tsv (also .gz and .zst) or *.parquet"
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_SETS = (re.compile(r"(?<![a-z])train", re.I), re.compile(r"(?<![a-z])(test|val|dev|eval)", re.I))


def ending_of(path: Path) -> str:
    """Return the ending that says how a file is read, without that of its compression."""
    ending = path.suffix.lower()
    return Path(path.stem).suffix.lower() if ending in _COMPRESSED else ending


def local_files(source: str | Path, also: str = "") -> list[Path]:
    """Return the files that `source` names, in order: itself, those that a glob matches (** is any
    number of folders), or those of a folder that have a known ending.

    Raise ConfigError, which names what is read `also`, where there are none; where one is of an
    unknown kind; and for a folder whose files are of several kinds, or some for training and some
    for tests.
    """
    path = Path(source)
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(f for f in path.iterdir() if _is_known(f))
        if not files:
            raise ConfigError(
                f"{path}: a folder without prompts. Expected {EXPECTED} in it; name files of its"
                f" folders with a glob, such as '{path}/**/*.jsonl'."
            )
        _require_one_set(path, files)
    elif path.exists():
        raise ConfigError(f"{path}: neither a file nor a folder. Write what it gives to a file.")
    else:
        # Path.glob takes no absolute patterns.
        found = glob.glob(str(source), recursive=True)  # noqa: PTH207
        files = sorted(f for f in map(Path, found) if f.is_file())
        if not files:
            raise ConfigError(
                f"{path}: no such file. Expected {EXPECTED}, a folder or a glob{also}."
            )
    for file in files:
        if ending_of(file) not in KINDS:
            hint = f" {SAVE_THE_SHEET}" if ending_of(file) in _WORKBOOKS else ""
            raise ConfigError(f"{file}: prompts are read from {EXPECTED} files.{hint}")
    return files


def _is_known(file: Path) -> bool:
    return file.is_file() and not file.name.startswith(".") and ending_of(file) in KINDS


def _require_one_set(folder: Path, files: list[Path]) -> None:
    """Raise ConfigError where the files of a folder are not for one purpose."""
    names = ", ".join(file.name for file in files[:5]) + (", …" if len(files) > 5 else "")
    kinds = {KINDS[ending_of(file)] for file in files}
    if len(kinds) > 1 or all(any(p.search(f.name) for f in files) for p in _SETS):
        what = "several kinds" if len(kinds) > 1 else "training and test sets"
        raise ConfigError(
            f"{folder}: holds files of {what} ({names}). Name those that you mean, or a glob such"
            f" as '{folder}/train*.jsonl'."
        )


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[BinaryIO]:
    """Open a file of UTF-8 text for reading bytes, decompressed, after its byte order mark. Raise
    DataError for text of another encoding, for what is no text, and where the file is damaged."""
    with contextlib.ExitStack() as stack:
        try:
            raw = stack.enter_context(path.open("rb"))
            start = raw.peek(8)
            file: BinaryIO = raw
            compression = next((v for k, v in _MAGIC.items() if start.startswith(k)), None)
            if compression == "gzip":
                file = cast(BinaryIO, stack.enter_context(gzip.GzipFile(fileobj=raw)))
            elif compression == "zstd":
                file = stack.enter_context(pa.input_stream(str(path), compression="zstd"))
            if compression is not None:
                file = cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, file), 1 << 20))
            head = cast(io.BufferedReader, file).peek(4096)
            if (found := other_encoding(head)) is not None:
                raise DataError(f"{path}: {found}")
            if head.startswith(BOM):
                file.read(len(BOM))
            yield file
        except (EOFError, zlib.error, pa.ArrowInvalid, OSError) as error:
            raise DataError(
                f"{path}: damaged, or not to be read ({error}). Make or fetch it again."
            ) from error
