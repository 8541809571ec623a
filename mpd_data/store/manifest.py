"""A stage's manifest: an index of its committed shards, one JSON line for each.

The folder is the truth. A manifest that is missing, torn or behind is made anew from the shards.
"""

import errno
import json
import os
from pathlib import Path

from pydantic import Field

from mpd_data.common.errors import DataError
from mpd_data.common.files import atomic_file, read_json_lines
from mpd_data.common.records import Record, require
from mpd_data.store.shards import Shard

_REMEDY = "Delete the manifest: the next mpd-gen command makes it anew from the shards."


class _Line(Record):
    name: str = Field(pattern=r"^part-[^/]*\.parquet$")
    rows: int = Field(ge=0)
    tokens: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str
    row_groups: list[int]


def _line(shard: Shard) -> str:
    return json.dumps(shard.__dict__, separators=(",", ":")) + "\n"


def read_manifest(path: Path) -> list[Shard]:
    """Return the shards that a manifest lists; [] where there is none. An unterminated last line (a
    kill during the append) counts as absent. Raise DataError for any other line that is malformed
    or names a shard again, and for a manifest that cannot be read."""
    shards: dict[str, Shard] = {}
    for number, record in enumerate(read_json_lines(path, _REMEDY), start=1):
        place = f"{path}, line {number}"
        require(_Line, record, f"{place}: not a manifest line", _REMEDY)
        shard = Shard(**{name: record[name] for name in _Line.model_fields})
        if shards.setdefault(shard.name, shard) is not shard:
            raise DataError(f"{place}: names {shard.name} again. {_REMEDY}")
    return list(shards.values())


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
