"""The sections of a report, of one run or of several."""

from collections.abc import Iterator
from pathlib import Path

from mpd_rounds.report import examples, queries
from mpd_rounds.report.accuracy import lengths, results, results_of_runs
from mpd_rounds.report.card import data_card
from mpd_rounds.report.data_and_training import funnel_tables, training_curves, training_tiles
from mpd_rounds.report.document import (
    Block,
    Document,
    Examples,
    Notice,
    Paragraph,
    Section,
    Tile,
    Tiles,
    bounds,
    number,
    percent,
    points,
)
from mpd_rounds.report.provenance import provenance, training_provenance, unlike_settings
from mpd_rounds.report.queries import Evaluation, Funnel, Training
from mpd_rounds.report.run import BASE, Run, dates, read_json, round_name


def single(run: Run) -> Document:
    """Return the report of one run: of mpd-rounds, or of one training alone."""
    if not run.is_pipeline:
        return _training_report(run)
    measured = queries.evaluations(run)
    funnels = {n: queries.funnel(folder) for n, folder in run.rounds.items()}
    overview: list[Block] = [*_missing([run])]
    if tiles := _tiles(run, measured, funnels):
        overview.append(Tiles(tiles))
    sections = [
        Section("overview", "Overview", overview),
        *_sections(run, measured, funnels, "", 2),
    ]
    name = str(run.settings.get("name", run.label))
    return Document(f"{name}: {run.label}", _subtitle(run), sections)


def _sections(
    run: Run,
    measured: list[Evaluation],
    funnels: dict[int, Funnel],
    prefix: str,
    level: int,
) -> Iterator[Section]:
    """Yield all sections of a run but its overview."""

    def section(anchor: str, title: str, blocks: list[Block]) -> Iterator[Section]:
        if blocks:
            yield Section(prefix + anchor, title, blocks, level)

    if not prefix:
        yield from section("accuracy", "Accuracy and length", list(results(measured)))
    yield from section("lengths", "How long the traces are", list(lengths(run)))
    yield from section("funnel", "From prompts to kept rewrites", list(funnel_tables(funnels)))
    yield from section("training", "Training", list(training_curves(_trainings(run))))
    yield from section("rewrites", "Drafts and their rewrites", list(_rewrites(run)))
    yield from section("answers", "Before and after", list(_before_and_after(run)))
    yield from section("worst", "Where it went wrong", list(_worst(run)))
    yield data_card(run, funnels, prefix, level)
    yield from section("settings", "Settings and provenance", list(provenance(run)))


def several(runs: list[Run]) -> Document:
    """Return the comparison of several runs, followed by each of them."""
    by_run = {run.label: queries.evaluations(run) for run in runs}
    comparison: list[Block] = [*_missing(runs), *results_of_runs(by_run)]
    sections = [Section("comparison", "Comparison", comparison)]
    settings = unlike_settings(runs)
    if settings:
        sections.append(Section("differences", "Settings that differ", settings))
    for index, run in enumerate(runs):
        prefix = f"run-{index}-"
        funnels = {n: queries.funnel(folder) for n, folder in run.rounds.items()}
        blocks: list[Block] = []
        if tiles := _tiles(run, by_run[run.label], funnels):
            blocks.append(Tiles(tiles))
        sections.append(Section(f"run-{index}", f"Run {run.label}", blocks))
        sections += _sections(run, by_run[run.label], funnels, prefix, 3)
    names = dict.fromkeys(str(run.settings.get("name", run.label)) for run in runs)
    return Document(f"{', '.join(names)}: {len(runs)} runs", ", ".join(by_run), sections)


def _training_report(run: Run) -> Document:
    trainings = _trainings(run)
    sections = [
        Section("overview", "Overview", [*_missing([run]), *training_tiles(trainings)]),
        Section("training", "Training", list(training_curves(trainings))),
        Section("settings", "Settings and provenance", list(training_provenance(run))),
    ]
    details = read_json(run.path / "run.json")["details"]
    student = str(details.get("config", {}).get("student"))
    return Document(
        f"Training: {run.label}",
        f"Student {student}",
        [section for section in sections if section.blocks or section.anchor == "overview"],
    )


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
        first, last = days
        text += f", {first}" if first == last else f", {first} to {last}"
    return text


def _missing(runs: list[Run]) -> Iterator[Block]:
    lines = [
        f"{run.label}: {line}" if len(runs) > 1 else line for run in runs for line in run.missing
    ]
    if lines:
        which = "This run is not" if len(runs) == 1 else "Not all of these runs are"
        yield Notice(f"{which} complete. The report shows what exists. Missing:", lines)


def _tiles(run: Run, measured: list[Evaluation], funnels: dict[int, Funnel]) -> list[Tile]:
    """Return the main results, on the first evaluation set."""
    tiles = []
    if measured:
        first = measured[0]
        last, base = first.last, first.by_round.get(BASE)
        where = f"{first.name}, {round_name(max(first.by_round))}"
        if last.paired is not None and base is not None:
            paired = last.paired
            tiles.append(
                Tile(
                    "Tokens saved",
                    percent(paired["token_reduction"]),
                    bounds(paired["token_reduction_interval"], "95% interval {:.1f} to {:.1f}"),
                )
            )
            if paired["accuracy_difference"] is not None:
                tiles.append(
                    Tile(
                        "Accuracy, points",
                        points(paired["accuracy_difference"], None),
                        bounds(
                            paired["accuracy_difference_interval"],
                            "95% interval {:+.1f} to {:+.1f}",
                        ),
                    )
                )
            sides = [base.side, last.side]
            tokens = " → ".join(number(side["mean_tokens"]) for side in sides)
            detail = ""
            if last.side["accuracy"] is not None:
                right = " → ".join(percent(side["accuracy"]) for side in sides)
                detail = f"accuracy {right}"
            tiles.append(Tile(f"Mean tokens, {where}", tokens, detail))
        else:
            detail = f"accuracy {percent(last.side['accuracy'])}"
            tiles.append(Tile(f"Mean tokens, {where}", number(last.side["mean_tokens"]), detail))
    rows = sum(sum(funnel.statuses.values()) for funnel in funnels.values())
    if rows:
        kept = sum(funnel.kept for funnel in funnels.values())
        tiles.append(Tile("Rewrites kept", percent(kept / rows), f"{kept:,} of {rows:,}"))
    return tiles


# -- examples -----------------------------------------------------------------------------------


def _rewrites(run: Run) -> Iterator[Block]:
    chosen = {n: examples.kept_rewrites(folder) for n, folder in run.rounds.items()}
    intro = (
        "Kept rewrites, chosen by the smallest keys. Keys are hashes, so the choice is fair. Struck"
        " out: words that the rewrite removed. Marked: words that it added."
    )
    for n, rewrites in chosen.items():
        if rewrites:
            yield Examples(round_name(n).capitalize(), intro, rewrites)
            intro = ""


def _ends(run: Run) -> tuple[Path, Path, str] | None:
    """Return the first set's evaluations of the base and of the newest model, and the name of the
    latter; None unless both exist."""
    folders = run.evaluations.get(run.headline or "", {})
    last = max(folders, default=BASE)
    if BASE not in folders or last == BASE:
        return None
    return folders[BASE], folders[last], round_name(last)


def _before_and_after(run: Run) -> Iterator[Block]:
    ends = _ends(run)
    if ends is None:
        return
    base, last, name = ends
    pairs = examples.before_and_after(base, last, name)
    if pairs:
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
    longest = examples.most(last, "num_completion_tokens", name)
    yield Examples("Longest traces", f"Of {name}, on {run.headline}.", longest)
    repetitive = examples.most(last, "repetition", name)
    yield Examples("Most repetitive traces", f"Of {name}, on {run.headline}.", repetitive)
