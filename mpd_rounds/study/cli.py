"""`mpd-study`: run a study, many settings of one pipeline, from one TOML file."""

import shlex
from pathlib import Path

import click

from mpd_data.common.command import CONTEXT, VERSION, Command, example, run_command
from mpd_data.common.errors import MPDError
from mpd_data.parts.workers import EXIT_FAILED_ROWS
from mpd_rounds.run.runner import Finished
from mpd_rounds.study.study import Planner, SettingRun, load_study, run_study, waves_of


@click.command(
    cls=Command,
    context_settings=CONTEXT,
    epilog=example("mpd-study pipelines/pocket/study.toml --out runs/study --group loss --dry-run"),
)
@click.argument("study", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the study.")
@click.option("--group", "groups", multiple=True, help="Run only this group. May be repeated.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="NAME=VALUE",
    help="Change a setting of the file, as seeds=[0]. May be repeated.",
)
@click.option("--dry-run", is_flag=True, help="List the remaining stages, and run nothing.")
@VERSION
def cli(
    study: Path, out: Path, groups: tuple[str, ...], overrides: tuple[str, ...], dry_run: bool
) -> None:
    """Run all settings of a STUDY (TOML) into OUT and compare them. Run the command again to
    resume."""
    loaded = load_study(study, overrides)
    if dry_run:
        show_remaining(Planner(loaded, out).runs(groups), out)
        return
    outcome = run_study(loaded, out, groups)
    from mpd_rounds.study.results import write_results

    click.echo(f"\n{write_results(loaded, outcome, out)}")
    if outcome.stopped:
        raise MPDError("some settings did not finish; the figures of the others are written.")
    if outcome.failed_rows:
        click.echo(f"some rows failed; see {out}/stages/*/errors/*.parquet", err=True)
        raise click.exceptions.Exit(EXIT_FAILED_ROWS)


def show_remaining(runs: list[SettingRun], out: Path) -> None:
    """Print the stages of `runs` that have not finished, as commands."""
    finished = Finished(out)
    stages = [step for wave in waves_of(runs) for step in wave]
    remaining = [step for step in stages if not finished.holds(step)]
    for step in remaining:
        click.echo(f"{step.label}\n    {step.program} {shlex.join(step.command)}")
    click.echo(f"{len(remaining)} of {len(stages)} stages remain.")


def main() -> None:
    run_command(cli)


if __name__ == "__main__":
    main()
