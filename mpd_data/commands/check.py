"""validate, contamination, push, env: check what is there, and hand it on."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from mpd_data.commands.arguments import JSON, ROUND, require_sound
from mpd_data.common.command import Command, example
from mpd_data.common.errors import ConfigError, MPDError
from mpd_data.common.options import build, config_options
from mpd_data.common.text import json_text
from mpd_data.config import ContaminationConfig


@click.command(cls=Command, epilog=example("mpd-gen validate data/round*"))
@click.argument("rounds", nargs=-1, required=True, type=ROUND)
def validate(rounds: tuple[Path, ...]) -> None:
    """Check every shard and row of ROUNDS."""
    from mpd_data.inspect.validate import validate_round

    require_sound([problem for path in rounds for problem in validate_round(path)])
    click.echo("\n".join(f"{path}: sound" for path in rounds))


@click.command(
    cls=Command,
    epilog=example("mpd-gen contamination --prompts problems.jsonl --against test.jsonl --n 13"),
)
@config_options(ContaminationConfig, paths=("prompts", "against"))
@JSON
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


@click.command(cls=Command, epilog=example("mpd-gen push runs/round1/model OWNER/my-student"))
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--public", is_flag=True, help="Make a new repository public. Default: private.")
def push(folder: Path, repository: str, public: bool) -> None:
    """Upload FOLDER to OWNER/NAME on the Hugging Face Hub.

    FOLDER is a round, which becomes a dataset, or that of a model or an adapter, as a training's
    model/ and adapter/.
    """
    from mpd_data.common import hub
    from mpd_data.inspect.validate import validate_round
    from mpd_data.store.round import PUBLISHED
    from mpd_data.store.run_record import kind_of

    hub.require_name(repository)
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        url = hub.push_model(folder, repository, public)
    elif kind_of(folder) == "round":
        require_sound(validate_round(folder))
        url = hub.push(folder, repository, list(PUBLISHED), True, public)
    else:
        raise ConfigError(
            f"{folder}: neither a round nor a model. Give a round's folder, or the model/ or"
            " adapter/ in a training's."
        )
    click.echo(url)


@click.command(cls=Command)
@JSON
def env(as_json: bool) -> None:
    """Show versions and machine, for a bug report."""
    from mpd_data.common.machine import environment

    versions = environment()
    width = max(map(len, versions))
    lines = [f"{name.ljust(width)}  {value}" for name, value in versions.items()]
    click.echo(json_text(versions) if as_json else "\n".join(lines))
