"""init, rollouts, rewrite: from prompts to a round's rows."""

import shlex
from pathlib import Path
from typing import Any

import click

from mpd_data.commands.arguments import LIMIT, OVERWRITE
from mpd_data.common.command import DRY_RUN, PLAN_JSON, Command, example
from mpd_data.common.errors import MPDError
from mpd_data.common.options import build, config_options
from mpd_data.common.text import plain
from mpd_data.config import InitConfig, PartsConfig, RewriteConfig, RolloutsConfig
from mpd_data.parts import session, workers
from mpd_data.store.locks import WHOLE


@click.command(
    cls=Command,
    epilog=example(
        "mpd-gen init my-run --student Qwen/Qwen3-1.7B --teacher Qwen/Qwen3-8B \\",
        "    --prompts problems.jsonl",
    ),
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


@click.command(
    cls=Command,
    epilog=example(
        "mpd-gen rollouts --model Qwen/Qwen3-1.7B --prompts problems.jsonl \\",
        "    --answer-column answer -n 4 --max-tokens 16000 --out data/round1 --limit 64",
    ),
)
@config_options(
    RolloutsConfig,
    also={"num_samples": "-n", "backend": "--engine"},
    common=("num_samples", "num_prompts", "answer_column", "max_tokens"),
    paths=("prompts",),
)
@OVERWRITE
@LIMIT
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


@click.command(
    cls=Command,
    epilog=example(
        "mpd-gen rewrite --teacher Qwen/Qwen3-8B --shards data/round1 --max-tokens 8000 --limit 64"
    ),
)
@config_options(
    RewriteConfig, also={"backend": "--engine"}, common=("template", "num_candidates", "max_tokens")
)
@OVERWRITE
@LIMIT
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
            workers.close_worker_engines()
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
    kept, copied, corrected = rewrite_rates(config.shards, limit)
    text = f"; {kept:.1%} kept, {copied:.1%} copies (draft_overlap above {limit:g})"
    if copied > _MANY and config.filters.max_overlap is None:
        text += f"; --max-overlap {limit:g} --refilter rejects them"
    if corrected > _MANY:
        text += f"; {corrected:.1%} correct a wrong draft (--corrections --refilter keeps them)"
    return text


# Without --max-overlap a rewrite is called a copy that repeats more of its draft's 4-grams.
_COPY = 0.9
# A share of rewrites that is worth a hint.
_MANY = 0.05


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
