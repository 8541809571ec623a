"""The numbers of a report: lazy Polars queries over light columns of the shards.

No query reads token lists, and none reads the text of training rounds. A collected frame has one
row per length, status or problem.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from mpd_data.common.errors import ConfigError
from mpd_data.inspect import compare as comparison
from mpd_data.inspect import frontier
from mpd_data.inspect.stats import (
    collect,
    difficulties,
    mean_text,
    mean_tokens,
    of_lengths,
    of_prompts,
    round_stats,
    scan,
    scan_round,
    support_quantiles,
    trace_lengths,
)
from mpd_data.store.schema import STATUSES
from mpd_data.store.trainings import read_metrics
from mpd_rounds.report.run import BASE, Run, count, round_name

# The curves of a training, in order: (columns of metrics.jsonl, title).
CURVES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("loss", "validation_loss"), "loss"),
    (("kl",), "divergence, nats per token"),
    (("student_entropy", "teacher_entropy"), "entropy, nats"),
    (("topk_mass",), "student's mass on the teacher's top K"),
    (("agreement",), "share of tokens both rank first"),
    (("grad_norm",), "gradient norm"),
    (("learning_rate",), "learning rate"),
    (("tokens_per_second",), "tokens per second"),
    (("cross_entropy",), "cross-entropy of the rewrites"),
    (("clipped",), "share of tokens clipped"),
    (("given_away",), "share of tokens that the draft gave away"),
)


@dataclass(frozen=True)
class LengthCounts:
    """A distribution of trace lengths. `counts` has a row for each length, with the columns
    `tokens`, ascending, and `samples`; `mean`, and that of the `thinking` part, if there is one:
    see `mean_tokens`."""

    counts: pl.DataFrame
    mean: float
    thinking: float | None

    @property
    def samples(self) -> int:
        return int(self.counts["samples"].sum())

    @property
    def mean_text(self) -> str:
        return mean_text(self.mean, self.thinking)

    def quantile(self, q: float) -> int:
        """Return a quantile of the lengths, without interpolation."""
        rank = int(q * (self.samples - 1) + 0.5)
        reached = self.counts["samples"].cum_sum()
        return int(self.counts["tokens"][int((reached <= rank).sum())])


@dataclass(frozen=True)
class Histogram:
    """`shares` of the samples per bin. `edges` has one value more; the last bin also holds all
    longer samples."""

    edges: list[int]
    shares: list[float]


def histograms(lengths: dict[str, LengthCounts]) -> dict[str, Histogram]:
    """Return the histogram of each distribution, in common bins (those of `mpd-gen stats`)."""
    frames = [own.counts.with_columns(folder=pl.lit(label)) for label, own in lengths.items()]
    p99 = {label: own.quantile(0.99) for label, own in lengths.items()}
    rows = trace_lengths(pl.concat(frames), p99)
    result = {}
    for label in lengths:
        bins = [row for row in rows if row["folder"] == label]
        edges = [row["from"] for row in bins]
        width = edges[1] - edges[0] if len(edges) > 1 else (bins[0]["below"] or 1)
        shares = [row["share"] for row in bins]
        result[label] = Histogram([*edges, edges[-1] + width], shares)
    return result


def rollout_lengths(folder: Path) -> LengthCounts:
    """Return the lengths of the rollouts in a round's folder, which must hold some."""
    rollouts = scan_round(folder)
    counts = of_lengths(rollouts).group_by("tokens").agg(pl.col("samples").sum())
    return LengthCounts(counts.sort("tokens"), *mean_tokens(rollouts, "num_completion_tokens"))


def rewrite_lengths(folder: Path) -> LengthCounts | None:
    """Return the lengths of the kept rewrites; None if there are none."""
    frame = scan([folder], "distill")
    if frame is None:
        return None
    kept, tokens = frame.filter(pl.col("status") == "ok"), "num_rewritten_tokens"
    counts = collect(kept.group_by(tokens=tokens).agg(samples=pl.len())).sort("tokens")
    return LengthCounts(counts, *mean_tokens(kept, tokens)) if counts.height else None


@dataclass(frozen=True)
class Funnel:
    """How many rows of a round are left after each stage. `whole`: rollouts that were not cut off;
    `answered`: rewrites that the teacher gave; `statuses`: rewrite rows by status, in the order of
    the contract; `ratio`: mean length of the kept rewrites as a share of their drafts'; `failed`:
    rows in errors/; `difficulty`: rows of stats.difficulties by pass rate; `support`: lines of
    stats.support_quantiles, by measure."""

    prompts: int
    rollouts: int
    whole: int
    answered: int
    statuses: dict[str, int]
    ratio: float | None
    failed: int
    difficulty: dict[str, dict[str, Any]]
    support: dict[str, dict[str, Any]]

    @property
    def rewrites(self) -> int:
        return sum(self.statuses.values())

    @property
    def kept(self) -> int:
        return self.statuses.get("ok", 0)


def funnel(folder: Path) -> Funnel:
    """Return the funnel of a round's folder, which must hold rollouts."""
    first = collect(
        scan_round(folder).select(
            prompts=pl.col("prompt_id").hash().n_unique(),
            rollouts=pl.len(),
            whole=(pl.col("finish_reason") == "stop").sum(),
        )
    ).row(0, named=True)
    statuses: dict[str, int] = {}
    answered, ratio = 0, None
    support = {}
    distill = scan([folder], "distill")
    if distill is not None:
        rows = collect(
            distill.group_by("status").agg(
                rows=pl.len(),
                answered=pl.col("rewrite_finish_reason").is_not_null().sum(),
                ratio=pl.col("compression_ratio").mean(),
            )
        )
        by_status = {row["status"]: row for row in rows.to_dicts()}
        statuses = {name: by_status[name]["rows"] for name in STATUSES if name in by_status}
        answered = sum(row["answered"] for row in by_status.values())
        ratio = by_status["ok"]["ratio"] if "ok" in by_status else None
        measured = support_quantiles(distill, pl.Enum([str(folder)]))
        support = {row["measure"]: row for row in measured}
    failed = count(folder, "errors")
    folders, prompt = pl.Enum([str(folder)]), pl.col("prompt_id").hash().alias("prompt")
    light = scan_round(folder).select(pl.col("folder").cast(folders), prompt, "is_correct")
    table = difficulties(of_prompts(light), distill, folders)
    difficulty = {row["pass_rate"]: row for row in table}
    return Funnel(
        **first, answered=answered, statuses=statuses, ratio=ratio, failed=failed,
        difficulty=difficulty, support=support,
    )  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """A model's results on an evaluation set. `side`: from compare.evaluate; `paired`: differences
    from the base, from compare.compare; None for the base, and if the two cannot be paired (`note`
    says why); `behaviour`: from stats.round_stats."""

    side: dict[str, Any]
    paired: dict[str, Any] | None
    behaviour: dict[str, Any]
    note: str | None = None


Evaluations = dict[str, dict[int, Measured]]  # by evaluation set and round


def evaluations(run: Run) -> Evaluations:
    return {name: _measure(folders) for name, folders in run.evaluations.items()}


def _measure(folders: dict[int, Path]) -> dict[int, Measured]:
    tables = round_stats(list(folders.values()))
    behaviour: dict[str, dict[str, Any]] = {}
    for row in (*tables["rollouts"], *tables["behaviour"]):
        behaviour.setdefault(row["folder"], {}).update(row)
    measured = {}
    for number, folder in folders.items():
        paired, note = None, None
        if number != BASE and BASE in folders:
            try:
                paired = comparison.compare(folders[BASE], folder)
            except ConfigError as error:
                # Rows failed on one side alone: the note appears below the table.
                note = str(error)
            else:
                if paired["settings_that_differ"]:
                    note = "sampled differently: " + "; ".join(paired["settings_that_differ"])
        side = comparison.evaluate(folder) if paired is None else paired["new"]
        measured[number] = Measured(side, paired, behaviour[str(folder)], note)
    return measured


def frontiers(run: Run) -> dict[str, dict[str, Any]]:
    """Return what `frontier.judge` says of each round, for the evaluation sets with the base, a
    baseline and gold answers."""
    found = {}
    for name, baselines in run.baselines.items():
        folders = {round_name(n): folder for n, folder in run.evaluations.get(name, {}).items()}
        base = folders.pop(round_name(BASE), None)
        if base is not None:
            free = {"base": base, **{f"baseline {n}": folder for n, folder in baselines.items()}}
            judged = frontier.judge(free, folders)
            if judged is not None:
                found[name] = judged
    return found


@dataclass(frozen=True)
class Training:
    """One training: `columns` of metrics.jsonl, each a list of (step, value)."""

    columns: dict[str, list[tuple[int, float]]]

    @property
    def steps(self) -> int:
        return max((step for points in self.columns.values() for step, _ in points), default=0)

    def first_and_last(self, name: str) -> tuple[float, float] | None:
        points = self.columns.get(name)
        return (points[0][1], points[-1][1]) if points else None

    @property
    def tokens(self) -> float:
        return self._total("tokens")

    @property
    def seconds(self) -> float:
        return self._total("seconds")

    def _total(self, name: str) -> float:
        return sum(value for _, value in self.columns.get(name, []))


_READ = {name for names, _ in CURVES for name in names} | {"tokens", "seconds"}


def training(folder: Path) -> Training:
    columns: dict[str, list[tuple[int, float]]] = {}
    for record in read_metrics(folder):
        for name in _READ & record.keys():
            value = record[name]
            if isinstance(value, int | float):
                columns.setdefault(name, []).append((int(record["step"]), float(value)))
    return Training(columns)
