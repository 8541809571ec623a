"""How the data was made and what was learned from it: the funnel of each round, and training."""

from collections.abc import Callable, Iterator

from mpd_rounds.report import plots, queries
from mpd_rounds.report.document import (
    NONE,
    Bar,
    Block,
    Plot,
    Plots,
    Table,
    Tile,
    Tiles,
    number,
    percent,
)
from mpd_rounds.report.queries import Funnel, Training
from mpd_rounds.report.run import round_name

# -- funnel -------------------------------------------------------------------------------------


def funnel_tables(funnels: dict[int, Funnel]) -> Iterator[Block]:
    if not funnels:
        return
    head = ["", *(round_name(n) for n in funnels)]
    stages: list[tuple[str, Callable[[Funnel], int]]] = [
        ("prompts", lambda of: of.prompts),
        ("rollouts", lambda of: of.rollouts),
        ("not cut off", lambda of: of.whole),
        ("rewrites", lambda of: of.answered),
        ("kept", lambda of: of.kept),
    ]
    rows: list[list[str | Bar]] = []
    for name, count in stages:
        cells: list[str | Bar] = [name]
        for of in funnels.values():
            share = count(of) / of.rollouts
            said = f"{count(of):,}" if name == "prompts" else f"{count(of):,} · {percent(share)}"
            cells.append(said if name == "prompts" else Bar(said, share))
        rows.append(cells)
    rows.append(
        ["kept rewrites' length", *(f"{percent(of.ratio)} of the draft's" if of.ratio else NONE
                                    for of in funnels.values())]
    )  # fmt: skip
    if any(of.failed for of in funnels.values()):
        rows.append(["failed requests", *(f"{of.failed:,}" for of in funnels.values())])
    yield Table(
        "What is left after each stage",
        head,
        rows,
        left=len(head),
        note="Shares are of the rollouts. Rewrites: those that were given (the drafts themselves"
        " where nothing is rewritten); none is asked for of drafts that were cut off. Length: mean"
        " of the ratios.",
    )
    statuses = [s for s in _order(funnels) if s != "ok"]
    rows = []
    for status in statuses:
        cells = [f"{status}: {_REASONS.get(status, '')}".rstrip(": ")]
        for of in funnels.values():
            rejected = of.statuses.get(status, 0)
            share = rejected / max(sum(of.statuses.values()), 1)
            cells.append(Bar(f"{rejected:,} · {percent(share)}", share))
        rows.append(cells)
    if rows:
        yield Table(
            "Why rewrites were rejected", head, rows, len(head), "Shares are of all rewrite rows."
        )


_REASONS = {
    "draft_truncated": "the draft hit its limit, the teacher is not asked",
    "too_long": "does not fit the teacher's context",
    "truncated": "the rewrite hit its limit",
    "malformed": "not in the template's format, or without an answer",
    "check_failed": "the answer's check failed",
    "draft_rejected": "the draft is not of the kind that is kept",
    "answer_changed": "another answer than the draft's",
    "longer": "longer than the draft allows",
    "too_short": "shorter than the draft allows",
    "repetitive": "repeats itself",
    "incorrect": "not the gold answer",
    "not_chosen": "passed, but another rewrite was taken",
}


def _order(funnels: dict[int, Funnel]) -> list[str]:
    """Statuses that occur, the most frequent first."""
    totals: dict[str, int] = {}
    for of in funnels.values():
        for status, count in of.statuses.items():
            totals[status] = totals.get(status, 0) + count
    return sorted(totals, key=lambda status: (-totals[status], status))


# -- training -----------------------------------------------------------------------------------

_SERIES_NAMES = {
    "loss": "training",
    "validation_loss": "validation",
    "student_entropy": "student",
    "teacher_entropy": "teacher",
}


def training_curves(trainings: dict[str, Training]) -> Iterator[Block]:
    trainings = {label: of for label, of in trainings.items() if of.steps}
    if not trainings:
        return
    drawn = []
    for names, title in queries.CURVES:
        rounds = {
            label: {
                _SERIES_NAMES.get(name, name): of.columns[name]
                for name in names
                if name in of.columns
            }
            for label, of in trainings.items()
        }
        rounds = {label: series for label, series in rounds.items() if series}
        if rounds:
            said = "; ".join(
                f"{label}, {name}: {_value(values[0][1])} to {_value(values[-1][1])}"
                for label, series in rounds.items()
                for name, values in series.items()
            )
            drawn.append(Plot(plots.curves(title, rounds), f"{title}, by step. {said}"))
    several = len(trainings) > 1
    yield Plots(
        drawn,
        "By optimiser step" + (", rounds one after another." if several else ".")
        + (" Of long trainings each point is a mean of neighbouring steps."
           if any(of.steps > 300 for of in trainings.values()) else ""),
    )  # fmt: skip
    rows: list[list[str | Bar]] = []
    for label, of in trainings.items():
        seconds = of.total("seconds")
        pace = of.total("tokens") / seconds if seconds else None
        losses = [_span(of, name) for name in ("loss", "kl", "validation_loss")]
        cells = [f"{of.steps:,}", f"{of.total('tokens'):,.0f}", number(pace), *losses]
        rows.append([label, *cells])
    head = ["", "steps", "tokens", "tokens/s", "loss", "divergence", "validation loss"]
    yield Table("Trainings", head, rows, note="Of losses the first and the last step's.")


def _value(value: float) -> str:
    return f"{value:.4g}"


def _span(of: Training, name: str) -> str:
    found = of.first_and_last(name)
    return NONE if found is None else f"{_value(found[0])} → {_value(found[1])}"


def training_tiles(trainings: dict[str, Training]) -> Iterator[Block]:
    for of in trainings.values():
        seconds = of.total("seconds")
        tiles = [Tile("Steps", f"{of.steps:,}", f"{of.total('tokens'):,.0f} tokens")]
        for name, label in (("loss", "Loss"), ("validation_loss", "Validation loss")):
            found = of.first_and_last(name)
            if found is not None:
                tiles.append(Tile(label, _value(found[1]), f"from {_value(found[0])}"))
        if seconds:
            pace = f"{of.total('tokens') / seconds:,.0f}"
            tiles.append(Tile("Tokens per second", pace, f"{seconds:,.0f} s of steps"))
        yield Tiles(tiles)
