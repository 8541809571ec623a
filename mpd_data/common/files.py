"""Write files and folders that survive a crash: they are whole once they have their name."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

# The disk is full, read-only, broken, or belongs to somebody else.
DISK_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO
}  # fmt: skip


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
