"""`mpd-report`: the report of a run as a page, a summary and a data card."""

from pathlib import Path

import click

from mpd_data.common.command import run_command


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("paths", metavar="RUN…", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to write to; several runs need one.  [default: RUN/report]",
)
@click.version_option(package_name="mixed-policy-distillation")
def cli(paths: tuple[Path, ...], out: Path | None) -> None:
    """Draw the report of a RUN: the OUT of mpd-rounds, with or without --seeds, or of mpd-train.
    Several RUNs are compared."""
    from mpd_rounds.report.write import write_report

    for path in write_report(list(paths), out):
        click.echo(f"wrote {path}", err=True)


def main() -> None:
    run_command(cli)


if __name__ == "__main__":
    main()
