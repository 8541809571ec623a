"""status, stats, compare, view: look at what a command made, or is making."""

import contextlib
import shutil
import sys
import time
from pathlib import Path

import click

from mpd_data.commands.arguments import BY, JSON, ROUND, RunFolder
from mpd_data.common.command import Command, example
from mpd_data.common.errors import requires
from mpd_data.common.text import json_text, plain
from mpd_data.store.run_record import require_once

# Of view --serve.
_PORT = 8765
# Of status --watch.
_SECONDS_PER_LOOK = 2.0


@click.command(
    cls=Command, epilog=example("mpd-gen status data/round1", "mpd-gen status runs/demo --watch")
)
@click.argument("folders", nargs=-1, required=True, type=RunFolder(exists=True, file_okay=False))
@JSON
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


@click.command(
    cls=Command,
    epilog=example("mpd-gen stats data/round1 data/round2 --by family --plot lengths.png"),
)
@click.argument("rounds", nargs=-1, required=True, type=ROUND)
@JSON
@BY
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


@click.command(
    cls=Command,
    epilog=example("mpd-gen compare runs/demo/eval/base-test runs/demo/eval/round1-test"),
)
@click.argument("base", type=ROUND)
@click.argument("new", type=ROUND)
@JSON
@BY
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


@click.command(
    cls=Command,
    epilog=example(
        "mpd-gen view data/round1",
        "mpd-gen view data/round* --evaluations eval/base-test eval/round2-test --out traces.html",
        "mpd-gen view data/round* --serve",
    ),
)
@click.argument("rounds", nargs=-1, type=ROUND)
@click.option(
    "--evaluations",
    nargs=2,
    type=ROUND,
    metavar="BASE NEW",
    help="Show the samples of two models side by side, problem by problem, too or alone.",
)
@click.option(
    "--training",
    "trainings",
    multiple=True,
    type=ROUND,
    help="Folder of a training on the rounds: its rows get their divergence. May be repeated; the"
    " last one counts for the rows that it met.",
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
    require_once(rounds)
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
