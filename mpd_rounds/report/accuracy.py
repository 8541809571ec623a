"""Sections on accuracy and length, of one run or of several: plots and tables."""

from collections.abc import Iterator
from typing import Any

from mpd_data.inspect import compare as comparison
from mpd_data.inspect.stats import MARKERS
from mpd_rounds.report import plots, queries
from mpd_rounds.report.document import (
    NONE,
    Block,
    Paragraph,
    Plot,
    Plots,
    Table,
    number,
    percent,
    points,
)
from mpd_rounds.report.queries import Evaluations, LengthCounts, Measured
from mpd_rounds.report.run import BASE, Run, round_name

_INTERVALS = (
    "Intervals are 95%, by bootstrap over problems. Differences and tokens saved are paired: they"
    " compare the same problems on both sides. Differences of accuracy are in points."
)
_BEHAVIOUR = (
    "Tokens, right and wrong: mean over samples with right and with wrong answers. Cut off: at the"
    " token limit. No answer: finished without an answer in a declared format. Repetition: mean"
    " share of 4-grams that occur earlier in the trace. Markers: words such as"
    f" {', '.join(MARKERS[:4])}, per 1,000 tokens."
)


def results(by_run: dict[str, Evaluations]) -> Iterator[Block]:
    """Yield a plot of the evaluation sets, and two tables for each set, with all runs in them."""
    sets: dict[str, dict[str, dict[int, Measured]]] = {}  # by set, run and round
    for label, evaluations in by_run.items():
        for name, by_round in evaluations.items():
            sets.setdefault(name, {})[label] = by_round
    if not sets:
        return
    several = len(by_run) > 1
    if drawn := list(_pareto_plots(sets, several)):
        caption = "Accuracy against mean tokens, a panel for each evaluation set. "
        caption += "Each line is a run. " * several
        caption += "The open circle is the base; crosses are 95% intervals."
        yield Plots(drawn, f"{caption} Up and to the left is better.")
    else:
        yield Paragraph("No problem has a gold answer, so there is no accuracy to draw.")
    for index, (name, runs) in enumerate(sets.items()):
        rows = [
            ([label, round_name(n)] if several else [round_name(n)], measured)
            for label, by_round in runs.items()
            for n, measured in by_round.items()
        ]
        heads = ["run", "model"] if several else ["model"]
        yield from _result_tables(name, heads, rows, explained=index == 0)
        yield from _hard_tables(name, heads, rows, explained=index == 0)
        yield from _part_tables(name, heads, rows, explained=index == 0)


def _pareto_plots(sets: dict[str, dict[str, dict[int, Measured]]], several: bool) -> Iterator[Plot]:
    """Yield a plot for each set that has accuracy. `sets`: results by set, run and round."""
    for name, runs in sets.items():
        lines = {label: _pareto_points(by_round) for label, by_round in runs.items()}
        lines = {label: line for label, line in lines.items() if line}
        if lines:
            texts = [f"{label}: " * several + _in_words(line) for label, line in lines.items()]
            svg = plots.pareto(name, lines, len(sets) == 1)
            yield Plot(svg, f"{name}: {'. '.join(texts)}")


def _pareto_points(by_round: dict[int, Measured]) -> list[plots.Point]:
    sides = {round_name(n): measured.side for n, measured in by_round.items()}
    return [_point(n, side) for n, side in sides.items() if side["accuracy"] is not None]


def _point(name: str, side: dict[str, Any]) -> plots.Point:
    tokens = side["mean_tokens"], tuple(side["mean_tokens_interval"])
    accuracy = side["accuracy"], tuple(side["accuracy_interval"])
    return plots.Point(name, *tokens, *accuracy)


def _in_words(line: list[plots.Point]) -> str:
    parts = (f"{p.label} {percent(p.accuracy)} at {number(p.tokens)} mean tokens" for p in line)
    return "; ".join(parts)


def _result_tables(
    name: str, heads: list[str], lines: list[tuple[list[str], Measured]], explained: bool
) -> Iterator[Block]:
    """Yield results and behaviour on an evaluation set, a line for each model; with `explained`,
    also how to read them."""
    rows = []
    for labels, measured in lines:
        side, paired = measured.side, measured.paired or {}
        tokens = map(number, (side["mean_tokens"], *side["mean_tokens_interval"]))
        rows.append([
            *labels,
            percent(side["accuracy"], side["accuracy_interval"]),
            points(paired.get("accuracy_difference"), paired.get("accuracy_difference_interval")),
            "{} [{}, {}]".format(*tokens),
            percent(paired.get("token_reduction"), paired.get("token_reduction_interval")),
            comparison.count_text(side),
            f"{side['samples']:,}",
        ])  # fmt: skip
    notes = dict.fromkeys(f"{labels[-1]}: {m.note}." for labels, m in lines if m.note is not None)
    few = dict.fromkeys(comparison.too_few(measured.side) for _, measured in lines)
    notes |= dict.fromkeys(f"{warning.capitalize()}." for warning in few if warning)
    yield Table(
        f"{name}: results",
        [*heads, "accuracy [95%]", "against base", "mean tokens [95%]", "saved [95%]", "problems",
         "samples"],
        rows,
        len(heads),
        " ".join([*([_INTERVALS] if explained else []), *notes]),
    )  # fmt: skip
    rows = []
    for labels, measured in lines:
        behaviour = measured.behaviour
        rows.append([
            *labels,
            *(number(behaviour[k]) for k in ("right_tokens", "wrong_tokens", "p50", "p99")),
            percent(behaviour["truncated"], decimals=2),
            percent(behaviour["no_answer"], decimals=2),
            percent(behaviour["repetition"]),
            number(behaviour["markers_per_1k"]),
        ])  # fmt: skip
    yield Table(
        f"{name}: behaviour",
        [*heads, "tokens, right", "tokens, wrong", "median", "99%", "cut off", "no answer",
         "repetition", "markers per 1k"],
        rows,
        len(heads),
        _BEHAVIOUR if explained else "",
    )  # fmt: skip


def _hard_tables(
    name: str, heads: list[str], lines: list[tuple[list[str], Measured]], explained: bool
) -> Iterator[Block]:
    """Yield the results on the problems that the base solves least often, where there are some."""
    rows = []
    for labels, measured in lines:
        if measured.paired is not None and (hard := measured.paired["hard_third"]) is not None:
            rows.append([
                *labels,
                *(percent(hard[side]["accuracy"]) for side in ("base", "new")),
                points(hard["accuracy_difference"], hard["accuracy_difference_interval"]),
                *(number(hard[side]["mean_tokens"]) for side in ("base", "new")),
                percent(hard["token_reduction"], hard["token_reduction_interval"]),
                f"{hard['problems']:,}",
            ])  # fmt: skip
    note = (
        "The third of the problems that the base solves least often. A problem chosen for bad luck"
        " would seem to improve, so one half of the base's samples chooses the third and the other"
        " half of all samples is measured; then the halves change places. A problem can be in both"
        " of these thirds or in one, so together they are more than a third. With fewer than four"
        " samples of a problem, mostly chance chooses."
    )
    if rows:
        yield Table(
            f"{name}: the hard third",
            [*heads, "accuracy, base", "accuracy", "against base", "tokens, base", "tokens",
             "saved [95%]", "problems"],
            rows,
            len(heads),
            note if explained else "",
        )  # fmt: skip


def _part_tables(
    name: str, heads: list[str], lines: list[tuple[list[str], Measured]], explained: bool
) -> Iterator[Block]:
    """Yield the tokens of thinking and answer, for models that think."""
    rows = []
    for labels, measured in lines:
        side, paired = measured.side, measured.paired or {}
        if side["thinking_tokens"] is not None:
            row = list(labels)
            for part in ("thinking", "answer"):
                saved = paired.get(f"{part}_reduction"), paired.get(f"{part}_reduction_interval")
                row += [number(side[f"{part}_tokens"]), percent(*saved)]
            rows.append(row)
    if rows:
        yield Table(
            f"{name}: thinking and answer",
            [*heads, "thinking tokens", "saved of them", "answer tokens", "saved of these"],
            rows,
            len(heads),
            "The thinking part ends with its closing tag." if explained else "",
        )


# -- what is free -------------------------------------------------------------------------------


def beside_what_is_free(
    evaluations: Evaluations, frontiers: dict[str, dict[str, Any]]
) -> Iterator[Block]:
    """Yield for each evaluation set with baselines whether the rounds are beyond them: a plot, the
    verdicts and two tables. `frontiers`: of `queries.frontiers`."""
    drawn = []
    for name, judged in frontiers.items():
        free = [_point(label, side) for label, side in judged["points"].items()]
        rounds = {n: m for n, m in evaluations[name].items() if n != BASE}
        models = _pareto_points(rounds)
        line = judged["frontier"]
        svg = plots.frontier(name, free, line, models, len(frontiers) == 1)
        drawn.append(Plot(svg, f"{name}, what is free: {_in_words([*free, *models])}"))
    if not drawn:
        return
    yield Plots(
        drawn,
        "Accuracy against mean tokens. Open circles cost no training: the base and its baselines;"
        " the dashed line joins those that no other of them dominates. Filled circles are the"
        " rounds; crosses are 95% intervals. Up and to the left is better.",
    )
    for index, (name, judged) in enumerate(frontiers.items()):
        for one in judged["models"].values():
            yield Paragraph(f"{name}: {one['verdict']}")
        yield _free_table(name, judged)
        if judged["models"]:
            yield _against_table(name, judged, explained=index == 0)


def _free_table(name: str, judged: dict[str, Any]) -> Table:
    rows = []
    for label, side in judged["points"].items():
        is_base = label == "base"
        tokens = map(number, (side["mean_tokens"], *side["mean_tokens_interval"]))
        rows.append([
            label,
            percent(side["accuracy"], side["accuracy_interval"]),
            NONE if is_base else points(*_difference(side)),
            "{} [{}, {}]".format(*tokens),
            NONE if is_base else percent(side["token_reduction"], side["token_reduction_interval"]),
            percent(side["truncated"], decimals=2),
            "yes" if label in judged["frontier"] else "no",
        ])  # fmt: skip
    head = ["", "accuracy [95%]", "against base", "mean tokens [95%]", "saved [95%]", "cut off",
            "on the frontier"]  # fmt: skip
    return Table(f"{name}: what costs no training", head, rows)


def _against_table(name: str, judged: dict[str, Any], explained: bool) -> Table:
    rows = [
        [
            model,
            label,
            percent(against["token_reduction"], against["token_reduction_interval"]),
            points(*_difference(against)),
            f"{against['problems']:,}",
            "yes" if against["beyond"] else "no",
        ]
        for model, one in judged["models"].items()
        for label, against in one["against"].items()
    ]
    margin = percent(-judged["margin"], decimals=0).removesuffix("%")
    note = (
        "Beyond: it saves tokens (the interval lies above 0) and the interval of the accuracy"
        f" difference lies above {margin} points, or its accuracy is higher (the"
        " interval lies above 0)."
    )
    head = ["model", "against", "saved [95%]", "accuracy difference [95%]", "problems", "beyond"]
    return Table(f"{name}: rounds against what is free", head, rows, 2, note if explained else "")


def _difference(side: dict[str, Any]) -> tuple[float | None, list[float] | None]:
    return side["accuracy_difference"], side["accuracy_difference_interval"]


# -- lengths ------------------------------------------------------------------------------------


def lengths(run: Run) -> Iterator[Block]:
    """Yield how long the traces of a run are: on held-out problems, and drafts and rewrites."""
    drawn, named = [], {}
    panels: dict[str, dict[str, LengthCounts]] = {}
    if run.headline is not None:
        for n, folder in run.evaluations[run.headline].items():
            label = round_name(n)
            panels[label] = {label: queries.rollout_lengths(folder)}
            named[f"{run.headline}, {label}"] = panels[label][label]
        drawn.append(_lengths_plot(f"Held-out problems ({run.headline})", panels))
    panels = {}
    for n, folder in run.rounds.items():
        panel = {"drafts": queries.rollout_lengths(folder)}
        kept = queries.rewrite_lengths(folder)
        if kept is not None:
            panel["kept rewrites"] = kept
        panels[round_name(n)] = panel
        named |= {f"{round_name(n)}, {name}": counts for name, counts in panel.items()}
    if panels:
        drawn.append(_lengths_plot("Training rounds: drafts and kept rewrites", panels))
    if drawn:
        caption = (
            "Share of traces by length; all panels of a plot have the same bins. Lines mark the"
            " mean (solid) and the median (dashed), the triangle the 95th percentile."
        )
        yield Plots(drawn, caption)
        # The two parts of the mean, where there are two.
        parts = ["thinking", "answer"] * any(c.thinking is not None for c in named.values())
        rows = [[name, *_length_cells(counts, bool(parts))] for name, counts in named.items()]
        columns = ["", "traces", "mean", *parts, "median", "95%", "longest"]
        yield Table("Tokens per trace", columns, rows)


def _lengths_plot(title: str, panels: dict[str, dict[str, LengthCounts]]) -> Plot:
    flat = {f"{a}\n{b}": counts for a, panel in panels.items() for b, counts in panel.items()}
    histograms = queries.histograms(flat)
    drawn = {
        a: {b: (counts, histograms[f"{a}\n{b}"]) for b, counts in panel.items()}
        for a, panel in panels.items()
    }
    alt = "; ".join(
        f"{a}{'' if a == b else f', {b}'}: mean {counts.mean_text}, median"
        f" {counts.quantile(0.5):,}, 95% up to {counts.quantile(0.95):,} tokens"
        for a, panel in panels.items()
        for b, counts in panel.items()
    )
    return Plot(plots.lengths(title, drawn), f"{title}. {alt}")


def _length_cells(counts: LengthCounts, parts: bool) -> list[str]:
    means: list[float | None] = [counts.mean]
    if parts:
        thinking = counts.thinking
        means += [thinking, None if thinking is None else counts.mean - thinking]
    quantiles = (f"{counts.quantile(q):,}" for q in (0.5, 0.95, 1.0))
    return [f"{counts.samples:,}", *map(number, means), *quantiles]
