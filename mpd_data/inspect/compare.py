"""`mpd-gen compare`: compare two sets of rollouts on the same prompts, with paired intervals.

Samples of one problem are alike, so the bootstrap resamples problems, not samples, and the same
problems on both sides.

The hard third are the problems that the base solves least often. What is chosen by a sample must
not be measured by it: a problem that is hard by bad luck would seem to improve. So one half of the
base's samples chooses and the other half of both sides' samples is measured, both ways round.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from mpd_data.common.errors import ConfigError
from mpd_data.common.hashing import content_key, differences
from mpd_data.common.text import format_table, plain
from mpd_data.inspect.stats import GROUP_ORDER, collect, quantile, scan, scan_round, with_group
from mpd_data.store.round import RoundDir
from mpd_data.store.shards import read_metadata

RESAMPLES = 10_000
# With fewer problems the intervals are too narrow. Simulated paired comparisons of up to 10 points
# had the truth in 53% to 99% of the 95% intervals of 10 problems, and in 85% to 99% of those of 30.
MIN_PROBLEMS = 30
_SEED = 0
# What `paired` returns, each with its 95% interval.
DIFFERENCES = (
    "token_reduction", "token_reduction_interval", "accuracy_difference",
    "accuracy_difference_interval", "thinking_reduction", "thinking_reduction_interval",
    "answer_reduction", "answer_reduction_interval",
)  # fmt: skip


# Mean tokens of the thinking part and of what follows it; null if that is not known of a row.
_KNOWN = pl.when(pl.col("num_thinking_tokens").null_count() == 0)
_THINKING = _KNOWN.then(pl.col("num_thinking_tokens").mean())
_ANSWER = _KNOWN.then((pl.col("num_completion_tokens") - pl.col("num_thinking_tokens")).mean())


def per_problem(path: Path, half: int | None = None) -> pl.DataFrame:
    """Return `samples`, mean `accuracy`, mean `tokens`, and those of the `thinking` part and of the
    `answer` after it, of each prompt, sorted by its id. `half`: of the samples with an even (0) or
    odd (1) number only. Raise ConfigError if there are no rollouts."""
    samples = scan_round(path)
    if half is not None:
        samples = samples.filter(pl.col("sample_idx") % 2 == half)
    means = samples.group_by("prompt_id").agg(
        pl.len().alias("samples"),
        pl.col("is_correct").cast(pl.Float64).mean().alias("accuracy"),
        pl.col("num_completion_tokens").cast(pl.Float64).mean().alias("tokens"),
        _THINKING.cast(pl.Float64).alias("thinking"),
        _ANSWER.cast(pl.Float64).alias("answer"),
    )
    return collect(means.sort("prompt_id"))


def graded(problems: pl.DataFrame) -> pl.DataFrame:
    """Return the problems of a frame of `per_problem` that have an accuracy: a gold answer that the
    checker could read."""
    return problems.drop_nulls("accuracy")


def mean_accuracy(problems: pl.DataFrame) -> float | None:
    """Return the mean accuracy of the `graded` problems; None if there are none."""
    accuracy = graded(problems)["accuracy"]
    return float(accuracy.to_numpy().mean()) if len(accuracy) else None


def hard_third(problems: pl.DataFrame) -> list[str]:
    """Return the ids of the hard third: of a frame of `per_problem` with accuracy, the third of the
    problems (rounded up) with the lowest accuracy. Of equally hard ones those whose id has the
    smallest hash are taken, so that the choice does not depend on the order of the ids."""
    hashed = problems["prompt_id"].map_elements(content_key, pl.String)
    ordered = problems.with_columns(hash=hashed).sort("accuracy", "hash")
    return ordered["prompt_id"].head(-(-problems.height // 3)).to_list()


def on_hard_third(base: Path, new: Path) -> tuple[pl.DataFrame, pl.DataFrame, pl.Series] | None:
    """Return the hard problems of two sets of rollouts on the same prompts: a row each of the base
    and of `new`, and how many halves of the base's samples chose the problem (1 or 2). The means
    of a row are summed over these halves, so a mean over problems is their sum by that of the
    numbers. Problems without a gold answer are left out. Return None if all are, or a side has one
    sample of each."""
    befores, afters = ([graded(per_problem(path, half)) for half in (0, 1)] for path in (base, new))
    if any(half.is_empty() for half in (*befores, *afters)):
        return None
    sides: tuple[list[pl.DataFrame], list[pl.DataFrame]] = ([], [])
    for half in (0, 1):
        measured = befores[half], afters[half]
        ids = set(hard_third(befores[1 - half])).intersection(*(f["prompt_id"] for f in measured))
        for side, frame in zip(sides, measured, strict=True):
            side.append(frame.filter(pl.col("prompt_id").is_in(list(ids))))
    columns = pl.col("samples", "accuracy", "tokens").sum()
    left, right = (
        pl.concat(side).group_by("prompt_id").agg(columns, times=pl.len()).sort("prompt_id")
        for side in sides
    )
    return left.drop("times"), right.drop("times"), left["times"]


def _interval(draws: npt.NDArray[np.float64]) -> list[float]:
    return [float(x) for x in np.quantile(draws, [0.025, 0.975])]


def _resampled_means(columns: list[npt.NDArray[np.float64]]) -> list[npt.NDArray[np.float64]]:
    """Return the means of each column over RESAMPLES bootstrap samples of its rows. All columns use
    the same rows."""
    n = len(columns[0])
    rng = np.random.default_rng(_SEED)
    means = [np.empty(RESAMPLES) for _ in columns]
    block = max(1, 4_000_000 // n)
    for first in range(0, RESAMPLES, block):
        last = min(first + block, RESAMPLES)
        chosen = rng.integers(0, n, size=(last - first, n))
        for column, out in zip(columns, means, strict=True):
            out[first:last] = column[chosen].mean(axis=1)
    return means


def evaluate(path: Path) -> dict[str, Any]:
    """Return mean accuracy (avg@n) and tokens of the problems of one set of rollouts with 95%
    bootstrap intervals, their mean tokens of the thinking part and of the answer after it, median
    tokens, and the truncated fraction. Each problem counts once, whatever its samples. Accuracy is
    that of the `graded` problems, None without any; the two parts are None for a model without a
    thinking part."""
    problems = per_problem(path)
    whole = scan_round(path).select(
        truncated=(pl.col("finish_reason") == "length").mean(),
        median=quantile(pl.col("num_completion_tokens"), 0.5),
    )
    truncated_fraction, median_tokens = collect(whole).row(0)
    thinking, answer = (
        None if problems[part].null_count() else float(problems[part].to_numpy().mean())
        for part in ("thinking", "answer")
    )
    known = graded(problems)["accuracy"].to_numpy()
    return {
        "problems": problems.height,
        "graded": len(known),
        "samples": int(problems["samples"].sum()),
        "accuracy": mean_accuracy(problems),
        "accuracy_interval": _interval(_resampled_means([known])[0]) if len(known) else None,
        "mean_tokens": float(problems["tokens"].to_numpy().mean()),
        "mean_tokens_interval": _interval(_resampled_means([problems["tokens"].to_numpy()])[0]),
        "median_tokens": median_tokens,
        "thinking_tokens": thinking,
        "answer_tokens": answer,
        "truncated": truncated_fraction,
    }


def compare(base: str | Path, new: str | Path, by: str | None = None) -> dict[str, Any]:
    """Return `evaluate` of both sides, the accuracy difference (new - base) and the fraction of
    tokens saved (1 - new / base), also of the thinking part and of the answer after it, each with a
    paired 95% bootstrap interval over problems (None for a single problem). With `by`, a key of the
    rollouts' metadata, `groups` has the same for the problems of each value. `hard_third` has the
    same for the problems that the base solves least often; None without gold answers, and if a side
    has one sample of each problem. Problems without a gold answer count for tokens alone.

    Raise ConfigError unless both were sampled on the same prompts, and if no rollout has the key
    `by` or the two sides have different values for one prompt.
    """
    base, new = Path(base), Path(new)
    left, right = per_problem(base), per_problem(new)
    if not left["prompt_id"].equals(right["prompt_id"]):
        shared = len(set(left["prompt_id"]) & set(right["prompt_id"]))
        raise ConfigError(
            f"{base} has {left.height} prompts, {new} has {right.height}, and they share {shared}."
            " A paired comparison needs the same prompts on both sides: sample both from one file."
        )
    result = {
        "settings_that_differ": _unlike_settings(base, new),
        "base": evaluate(base),
        "new": evaluate(new),
        **paired(left, right),
        "hard_third": None,
    }
    if (hard := on_hard_third(base, new)) is not None:
        before, after, times = hard
        result["hard_third"] = {
            "problems": len(times),
            "base": _hard_means(before, times),
            "new": _hard_means(after, times),
            **paired(before, after, times),
        }
    if by is not None:
        result["groups"] = _by_group(base, new, by, left, right)
    return result


def paired(
    left: pl.DataFrame, right: pl.DataFrame, times: pl.Series | None = None
) -> dict[str, Any]:
    """Return the differences between two frames of `per_problem`, as in `compare`. Both have the
    same problems in the same order. Tokens are those of all problems, accuracy is that of the ones
    `graded` on both sides. `times`: for frames of `on_hard_third`."""
    weights = np.ones(left.height) if times is None else times.to_numpy()

    def differences_of(known: list[str], means: list[Any]) -> dict[str, Any]:
        *sums, count = means
        found = {}
        for name, old, new in zip(known, sums[::2], sums[1::2], strict=True):
            if name == "accuracy":
                found["accuracy_difference"] = (new - old) / count
            elif np.all(old > 0):  # nothing can be saved of a part that the base does not have
                found[f"{name.removesuffix('s')}_reduction"] = 1 - new / old
        return found

    result: dict[str, Any] = dict.fromkeys(DIFFERENCES)
    every = np.ones(left.height, bool)
    answered = (left["accuracy"].is_not_null() & right["accuracy"].is_not_null()).to_numpy()
    for names, rows in ((("tokens", "thinking", "answer"), every), (("accuracy",), answered)):
        sides = [side.filter(rows) for side in (left, right)]
        known = [
            name
            for name in names
            if all(len(s) and name in s and s[name].null_count() == 0 for s in sides)
        ]
        columns = [side[name].to_numpy() for name in known for side in sides] + [weights[rows]]
        if not known:
            continue
        means = differences_of(known, [column.mean() for column in columns])
        result |= {name: float(value) for name, value in means.items()}
        # A single problem does not show how much problems differ.
        if rows.sum() > 1:
            draws = differences_of(known, _resampled_means(columns))
            result |= {f"{name}_interval": _interval(values) for name, values in draws.items()}
    return result


def _by_group(
    base: Path, new: Path, by: str, left: pl.DataFrame, right: pl.DataFrame
) -> list[dict[str, Any]]:
    """Return both sides and their differences for the problems of each value of `by`. A problem's
    value is taken from either side."""
    rows = scan([base, new], "rollouts")
    assert rows is not None
    of_prompt = with_group(rows, by).group_by("prompt_id")
    groups_of_prompt = of_prompt.agg(pl.col("group").drop_nulls().unique().sort())
    values = collect(groups_of_prompt.sort("prompt_id"))
    for prompt_id, both in values.filter(pl.col("group").list.len() > 1).iter_rows():
        raise ConfigError(
            f"--by {by!r}: prompt {prompt_id!r} has {both[0]!r} on one side and {both[1]!r} on"
            " the other. Sample both from one file."
        )
    values = values.with_columns(pl.col("group").list.first())
    groups = []
    for value in values["group"].unique().to_frame().sort(*GROUP_ORDER, nulls_last=True)["group"]:
        chosen = values["group"].eq_missing(value)
        sides = [side.filter(chosen) for side in (left, right)]
        means = {"base": _means(sides[0]), "new": _means(sides[1])}
        group = {"group": value, "problems": sides[0].height, **means}
        groups.append(group | paired(sides[0], sides[1]))
    return groups


def _means(problems: pl.DataFrame) -> dict[str, float | None]:
    """Return `graded`, accuracy and mean tokens as `evaluate` defines them."""
    return {
        "graded": graded(problems).height,
        "accuracy": mean_accuracy(problems),
        "mean_tokens": float(problems["tokens"].to_numpy().mean()),
    }


def _hard_means(side: pl.DataFrame, times: pl.Series) -> dict[str, float]:
    """Return accuracy and mean tokens of a side of `on_hard_third`."""
    of_column = {"accuracy": "accuracy", "mean_tokens": "tokens"}
    return {
        name: float(side[column].to_numpy().sum() / times.to_numpy().sum())
        for name, column in of_column.items()
    }


def _unlike_settings(base: Path, new: Path) -> list[str]:
    """Return how the sampling of the two differs; the reader judges whether it matters."""
    sides = (read_metadata(RoundDir(path).shard_paths("rollouts")[0]) for path in (base, new))
    names = ("sampling", "num_samples", "template_kwargs", "checker")
    saved, now = ({name: side.get(name) for name in names} for side in sides)
    return differences(saved, now)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def _estimate(result: dict[str, Any], name: str) -> str:
    interval = result[f"{name}_interval"]
    bounds = "" if interval is None else " [{:.1f}, {:.1f}]".format(*(100 * x for x in interval))
    return f"{_percent(result[name])}{bounds}"


def table(sides: dict[str, dict[str, Any]]) -> str:
    """Return results of `evaluate` as a table, one line per label."""
    return format_table(
        [
            {
                "": label,
                "accuracy [95%]": _estimate(side, "accuracy"),
                "mean tokens [95%]": "{:.1f} [{:.1f}, {:.1f}]".format(
                    side["mean_tokens"], *side["mean_tokens_interval"]
                ),
                **_part_cells(sides, side),
                "median": side["median_tokens"],
                "truncated": f"{100 * side['truncated']:.2f}%",
                "problems": side["problems"],
                **_graded_cell(sides.values(), side),
                "samples": side["samples"],
            }
            for label, side in sides.items()
        ]
    )


def _graded_cell(sides: Iterable[Mapping[str, Any]], side: Mapping[str, Any]) -> dict[str, int]:
    """Return the cell with the number of problems that accuracy is measured on, where any of
    `sides` lacks gold answers."""
    if all(other["graded"] == other["problems"] for other in sides):
        return {}
    return {"with gold answers": side["graded"]}


def _part_cells(sides: dict[str, dict[str, Any]], side: dict[str, Any]) -> dict[str, float | None]:
    """Return the cells of thinking and answer tokens, where any of `sides` has them."""
    if all(other["thinking_tokens"] is None for other in sides.values()):
        return {}
    return {"thinking": side["thinking_tokens"], "answer": side["answer_tokens"]}


def side_by_side(result: dict[str, Any]) -> dict[str, str]:
    """Return the cells of a line: base and new of a `compare` or of one of its groups, with their
    paired differences (accuracy in points)."""
    sides = (result["base"], result["new"])
    return {
        "accuracy": " -> ".join(_percent(side["accuracy"]) for side in sides),
        "difference [95%]": _estimate(result, "accuracy_difference"),
        "tokens": " -> ".join(f"{side['mean_tokens']:,.1f}" for side in sides),
        "saved [95%]": _estimate(result, "token_reduction"),
    }


# A third is chosen by each half, and a problem may be in both.
_HARD = "the hard third: what the base solves least often in half of its samples, by the other half"


def show(result: dict[str, Any], by: str | None) -> str:
    """Return the tables and the verdict of `compare`."""
    text = f"{table({side: result[side] for side in ('base', 'new')})}\n{verdict(result)}"
    if (hard := result["hard_third"]) is not None:
        line = {"problems": hard["problems"], **side_by_side(hard)}
        text += f"\n\n{_HARD}\n{format_table([line])}"
        if result["base"]["samples"] < 4 * result["base"]["problems"]:
            text += "\nWith fewer than four samples of a problem, mostly chance chooses this third."
    if by is None:
        return text
    counts = [{"problems": g["problems"], "graded": g["base"]["graded"]} for g in result["groups"]]
    lines = [
        {
            "group": group["group"],
            "problems": group["problems"],
            **_graded_cell(counts, count),
            **side_by_side(group),
        }
        for group, count in zip(result["groups"], counts, strict=True)
    ]
    return f"{text}\n\nby {plain(by)}\n{format_table(lines)}"


def too_few(side: Mapping[str, Any]) -> str:
    """Return the warning for the intervals of a result of `evaluate` (or another mapping with
    `problems`, and `graded` if those with gold answers may be fewer); "" with enough problems."""
    problems, graded = side["problems"], side.get("graded") or side["problems"]
    if min(problems, graded) >= MIN_PROBLEMS:
        return ""
    count = (
        f"{graded} problems with gold answers"
        if problems >= MIN_PROBLEMS
        else (f"{problems} problem{'s' * (problems != 1)}")
    )
    return (
        f"only {count}: intervals of fewer than {MIN_PROBLEMS} problems are too narrow to rely on"
    )


def count_text(side: Mapping[str, Any]) -> str:
    """Return the number of problems of a result of `evaluate`, and of those that accuracy is
    measured on if these are fewer."""
    problems, graded = side["problems"], side["graded"]
    return f"{problems:,}" + (f", {graded:,} with gold answers" if graded < problems else "")


def verdict(result: dict[str, Any]) -> str:
    """Return the paired differences of `compare` in a sentence, with what limits them."""
    saved, gain = _estimate(result, "token_reduction"), _estimate(result, "accuracy_difference")
    line = f"tokens saved {saved}, accuracy difference in points {gain} (paired bootstrap)"
    if result["answer_reduction"] is not None:
        parts = (_estimate(result, f"{part}_reduction") for part in ("thinking", "answer"))
        line += "\nof the thinking part saved {}, of the answer after it {}".format(*parts)
    if warning := too_few(result["base"]):
        line += f"\n{warning}"
    if result["settings_that_differ"]:
        line += "\nsampled differently (saved: base, now: new): "
        line += "; ".join(result["settings_that_differ"])
    return line
