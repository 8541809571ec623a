"""Write files that survive a crash: whole under their final name, durable once renamed."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def fsync_directory(path: Path) -> None:
    """Makes the entries of `path` (new names, removed names) durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json_atomic(path: Path, value: Any) -> None:
    """Replaces `path` by `value` as JSON: readers see the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        # On a full disk it would take room that nobody gets back.
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)
