"""Which samples of which prompts a round has, whatever their keys are.

A rollout's key holds the token ids of its prompt. When a chat template gives a prompt other ids
than before (another version of a library, a template that draws lots), each finished sample looks
like a missing one. It would be taken again, and its prompt would count twice.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mpd_data.common.errors import ConfigError
from mpd_data.store.round import RoundDir
from mpd_data.store.shards import read_all, read_batches, read_columns

_SHOWN = 60  # characters of each prompt, from where they differ


class Samples:
    """The samples in the rollouts shards at `paths`, 8 bytes for each. They are read when the first
    one is asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)

    @classmethod
    def of(cls, round_dir: RoundDir) -> "Samples":
        """Return those of a round's committed shards."""
        folder = round_dir.folder("rollouts")
        return cls([folder / shard.name for shard in round_dir.manifest("rollouts")])

    @functools.cached_property
    def _hashes(self) -> npt.NDArray[np.int64]:
        return np.sort(np.concatenate([np.empty(0, np.int64), *read_all(_hash, self._paths)]))

    def require_new(self, prompt_id: str, sample_idx: int, text: str) -> None:
        """Raise ConfigError where the round has the sample already; call it with one whose key the
        round lacks. `text`: its prompt, as laid out now."""
        if not self._paths:
            return
        key = hash((prompt_id, sample_idx))
        at = np.searchsorted(self._hashes, key)
        if at == len(self._hashes) or self._hashes[at] != key:
            return
        path, saved = self._find(prompt_id, sample_idx)
        if saved == text:
            change = "the same text has other token ids now"
        else:
            same = next((i for i, (a, b) in enumerate(zip(saved, text, strict=False)) if a != b), 0)
            start = max(same - _SHOWN // 2, 0)
            old, new = saved[start : start + _SHOWN], text[start : start + _SHOWN]
            change = f"its prompt\n  saved …{old!r} / now …{new!r}"
        raise ConfigError(
            f"{path}: sample {sample_idx} of prompt {prompt_id!r} was taken with another prompt"
            f" than it would get now: {change}\nThe settings are the same, so the chat template or"
            " the tokenizer does not give the same twice. Go on with the library versions that the"
            " shards record, or with a chat template that does not change; or start anew:"
            " give another --out, or run mpd-gen rollouts with --overwrite."
        )

    def _find(self, prompt_id: str, sample_idx: int) -> tuple[Path, str]:
        for path in self._paths:
            for batch in read_batches(path, ["prompt_id", "sample_idx", "prompt"]):
                for row in batch.to_pylist():
                    if (row["prompt_id"], row["sample_idx"]) == (prompt_id, sample_idx):
                        return path, row["prompt"]
        raise AssertionError(f"{prompt_id}, {sample_idx}: not in {self._paths}")


def _hash(path: Path) -> npt.NDArray[np.int64]:
    columns = read_columns(path, ["prompt_id", "sample_idx"])
    pairs: Any = zip(*(column.to_pylist() for column in columns.columns), strict=True)
    return np.fromiter(map(hash, pairs), np.int64, len(columns))
