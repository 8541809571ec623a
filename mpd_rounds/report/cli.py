"""`mpd-report`: write the report of a run as a page, a summary and a data card."""

from pathlib import Path

import click

from mpd_data.common.command import CONTEXT, VERSION, Command, example, run_command


@click.command(cls=Command, context_settings=CONTEXT, epilog=example("mpd-report runs/demo"))
@click.argument("paths", metavar="RUN…", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to write to. Required for several runs. Default: RUN/report.",
)
@VERSION
def cli(paths: tuple[Path, ...], out: Path | None) -> None:
    """Write the report of a RUN: the --out of mpd-rounds or of mpd-train. Several RUNs are
    compared."""
    from mpd_rounds.report.write import write_report

    for path in write_report(list(paths), out):
        click.echo(f"wrote {path}", err=True)


def main() -> None:
    run_command(cli)


if __name__ == "__main__":
    main()
