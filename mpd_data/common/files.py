"""Write files and folders that survive a crash: they are whole once they have their name. Read
small files of text, with one message for each way in which such a file can be wrong."""

import codecs
import contextlib
import errno
import hashlib
import json
import os
import shutil
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from mpd_data.common.errors import ConfigError, DataError

# The disk is full, read-only, broken, or belongs to somebody else.
DISK_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO
}  # fmt: skip

BOM = codecs.BOM_UTF8
_OTHERS = (
    (codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"),
)  # fmt: skip
_ZIP, _OLD_OFFICE = b"PK\3\4", b"\xd0\xcf\x11\xe0"
SAVE_THE_SHEET = "Save the sheet as *.csv, in Excel as CSV UTF-8 (comma delimited)."


def other_encoding(head: bytes) -> str | None:
    """Return, as a sentence with a remedy, what a file is that begins with `head` and is not UTF-8
    text; None where it may be."""
    for mark, name in _OTHERS:
        if head.startswith(mark):
            return f"{name} text. Save it as UTF-8: iconv -f {name} -t UTF-8 OLD > NEW."
    if (head.startswith(_ZIP) and b"xl/" in head) or head.startswith(_OLD_OFFICE):
        return f"a workbook of Excel, or another office file, not text. {SAVE_THE_SHEET}"
    if head.startswith(_ZIP):
        return f"a zip archive, not text. Unpack it; if it is a workbook: {SAVE_THE_SHEET}"
    if b"\0" in head:
        return "not text: it has zero bytes. Expected UTF-8 (UTF-16 is not read)."
    return None


def read_text(path: Path, remedy: str) -> str:
    """Return the content of a file of UTF-8 text without its byte order mark. Raise DataError, the
    end of which is `remedy`, for other content and for a file that cannot be read;
    FileNotFoundError or NotADirectoryError where there is none."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). {remedy}") from error
    if (found := other_encoding(content[:4096])) is not None:
        raise DataError(f"{path}: {found} {remedy}")
    try:
        return content.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}). {remedy}") from error


def json_object(
    text: str | bytes, place: object, remedy: str, keys: Iterable[str] = ()
) -> dict[str, Any]:
    """Return the JSON object that `text` is. Raise DataError, which begins with `place` and ends
    with `remedy`, for anything else and for one that lacks one of `keys`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({_reason(error)}). {remedy}") from error
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise DataError(f"{place}: expected a JSON object, found {kind}. {remedy}")
    if missing := [key for key in keys if key not in value]:
        raise DataError(f"{place}: a JSON object without {', '.join(missing)}. {remedy}")
    return value


def read_json(
    path: Path, remedy: str = "Restore it from a copy.", keys: Iterable[str] = ()
) -> dict[str, Any]:
    """Return the JSON object in a file. Raise what `read_text` and `json_object` raise."""
    return json_object(read_text(path, remedy), path, remedy, keys)


def read_json_lines(path: Path, remedy: str, keys: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Return the JSON objects in a file, one a line; [] where there is none. A last line that does
    not end (a kill while it was written) counts as absent. Raise DataError for any other."""
    try:
        lines = read_text(path, remedy).split("\n")[:-1]
    except FileNotFoundError:
        return []
    numbered = enumerate(lines, start=1)
    return [json_object(line, f"{path}, line {i}", remedy, keys) for i, line in numbered]


def read_toml(path: Path) -> dict[str, Any]:
    """Return the content of a TOML file, which holds settings. Raise ConfigError for other content,
    and what `read_text` raises where there is none."""
    try:
        return tomllib.loads(read_text(path, "Expected TOML."))
    except DataError as error:
        raise ConfigError(str(error)) from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not TOML ({_reason(error)}).") from error


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def fsync_directory(path: Path) -> None:
    """Make the entries of `path` (new names, removed names) durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_file(path: Path, durable: bool = True, errors: str = "strict") -> Iterator[TextIO]:
    """Open a new UTF-8 file that replaces `path` at the end of the block.

    Readers see the old file or the new one, whole. An exception leaves the old one. `durable`:
    the file is on disk when the block ends (fsync). `errors`: as for `open`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", errors=errors) as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        # On a full disk it would keep room that nobody gets back.
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync_directory(path.parent)


def write_json_atomic(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON, durable when this returns."""
    with atomic_file(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def staging_of(folder: Path) -> Path:
    """Return the name that `atomic_folder` gives `folder` while it is being written."""
    return folder.with_name(f".{folder.name}.staging")


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Make an empty folder that takes the name `folder` at the end of the block, durably.

    By then nothing, or an empty folder, may have that name. An exception leaves no trace. Files
    that a library wrote for their owner alone get the mode that this process's umask gives.
    """
    staging = staging_of(folder)
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    try:
        yield staging
        usual = staging.stat().st_mode & 0o666
        for path in staging.rglob("*"):
            if path.is_dir():
                fsync_directory(path)
                continue
            mode = path.stat().st_mode
            if usual & ~mode:
                path.chmod(mode | usual)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        fsync_directory(staging)
        staging.replace(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    fsync_directory(folder.parent)
