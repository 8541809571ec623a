"""The student's pass rate on a prompt: the share of its rollouts in a round that are right.

It must not depend on when a rollout is rewritten. So a rollout waits until each sample of its
prompt exists or has failed for good.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from mpd_data.store.keys import KeySet, pack
from mpd_data.store.round import RoundDir
from mpd_data.store.shards import read_all, read_columns, read_keys, read_metadata


def _hashed(path: Path, column: str) -> pl.DataFrame:
    """Return a column of a shard, with the hash of its prompt ids as `prompt`: numbers take less
    memory. Among ten million prompts, two have the same hash once in 300,000 rounds."""
    frame = pl.DataFrame(read_columns(path, ["prompt_id", column]))
    return frame.select(_hashes(frame["prompt_id"]), column)


def _hashes(prompt_ids: pl.Series) -> pl.Series:
    # Python's hash has 64 bits and does not change within a process. For one id at a time it is
    # much faster than that of Polars.
    return pl.Series("prompt", [hash(prompt_id) for prompt_id in prompt_ids], pl.Int64)


@dataclass(frozen=True)
class PassRates:
    """The pass rates of a round's prompts, and the rollouts that wait. The rollouts, those of the
    shards at `paths`, are read at the first question. Memory: 32 bytes for each prompt, and about
    60 for each rollout while they are read."""

    round_dir: RoundDir
    paths: list[Path]

    @functools.cached_property
    def _counts(self) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Of the prompts with a gold answer, those with all samples and those that lack some: the
        hash `prompt`, sorted, and how many `samples` there are and are `right`."""
        if not self.paths:
            none = pl.DataFrame(
                schema={"prompt": pl.Int64, "samples": pl.UInt32, "right": pl.UInt32}
            )
            return none, none
        right, samples = pl.col("is_correct"), pl.col("samples")
        graded = (
            pl.concat(read_all(lambda path: _hashed(path, "is_correct"), self.paths))
            .group_by("prompt")
            .agg(samples=pl.len(), graded=right.count(), right=right.sum())
            .filter(pl.col("graded") > 0)
            .sort("prompt")
        )
        expected = read_metadata(self.paths[0])["num_samples"]
        if graded.filter(samples < expected).is_empty():
            return graded, graded.clear()
        # Samples that failed for good will not come.
        counts = graded.join(self._failed(), on="prompt", how="left", maintain_order="left")
        is_whole = samples + pl.col("failed").fill_null(0) >= expected
        return counts.filter(is_whole), counts.filter(~is_whole)

    def _failed(self) -> pl.DataFrame:
        """Return how many samples of each `prompt` have `failed`. One that came later, under other
        limits, is not counted."""
        rows = pl.DataFrame(self.round_dir.table("errors", ["row_id", "stage", "prompt_id"]))
        rows = rows.filter(pl.col("stage") == "rollouts")
        came = KeySet.of(list(read_all(read_keys, self.paths))).holds(
            pack(rows["row_id"].to_arrow())
        )
        rows = rows.filter(pl.Series(~came, dtype=pl.Boolean))
        return rows.group_by(_hashes(rows["prompt_id"])).agg(failed=pl.len())

    @functools.cached_property
    def waiting(self) -> KeySet:
        """The keys of the rollouts whose prompts lack samples. Without gold answers none waits."""
        lacking = self._counts[1]["prompt"].to_list()
        if not lacking:
            return KeySet()
        parts = read_all(lambda path: _hashed(path, "row_id"), self.paths)
        wanted = (part.filter(pl.col("prompt").is_in(lacking))["row_id"] for part in parts)
        return KeySet(key for keys in wanted for key in keys)

    @functools.cached_property
    def _rates(self) -> tuple[Any, Any]:
        whole = self._counts[0]
        # Rounded as it is stored: a filter finds the same value in the row and in the shard.
        rates = (whole["right"] / whole["samples"]).cast(pl.Float32)
        return whole["prompt"].to_numpy(), rates.to_numpy()

    def of(self, prompt_id: str) -> float | None:
        """Return a prompt's pass rate; None without gold answers, and while it lacks samples."""
        prompts, rates = self._rates
        prompt = hash(prompt_id)
        at = np.searchsorted(prompts, prompt)
        is_here = at < len(prompts) and prompts[at] == prompt
        return float(rates[at]) if is_here else None

    def fill(self, rows: Sequence[dict[str, Any]]) -> None:
        """Set the pass rate of rewrites that an older version made without it."""
        for row in rows:
            if row["pass_rate"] is None and row["draft_is_correct"] is not None:
                row["pass_rate"] = self.of(row["prompt_id"])
