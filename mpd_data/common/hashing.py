"""Canonical JSON, content hashes, and the differences between two settings."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any


def canonical_json(value: Any) -> str:
    """Return JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def content_key(value: Any) -> str:
    """Return 32 hex digits that name `value` (JSON types only) by its content."""
    return hashlib.sha256(canonical_json(value).encode("utf-8")).hexdigest()[:32]


def differences(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    prefix: str = "",
    counts: Mapping[str, tuple[int, int]] | None = None,
) -> list[str]:
    """Return the settings in which two nested mappings differ, one line each.

    A line is `name: saved … / now …`; for a hash or a list of hashes, which tell a reader nothing,
    it gives how many things it stands for, where that differs. `counts`: that number, saved and
    now, by the name of a setting. A setting that is missing on one side is None.
    """
    lines: list[str] = []
    for name in sorted(saved.keys() | now.keys()):
        old, new = saved.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            if _is_hash(old) and _is_hash(new):
                sizes = tuple(len(x) if isinstance(x, list) else 1 for x in (old, new))
                old, new = (counts or {}).get(name) or sizes
                if old == new:
                    lines.append(f"{prefix}{name}: the content differs")
                    continue
            lines.append(f"{prefix}{name}: saved {old!r} / now {new!r}")
    return lines


def _is_hash(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(map(_is_hash, value))
    # An adapter's version is two hashes with a plus between them.
    return isinstance(value, str) and re.fullmatch(r"([0-9a-f]{32,64}\+?)+", value) is not None
