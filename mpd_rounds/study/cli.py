"""`mpd-study`: the command line of a study."""

import shlex
from pathlib import Path

import click

from mpd_data.common.command import run_command
from mpd_data.common.errors import MPDError
from mpd_data.parts.workers import EXIT_FAILED_ROWS
from mpd_rounds.run.runner import Finished
from mpd_rounds.study.study import Planner, SettingRun, load_study, run_study, waves_of


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("study", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the study.")
@click.option("--group", "groups", multiple=True, help="Only this group; may be given repeatedly.")
@click.option("--set", "overrides", multiple=True, metavar="NAME=VALUE", help="Override a setting.")
@click.option("--dry-run", is_flag=True, help="Show what is owed, and run nothing.")
@click.version_option(package_name="mixed-policy-distillation")
def cli(
    study: Path, out: Path, groups: tuple[str, ...], overrides: tuple[str, ...], dry_run: bool
) -> None:
    """Run all settings of a STUDY (TOML) into OUT, and compare them. Run again to resume."""
    loaded = load_study(study, overrides)
    if dry_run:
        show_owed(Planner(loaded, out).runs(groups), out)
        return
    outcome = run_study(loaded, out, groups)
    from mpd_rounds.study.results import write_results

    click.echo(f"\n{write_results(loaded, outcome, out)}", err=True)
    if outcome.stopped:
        raise MPDError("some settings did not finish; the figures of the others are written.")
    if outcome.failed_rows:
        click.echo(f"some rows failed; see {out}/stages/*/errors/*.parquet", err=True)
        raise click.exceptions.Exit(EXIT_FAILED_ROWS)


def show_owed(runs: list[SettingRun], out: Path) -> None:
    """The stages that runs owe, as commands."""
    finished = Finished(out)
    stages = [step for wave in waves_of(runs) for step in wave]
    owed = [step for step in stages if not finished.holds(step)]
    for step in owed:
        click.echo(f"{step.label}\n    {step.program} {shlex.join(step.command)}")
    click.echo(f"{len(owed)} of {len(stages)} stages are owed.", err=True)


def main() -> None:
    run_command(cli)


if __name__ == "__main__":
    main()
