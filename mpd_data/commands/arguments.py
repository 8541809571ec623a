"""Arguments and options that several commands have."""

import os
from pathlib import Path
from typing import Any

import click

from mpd_data.common.errors import ConfigError, MPDError
from mpd_data.store.run_record import kind_of

OVERWRITE = click.option(
    "--overwrite", is_flag=True, help="Delete what this stage has written here, then start again."
)
LIMIT = click.option(
    "--limit",
    type=click.IntRange(1),
    help="Process at most this many remaining samples (or rollouts to rewrite), then stop.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
BY = click.option(
    "--by", metavar="NAME", help="Also group by NAME, a key of the rollouts' metadata."
)


class RoundFolder(click.Path):
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


class RunFolder(RoundFolder):
    """A round's folder, or that of a training, a pipeline run or a study."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(os.fsdecode(click.Path.convert(self, value, param, ctx)))
        is_run = kind_of(path) in ("training", "pipeline", "study")
        return path if is_run else super().convert(value, param, ctx)


# Of the rounds in a folder.
_LISTED = 20
ROUND = RoundFolder(exists=True, file_okay=False)


def require_sound(problems: list[str]) -> None:
    """Print the first of the `problems` of rounds and raise MPDError if there are any."""
    if problems:
        click.echo("\n".join(problems[:50]))
        raise MPDError(f"{len(problems):,} breaches of the contract.")
