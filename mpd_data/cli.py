"""`mpd-gen`: student rollouts, teacher rewrites, and what there is to know of the shards.

Exit codes: 0 done, 1 fatal, 2 usage, 3 done with failed rows (in errors/), 130 interrupted
(run the same command again to go on). Tables go to stderr, `--json` to stdout.
"""

import dataclasses
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from mpd_data.common.command import DRY_RUN, PLAN_JSON, run_command
from mpd_data.common.errors import MPDError
from mpd_data.common.options import build, config_options
from mpd_data.common.text import plain
from mpd_data.config import (
    ContaminationConfig,
    InitConfig,
    PartsConfig,
    RewriteConfig,
    RolloutsConfig,
)
from mpd_data.parts.workers import (
    EXIT_FAILED_ROWS,
    end_with_parent,
    is_worker,
    run_workers,
    slurm_part,
)
from mpd_data.store.locks import WHOLE

_OVERWRITE = click.option(
    "--overwrite", is_flag=True, help="Delete what this stage has written here, then start anew."
)
_LIMIT = click.option(
    "--limit",
    type=click.IntRange(1),
    help="Do at most so much of what is owed (samples; rollouts to rewrite), then stop.",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON to stdout.")
_BY = click.option(
    "--by", metavar="NAME", help="Also by the values of NAME, a key of the rollouts' metadata."
)


_FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="mixed-policy-distillation")
def cli() -> None:
    """Stage one of Mixed-Policy Distillation: generate, rewrite, inspect."""


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@config_options(InitConfig)
def init(folder: Path, **options: Any) -> None:
    """Write FOLDER/pipeline.toml, a commented pipeline for your models and prompts."""
    from mpd_data.init.pipeline import run_init

    config = build(InitConfig, options)
    for line in run_init(folder, config):
        click.echo(line, err=True)
    pipeline, out = shlex.quote(str(folder / "pipeline.toml")), shlex.quote(str(folder / "out"))
    click.echo(f"wrote {pipeline}; next: mpd-rounds {pipeline} --out {out} --dry-run", err=True)


@cli.command()
@config_options(RolloutsConfig, also={"num_samples": "-n", "backend": "--engine"})
@_OVERWRITE
@_LIMIT
@DRY_RUN
@PLAN_JSON
def rollouts(
    overwrite: bool, limit: int | None, dry_run: bool, as_json: bool, **options: Any
) -> None:
    """Sample solutions with the student into OUT/rollouts. Run again to resume."""
    from mpd_data.dryrun.rollouts import plan_rollouts
    from mpd_data.dryrun.show import print_plan
    from mpd_data.rollouts import run_rollouts, setup

    config = _with_part(build(RolloutsConfig, options))
    _refuse_overwrite_of_parts(config, overwrite)
    if dry_run:
        plan = plan_rollouts(setup(config, weights=False, overwrite=overwrite), overwrite, limit)
        print_plan(plan, as_json)
        return
    if config.parts.ray:
        from mpd_data.parts.ray import rollouts_on_ray as run_rollouts
    elif config.parts.workers > 1:
        _finish_workers(run_workers("rollouts", config, limit))
        return
    outcome = run_rollouts(config, overwrite, limit)
    _finish(
        f"{config.out}: {outcome.total} rollouts, {outcome.written} of them new",
        outcome.failed,
        outcome.owed,
    )


@cli.command()
@config_options(RewriteConfig, also={"backend": "--engine"})
@_OVERWRITE
@_LIMIT
@DRY_RUN
@PLAN_JSON
@click.option(
    "--refilter",
    is_flag=True,
    help="Apply changed filters and choice to the rewrites that are there; scores what is newly"
    " kept.",
)
def rewrite(
    overwrite: bool,
    limit: int | None,
    dry_run: bool,
    as_json: bool,
    refilter: bool,
    **options: Any,
) -> None:
    """Let the teacher rewrite and score a round's rollouts into SHARDS/distill. Run again to
    resume."""
    from mpd_data.dryrun.refilter import plan_refilter
    from mpd_data.dryrun.rewrite import plan_rewrite
    from mpd_data.dryrun.show import print_plan
    from mpd_data.rewrite import run_rewrite
    from mpd_data.rewrite_setup import setup
    from mpd_data.select.likeliest import choose_rewrites, waiting_rollouts
    from mpd_data.select.refilter import run_refilter
    from mpd_data.store.round import RoundDir

    config = build(RewriteConfig, options)
    if not refilter:
        config = _with_part(config)
    elif config.parts != PartsConfig():
        raise click.UsageError("--refilter judges a round as a whole: it has no parts or workers.")
    _refuse_overwrite_of_parts(config, overwrite)
    if refilter and overwrite:
        raise click.UsageError("--refilter keeps the rewrites, --overwrite deletes them: give one.")
    if refilter and limit is not None:
        raise click.UsageError("--refilter judges all rewrites anew: it takes no --limit.")
    if dry_run:
        if refilter:
            plan = plan_refilter(config)
        else:
            plan = plan_rewrite(setup(config, weights=False, overwrite=overwrite), overwrite, limit)
        print_plan(plan, as_json)
        return
    if config.parts.ray:
        from mpd_data.parts.ray import rewrite_on_ray as run_rewrite
    elif config.parts.workers > 1:
        code = run_workers("rewrite", config, limit)
        if config.choose == "likeliest" and config.parts.num_shards is None:
            choose_rewrites(config)
        _finish_workers(code)
        return
    outcome = run_refilter(config) if refilter else run_rewrite(config, overwrite, limit)
    counts = ", ".join(f"{n} {status}" for status, n in sorted(outcome.statuses.items()))
    waiting = 0
    if config.choose == "likeliest" and not is_worker():
        round_dir = RoundDir(config.shards)
        waiting = waiting_rollouts(round_dir, round_dir.survey("distill").paths)
    # Of a part that keeps nothing, the other parts may still keep something.
    alone = config.parts.part == WHOLE and not waiting
    if not outcome.statuses.get("ok") and not outcome.owed and alone:
        raise MPDError(
            f"{config.shards}: no rewrite was kept ({counts or 'no rows'}), so there is nothing to"
            " train on. Read some in distill/*.parquet (columns rewrite, status): is the teacher"
            " able to follow the template, is --max-tokens long enough?"
        )
    if waiting:
        click.echo(
            f"{waiting:,} rollouts wait for the student's choice, and are not trained on before:"
            " once all parts are done, give this command with --refilter and without what divides"
            " it.",
            err=True,
        )
    _finish(f"{config.shards}: {counts}; {outcome.written} rows new", outcome.failed, outcome.owed)


def _with_part(config: Any) -> Any:
    """`config` with its part of a SLURM job array, where it names none and is in one."""
    parts = config.parts
    if parts.ray or parts.num_shards is not None or (found := slurm_part()) is None:
        return config
    index, count = found
    click.echo(f"SLURM job array: part {index} of {count} (--shard-index, --num-shards)", err=True)
    own = parts.model_copy(update={"shard_index": index, "num_shards": count})
    return config.model_copy(update={"parts": own})


def _refuse_overwrite_of_parts(config: Any, overwrite: bool) -> None:
    if config.parts.ray:
        return  # the one command that starts the actors deletes before it does
    if overwrite and (config.parts.workers > 1 or config.parts.part != WHOLE):
        raise click.UsageError(
            "--overwrite deletes what all parts have written. Give it once without --workers and"
            " --num-shards, with --limit 1; then start the parts."
        )


def _finish_workers(code: int) -> None:
    if code == EXIT_FAILED_ROWS:
        click.echo("some rows failed; see errors/*.parquet (column message).", err=True)
        raise click.exceptions.Exit(code)


def _finish(summary: str, failed: int, owed: int) -> None:
    click.echo(summary, err=True)
    if owed:
        click.echo(f"{owed:,} still owed; run without --limit for the rest.", err=True)
    if failed:
        click.echo(f"{failed} rows failed; see errors/*.parquet (column message).", err=True)
        raise click.exceptions.Exit(EXIT_FAILED_ROWS)


@cli.command()
@click.argument("rounds", nargs=-1, required=True, type=_FOLDER)
@_JSON
@_BY
@click.option("--plot", type=click.Path(path_type=Path), help="Draw trace lengths to this file.")
def stats(rounds: tuple[Path, ...], as_json: bool, by: str | None, plot: Path | None) -> None:
    """Trace-length statistics of ROUNDS."""
    from mpd_data.common.text import format_histogram, format_table
    from mpd_data.inspect.stats import plot_lengths, round_stats

    tables = round_stats(list(rounds), by)
    if as_json:
        click.echo(json.dumps(tables, indent=2))
    else:
        for name, rows in tables.items():
            title = f"by {plain(by)}" if name == "groups" else name.replace("_", " ")
            text = format_histogram(rows) if name == "trace_lengths" else format_table(rows)
            click.echo(f"\n{title}\n{text}", err=True)
    if plot is not None:
        plot_lengths({str(path): path for path in rounds}, plot)
        click.echo(f"wrote {plot}", err=True)


@cli.command()
@click.argument("rounds", nargs=-1, required=True, type=_FOLDER)
@_JSON
def status(rounds: tuple[Path, ...], as_json: bool) -> None:
    """How far the stages of ROUNDS are, and who is writing there now."""
    from mpd_data.inspect.status import round_status, show_status

    found = {str(path): round_status(path) for path in rounds}
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for path, status in found.items():
        click.echo(f"\n{plain(path)}\n{show_status(status)}", err=True)


@cli.command()
@click.argument("rounds", nargs=-1, required=True, type=_FOLDER)
def validate(rounds: tuple[Path, ...]) -> None:
    """Check that ROUNDS keep the shard contract."""
    from mpd_data.inspect.validate import validate_round

    problems = [problem for path in rounds for problem in validate_round(path)]
    for problem in problems[:50]:
        click.echo(problem, err=True)
    if problems:
        raise MPDError(f"{len(problems)} breaches of the contract.")
    for path in rounds:
        click.echo(f"{path}: sound", err=True)


@cli.command()
@click.argument("base", type=_FOLDER)
@click.argument("new", type=_FOLDER)
@_JSON
@_BY
def compare(base: Path, new: Path, as_json: bool, by: str | None) -> None:
    """Compare the rollouts of NEW with those of BASE on the same prompts."""
    from mpd_data.inspect import compare as comparison

    result = comparison.compare(base, new, by)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        sides = {"base": result["base"], "new": result["new"]}
        click.echo(comparison.table(sides), err=True)
        click.echo(comparison.verdict(result), err=True)
        if by is not None:
            click.echo(f"\nby {plain(by)}\n{comparison.groups_table(result['groups'])}", err=True)


@cli.command()
@config_options(ContaminationConfig)
@_JSON
def contamination(as_json: bool, **options: Any) -> None:
    """Which evaluation prompts stand among training prompts, whole or in part."""
    from mpd_data.inspect import contamination as check
    from mpd_data.prompts.reader import read_prompts

    config = build(ContaminationConfig, options)

    def pairs(paths: list[str], column: str, id_column: str | None) -> Iterator[tuple[str, str]]:
        for prompt in read_prompts(paths, column, id_column):
            yield (prompt.source if id_column is None else prompt.id), prompt.text

    column = config.against_prompt_column or config.prompt_column
    result = check.check_contamination(
        pairs(config.prompts, config.prompt_column, config.id_column),
        pairs(config.against, column, config.against_id_column),
        config.n,
    )
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result), indent=2))
    else:
        click.echo(check.show(result), err=True)
    if config.fail_above is not None and result.share > config.fail_above:
        raise MPDError(
            f"{result.overlapping:,} of {result.num_evaluation:,} evaluation prompts overlap with"
            f" training prompts, more than --fail-above {config.fail_above}. Take them out of the"
            " training prompts, or report without them."
        )


@cli.command()
@_JSON
def env(as_json: bool) -> None:
    """Versions and machine, for a bug report."""
    from mpd_data.common.machine import environment

    found = environment()
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        width = max(map(len, found))
        for name, value in found.items():
            click.echo(f"{name.ljust(width)}  {value}", err=True)


def main() -> None:
    end_with_parent()
    run_command(cli)


if __name__ == "__main__":
    main()
