"""`mpd-gen stats`: lengths, accuracy and statuses of rounds, by lazy Polars queries on the shards.

A notebook can query the shards without this module:

    df = pl.scan_parquet("data/round*/rollouts/*.parquet")
    df.group_by("round").agg(pl.col("num_completion_tokens").mean()).collect()
"""

import itertools
import json
import textwrap
from collections.abc import Sequence
from math import comb
from pathlib import Path
from typing import Any

import polars as pl
from polars import selectors

from mpd_data.common.errors import ConfigError, DataError, did_you_mean
from mpd_data.store.round import RoundDir
from mpd_data.store.run_record import require_kind, require_once
from mpd_data.store.schema import FINISH_REASONS, SCHEMAS, STATUSES, Stage
from mpd_data.store.shards import read_metadata

# The table `behaviour` of `round_stats`.
BEHAVIOUR = ("check_failed", "repetition", "markers_per_1k", "right_tokens", "wrong_tokens")
QUANTILES = (0.1, 0.5, 0.9, 0.99)
# The low ones say what a limit rejects.
SUPPORT_QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75)

# Maximum bins of a histogram. The last bin begins below the largest 99th percentile of a round.
BINS = 20

# Most bins of a plot, and characters in a line of its labels.
_PLOT_BINS, _PLOT_LABEL = 150, 28

# Of `light` rollouts, as fractions.
RATES = (
    pl.col("is_correct").mean().alias("accuracy"),
    (pl.col("finish_reason") == "length").mean().alias("truncated"),
    pl.col("lacks_answer").filter(pl.col("finish_reason") == "stop").mean().alias("no_answer"),
)

# Groups in order: numbers by size, then text, then the rows without a value.
GROUP_ORDER = (pl.col("group").cast(pl.Float64, strict=False), pl.col("group"))

# How hard a problem is for the student: by the share of its rollouts that are right, `c` of `n`.
DIFFICULTIES = {
    "0": pl.col("c") == 0,
    "(0, 1/3]": 3 * pl.col("c") <= pl.col("n"),
    "(1/3, 2/3]": 3 * pl.col("c") <= 2 * pl.col("n"),
    "(2/3, 1)": pl.col("c") < pl.col("n"),
    "1": pl.lit(True),
}

# Words with which a trace corrects itself. Shorter traces that lose all of them may have lost the
# habit of checking, too.
MARKERS = (
    "wait", "hmm", "actually", "alternatively", "let me check", "let me re", "double-check",
    "on second thought",
)  # fmt: skip
# ASCII word boundaries are a fifth faster than Unicode ones.
_MARKED = rf"(?i-u:\b(?:{'|'.join(MARKERS)}))"


def scan(rounds: list[Path], stage: Stage) -> pl.LazyFrame | None:
    """Return the rows of one stage of several rounds, with the round's folder in the column
    `folder`; None if no round has any. Raise DataError for a torn shard."""
    frames = []
    for path in rounds:
        require_kind(path, "round")
        round_dir = RoundDir(path)
        files = round_dir.shard_paths(stage)
        # Opening each of ten thousand shards takes longer than the query. A shard that the manifest
        # lists with its size is whole and has our schema.
        for file in {*files[:1], *round_dir.unindexed(stage)}:
            read_metadata(file)
        if files:
            frames.append(scan_shards(files, stage).with_columns(folder=pl.lit(str(path))))
    return pl.concat(frames) if frames else None


def scan_shards(
    files: Sequence[Path], stage: Stage, path_column: str | None = None
) -> pl.LazyFrame:
    """Return the rows of shards of one stage, in their order, with the shard's path in a column."""
    return pl.scan_parquet(
        list(files),
        glob=False,
        schema=pl.DataFrame(SCHEMAS[stage].empty_table()).schema,
        missing_columns="insert",
        include_file_paths=path_column,
    )


def scan_round(folder: str | Path, stage: Stage = "rollouts") -> pl.LazyFrame:
    """Return the rows of one stage of the round in `folder` as a lazy Polars frame.

    `stage` is "rollouts", "distill" (rewrites) or "errors" (failed requests); docs/contract.md
    lists the columns. The column `folder` is added. Rows that a running stage commits later are not
    in the frame.

    Raise ConfigError where the round has no rows of the stage, DataError for a damaged shard.
    """
    frame = scan([Path(folder)], stage)
    if frame is None:
        raise ConfigError(
            f"{folder}: no {stage} here (expected {stage}/part-*.parquet). Give a round's folder."
        )
    return frame


def collect(frame: pl.LazyFrame) -> pl.DataFrame:
    """Run a query over shards. Raise DataError if their bytes are damaged."""
    try:
        return frame.collect(engine="streaming")
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise DataError(f"a shard is damaged ({error}). Find it with mpd-gen validate.") from error


def with_group(rollouts: pl.LazyFrame, name: str) -> pl.LazyFrame:
    """Return `rollouts` with the column `group`: the value of the key `name` in `metadata` as text,
    or null. Raise ConfigError if no row has the key."""
    key = f"$[{json.dumps(name, ensure_ascii=False)}]"
    grouped = rollouts.with_columns(group=pl.col("metadata").str.json_path_match(key))
    if collect(grouped.select(pl.col("group").is_not_null().any())).item():
        return grouped
    objects = collect(rollouts.select(pl.col("metadata").drop_nulls().unique())).to_series()
    carried = sorted({key for text in objects for key in json.loads(text)} - {name})
    hint = " Copy columns into the metadata with --metadata-columns of mpd-gen rollouts."
    if carried:
        hint = did_you_mean(name, carried) or f" They carry {', '.join(map(repr, carried))}."
    raise ConfigError(f"--by {name!r}: no rollout has a value of it in its metadata.{hint}")


def light(rollouts: pl.LazyFrame, folders: pl.Enum) -> pl.LazyFrame:
    """Read the columns that the tables need into memory, once for all tables. The column `group` is
    kept if `rollouts` has it."""
    kept = (
        "round", "is_correct", "num_completion_tokens", "num_thinking_tokens", "repetition", "group"
    )  # fmt: skip
    rows = rollouts.select(
        selectors.by_name(kept, require_all=False),
        # Numbers group faster than text. Among ten million prompts, two have the same hash once in
        # 300,000 rounds.
        pl.col("prompt_id").hash().alias("prompt"),
        pl.col("folder").cast(folders),
        pl.col("finish_reason").cast(pl.Enum(sorted(FINISH_REASONS))),
        pl.col("answer").is_null().alias("lacks_answer"),
        pl.col("check_error").is_not_null().alias("check_failed"),
        # Number of self-correction markers, as whole words in any case.
        pl.col("completion").str.count_matches(_MARKED).alias("markers"),
    )
    return collect(rows).lazy()


def of_lengths(rollouts: pl.LazyFrame) -> pl.DataFrame:
    """Count the `samples` of `light` rollouts by folder, finish reason, correctness and `tokens`,
    shortest first: few rows, from which all statistics of lengths follow."""
    tokens = pl.col("num_completion_tokens").alias("tokens")
    groups = rollouts.group_by("folder", "finish_reason", "is_correct", tokens)
    return collect(groups.len("samples")).sort("tokens")


def quantile(values: pl.Expr, q: float) -> pl.Expr:
    """Return a quantile as every table of this project has it: one of the values, without
    interpolation; of two that are equally near the larger. The median is that of q = 0.5."""
    return values.quantile(q, "nearest")


def _mean_tokens(where: pl.Expr | None = None) -> pl.Expr:
    """Return the mean tokens of rows of `of_lengths`; null for no rows."""
    tokens, samples = pl.col("tokens"), pl.col("samples")
    if where is not None:
        tokens, samples = tokens.filter(where), samples.filter(where)
    return pl.when(samples.len() > 0).then((tokens * samples).sum() / samples.sum())


def _lengths() -> list[pl.Expr]:
    """Return mean, quantiles (without interpolation) and maximum over rows of `of_lengths`."""
    tokens, samples = pl.col("tokens"), pl.col("samples")
    before = samples.cum_sum() - samples
    quantiles = []
    for q in QUANTILES:
        up_to = tokens.filter(before <= (q * (samples.sum() - 1) + 0.5).floor())
        quantiles.append(up_to.last().cast(pl.Float64).alias(f"p{round(q * 100)}"))
    return [_mean_tokens().alias("mean_tokens"), *quantiles, tokens.max().alias("max")]


def of_prompts(rollouts: pl.LazyFrame) -> pl.DataFrame:
    """Count `n` checked and `c` correct samples of each folder and prompt of `light` rollouts."""
    right = pl.col("is_correct")
    groups = rollouts.group_by("folder", "prompt")
    return collect(groups.agg(right.count().alias("n"), right.sum().alias("c")))


def pass_at(prompts: pl.DataFrame) -> list[dict[str, Any]]:
    """Return pass@k by folder, for powers of two up to the samples per prompt: the probability that
    one of k samples is correct. The estimate 1 - C(n - c, k) / C(n, k) is unbiased
    (arXiv:2107.03374); it is averaged over prompts with a gold answer and at least k samples."""
    # Prompts with the same n and c have the same estimate.
    counts = prompts.filter(pl.col("n") > 0).group_by("folder", "n", "c").len().sort(pl.all())
    rows: list[dict[str, Any]] = []
    for (folder,), group in counts.group_by("folder", maintain_order=True):
        k = 1
        while kinds := group.filter(pl.col("n") >= k).drop("folder").rows():
            total = sum(count for _, _, count in kinds)
            correct = sum(count * (1 - comb(n - c, k) / comb(n, k)) for n, c, count in kinds)
            rows.append({"folder": folder, "k": k, "pass_at_k": correct / total, "prompts": total})
            k *= 2
    return rows


def difficulties(
    prompts: pl.DataFrame, distill: pl.LazyFrame | None, folders: pl.Enum
) -> list[dict[str, Any]]:
    """Return how the drafts and the kept rewrites of each folder are spread over problems of
    different difficulty, the hardest first. `prompts`: as `of_prompts` returns them; those without
    a gold answer are left out. A share is None where its whole is empty."""
    rows = prompts.filter(pl.col("n") > 0)
    if distill is None:
        rows = rows.with_columns(kept=0)
    else:
        prompt = pl.col("prompt_id").hash().alias("prompt")
        kept = distill.filter(pl.col("status") == "ok").with_columns(
            pl.col("folder").cast(folders), prompt
        )
        counts = collect(kept.group_by("folder", "prompt").agg(kept=pl.len()))
        rows = rows.join(counts, on=["folder", "prompt"], how="left")
    pass_rate = pl.coalesce(
        pl.when(condition).then(pl.lit(label)) for label, condition in DIFFICULTIES.items()
    )
    counts = rows.group_by(
        "folder", pass_rate.cast(pl.Enum(list(DIFFICULTIES))).alias("pass_rate")
    ).agg(pl.len().alias("problems"), pl.col("n").sum().alias("drafts"), pl.col("kept").sum())
    shares = [
        pl.when(pl.col(name).sum().over("folder") > 0)
        .then(pl.col(name) / pl.col(name).sum().over("folder"))
        .alias(f"{name}_share")
        for name in ("drafts", "kept")
    ]
    ordered = counts.sort("folder", "pass_rate").with_columns(*shares)
    columns = ("folder", "pass_rate", "problems", "drafts", "drafts_share", "kept", "kept_share")
    return ordered.select(columns).to_dicts()


def _parts(traces: pl.LazyFrame, name: str, tokens: str) -> list[dict[str, Any]]:
    """Return mean tokens of the thinking part and of the rest, by folder, over the traces that are
    known to have a thinking part or not; `tokens`: the column of all tokens of a trace."""
    thinking = pl.col("num_thinking_tokens")
    known = traces.filter(thinking.is_not_null()).group_by("folder").agg(
        pl.lit(name).alias("traces"),
        pl.len().alias("samples"),
        thinking.mean().alias("thinking_tokens"),
        (pl.col(tokens) - thinking).mean().alias("answer_tokens"),
        (thinking.sum() / pl.col(tokens).sum()).alias("thinking_share"),
    )  # fmt: skip
    return collect(known.sort("folder")).to_dicts()


def mean_tokens(traces: pl.LazyFrame, tokens: str) -> tuple[float, float | None]:
    """Return the mean tokens of traces, and of their thinking part: None where it is not known of
    all, or none has one. `tokens`: the column of all tokens of a trace."""
    thinking = pl.col("num_thinking_tokens")
    known = (thinking.null_count() == 0) & (thinking.sum() > 0)
    both = traces.select(mean=pl.col(tokens).mean(), part=pl.when(known).then(thinking.mean()))
    mean, part = collect(both).row(0)
    return mean, part


def mean_text(mean: float, thinking: float | None) -> str:
    """Return a mean of tokens in words, with its two parts where they are known."""
    if thinking is None:
        return f"{mean:,.1f}"
    return f"{mean:,.1f} ({thinking:,.1f} thinking + {mean - thinking:,.1f} answer)"


def trace_lengths(lengths: pl.DataFrame, p99: dict[str, int]) -> list[dict[str, Any]]:
    """Return histograms of completion tokens, one row for each folder and bin. A bin counts samples
    of at least `from` and fewer than `below` tokens (None: no bound). All folders have the same
    bins. `p99` holds the 99th percentile of each folder, in the order of the result."""
    longest = max(p99.values())
    width = next(
        size * 10**exponent
        for exponent in itertools.count()
        for size in (1, 2, 5)
        if longest // (size * 10**exponent) < BINS
    )
    last = longest // width
    of_bin = (pl.col("tokens") // width).clip(upper_bound=last).alias("bin")
    bins = lengths.group_by("folder", of_bin).agg(pl.col("samples").sum())
    counts = {(folder, index): samples for folder, index, samples in bins.rows()}
    rows: list[dict[str, Any]] = []
    for folder in p99:
        samples = [counts.get((folder, index), 0) for index in range(last + 1)]
        rows += [
            {
                "folder": folder,
                "from": index * width,
                "below": (index + 1) * width if index < last else None,
                "samples": count,
                "share": count / sum(samples),
            }
            for index, count in enumerate(samples)
        ]
    return rows


def round_stats(
    rounds: Sequence[str | Path], by: str | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Return tables as lists of rows, each row with its `folder`.

    `rollouts`, their `trace_lengths` (a histogram), their `behaviour`, `rollouts_by` finish reason
    and correctness, `pass_at_k` if there are gold answers, `groups` by the key `by` of their
    metadata if one is given, `rewrites` by status, `support` if a student measured it.
    `difficulty`: the shares of problems of each pass rate among drafts and kept rewrites, if there
    are gold answers. `thinking_and_answer`: the tokens of both parts of rollouts and kept rewrites,
    for models that think. Lengths are in tokens, rates are fractions.
    `no_answer` is the fraction of finished samples without an answer in a declared format,
    `repetition` the mean fraction of repeated 4-grams, `markers_per_1k` the self-correction MARKERS
    per 1,000 tokens.

    Raise ConfigError if no folder holds a round, if one is given twice, and if no rollout has the
    key `by`.
    """
    paths = [Path(path) for path in rounds]
    require_once(paths)
    rollouts, distill = scan(paths, "rollouts"), scan(paths, "distill")
    if rollouts is None and distill is None:
        raise ConfigError(
            f"{', '.join(map(str, rounds))}: no shards here. Expected the folders of rounds, with"
            " rollouts/part-*.parquet in them."
        )
    # In the order they are given in.
    folders = pl.Enum(list(dict.fromkeys(map(str, paths))))
    tables: dict[str, list[dict[str, Any]]] = {}
    if rollouts is not None:
        grouped = rollouts if by is None else with_group(rollouts, by)
        rows = light(grouped, folders)
        prompts = of_prompts(rows)
        tables |= _rollout_tables(rows, prompts)
        if difficulty := difficulties(prompts, distill, folders):
            tables["difficulty"] = difficulty
        parts = _parts(rows, "rollouts", "num_completion_tokens")
        if distill is not None:
            kept = distill.filter(pl.col("status") == "ok").with_columns(
                pl.col("folder").cast(folders)
            )
            parts += _parts(kept, "kept rewrites", "num_rewritten_tokens")
        if parts:
            tables["thinking_and_answer"] = parts
    elif by is not None:
        raise ConfigError(f"--by {by!r}: no rollouts here, and only they have metadata.")
    if distill is not None:
        tables["rewrites"] = _rewrites_by_status(distill, folders)
        if support := support_quantiles(distill, folders):
            tables["support"] = support
    return tables


def _rollout_tables(
    rollouts: pl.LazyFrame, prompts: pl.DataFrame
) -> dict[str, list[dict[str, Any]]]:
    """Return the tables of `round_stats` about `light` rollouts alone. `prompts`: `of_prompts`."""
    lengths = of_lengths(rollouts)
    tokens, markers = pl.col("num_completion_tokens"), pl.col("markers")
    rates = rollouts.group_by("folder").agg(
        pl.col("round").first(),
        pl.len().alias("samples"),
        *RATES,
        pl.col("check_failed", "repetition").mean(),
        markers_per_1k=1000 * markers.mean() / tokens.mean(),
    )
    by_folder = collect(rates).sort("round", "folder")
    of_folder = lengths.group_by("folder").agg(
        *_lengths(),
        _mean_tokens(pl.col("is_correct")).alias("right_tokens"),
        _mean_tokens(~pl.col("is_correct")).alias("wrong_tokens"),
    )
    for more in (prompts.group_by("folder").len("prompts"), of_folder):
        by_folder = by_folder.join(more, on="folder", maintain_order="left")
    first = ["folder", "round", "prompts"]
    p99 = {folder: int(tokens) for folder, tokens in by_folder.select("folder", "p99").rows()}
    kinds = ("folder", "finish_reason", "is_correct")
    of_kind = lengths.group_by(kinds).agg(pl.col("samples").sum(), *_lengths())
    tables = {
        "rollouts": by_folder.select(*first, pl.exclude(*first, *BEHAVIOUR)).to_dicts(),
        "trace_lengths": trace_lengths(lengths, p99),
        "behaviour": by_folder.select("folder", "round", *BEHAVIOUR).to_dicts(),
        "rollouts_by": of_kind.sort(kinds).to_dicts(),
    }
    if passes := pass_at(prompts):
        tables["pass_at_k"] = passes
    if "group" in rollouts.collect_schema().names():
        tables["groups"] = _by_group(rollouts)
    return tables


def _by_group(rollouts: pl.LazyFrame) -> list[dict[str, Any]]:
    """Return a line for each value of `group` and folder."""
    tokens, (accuracy, truncated, no_answer) = pl.col("num_completion_tokens"), RATES
    frame = rollouts.group_by("group", "folder", maintain_order=True).agg(
        pl.len().alias("samples"),
        accuracy,
        no_answer,
        tokens.mean().alias("mean_tokens"),
        *(quantile(tokens, q).alias(f"p{round(q * 100)}") for q in (0.5, 0.9)),
        truncated,
        pl.col("round").first(),
    )
    ordered = frame.sort(*GROUP_ORDER, "round", nulls_last=True, maintain_order=True)
    return collect(ordered.drop("round")).to_dicts()


def _rewrites_by_status(distill: pl.LazyFrame, folders: pl.Enum) -> list[dict[str, Any]]:
    """Return a line for each folder and status, the most frequent status first."""
    frame = distill.with_columns(
        pl.col("folder").cast(folders), pl.col("status").cast(pl.Enum(STATUSES))
    )
    by_status = frame.group_by("folder", "status").agg(
        pl.len().alias("rows"),
        pl.col("num_original_tokens").mean().alias("mean_original"),
        pl.col("num_rewritten_tokens").mean().alias("mean_rewritten"),
        pl.col("repetition").mean(),
        pl.col("compression_ratio").mean().alias("mean_ratio"),
        quantile(pl.col("compression_ratio"), 0.5).alias("median_ratio"),
    )
    share = (pl.col("rows") / pl.col("rows").sum().over("folder")).alias("share")
    ordered = by_status.with_columns(share).sort(
        "folder", "rows", "status", descending=[False, True, False]
    )
    return collect(ordered).to_dicts()


def support_quantiles(distill: pl.LazyFrame, folders: pl.Enum) -> list[dict[str, Any]]:
    """Return a line for each folder and measure with the number of `rewrites` that have it, those
    that a filter rejected included, and its quantiles without interpolation, in nats."""
    rows: list[dict[str, Any]] = []
    for name in ("answer_support", "weakest_step"):
        value = pl.col(name)
        groups = distill.filter(value.is_not_null()).group_by(pl.col("folder").cast(folders))
        frame = groups.agg(
            pl.lit(name).first().alias("measure"),
            pl.len().alias("rewrites"),
            *(
                quantile(value, q).cast(pl.Float64).alias(f"p{round(q * 100)}")
                for q in SUPPORT_QUANTILES
            ),
        )
        rows += collect(frame.sort("folder")).to_dicts()
    return rows


def outcome_rates(folder: Path) -> dict[str, float | None]:
    """Return `accuracy`, `truncated` and `no_answer` of a round's rollouts, as fractions, and their
    `mean_tokens`; None for what is not known: accuracy without gold answers, and all without
    rollouts."""
    rollouts = scan([folder], "rollouts")
    if rollouts is None:
        return dict.fromkeys(("accuracy", "truncated", "no_answer", "mean_tokens"))
    rows = rollouts.select(
        "is_correct", "finish_reason", "num_completion_tokens",
        lacks_answer=pl.col("answer").is_null(),
    )  # fmt: skip
    mean = pl.col("num_completion_tokens").mean().alias("mean_tokens")
    rates: dict[str, float | None] = collect(rows.select(*RATES, mean)).to_dicts()[0]
    return rates


def rewrite_rates(folder: Path, max_overlap: float) -> tuple[float, float, float]:
    """Return which fraction of a round's rows of rewrites is kept, which repeats more than
    `max_overlap` of its draft, and which is rejected because it corrects its draft; 0 without
    rows."""
    distill = scan([folder], "distill")
    if distill is None:
        return 0.0, 0.0, 0.0
    status = pl.col("status")
    shares = {
        "kept": status == "ok",
        "copied": pl.col("draft_overlap") > max_overlap,
        "corrected": (status == "answer_changed") & pl.col("is_correct"),
    }
    rates = [share.fill_null(False).mean().alias(name) for name, share in shares.items()]
    kept, copied, corrected = collect(distill.select(rates)).row(0)
    return kept or 0.0, copied or 0.0, corrected or 0.0


def plot_lengths(series: dict[str, Path], out: Path) -> None:
    """Draw the completion tokens of each round in `series` (label -> folder) to `out` (PNG, SVG or
    PDF by its ending), a row for each, the first in grey. Raise ConfigError."""
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lengths, parts = {}, {}
    for label, path in series.items():
        rollouts = scan_round(path)
        tokens = collect(rollouts.select("num_completion_tokens"))
        lengths[label] = tokens.to_series().to_numpy()
        parts[label] = mean_text(*mean_tokens(rollouts, "num_completion_tokens"))
    longest = int(max(values.max() for values in lengths.values()))
    width = -(-(longest + 1) // _PLOT_BINS)
    edges = np.arange(0, longest + 1 + width, width)
    figure, axes = plt.subplots(
        len(lengths), figsize=(8, 0.6 + 1.0 * len(lengths)), sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for number, (axis, (label, values)) in enumerate(zip(axes[:, 0], lengths.items(), strict=True)):
        colour = "#7d8590" if number == 0 and len(lengths) > 1 else "#1f5fa8"
        counts, _ = np.histogram(values, edges)
        axis.stairs(counts, edges, fill=True, color=colour, alpha=0.75)
        mean, median = values.mean(), np.sort(values)[len(values) // 2]
        axis.axvline(mean, color="#1a1d21", linewidth=1.2)
        # Where there is room for the words: on the side that has less.
        words, side = f" mean {parts[label]}, median {median:.0f} ", mean > longest / 2
        axis.annotate(
            words, (mean, 0.93), xycoords=("data", "axes fraction"), fontsize=9, va="top",
            ha="right" if side else "left",
        )  # fmt: skip
        # Labels are data and may hold dollar signs.
        name = textwrap.fill(label, _PLOT_LABEL)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", parse_math=False)
        axis.set_yticks([])
        axis.set_ylim(0, 1.25 * max(counts.max(), 1))
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[-1, 0].set_xlabel("trace tokens")
    axes[-1, 0].set_xlim(0, longest + width)
    axes[-1, 0].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    try:
        figure.savefig(out, dpi=150)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{out}: the plot cannot be written: {error}") from error
    finally:
        plt.close(figure)
