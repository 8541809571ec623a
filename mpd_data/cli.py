"""`mpd-gen`: sample rollouts, rewrite them, and inspect the shards.

Exit codes: 0 done, 1 fatal, 2 usage, 3 done with failed rows (in errors/), 130 interrupted
(run the same command again to resume). Results go to stdout, progress and messages to stderr.
"""

import contextlib
import dataclasses
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from mpd_data.common.command import (
    CONTEXT,
    DRY_RUN,
    PLAN_JSON,
    VERSION,
    Group,
    example,
    run_command,
)
from mpd_data.common.errors import ConfigError, MPDError, requires
from mpd_data.common.options import build, config_options
from mpd_data.common.text import json_text, plain
from mpd_data.config import (
    ContaminationConfig,
    InitConfig,
    PartsConfig,
    RewriteConfig,
    RolloutsConfig,
)
from mpd_data.parts import session, workers
from mpd_data.parts.serve import serve
from mpd_data.store.locks import WHOLE
from mpd_data.store.run_record import kind_of

_OVERWRITE = click.option(
    "--overwrite", is_flag=True, help="Delete what this stage has written here, then start again."
)
_LIMIT = click.option(
    "--limit",
    type=click.IntRange(1),
    help="Process at most this many remaining samples (or rollouts to rewrite), then stop.",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
_BY = click.option(
    "--by", metavar="NAME", help="Also group by NAME, a key of the rollouts' metadata."
)


class _RoundFolder(click.Path):
    """The folder of a round, or the rollouts/ or distill/ in it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the round's folder. Raise ConfigError for a folder of several rounds."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        stages = ("rollouts", "distill")
        if path.name in stages and (path.parent / "run.json").is_file():
            return path.parent
        if any((path / stage).is_dir() for stage in stages):
            return path
        # As deep as those of `mpd-rounds --seeds`: seed0/data/round1.
        manifests = (
            file for depth in range(1, 4) for file in path.glob(f"{depth * '*/'}*.manifest.jsonl")
        )
        folders = {file.parent for file in manifests}
        # Rounds with rewrites before the rollouts of evaluations.
        by_use = sorted(folders, key=lambda folder: (not (folder / "distill").is_dir(), folder))
        if rounds := [str(folder) for folder in by_use]:
            more = f" and {len(rounds) - _LISTED} more" if len(rounds) > _LISTED else ""
            raise ConfigError(
                f"{path}: not a round. The rounds in it: {', '.join(rounds[:_LISTED])}{more}."
            )
        return path


class _RunFolder(_RoundFolder):
    """A round's folder, or that of a training, a pipeline run or a study."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(os.fsdecode(click.Path.convert(self, value, param, ctx)))
        is_run = kind_of(path) in ("training", "pipeline", "study")
        return path if is_run else super().convert(value, param, ctx)


_LISTED = 20
# Of view --serve.
_PORT = 8765
# Of status --watch.
_SECONDS_PER_LOOK = 2.0
_ROUND = _RoundFolder(exists=True, file_okay=False)


@click.group(
    cls=Group,
    context_settings=CONTEXT,
    replaced={
        "plan": "mpd-rounds PIPELINE --dry-run",
        "completion": "_MPD_GEN_COMPLETE=bash_source mpd-gen (or zsh_source, fish_source)",
    },
)
@VERSION
def cli() -> None:
    """Sample rollouts with a student, rewrite them with a teacher, and inspect the result."""


@cli.command(
    epilog=example(
        "mpd-gen init my-run --student Qwen/Qwen3-1.7B --teacher Qwen/Qwen3-8B \\",
        "    --prompts problems.jsonl",
    )
)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@config_options(InitConfig)
def init(folder: Path, **options: Any) -> None:
    """Write FOLDER/pipeline.toml for your models and prompts."""
    from mpd_data.init.pipeline import run_init

    config = build(InitConfig, options)
    for line in run_init(folder, config):
        click.echo(line, err=True)
    pipeline, out = shlex.quote(str(folder / "pipeline.toml")), shlex.quote(str(folder / "out"))
    click.echo(f"wrote {pipeline}; next: mpd-rounds {pipeline} --out {out} --dry-run", err=True)


@cli.command(
    epilog=example(
        "mpd-gen rollouts --model Qwen/Qwen3-1.7B --prompts problems.jsonl \\",
        "    --answer-column answer -n 4 --max-tokens 16000 --out data/round1 --limit 64",
    )
)
@config_options(
    RolloutsConfig,
    also={"num_samples": "-n", "backend": "--engine"},
    common=("num_samples", "num_prompts", "answer_column", "max_tokens"),
    paths=("prompts",),
)
@_OVERWRITE
@_LIMIT
@DRY_RUN
@PLAN_JSON
def rollouts(
    overwrite: bool, limit: int | None, dry_run: bool, as_json: bool, **options: Any
) -> None:
    """Sample solutions with the student into OUT/rollouts. Run the command again to resume."""
    from mpd_data.dryrun.rollouts import plan_rollouts
    from mpd_data.dryrun.show import print_plan
    from mpd_data.rollouts import run_rollouts, setup

    config = _with_part(build(RolloutsConfig, options), overwrite)
    if dry_run:
        plan = plan_rollouts(setup(config, weights=False, overwrite=overwrite), overwrite, limit)
        print_plan(plan, as_json)
        return
    if config.parts.ray:
        from mpd_data.parts.ray import rollouts_on_ray as run_rollouts
    elif config.parts.workers > 1:
        failed = workers.run_workers("rollouts", config, limit)
        click.echo(f"{config.out}: all workers finished{_quality(config)}", err=True)
        _exit_if_failed("some" if failed else 0, config.out, "rollouts")
        return
    outcome = run_rollouts(config, overwrite, limit)
    summary = f"{config.out}: {outcome.total:,} rollouts, {outcome.written:,} of them new"
    _finish(f"{summary}{_quality(config)}", outcome.remaining)
    _exit_if_failed(outcome.failed, config.out, "rollouts")


def _quality(config: RolloutsConfig) -> str:
    """Return the end of a message: mean tokens, and which fractions are correct, lack an answer,
    are truncated."""
    from mpd_data.inspect.stats import outcome_rates

    if session.is_worker():
        return ""  # the command that started the workers says it once
    rates = outcome_rates(config.out)
    names = {"accuracy": "correct", "no_answer": "without an answer", "truncated": "truncated"}
    mean = rates.pop("mean_tokens")
    parts = [] if mean is None else [f"{mean:,.1f} tokens on average"]
    parts += [f"{rate:.1%} {names[name]}" for name, rate in rates.items() if rate is not None]
    if rates["truncated"] == 1:
        parts[-1] += (
            f"\nEvery rollout was cut off at --max-tokens {config.sampling.max_tokens}, so none can"
            " be rewritten. Sample again with a higher --max-tokens, in another --out or with"
            " --overwrite."
        )
    return "".join(f", {part}" for part in parts)


@cli.command(
    epilog=example(
        "mpd-gen rewrite --teacher Qwen/Qwen3-8B --shards data/round1 --max-tokens 8000 --limit 64"
    )
)
@config_options(
    RewriteConfig, also={"backend": "--engine"}, common=("template", "num_candidates", "max_tokens")
)
@_OVERWRITE
@_LIMIT
@DRY_RUN
@PLAN_JSON
@click.option(
    "--refilter",
    is_flag=True,
    help="Apply changed filters or another --choose to the existing rewrites. Only rewrites that"
    " are newly kept are scored.",
)
def rewrite(
    overwrite: bool, limit: int | None, dry_run: bool, as_json: bool, refilter: bool, **options: Any
) -> None:
    """Rewrite a round with the teacher. Rewrites that pass the filters are scored and stored in
    SHARDS/distill. Run the command again to resume."""
    from mpd_data.dryrun.refilter import plan_refilter
    from mpd_data.dryrun.rewrite import plan_rewrite
    from mpd_data.dryrun.show import print_plan
    from mpd_data.rewrite import run_rewrite
    from mpd_data.rewrite_setup import setup
    from mpd_data.select.refilter import run_refilter
    from mpd_data.select.student import ask_student, waiting_rollouts
    from mpd_data.store.round import RoundDir

    config = build(RewriteConfig, options)
    if not refilter:
        config = _with_part(config, overwrite)
    elif config.parts != PartsConfig():
        raise click.UsageError("--refilter works on a whole round: it takes no parts or workers.")
    if refilter and overwrite:
        raise click.UsageError("--refilter keeps the rewrites, --overwrite deletes them: give one.")
    if refilter and limit is not None:
        raise click.UsageError("--refilter filters all rewrites again: it takes no --limit.")
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
        failed = workers.run_workers("rewrite", config, limit)
        if config.student_option is not None and config.parts.num_shards is None:
            workers.close_engines()
            ask_student(config)
        click.echo(f"{config.shards}: all workers finished{_shares(config)}", err=True)
        _exit_if_failed("some" if failed else 0, config.shards, "distill")
        return
    outcome = run_refilter(config) if refilter else run_rewrite(config, overwrite, limit)
    counts = ", ".join(f"{n:,} {status}" for status, n in sorted(outcome.statuses.items()))
    waiting = 0
    if config.student_option is not None and not session.is_worker():
        round_dir = RoundDir(config.shards)
        waiting = waiting_rollouts(round_dir, round_dir.scan_shards("distill").paths)
    # If this part keeps nothing, another part may still keep something.
    alone = config.parts.part == WHOLE and not waiting
    if not outcome.statuses.get("ok") and not outcome.remaining and alone:
        hint = (
            "Read some in distill/*.parquet (columns rewrite, status): does the teacher follow the"
            " template, is --max-tokens long enough?"
        )
        if set(outcome.statuses) == {"malformed"}:
            hint = _how_malformed(config)
        if set(outcome.statuses) == {"draft_rejected"}:
            hint = f"No draft is {config.filters.drafts}: give another --drafts."
        if set(outcome.statuses) == {"draft_truncated"}:
            hint = (
                "Every draft was cut off at the student's --max-tokens: run mpd-gen rollouts with a"
                " higher one, in another --out. With gold answers, --cut-drafts rewrites them as"
                " they are."
            )
        raise MPDError(
            f"{config.shards}: no rewrite was kept ({counts or 'no rows'}), so there is nothing to"
            f" train on. {hint}"
        )
    if waiting:
        click.echo(
            f"{waiting:,} rollouts still need the student to choose a rewrite and will be skipped"
            " in training. When all parts have finished, rerun this command with --refilter and"
            " without --num-shards/--workers.",
            err=True,
        )
    summary = f"{config.shards}: {counts}; {outcome.written:,} rows new"
    _finish(f"{summary}{_shares(config)}", outcome.remaining)
    _exit_if_failed(outcome.failed, config.shards, "distill")


def _how_malformed(config: RewriteConfig) -> str:
    """Return what a rewrite looks like, and what the template expects."""
    from mpd_data.inspect.stats import collect, scan_round
    from mpd_data.prompts.template import load_template

    (first,) = collect(scan_round(config.shards, "distill").select("rewrite").head(1))["rewrite"]
    expected = load_template(config.template).output
    return (
        f"The teacher's turns are not of the form that the template {config.template} has in"
        f" `output`: {expected!r}. One of them: {first[:200]!r}. Write a template in words that"
        " this teacher follows (docs/guide.md, The rewrite template), and begin the rewrites anew"
        " with --overwrite."
    )


def _shares(config: RewriteConfig) -> str:
    """Return the end of a message: which fraction of the round's rows is kept, and which are
    copies of their drafts."""
    from mpd_data.inspect.stats import rewrite_rates

    if session.is_worker():
        return ""  # the command that started the workers says it once
    limit = config.filters.max_overlap
    limit = _COPY if limit is None else limit
    kept, copied = rewrite_rates(config.shards, limit)
    return f"; {kept:.1%} kept, {copied:.1%} copies (draft_overlap above {limit:g})"


# Without --max-overlap a rewrite is called a copy that repeats more of its draft's 4-grams.
_COPY = 0.9


def _with_part(config: Any, overwrite: bool) -> Any:
    """Return `config` with this task's part of the SLURM job array, unless it names a part. Raise
    click.UsageError if `overwrite` would delete the rows of other parts."""
    parts = config.parts
    if parts.ray:
        return config  # one command starts all actors, and deletes before it starts them
    if parts.num_shards is None and (task := workers.slurm_part()) is not None:
        part = "part {} of {}".format(*task)
        click.echo(f"SLURM job array: {part} (--shard-index, --num-shards)", err=True)
        parts = parts.model_copy(update={"shard_index": task[0], "num_shards": task[1]})
    if overwrite and (parts.workers > 1 or parts.part != WHOLE):
        raise click.UsageError(
            "--overwrite deletes the rows of all parts. Run the command once with --overwrite"
            " --limit 1 and without --workers and --num-shards, then start the parts."
        )
    return config.model_copy(update={"parts": parts})


def _finish(summary: str, remaining: int) -> None:
    click.echo(summary, err=True)
    if remaining:
        click.echo(f"{remaining:,} remaining; run without --limit for the rest.", err=True)


def _exit_if_failed(rows: int | str, folder: Path, stage: str) -> None:
    if not rows:
        return
    from mpd_data.inspect.stats import collect, scan_round

    messages = scan_round(folder, "errors").filter(stage=stage).select("message")
    first = "".join(
        f" The first: {plain(message)}" for message in collect(messages.head(1))["message"]
    )
    click.echo(f"{rows} rows failed; see errors/*.parquet (column message).{first}", err=True)
    raise click.exceptions.Exit(workers.EXIT_FAILED_ROWS)


@cli.command(epilog=example("mpd-gen status data/round1", "mpd-gen status runs/demo --watch"))
@click.argument("folders", nargs=-1, required=True, type=_RunFolder(exists=True, file_okay=False))
@_JSON
@click.option(
    "--watch",
    is_flag=True,
    help="Show it anew every two seconds, until nothing runs any more. Ctrl-C ends the display, not"
    " the job.",
)
def status(folders: tuple[Path, ...], as_json: bool, watch: bool) -> None:
    """Show how far the work in FOLDERS is: rounds, trainings, runs of mpd-rounds or mpd-study. Also
    lists the processes that write there."""
    from mpd_data.inspect.status import is_at_work, show_status, status_of

    if watch and as_json:
        raise click.UsageError("--watch and --json do not go together.")
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            statuses = {str(path): status_of(path) for path in folders}
            # The terminal's width; a file has none.
            columns = shutil.get_terminal_size((sys.maxsize, 0)).columns
            text = [f"{plain(path)}\n{show_status(x, columns)}" for path, x in statuses.items()]
            if watch and sys.stdout.isatty():
                click.clear()
            click.echo(json_text(statuses) if as_json else "\n\n".join(text))
            if not watch or not any(map(is_at_work, statuses.values())):
                return
            time.sleep(_SECONDS_PER_LOOK)


@cli.command(epilog=example("mpd-gen stats data/round1 data/round2 --by family --plot lengths.png"))
@click.argument("rounds", nargs=-1, required=True, type=_ROUND)
@_JSON
@_BY
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    help="Draw the trace lengths to this file (PNG, SVG or PDF).",
)
def stats(rounds: tuple[Path, ...], as_json: bool, by: str | None, plot: Path | None) -> None:
    """Show lengths, accuracy and statuses of the rows in ROUNDS."""
    from mpd_data.common.text import format_histogram, format_table
    from mpd_data.inspect.stats import plot_lengths, round_stats

    tables = round_stats(list(rounds), by)
    parts = []
    for name, rows in tables.items():
        title = f"by {plain(by)}" if name == "groups" else name.replace("_", " ")
        text = format_histogram(rows) if name == "trace_lengths" else format_table(rows)
        parts.append(f"{title}\n{text}")
    click.echo(json_text(tables) if as_json else "\n\n".join(parts))
    if plot is not None:
        plot_lengths({str(path): path for path in rounds}, plot)
        click.echo(f"wrote {plot}", err=True)


@cli.command(epilog=example("mpd-gen compare runs/demo/eval/base-test runs/demo/eval/round1-test"))
@click.argument("base", type=_ROUND)
@click.argument("new", type=_ROUND)
@_JSON
@_BY
@click.option(
    "--serve",
    "at_once",
    type=click.IntRange(1),
    help="Also run both models, with this many requests at a time: requests per hour, time to an"
    " answer, and after how many requests NEW's run has paid for itself.",
)
def compare(base: Path, new: Path, as_json: bool, by: str | None, at_once: int | None) -> None:
    """Compare NEW with BASE on the same prompts. Both are folders with rollouts."""
    from mpd_data.inspect import compare as comparison

    result = comparison.compare(base, new, by)
    text = comparison.show(result, by)
    if at_once is not None:
        from mpd_data.inspect import serving

        result["served"] = serving.serve_both(base, new, at_once)
        text += f"\n\n{serving.show(result['served'])}"
    click.echo(json_text(result) if as_json else text)


@cli.command(
    epilog=example(
        "mpd-gen view data/round1",
        "mpd-gen view data/round* --evaluations eval/base-test eval/round2-test --out traces.html",
        "mpd-gen view data/round* --serve",
    )
)
@click.argument("rounds", nargs=-1, type=_ROUND)
@click.option(
    "--evaluations",
    nargs=2,
    type=_ROUND,
    metavar="BASE NEW",
    help="Show the samples of two models side by side, problem by problem, too or alone.",
)
@click.option(
    "--training",
    "trainings",
    multiple=True,
    type=_ROUND,
    help="Folder of a training on the rounds: its rows get their divergence. May be repeated.",
)
@click.option(
    "--rows",
    type=click.IntRange(1),
    default=2000,
    show_default=True,
    help="Show at most this many rows of each round (with --serve all), and this many problems.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    show_default="traces.html",
    help="The page to write.",
)
@click.option(
    "--serve",
    is_flag=True,
    help="Write no page but serve it, to browsers on this machine, with all rows: for rounds that"
    " are too large for a file.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    show_default=str(_PORT),
    help="Of --serve; 0: a free one.",
)
def view(
    rounds: tuple[Path, ...],
    evaluations: tuple[Path, Path] | None,
    trainings: tuple[Path, ...],
    rows: int,
    out: Path | None,
    serve: bool,
    port: int | None,
) -> None:
    """Write a page to browse the drafts and rewrites of ROUNDS. It needs no network."""
    from mpd_data.inspect.view import write_view

    if not rounds and (evaluations is None or serve or trainings):
        raise click.UsageError("Give the folder of a round, or --evaluations BASE NEW.")
    if serve:
        if out is not None:
            raise click.UsageError("--serve writes no page: it takes no --out.")
        with requires("serve", "mpd-gen view --serve"):
            from mpd_data.inspect.view.serve import serve_view
        serve_view(rounds, _PORT if port is None else port, evaluations, rows, trainings)
        return
    if port is not None:
        raise click.UsageError("--port goes with --serve.")
    out = out or Path("traces.html")
    write_view(rounds, out, evaluations, rows, trainings)
    click.echo(f"wrote {out}", err=True)


def _require_sound(problems: list[str]) -> None:
    """Print the first of the `problems` of rounds and raise MPDError if there are any."""
    if problems:
        click.echo("\n".join(problems[:50]))
        raise MPDError(f"{len(problems):,} breaches of the contract.")


@cli.command(epilog=example("mpd-gen validate data/round*"))
@click.argument("rounds", nargs=-1, required=True, type=_ROUND)
def validate(rounds: tuple[Path, ...]) -> None:
    """Check every shard and row of ROUNDS."""
    from mpd_data.inspect.validate import validate_round

    _require_sound([problem for path in rounds for problem in validate_round(path)])
    click.echo("\n".join(f"{path}: sound" for path in rounds))


@cli.command(
    epilog=example("mpd-gen contamination --prompts problems.jsonl --against test.jsonl --n 13")
)
@config_options(ContaminationConfig, paths=("prompts", "against"))
@_JSON
def contamination(as_json: bool, **options: Any) -> None:
    """Find evaluation prompts among training prompts, whole or in part."""
    from mpd_data.inspect import contamination as check
    from mpd_data.prompts.reader import read_prompts

    config = build(ContaminationConfig, options)

    def pairs(paths: list[str], column: str, id_column: str | None) -> Iterator[tuple[str, str]]:
        unusable = 0
        for prompt in read_prompts(paths, column, id_column):
            if prompt.flaw is not None:
                unusable += 1
                continue
            yield (prompt.source if id_column is None else prompt.id), prompt.text
        if unusable:
            rows = f"{unusable:,} rows cannot be used and were left out"
            click.echo(f"{', '.join(paths)}: {rows}; mpd-gen rollouts names them.", err=True)

    column = config.against_prompt_column or config.prompt_column
    result = check.check_contamination(
        pairs(config.prompts, config.prompt_column, config.id_column),
        pairs(config.against, column, config.against_id_column),
        config.n,
    )
    click.echo(json_text(dataclasses.asdict(result)) if as_json else check.show(result))
    if config.fail_above is not None and result.share > config.fail_above:
        raise MPDError(
            f"{result.overlapping:,} of {result.num_evaluation:,} evaluation prompts overlap with"
            f" training prompts, more than --fail-above {config.fail_above}. Remove them from the"
            " training prompts, or evaluate without them."
        )


@cli.command(epilog=example("mpd-gen push runs/round1/model OWNER/my-student"))
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--public", is_flag=True, help="Make a new repository public. Default: private.")
def push(folder: Path, repository: str, public: bool) -> None:
    """Upload FOLDER to OWNER/NAME on the Hugging Face Hub.

    FOLDER is a round, which becomes a dataset, or a model/ or adapter/ that a training wrote.
    """
    from mpd_data.common import hub
    from mpd_data.inspect.validate import validate_round
    from mpd_data.store.round import PUBLISHED
    from mpd_data.store.run_record import kind_of

    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        url = hub.push_model(folder, repository, public)
    elif kind_of(folder) == "round":
        _require_sound(validate_round(folder))
        url = hub.push(folder, repository, list(PUBLISHED), True, public)
    else:
        raise ConfigError(
            f"{folder}: neither a round nor a model. Give a round's folder, or the model/ or"
            " adapter/ in a training's."
        )
    click.echo(url)


@cli.command()
@_JSON
def env(as_json: bool) -> None:
    """Show versions and machine, for a bug report."""
    from mpd_data.common.machine import environment

    versions = environment()
    width = max(map(len, versions))
    lines = [f"{name.ljust(width)}  {value}" for name, value in versions.items()]
    click.echo(json_text(versions) if as_json else "\n".join(lines))


def main() -> None:
    if session.is_session():
        serve(cli)
    run_command(cli)


if __name__ == "__main__":
    main()
