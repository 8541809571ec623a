"""Accuracy and length of a run or of several: plots and tables of what was measured."""

from collections.abc import Iterator

from mpd_data.inspect.stats import MARKERS
from mpd_rounds.report import plots, queries
from mpd_rounds.report.document import (
    Bar,
    Block,
    Paragraph,
    Plot,
    Plots,
    Table,
    number,
    percent,
    points,
)
from mpd_rounds.report.queries import Evaluation, Measured
from mpd_rounds.report.run import Run, round_name

_INTERVALS = (
    "Intervals are 95%, by bootstrap over problems; those of differences and of tokens saved are"
    " paired: the same problems on both sides. Differences of accuracy are in points."
)

_BEHAVIOUR = (
    "Tokens, right and wrong: mean over samples with right and with wrong answers. Cut off: at the"
    " token limit. No answer: finished without one in a declared format. Repetition: mean share of"
    " 4-grams that stand earlier in the trace. Markers: words such as"
    f" {', '.join(MARKERS[:4])}, per 1,000 tokens."
)


# -- accuracy and length ------------------------------------------------------------------------


def results(measured: list[Evaluation]) -> Iterator[Block]:
    if not measured:
        return
    drawn = []
    for of in measured:
        found = _pareto_points(of)
        if found:
            wide = len(measured) == 1
            svg = plots.pareto(of.name, {"": found}, wide)
            drawn.append(Plot(svg, f"{of.name}: {_in_words(found)}"))
    if drawn:
        yield Plots(
            drawn,
            "Accuracy against mean tokens, a panel for each evaluation set: the open circle is the"
            " base, lines are 95% intervals. Up and to the left is better.",
        )
    else:
        yield Paragraph("No problem has a gold answer, so there is no accuracy to draw.")
    for of in measured:
        lines = [(round_name(n), found) for n, found in of.by_round.items()]
        rows = [([name], found) for name, found in lines]
        yield from _result_tables(of.name, ["model"], rows, of is measured[0])


def _in_words(found: list[plots.Point]) -> str:
    return "; ".join(
        f"{p.label} {percent(p.accuracy)} at {number(p.tokens)} mean tokens" for p in found
    )


def _pareto_points(of: Evaluation) -> list[plots.Point]:
    found = []
    for n, measured in of.by_round.items():
        side = measured.side
        if side["accuracy"] is not None:
            low, high = side["mean_tokens_interval"]
            bottom, top = side["accuracy_interval"]
            found.append(
                plots.Point(
                    round_name(n), side["mean_tokens"], (low, high), side["accuracy"], (bottom, top)
                )
            )
    return found


def _result_tables(
    name: str, heads: list[str], lines: list[tuple[list[str], Measured]], explained: bool
) -> Iterator[Block]:
    """Results and behaviour on an evaluation set, a line for each model; `explained`: with how to
    read them."""
    rows: list[list[str | Bar]] = []
    for labels, found in lines:
        side, paired = found.side, found.paired or {}
        rows.append(
            [
                *labels,
                percent(side["accuracy"], side["accuracy_interval"]),
                points(
                    paired.get("accuracy_difference"), paired.get("accuracy_difference_interval")
                ),
                "{} [{}, {}]".format(
                    *map(number, (side["mean_tokens"], *side["mean_tokens_interval"]))
                ),
                percent(paired.get("token_reduction"), paired.get("token_reduction_interval")),
                f"{side['problems']:,}",
                f"{side['samples']:,}",
            ]
        )
    notes = dict.fromkeys(
        f"{labels[-1]}: {found.note}." for labels, found in lines if found.note is not None
    )
    yield Table(
        f"{name}: results",
        [*heads, "accuracy [95%]", "against base", "mean tokens [95%]", "saved [95%]", "problems",
         "samples"],
        rows,
        len(heads),
        " ".join([*([_INTERVALS] if explained else []), *notes]),
    )  # fmt: skip
    rows = []
    for labels, found in lines:
        of = found.behaviour
        rows.append(
            [
                *labels,
                number(of["right_tokens"]),
                number(of["wrong_tokens"]),
                number(of["p50"]),
                number(of["p99"]),
                percent(of["truncated"], decimals=2),
                percent(of["no_answer"], decimals=2),
                percent(of["repetition"]),
                number(of["markers_per_1k"]),
            ]
        )
    yield Table(
        f"{name}: behaviour",
        [*heads, "tokens, right", "tokens, wrong", "median", "99%", "cut off", "no answer",
         "repetition", "markers per 1k"],
        rows,
        len(heads),
        _BEHAVIOUR if explained else "",
    )  # fmt: skip


def results_of_runs(by_run: dict[str, list[Evaluation]]) -> Iterator[Block]:
    """One plot and one pair of tables for each evaluation set, all runs in them."""
    names = dict.fromkeys(of.name for measured in by_run.values() for of in measured)
    sets = {
        name: {
            label: of for label, measured in by_run.items() for of in measured if of.name == name
        }
        for name in names
    }
    drawn = []
    for name, runs in sets.items():
        lines = {label: found for label, of in runs.items() if (found := _pareto_points(of))}
        if lines:
            svg = plots.pareto(name, lines, len(sets) == 1)
            said = ". ".join(f"{label}: {_in_words(found)}" for label, found in lines.items())
            drawn.append(Plot(svg, f"{name}. {said}"))
    if drawn:
        yield Plots(
            drawn,
            "Accuracy against mean tokens, a panel for each evaluation set and a line for each run:"
            " it begins at the open circle, the base; crosses are 95% intervals. Up and to the left"
            " is better.",
        )
    for index, (name, runs) in enumerate(sets.items()):
        rows = [
            ([label, round_name(n)], found)
            for label, of in runs.items()
            for n, found in of.by_round.items()
        ]
        yield from _result_tables(name, ["run", "model"], rows, index == 0)


# -- lengths ------------------------------------------------------------------------------------


def lengths(run: Run) -> Iterator[Block]:
    drawn, rows = [], []
    panels: dict[str, dict[str, queries.LengthCounts]]
    if run.headline is not None:
        found = {
            round_name(n): queries.rollout_lengths(folder)
            for n, folder in run.evaluations[run.headline].items()
        }
        panels = {label: {label: of} for label, of in found.items()}
        drawn.append(_lengths_figure(f"Held-out problems ({run.headline})", panels))
        rows += [[f"{run.headline}, {label}", *_length_cells(of)] for label, of in found.items()]
    panels = {}
    for n, folder in run.rounds.items():
        panel = {"drafts": queries.rollout_lengths(folder)}
        kept = queries.rewrite_lengths(folder)
        if kept is not None:
            panel["kept rewrites"] = kept
        panels[round_name(n)] = panel
        rows += [[f"{round_name(n)}, {name}", *_length_cells(of)] for name, of in panel.items()]
    if panels:
        drawn.append(_lengths_figure("Training rounds: drafts and kept rewrites", panels))
    if drawn:
        yield Plots(
            drawn,
            "Share of traces by length, all panels of a figure in the same bins. Lines mark the"
            " mean (solid) and the median (dashed), the triangle the 95th percentile.",
        )
        yield Table("Tokens per trace", ["", "traces", "mean", "median", "95%", "longest"], rows)


def _lengths_figure(title: str, panels: dict[str, dict[str, queries.LengthCounts]]) -> Plot:
    flat = {f"{a}\n{b}": of for a, panel in panels.items() for b, of in panel.items()}
    binned = queries.histograms(flat)
    drawn = {
        a: {b: (of, binned[f"{a}\n{b}"]) for b, of in panel.items()} for a, panel in panels.items()
    }
    said = "; ".join(
        f"{a}{'' if a == b else f', {b}'}: mean {number(of.mean)}, median {of.quantile(0.5):,},"
        f" 95% up to {of.quantile(0.95):,} tokens"
        for a, panel in panels.items()
        for b, of in panel.items()
    )
    return Plot(plots.lengths(title, drawn), f"{title}. {said}")


def _length_cells(of: queries.LengthCounts) -> list[str]:
    quantiles = (of.quantile(q) for q in (0.5, 0.95, 1.0))
    return [f"{of.samples:,}", number(of.mean), *(f"{q:,}" for q in quantiles)]
