"""Trace-length statistics of rounds, with lazy Polars queries over the shards.

The same in a notebook needs nothing of this module:

    df = pl.scan_parquet("data/round*/rollouts/*.parquet")
    df.group_by("round").agg(pl.col("num_completion_tokens").mean()).collect()
"""

from pathlib import Path
from typing import Any

import polars as pl

from mpd_data.errors import ConfigError
from mpd_data.shards import RoundDir, Stage

QUANTILES = (0.1, 0.5, 0.9, 0.99)


def scan(rounds: list[Path], stage: Stage) -> pl.LazyFrame | None:
    """The rows of one stage over several rounds; None where no round has any."""
    files = [file for path in rounds for file in RoundDir(path).shard_paths(stage)]
    return pl.scan_parquet(files) if files else None


def _lengths(column: str) -> list[pl.Expr]:
    tokens = pl.col(column)
    return [
        tokens.mean().alias("mean_tokens"),
        *(tokens.quantile(q, "nearest").alias(f"p{round(q * 100)}") for q in QUANTILES),
        tokens.max().alias("max"),
    ]


def round_stats(rounds: list[Path]) -> dict[str, list[dict[str, Any]]]:
    """Tables as rows: `rollouts` by round, `rollouts_by` finish reason and correctness,
    `rewrites` by status. Lengths in tokens; rates are fractions.

    Raises ConfigError where none of the folders holds a round.
    """
    rollouts, distill = scan(rounds, "rollouts"), scan(rounds, "distill")
    if rollouts is None and distill is None:
        raise ConfigError(
            f"{', '.join(map(str, rounds))}: no shards here. Expected the folders of rounds, with"
            " rollouts/part-*.parquet in them."
        )
    tables: dict[str, list[dict[str, Any]]] = {}
    if rollouts is not None:
        tables["rollouts"] = (
            rollouts.group_by("round")
            .agg(
                pl.col("prompt_id").n_unique().alias("prompts"),
                pl.len().alias("samples"),
                pl.col("is_correct").mean().alias("accuracy"),
                (pl.col("finish_reason") == "length").mean().alias("truncated"),
                *_lengths("num_completion_tokens"),
            )
            .sort("round")
            .collect()
            .to_dicts()
        )
        tables["rollouts_by"] = (
            rollouts.group_by("round", "finish_reason", "is_correct")
            .agg(pl.len().alias("samples"), *_lengths("num_completion_tokens"))
            .sort("round", "finish_reason", "is_correct")
            .collect()
            .to_dicts()
        )
    if distill is not None:
        tables["rewrites"] = (
            distill.group_by("round", "status")
            .agg(
                pl.len().alias("rows"),
                pl.col("num_original_tokens").mean().alias("mean_original"),
                pl.col("num_rewritten_tokens").mean().alias("mean_rewritten"),
                pl.col("compression_ratio").mean().alias("mean_ratio"),
                pl.col("compression_ratio").quantile(0.5, "nearest").alias("median_ratio"),
            )
            .with_columns((pl.col("rows") / pl.col("rows").sum().over("round")).alias("share"))
            .sort("round", "rows", descending=[False, True])
            .collect()
            .to_dicts()
        )
    return tables


def plot_lengths(series: dict[str, Path], out: Path) -> None:
    """Draws the distribution of completion tokens of each round in `series` (label -> folder)
    to `out` (PNG, SVG or PDF by its ending)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lengths = {}
    for label, path in series.items():
        frame = scan([path], "rollouts")
        if frame is None:
            raise ConfigError(f"{path}: no rollouts to plot.")
        lengths[label] = frame.select("num_completion_tokens").collect().to_series().to_numpy()
    longest = max(values.max() for values in lengths.values())
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    colours = plt.get_cmap("viridis")
    for i, (label, values) in enumerate(lengths.items()):
        colour = colours(0.9 * i / max(len(lengths) - 1, 1))
        # `parse_math` off: labels are data and may hold dollar signs.
        axes.hist(
            values,
            bins=60,
            range=(0, longest),
            density=True,
            histtype="stepfilled",
            alpha=0.35,
            color=colour,
        )
        axes.hist(values, bins=60, range=(0, longest), density=True, histtype="step", color=colour)
        axes.axvline(values.mean(), color=colour, linestyle="--", linewidth=1)
        axes.plot([], [], color=colour, linewidth=6, label=f"{label}: mean {values.mean():.1f}")
    axes.set_xlabel("trace tokens (dashed: mean)")
    axes.set_ylabel("density")
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.legend(frameon=False).get_texts():
        text.set_parse_math(False)
    figure.savefig(out, dpi=150)
    plt.close(figure)
