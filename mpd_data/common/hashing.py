"""Canonical JSON, content hashes, and the difference between two settings."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def content_key(value: Any) -> str:
    """32 hex digits that name `value` (JSON types only) by its content."""
    return hashlib.sha256(canonical_json(value).encode("utf-8")).hexdigest()[:32]


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The settings in which two nested mappings differ, one line each: `name: saved … / now …`."""
    lines: list[str] = []
    for name in sorted(saved.keys() | now.keys()):
        old, new = saved.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            lines.append(f"{prefix}{name}: saved {old!r} / now {new!r}")
    return lines
