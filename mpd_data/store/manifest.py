"""A stage's manifest: an index of its committed shards, one JSON line for each.

The folder is the truth. A manifest that is missing, torn or behind is made anew from the shards.
"""

import errno
import json
import os
from pathlib import Path

from mpd_data.common.errors import DataError
from mpd_data.common.files import atomic_file, read_json_lines
from mpd_data.store.shards import Shard

_KINDS = {
    "name": "str", "rows": "int", "tokens": "int", "bytes": "int", "sha256": "str",
    "row_groups": "list",
}  # fmt: skip
_REMEDY = "Delete the manifest: the next mpd-gen command makes it anew from the shards."


def _line(shard: Shard) -> str:
    return json.dumps(shard.__dict__, separators=(",", ":")) + "\n"


def read_manifest(path: Path) -> list[Shard]:
    """Return the shards that a manifest lists; [] where there is none. An unterminated last line (a
    kill during the append) counts as absent. Raise DataError for any other line that is
    malformed."""
    shards = []
    for number, line in enumerate(read_json_lines(path, _REMEDY), start=1):
        kinds = {name: type(value).__name__ for name, value in line.items()}
        if kinds != _KINDS or not all(isinstance(n, int) for n in line["row_groups"]):
            raise DataError(f"{path}, line {number}: not a manifest line. {_REMEDY}")
        shards.append(Shard(**line))
    return shards


def append_manifest(path: Path, shard: Shard) -> None:
    """Add a shard that has its final name, durably. Call it under the `short_lock` in which the
    shard got that name."""
    line = _line(shard).encode()
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            os.ftruncate(fd, os.pread(fd, size, 0).rfind(b"\n") + 1)
        if os.write(fd, line) < len(line):
            raise OSError(errno.ENOSPC, "the manifest line was not written whole")
        os.fsync(fd)
    finally:
        os.close(fd)


def write_manifest(path: Path, shards: list[Shard]) -> None:
    """Make the manifest list exactly `shards`; nothing is written where it does already."""
    text = "".join(map(_line, shards))
    if text.encode() != (path.read_bytes() if path.exists() else b""):
        with atomic_file(path) as file:
            file.write(text)
