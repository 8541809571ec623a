"""The sections of a report, of one run or of several."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpd_data.store.run_record import read_record
from mpd_rounds.report import examples, queries
from mpd_rounds.report.accuracy import beside_what_is_free, lengths, results
from mpd_rounds.report.card import data_card
from mpd_rounds.report.data_and_training import funnel_tables, training_curves
from mpd_rounds.report.document import (
    Block,
    Code,
    Document,
    Examples,
    Notice,
    Paragraph,
    Section,
    Table,
    Tile,
    Tiles,
    bounds,
    number,
    percent,
    points,
)
from mpd_rounds.report.provenance import provenance, training_provenance, unlike_settings
from mpd_rounds.report.queries import Evaluations, Funnel, Training
from mpd_rounds.report.run import BASE, Run, dates, round_name


def single(run: Run) -> Document:
    """Return the report of one run: of mpd-rounds, or of one training alone."""
    if not run.is_pipeline:
        return _training_report(run)
    evaluations = queries.evaluations(run)
    funnels = {n: queries.funnel(folder) for n, folder in run.rounds.items()}
    frontiers = queries.frontiers(run)
    tiles = _tiles(run, evaluations, funnels)
    overview = [*_missing([run]), *tiles, *_verdict(run, frontiers), *_gate(run)]
    sections = [
        Section("overview", "Overview", overview),
        *_filled({"accuracy": ("Accuracy and length", results({run.label: evaluations}))}),
        *_filled(_details(run, evaluations, frontiers, funnels)),
    ]
    name = str(run.settings.get("name", run.label))
    return Document(f"{name}: {run.label}", _subtitle(run), sections)


def several(runs: list[Run]) -> Document:
    """Return the comparison of several runs, followed by each of them."""
    by_run = {run.label: queries.evaluations(run) for run in runs}
    sections = [
        Section("comparison", "Comparison", [*_missing(runs), *results(by_run)]),
        *_filled({"differences": ("Settings that differ", unlike_settings(runs))}),
    ]
    for index, run in enumerate(runs):
        funnels = {n: queries.funnel(folder) for n, folder in run.rounds.items()}
        evaluations, frontiers = by_run[run.label], queries.frontiers(run)
        tiles = _tiles(run, evaluations, funnels)
        overview = [*tiles, *_verdict(run, frontiers), *_gate(run)]
        sections.append(Section(f"run-{index}", f"Run {run.label}", overview))
        details = _details(run, evaluations, frontiers, funnels)
        sections += _filled(details, f"run-{index}-", 3)
    names = dict.fromkeys(str(run.settings.get("name", run.label)) for run in runs)
    return Document(f"{', '.join(names)}: {len(runs)} runs", ", ".join(by_run), sections)


def _details(
    run: Run,
    evaluations: Evaluations,
    frontiers: dict[str, dict[str, Any]],
    funnels: dict[int, Funnel],
) -> dict[str, tuple[str, Iterator[Block]]]:
    """Return title and blocks of a run's sections after its results, by anchor."""
    return {
        "free": ("Beside what costs nothing", beside_what_is_free(evaluations, frontiers)),
        "lengths": ("How long the traces are", lengths(run)),
        "funnel": (
            "From prompts to kept rewrites",
            funnel_tables(funnels, run.settings.get("round", [])),
        ),
        "training": ("Training", training_curves(_trainings(run))),
        "rewrites": ("Drafts and their rewrites", _rewrites(run)),
        "answers": ("Before and after", _before_and_after(run)),
        "worst": ("Where it went wrong", _worst(run)),
        "data-card": ("Data card", data_card(run, funnels)),
        "settings": ("Settings and provenance", provenance(run)),
    }


def _filled(
    sections: dict[str, tuple[str, Iterator[Block]]], prefix: str = "", level: int = 2
) -> Iterator[Section]:
    """Yield the sections that are not empty. `prefix` comes before their anchors."""
    for anchor, (title, blocks) in sections.items():
        if content := list(blocks):
            yield Section(prefix + anchor, title, content, level)


def _training_report(run: Run) -> Document:
    trainings = _trainings(run)
    details = {
        "training": ("Training", training_curves(trainings)),
        "settings": ("Settings and provenance", training_provenance(run)),
    }
    overview = Section("overview", "Overview", [*_missing([run]), *_training_tiles(trainings)])
    config = read_record(run.path).get("details", {}).get("config", {})
    subtitle = f"Student {config.get('student')}"
    return Document(f"Training: {run.label}", subtitle, [overview, *_filled(details)])


def _trainings(run: Run) -> dict[str, Training]:
    """Return the trainings by the names they have on the page."""
    return {
        round_name(n) if run.is_pipeline else run.label: queries.training(folder)
        for n, folder in run.trainings.items()
    }


# -- overview -----------------------------------------------------------------------------------


def _subtitle(run: Run) -> str:
    if not run.settings:
        return "Mixed-policy distillation"
    rounds = int(run.settings["rounds"])
    text = (
        f"{run.settings.get('student')} learns from {run.settings.get('teacher')},"
        f" {rounds} round{'s' * (rounds != 1)}, seed {run.settings.get('seed')}"
    )
    if (days := dates(run)) is not None:
        text += f", {' to '.join(dict.fromkeys(days))}"
    return text


def _missing(runs: list[Run]) -> Iterator[Block]:
    lines = [
        f"{run.label}: {line}" if len(runs) > 1 else line for run in runs for line in run.missing
    ]
    if lines:
        which = "This run is not" if len(runs) == 1 else "Not all of these runs are"
        yield Notice(f"{which} complete. The report shows what exists. Missing:", lines)


def _tiles(run: Run, evaluations: Evaluations, funnels: dict[int, Funnel]) -> Iterator[Block]:
    """Yield the main results, on the first evaluation set."""
    tiles = []
    if run.headline is not None:
        by_round = evaluations[run.headline]
        # The model that the gate chose, or the newest.
        chosen = run.gate["best"]["round"] if run.gate else BASE
        newest = chosen if chosen != BASE and chosen in by_round else max(by_round)
        last, base = by_round[newest], by_round.get(BASE)
        tokens = number(last.side["mean_tokens"])
        detail = f"accuracy {percent(last.side['accuracy'])}"
        if last.paired is not None and base is not None:
            paired = last.paired
            interval = bounds(paired["token_reduction_interval"], "95% interval {:.1f} to {:.1f}")
            tiles.append(Tile("Tokens saved", percent(paired["token_reduction"]), interval))
            if (difference := paired["accuracy_difference"]) is not None:
                interval = bounds(
                    paired["accuracy_difference_interval"], "95% interval {:+.1f} to {:+.1f}"
                )
                tiles.append(Tile("Accuracy, points", points(difference, None), interval))
            tokens = f"{number(base.side['mean_tokens'])} → {tokens}"
            accuracies = f"{percent(base.side['accuracy'])} → {percent(last.side['accuracy'])}"
            detail = "" if last.side["accuracy"] is None else f"accuracy {accuracies}"
        where = f"{run.headline}, {round_name(newest)}"
        tiles.append(Tile(f"Mean tokens, {where}", tokens, detail))
    rows = sum(funnel.rewrites for funnel in funnels.values())
    if rows:
        kept = sum(funnel.kept for funnel in funnels.values())
        tiles.append(Tile("Rewrites kept", percent(kept / rows), f"{kept:,} of {rows:,}"))
    if tiles:
        yield Tiles(tiles)


def _verdict(run: Run, frontiers: dict[str, dict[str, Any]]) -> Iterator[Block]:
    """Yield whether the newest round is beyond what is free, on the first evaluation set."""
    judged = frontiers.get(run.headline or "")
    if judged is not None and judged["models"]:
        newest = list(judged["models"].values())[-1]
        yield Paragraph(f"{run.headline}: {newest['verdict']}")


def _gate(run: Run) -> Iterator[Block]:
    """Yield what the gate decided after each round, and by which figures."""
    if not run.gate:
        return
    yield from map(Paragraph, run.gate["text"])
    rows = []
    for decision in run.gate["rounds"]:
        for finding in decision["findings"]:
            ends = [points(finding[end], None) for end in ("low", "high")]
            rows.append(
                [
                    round_name(decision["round"]),
                    decision["outcome"],
                    finding["on"],
                    f"{finding['problems']:,}",
                    points(finding["difference"], None),
                    " to ".join(ends),
                    points(-finding["margin"], None),
                    f"{finding['needed']:,}",
                ]
            )
    head = ["", "gate", "accuracy on", "problems", "difference", "bounds", "margin", "needed"]
    yield Table(
        "What the gate decided",
        head,
        rows,
        left=3,
        note="Differences of accuracy from the base, in points. A round is accepted if both lower"
        " bounds are above the margin, refused if an upper bound is below it. The bounds are"
        f" one-sided, each at {percent(run.gate['rounds'][0]['level'])}: the gate's alpha, divided"
        f" among the planned rounds. Needed: problems in the set {run.gate['set']} with which"
        " 80% of the students that are as accurate as the base are accepted.",
    )


def _training_tiles(trainings: dict[str, Training]) -> Iterator[Block]:
    for training in trainings.values():
        tokens, seconds = training.tokens, training.seconds
        tiles = [Tile("Steps", f"{training.steps:,}", f"{tokens:,.0f} tokens")]
        for name, label in (("loss", "Loss"), ("validation_loss", "Validation loss")):
            ends = training.first_and_last(name)
            if ends is not None:
                tiles.append(Tile(label, f"{ends[1]:.4g}", f"from {ends[0]:.4g}"))
        if seconds:
            pace = f"{tokens / seconds:,.0f}"
            tiles.append(Tile("Tokens per second", pace, f"{seconds:,.0f} s of steps"))
        yield Tiles(tiles)


# -- examples -----------------------------------------------------------------------------------


def _rewrites(run: Run) -> Iterator[Block]:
    intro = (
        "Kept rewrites, chosen by the smallest keys. Keys are hashes, so the choice is fair. Struck"
        " out: words that the rewrite removed. Marked: words that it added."
    )
    for n, folder in run.rounds.items():
        if rewrites := examples.kept_rewrites(folder):
            yield Examples(round_name(n).capitalize(), intro, rewrites)
            intro = ""
    if not intro:
        ends = _ends(run)
        evaluations = ["--evaluations", *map(str, ends[:2])] if ends else []
        words = ["mpd-gen", "view", *map(str, run.rounds.values()), *evaluations]
        yield Paragraph("To see all rows, to filter them and to compare both models' samples:")
        yield Code(shlex.join(words), "sh")


def _ends(run: Run) -> tuple[Path, Path, str] | None:
    """Return the first set's evaluations of the base and of the newest model, and the name of the
    latter; None unless both exist."""
    folders = run.evaluations.get(run.headline or "", {})
    last = max(folders, default=BASE)
    if BASE not in folders or last == BASE:
        return None
    return folders[BASE], folders[last], round_name(last)


def _before_and_after(run: Run) -> Iterator[Block]:
    if (ends := _ends(run)) and (pairs := examples.before_and_after(*ends)):
        _, _, name = ends
        intro = (
            f"The same held-out problems ({run.headline}), answered by the base and by {name}: the"
            " first sample of each. Problems are chosen by the smallest keys, which are hashes."
        )
        yield Examples(f"Base and {name}", intro, pairs)


def _worst(run: Run) -> Iterator[Block]:
    ends = _ends(run)
    if ends is None:
        return
    base, last, name = ends
    lost = examples.answers_lost(base, last, name)
    if lost is not None:
        yield Paragraph(
            f"Of {lost.problems:,} problems ({run.headline}), {name} gets {lost.lost:,} right"
            f" less often than the base, and {lost.won:,} more often."
        )
        if lost.examples:
            intro = (
                "The problems with the largest loss: a right sample of the base, a wrong one now."
            )
            yield Examples("Answers lost", intro, lost.examples)
            words = ["mpd-gen", "view", "--evaluations", str(base), str(last)]
            yield Paragraph(f"To see all of them: {shlex.join(words)}")
    intro = f"Of {name}, on {run.headline}."
    yield Examples("Longest traces", intro, examples.most(last, "num_completion_tokens", name))
    yield Examples("Most repetitive traces", intro, examples.most(last, "repetition", name))
