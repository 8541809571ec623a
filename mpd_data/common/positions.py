"""Positions that depend on a length.

LongRoPE (Phi-3, Phi-4-mini, MiniCPM) has two sets of rotary frequencies: short factors up to
`original_max_position_embeddings`, long ones beyond. Which are used differs: vLLM goes by the
context that it was started with, transformers by the longest sequence that it sees, in a pack by
its longest row. Up to the original context all take the short factors, so that is the context such
a model has here. Dynamic NTK changes beyond `max_position_embeddings`, which is the context anyway.
"""

from collections.abc import Iterator, Mapping
from typing import Any

# "su" is the older name.
_LONGROPE = ("longrope", "su")
_ORIGINAL = "original_max_position_embeddings"


def context_of_positions(text_config: Mapping[str, Any]) -> int:
    """Return the longest context in tokens in which every position is computed in one way. Raise
    KeyError, TypeError or ValueError for a configuration without one."""
    limits = [text_config["max_position_embeddings"]]
    if has_longrope(text_config):
        # Either place counts for one of the two libraries.
        limits += [part.get(_ORIGINAL) for part in (text_config, *_longropes(text_config))]
    return min(int(limit) for limit in limits if limit is not None)


def has_longrope(text_config: Mapping[str, Any]) -> bool:
    """Return whether some layers of a model have LongRoPE."""
    return any(True for _ in _longropes(text_config))


def _longropes(text_config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the parameters of each LongRoPE: of all layers, or of layers of one type."""
    for name in ("rope_parameters", "rope_scaling"):
        found = text_config.get(name)
        if isinstance(found, Mapping):
            for rope in (found, *found.values()):
                if isinstance(rope, Mapping) and _type(rope) in _LONGROPE:
                    yield rope


def _type(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type"))
