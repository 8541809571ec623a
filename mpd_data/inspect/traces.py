"""Kept rewrites with their drafts, to read."""

from pathlib import Path

import polars as pl

from mpd_data.inspect.stats import collect, scan, scan_round


def kept_pairs(folder: Path, count: int) -> pl.DataFrame:
    """Return `count` kept rewrites of a round and their drafts: those with the smallest keys, which
    are hashes, so that the choice is fair and always the same. No row without rewrites.

    Columns: `problem`, `gold_answer`; of the draft `completion`, `num_completion_tokens` and
    `is_correct`; of the rewrite `rewrite`, `num_rewritten_tokens` and `rewrite_is_correct`.
    """
    columns = [
        *("problem", "gold_answer", "completion", "num_completion_tokens", "is_correct"),
        *("rewrite", "num_rewritten_tokens", "rewrite_is_correct"),
    ]
    distill = scan([folder], "distill")
    if distill is None:
        return pl.DataFrame(schema=columns)
    kept = distill.filter(pl.col("status") == "ok")
    # Text is read for the chosen rows only.
    chosen = collect(kept.select("row_id").bottom_k(count, by="row_id"))["row_id"]
    rewrites = collect(
        distill.filter(pl.col("row_id").is_in(chosen.implode())).select(
            *("row_id", "rollout_id", "rewrite", "num_rewritten_tokens"),
            rewrite_is_correct="is_correct",
        )
    )
    of_them = pl.col("row_id").is_in(rewrites["rollout_id"].unique().implode())
    drafts = collect(scan_round(folder).filter(of_them).select("row_id", *columns[:5]))
    pairs = rewrites.join(drafts, left_on="rollout_id", right_on="row_id")
    return pairs.sort("row_id").select(columns)
