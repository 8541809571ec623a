"""`mpd-rounds`: a whole distillation from one TOML file.

For each round: rollouts by the newest student -> rewrites by the teacher -> training ->
evaluation. Each stage is the command that a user would type. It runs in a process of its own (the
engine must not share one with the trainer), is printed before it runs and can be resumed by
itself. A finished stage is not started again.

    OUT/data/round1/            the round's shards
    OUT/train/round1/           its training: model/, metrics.jsonl, checkpoints/
    OUT/eval/round1-test/       rollouts on held-out prompts (base-test: before any training,
                                baseline-concise-test: the base with another prompt)
    OUT/summary.json            the figures; OUT/lengths.png the trace lengths
    OUT/gate.json, OUT/best     what the gate said of each round; a link to the model to take

Exit codes: 0 done, 1 fatal, 2 usage, 3 done with failed rows (in errors/), 4 done, but the gate
accepted no round, 130 interrupted (run the same command again to resume).
"""

import contextlib
import math
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from mpd_data.common.command import (
    CONTEXT,
    DRY_RUN,
    PLAN_JSON,
    VERSION,
    Command,
    example,
    run_command,
)
from mpd_data.common.files import write_json_atomic
from mpd_data.common.models import resolve_model
from mpd_data.common.text import format_table
from mpd_data.config import RewriteConfig
from mpd_data.inspect import compare as comparison
from mpd_data.inspect import frontier
from mpd_data.inspect.stats import plot_lengths
from mpd_data.parts.workers import EXIT_FAILED_ROWS
from mpd_data.store.locks import folder_lock
from mpd_data.store.run_record import require_kind, write_record
from mpd_rounds import example as examples
from mpd_rounds.run import gate
from mpd_rounds.run.few_shot import write_examples
from mpd_rounds.run.layout import Plan
from mpd_rounds.run.runner import Runner
from mpd_rounds.run.steps import Pipeline, load_pipeline

EXIT_NONE_ACCEPTED = 4  # done, but the gate accepted no round


def summarize(
    pipeline: Pipeline, plan: Plan, last: int, judged: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the figures of a pipeline that ended after round `last`: the first evaluation set for
    the base, its baselines and every round, the comparison of the final round with the base on
    every set, and of every round with what is free.

    The final round is the one that the gate chose, as `judged` says; the last where there is no
    gate or it accepted none.
    """
    names = [chosen.name for chosen in pipeline.evaluation]
    final = (judged and judged["best"]["round"]) or last
    sets = {
        name: comparison.compare(plan.evaluation(0, name), plan.evaluation(final, name))
        for name in names
    }
    rounds = [comparison.evaluate(plan.evaluation(r, names[0])) for r in range(1, last + 1)]
    return {
        "pipeline": pipeline.name,
        "seed": pipeline.seed,
        "base": sets[names[0]]["base"],
        "baselines": {
            f"baseline {found.name}": comparison.evaluate(found.folder)
            for found in plan.baseline_folders()
            if found.set == names[0]
        },
        "rounds": rounds,
        "final_round": final,
        "final": rounds[final - 1],
        "round_settings": [pipeline.changes(r) for r in range(1, last + 1)],
        **{name: sets[names[0]][name] for name in comparison.DIFFERENCES},
        "sets": sets,
        "frontier": _frontiers(plan, last),
        **({"gate": judged, "best": judged["best"]["model"]} if judged else {}),
    }


def _frontiers(plan: Plan, last: int) -> dict[str, Any]:
    """Return what `frontier.judge` says of every round, for each evaluation set with baselines."""
    free: dict[str, dict[str, Path]] = {}
    for found in plan.baseline_folders():
        points = free.setdefault(found.set, {"base": plan.evaluation(0, found.set)})
        points[f"baseline {found.name}"] = found.folder
    return {
        name: frontier.judge(
            points,
            {f"round {r}": plan.evaluation(r, name) for r in range(1, last + 1)},
        )
        for name, points in free.items()
    }


def show(summary: dict[str, Any]) -> None:
    """Print the tables of a summary (the first evaluation set by baseline and round, and all sets
    before and after the final round), whether the rounds are beyond what is free, and what the gate
    decided."""
    rows = {"base": summary["base"]}
    rows |= summary["baselines"]
    rows |= {f"round {i}": side for i, side in enumerate(summary["rounds"], start=1)}
    click.echo(f"\n{comparison.table(rows)}")
    sets = [
        {"set": name, **comparison.side_by_side(result)} for name, result in summary["sets"].items()
    ]
    click.echo(f"\n{format_table(sets)}")
    show_warnings(summary)
    if summary["frontier"]:
        click.echo()
        show_verdicts(summary)
    if "gate" in summary:
        for decision in summary["gate"]["rounds"]:
            click.echo(f"\n{gate.shown(decision)}")
        click.echo("\n" + "\n".join(summary["gate"]["text"]))


def show_warnings(summary: dict[str, Any]) -> None:
    """Print which evaluation sets have too few problems for their intervals."""
    for name, result in summary["sets"].items():
        if warning := comparison.too_few(result["base"]):
            click.echo(f"{name}: {warning}")


def show_verdicts(summary: dict[str, Any], prefix: str = "") -> None:
    """Print for each evaluation set with baselines whether the rounds are beyond what is free."""
    for name, result in summary["frontier"].items():
        for one in result["models"].values() if result is not None else ():
            click.echo(f"{prefix}{name}: {one['verdict']}")
        if result is None:
            click.echo(
                f"{prefix}{name}: without gold answers there is no frontier of what is free."
            )


def check_inputs(pipeline: Pipeline, out: Path) -> None:
    """Check what would otherwise stop the pipeline hours later: both models, with their weights if
    this machine runs them, and all that a dry run checks. Raise ConfigError or DataError."""
    from mpd_rounds.run.plan import plan_pipeline

    sampling, rewriting, _ = Plan(pipeline, out).training(1)
    with pipeline.explaining(sampling):
        resolve_model(pipeline.student)
    assert isinstance(rewriting.config, RewriteConfig)
    with pipeline.explaining(rewriting):
        resolve_model(pipeline.teacher, served=rewriting.config.engine.served(pipeline.teacher))
    plan_pipeline(pipeline, out)


def run_pipeline(pipeline: Pipeline, out: Path) -> dict[str, Any]:
    """Run the unfinished stages of `pipeline` in `out`. Return the summary, with `failed_rows` true
    if a stage left rows in errors/."""
    require_kind(out, "pipeline")
    check_inputs(pipeline, out)
    # mpd-gen status sees by it that the run is alive.
    with folder_lock(out):
        return _run_steps(pipeline, Plan(pipeline, out), out)


def _run_steps(pipeline: Pipeline, plan: Plan, out: Path) -> dict[str, Any]:
    with contextlib.closing(Runner(out, pipeline.environment, plan.all_steps())) as runner:
        last, judged = _run_rounds(pipeline, plan, out, runner)
        runner.rest()
        return _record_results(pipeline, plan, last, judged, runner.failed_rows)


def _record_results(
    pipeline: Pipeline, plan: Plan, last: int, judged: dict[str, Any] | None, failed_rows: bool
) -> dict[str, Any]:
    """Write what the rounds up to `last` came to: the summary, cards, trackers and the plot. Return
    the summary."""
    summary = summarize(pipeline, plan, last, judged)
    summary["failed_rows"] = failed_rows
    write_json_atomic(plan.out / "summary.json", summary)
    # They import slowly.
    from mpd_train.card import add_results
    from mpd_train.metrics import record_evaluation

    sets = [chosen.name for chosen in pipeline.evaluation]
    base, *results = (
        {name: comparison.evaluate(plan.evaluation(r, name)) for name in sets}
        for r in range(last + 1)
    )
    for r, found in enumerate(results, start=1):
        model = Path(plan.student(r))
        add_results(model, f"{pipeline.name}, round {r}", base, found)
        record_evaluation(model.parent, found)
    names = ["base", *(f"round {r}" for r in range(1, last + 1))]
    headline = pipeline.evaluation[0].name
    lengths = {name: plan.evaluation(r, headline) for r, name in enumerate(names)}
    plot_lengths(lengths, plan.out / "lengths.png")
    return summary


def _run_rounds(
    pipeline: Pipeline, plan: Plan, out: Path, runner: Runner
) -> tuple[int, dict[str, Any] | None]:
    """Run the steps that have not finished. Return the last round, and what the gate concluded."""
    write_record(out, "pipeline", pipeline.model_dump(mode="json"))
    measured = [*plan.evaluations(0), *plan.baselines(from_rewrites=False)]
    runner.run(measured)
    judged, decisions = None, []
    if pipeline.gate is None:
        gate.remove(out)
    for round_ in range(1, pipeline.rounds + 1):
        sampling, rewriting, training = plan.training(round_)
        runner.run([sampling])
        runner.run([rewriting])
        if round_ == 1:
            write_examples(plan)
            runner.run(list(plan.baselines(from_rewrites=True)))
        runner.run([training])
        runner.run(list(plan.evaluations(round_)))
        if pipeline.gate is not None:
            decisions.append(gate.decide(plan, pipeline.gate, round_))
            judged = gate.conclude(plan, decisions)
            click.echo(judged["text"][0], err=True)
            if not decisions[-1].goes_on:
                break
    return round_, judged


def _rates(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    """Return the values of `--rate` as stage -> tokens per second."""
    rates = {}
    for value in values:
        stage, _equals, number = value.partition("=")
        try:
            rates[stage] = float(number)
        except ValueError:
            rates[stage] = 0.0
        if stage not in ("rollouts", "rewrite", "train") or not 0 < rates[stage] < math.inf:
            raise click.BadParameter(
                f"{value!r}: expected rollouts=, rewrite= or train= and tokens per second"
                " (rollouts=25000)."
            )
    return rates


@contextlib.contextmanager
def _pipeline_file(
    given: Path | None, name: str | None, out: Path | None, dry_run: bool
) -> Iterator[tuple[Path, Path | None]]:
    """Yield the pipeline file and the run's folder: those given, or those of the example `name`,
    whose files are written to OUT/example. A dry run writes them to a temporary folder instead."""
    if (given is None) == (name is None):
        raise click.UsageError("Give either a PIPELINE or --example.")
    if given is not None:
        yield given, out
        return
    out = out or Path("runs") / str(name)
    require_kind(out, "pipeline")
    with contextlib.ExitStack() as stack:
        folder = out / "example"
        if dry_run and not (folder / "pipeline.toml").exists():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        yield examples.write(folder), out
        if folder != out / "example":
            click.echo(
                f"{folder} was for this dry run and is gone. A run has its files in {out}/example.",
                err=True,
            )


@click.command(
    cls=Command,
    context_settings=CONTEXT,
    epilog=example(
        "mpd-rounds --example pocket --out runs/demo",
        "mpd-rounds my-run/pipeline.toml --out my-run/out --set rounds=1 --dry-run",
    ),
)
@click.argument(
    "pipeline", type=click.Path(path_type=Path, dir_okay=False, exists=True), required=False
)
@click.option(
    "--example",
    "example_name",
    type=click.Choice(examples.NAMES),
    help="Run a pipeline that comes with this package, with its models, in place of a PIPELINE. Its"
    " files are written to OUT/example; edit them and run the command again to try something else.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder of the run. Default: runs/NAME."
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="NAME=VALUE",
    help="Change a setting of the file, as train.epochs=2. May be repeated.",
)
@click.option(
    "--seeds", type=click.IntRange(1), help="Run seeds 0 to N-1 into OUT/seed0 … and compare them."
)
@DRY_RUN
@click.option(
    "--rate",
    "rates",
    multiple=True,
    callback=_rates,
    metavar="STAGE=N",
    help="With --dry-run: assume N tokens per second, of all GPUs together, for the stage rollouts"
    " (with evaluations), rewrite or train. May be repeated.",
)
@PLAN_JSON
@VERSION
def cli(
    pipeline: Path | None,
    example_name: str | None,
    out: Path | None,
    overrides: tuple[str, ...],
    seeds: int | None,
    dry_run: bool,
    rates: dict[str, float],
    as_json: bool,
) -> None:
    """Run all rounds of a PIPELINE (TOML) into OUT. Run the command again to resume. The exit code
    is 4 if the pipeline's gate accepted no round (of a seed)."""
    if rates and not dry_run:
        raise click.UsageError("--rate goes with --dry-run.")
    with _pipeline_file(pipeline, example_name, out, dry_run) as (file, folder):
        _run(file, folder, overrides, seeds, dry_run, rates, as_json)


def _run(
    pipeline: Path,
    out: Path | None,
    overrides: tuple[str, ...],
    seeds: int | None,
    dry_run: bool,
    rates: dict[str, float],
    as_json: bool,
) -> None:
    """Run or plan a pipeline file, once or with several seeds, and print the result."""
    if out is None:
        out = Path("runs") / load_pipeline(pipeline, overrides).name
    require_kind(out, "pipeline")
    if dry_run:
        from mpd_rounds.run.plan import plan_pipeline, show_pipeline

        # The first seed stands for all: each other seed takes as much again.
        if seeds is not None:
            out, overrides = out / "seed0", (*overrides, "seed=0")
        show_pipeline(plan_pipeline(load_pipeline(pipeline, overrides), out, rates), as_json)
        if seeds is not None:
            click.echo(f"This is the first of {seeds} seeds.", err=True)
        return
    if seeds is None:
        loaded = load_pipeline(pipeline, overrides)
        show(summary := run_pipeline(loaded, out))
        for line in loaded.changes_text():
            click.echo(line)
        click.echo(f"wrote {out / 'summary.json'} and {out / 'lengths.png'}", err=True)
        click.echo(f"mpd-report {shlex.quote(str(out))} draws the report", err=True)
        model = shlex.quote(Plan(loaded, out).student(summary["final_round"]))
        click.echo(f"mpd-gen push {model} OWNER/NAME uploads the student", err=True)
        _leave([summary], out)
        return
    summaries = [
        run_pipeline(load_pipeline(pipeline, (*overrides, f"seed={n}")), out / f"seed{n}")
        for n in range(seeds)
    ]
    write_json_atomic(out / "seeds.json", summaries)
    rows = [
        {"seed": str(summary["seed"]), "set": name, **comparison.side_by_side(result)}
        for summary in summaries
        for name, result in summary["sets"].items()
    ]
    click.echo(f"\n{format_table(rows)}")
    show_warnings(summaries[0])  # all seeds have the same problems
    for summary in summaries:
        show_verdicts(summary, f"seed {summary['seed']}, ")
        for line in summary["gate"]["text"] if "gate" in summary else ():
            click.echo(f"seed {summary['seed']}: {line}")
    click.echo(f"wrote {out / 'seeds.json'}", err=True)
    click.echo(f"mpd-report {shlex.quote(str(out))} draws the report", err=True)
    _leave(summaries, out / "seed*")


def _leave(summaries: list[dict[str, Any]], out: Path) -> None:
    """Raise Exit if the gate of a run accepted no round, or else if rows failed."""
    failed = any(summary["failed_rows"] for summary in summaries)
    if failed:
        click.echo(f"some rows failed; see {out}/*/*/errors/*.parquet", err=True)
    if any("gate" in summary and not summary["gate"]["best"]["round"] for summary in summaries):
        raise click.exceptions.Exit(EXIT_NONE_ACCEPTED)
    if failed:
        raise click.exceptions.Exit(EXIT_FAILED_ROWS)


def main() -> None:
    run_command(cli)


if __name__ == "__main__":
    main()
