"""Sets of row keys that take 16 bytes a key: ten million are 160 MB, not 1.5 GB of strings.

A key is 32 hex digits (hashing.content_key). A set is one sorted numpy array.
"""

from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

_DIGITS = 32
# The value of each hex digit, 16 for every other byte.
_VALUES = np.full(256, 16, np.uint8)
_VALUES[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)

Packed = npt.NDArray[np.bytes_]


def pack(column: pa.ChunkedArray | pa.Array) -> Packed:
    """Return 16 bytes for each key of a string column [n]; S16 [n], in its order. Raise
    ValueError, which names the first value that is not 32 lower-case hex digits."""
    column = column.cast(pa.string())
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    return np.concatenate([np.empty(0, "S16"), *map(_pack_chunk, chunks)])


def _pack_chunk(chunk: pa.StringArray) -> Packed:
    if len(chunk) == 0:
        return np.empty(0, "S16")
    if chunk.null_count == 0:
        _, offsets, text = chunk.buffers()
        ends = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        if (np.diff(ends) == _DIGITS).all():
            values = _VALUES[np.frombuffer(text, np.uint8)[ends[0] : ends[-1]]]
            if values.max() < 16:
                return (values[::2] << 4 | values[1::2]).view("S16")
    wrong = next(key for key in chunk.to_pylist() if not _is_key(key))
    raise ValueError(f"{wrong!r} is not a row key: expected {_DIGITS} hex digits")


def _is_key(key: object) -> bool:
    return isinstance(key, str) and len(key) == _DIGITS and not key.strip("0123456789abcdef")


class KeySet(Set[str]):
    """An immutable set of row keys. `holds` looks up many keys at once, and `-` of two such sets
    makes no Python object for each key."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        """Raise ValueError for anything but a key."""
        self._keys: Packed = np.unique(pack(pa.array(list(keys), pa.string())))

    @classmethod
    def of(cls, parts: Sequence[Packed]) -> "KeySet":
        """Return the keys of all `parts` (each as `pack` gives it), every key once."""
        keys = np.concatenate([np.empty(0, "S16"), *parts])
        keys.sort()
        new = np.ones(len(keys), bool)
        np.not_equal(keys[1:], keys[:-1], out=new[1:])
        union = cls()
        union._keys = keys if new.all() else keys[new]
        return union

    def holds(self, keys: Packed) -> npt.NDArray[np.bool_]:
        """Return which of `keys` [n] are in the set; bool [n]."""
        if not len(self._keys):
            return np.zeros(len(keys), bool)
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        is_here: npt.NDArray[np.bool_] = self._keys[at] == keys
        return is_here

    def __contains__(self, key: object) -> bool:
        if not _is_key(key):
            return False
        # As numpy gives them back, without the zeros at the end.
        raw = bytes.fromhex(str(key)).rstrip(b"\0")
        at = self._keys.searchsorted(raw)
        return bool(at < len(self._keys) and self._keys[at] == raw)

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[str]:
        return (raw.ljust(16, b"\0").hex() for raw in self._keys)

    def __sub__(self, other: Set[Any]) -> "KeySet":
        rest = KeySet()
        known = other if isinstance(other, KeySet) else KeySet(filter(_is_key, other))
        rest._keys = self._keys[~known.holds(self._keys)]
        return rest


def twice(parts: Sequence[Packed]) -> list[tuple[int, int]]:
    """Return the places of keys that occurred before, in order, as (part, index in it)."""
    keys = np.concatenate([np.empty(0, "S16"), *parts])
    order = np.argsort(keys, kind="stable")
    again = np.sort(order[1:][keys[order[1:]] == keys[order[:-1]]])
    ends = np.cumsum([len(part) for part in parts])
    part = np.searchsorted(ends, again, side="right")
    return [(int(p), int(i - (ends[p] - len(parts[p])))) for p, i in zip(part, again, strict=True)]
