"""Sections on how the data was made (the funnel of each round) and on the trainings."""

from collections import Counter
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

from mpd_data.inspect.stats import DIFFICULTIES
from mpd_rounds.report import plots, queries
from mpd_rounds.report.document import NONE, Bar, Block, Plot, Plots, Table, number, percent
from mpd_rounds.report.provenance import flattened, setting_text
from mpd_rounds.report.queries import Funnel, Training
from mpd_rounds.report.run import round_name

# -- funnel -------------------------------------------------------------------------------------

_STAGES: dict[str, Callable[[Funnel], int]] = {
    "rollouts": attrgetter("rollouts"),
    "not cut off": attrgetter("whole"),
    "rewrites": attrgetter("answered"),
    "kept": attrgetter("kept"),
}

_REASONS = {
    "draft_truncated": "the draft hit its limit, so the teacher was not asked",
    "draft_rejected": "the draft is not of the kind that is rewritten",
    "too_long": "does not fit the teacher's context",
    "truncated": "the rewrite hit its limit",
    "malformed": "not in the template's format, or without an answer",
    "check_failed": "the answer's check failed",
    "answer_changed": "another answer than the draft's",
    "longer": "longer than the draft allows",
    "too_short": "shorter than the draft allows",
    "copied": "repeats nearly all of the draft",
    "repetitive": "repeats itself",
    "incorrect": "not the gold answer",
    "unsupported": "does not carry its answer, by the student's measure",
    "not_chosen": "passed, but another rewrite was chosen",
}


_MEASURES = {
    "answer_support": "answer support, 10% / median, nats",
    "weakest_step": "weakest step, 10% / median, nats",
}


def funnel_tables(funnels: dict[int, Funnel], changes: list[dict[str, Any]]) -> Iterator[Block]:
    """Yield what is left of each round after each stage, how hard the problems of drafts and kept
    rewrites are, and why rewrites were rejected. `changes`: the pipeline's tables `round`."""
    if not funnels:
        return
    head = ["", *map(round_name, funnels)]
    rows: list[list[str | Bar]] = []
    # The last table also holds for all rounds after it.
    own = {n: flattened(changes[min(n, len(changes)) - 1]) if changes else {} for n in funnels}
    for name in dict.fromkeys(name for settings in own.values() for name in settings):
        rows.append([name, *(setting_text(s[name]) if name in s else NONE for s in own.values())])
    rows.append(["prompts", *(f"{f.prompts:,}" for f in funnels.values())])
    for stage, count in _STAGES.items():
        rows.append([stage, *(_bar(count(f), f.rollouts) for f in funnels.values())])
    ratios = [funnel.ratio for funnel in funnels.values()]
    rows.append(
        ["kept rewrites' length", *(f"{percent(r)} of the draft's" if r else NONE for r in ratios)]
    )
    for measure, label in _MEASURES.items():
        if any(measure in funnel.support for funnel in funnels.values()):
            rows.append([label, *(_quantiles(f.support.get(measure)) for f in funnels.values())])
    if any(funnel.failed for funnel in funnels.values()):
        rows.append(["failed requests", *(f"{funnel.failed:,}" for funnel in funnels.values())])
    yield Table(
        "What is left after each stage",
        head,
        rows,
        left=len(head),
        note="Shares are of the rollouts. Rewrites: the teacher's answers, or the drafts themselves"
        " if nothing is rewritten. Drafts that were cut off are not rewritten. Length: mean of the"
        " ratios.",
    )
    yield from _difficulty(funnels)
    totals: Counter[str] = Counter()
    for funnel in funnels.values():
        totals.update(funnel.statuses)
    del totals["ok"]
    rows = []
    for status in sorted(totals, key=lambda status: (-totals[status], status)):
        label = f"{status}: {_REASONS[status]}" if status in _REASONS else status
        bars = (_bar(f.statuses.get(status, 0), f.rewrites) for f in funnels.values())
        rows.append([label, *bars])
    if rows:
        note = "Shares are of all rewrite rows."
        yield Table("Why rewrites were rejected", head, rows, len(head), note)


def _difficulty(funnels: dict[int, Funnel]) -> Iterator[Block]:
    """Yield the shares of problems of each pass rate, among drafts and kept rewrites."""
    tables = {n: funnel.difficulty for n, funnel in funnels.items() if funnel.difficulty}
    if not tables:
        return
    rows: list[list[str | Bar]] = []
    for rate in DIFFICULTIES:
        row: list[str | Bar] = [rate]
        for table in tables.values():
            for name in ("drafts", "kept"):
                share = table[rate][f"{name}_share"] if rate in table else None
                row.append(NONE if share is None else Bar(percent(share), share))
        rows.append(row)
    head = [f"{round_name(n)}, {name}" for n in tables for name in ("drafts", "kept")]
    yield Table(
        "How hard their problems are",
        ["pass rate", *head],
        rows,
        left=1 + len(head),
        note="Pass rate: the share of a problem's rollouts in the round that are right. Where easy"
        " problems have a larger share of the kept rewrites than of the drafts, hard ones are"
        " lost.",
    )


def _quantiles(measured: dict[str, Any] | None) -> str:
    return NONE if measured is None else "{p10:.2f} / {p50:.2f}".format(**measured)


def _bar(count: int, total: int) -> Bar:
    share = count / max(total, 1)
    return Bar(f"{count:,} · {percent(share)}", share)


# -- training -----------------------------------------------------------------------------------

_SERIES_NAMES = {
    "loss": "training",
    "validation_loss": "validation",
    "student_entropy": "student",
    "teacher_entropy": "teacher",
}


def training_curves(trainings: dict[str, Training]) -> Iterator[Block]:
    """Yield the curves of the trainings, one after another, and a table of them."""
    trainings = {label: training for label, training in trainings.items() if training.steps}
    if not trainings:
        return
    drawn = []
    for names, title in queries.CURVES:
        rounds: dict[str, dict[str, list[tuple[int, float]]]] = {}
        for label, training in trainings.items():
            for name in names:
                if name in training.columns:
                    series = rounds.setdefault(label, {})
                    series[_SERIES_NAMES.get(name, name)] = training.columns[name]
        if rounds:
            ends = "; ".join(
                f"{label}, {name}: {values[0][1]:.4g} to {values[-1][1]:.4g}"
                for label, series in rounds.items()
                for name, values in series.items()
            )
            drawn.append(Plot(plots.curves(title, rounds), f"{title}, by step. {ends}"))
    caption = "By optimiser step"
    caption += ", rounds one after another." if len(trainings) > 1 else "."
    if any(training.steps > plots.MOST_POINTS for training in trainings.values()):
        caption += " In long trainings each point is the mean of neighbouring steps."
    yield Plots(drawn, caption)
    rows = []
    for label, training in trainings.items():
        columns = map(training.first_and_last, ("loss", "kl", "validation_loss"))
        losses = [NONE if ends is None else "{:.4g} → {:.4g}".format(*ends) for ends in columns]
        pace = number(training.tokens / training.seconds if training.seconds else None)
        rows.append([label, f"{training.steps:,}", f"{training.tokens:,.0f}", pace, *losses])
    head = ["", "steps", "tokens", "tokens/s", "loss", "divergence", "validation loss"]
    yield Table("Trainings", head, rows, note="Losses: of the first and the last step.")
