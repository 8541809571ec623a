"""`mpd-export`: write the model of a training that has not finished."""

from pathlib import Path

import click

from mpd_data.common.command import CONTEXT, VERSION, Command, example, run_command


@click.command(
    cls=Command, context_settings=CONTEXT, epilog=example("mpd-export runs/round1 --out tried")
)
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder to write: model/, and adapter/ if adapters are trained, as a finished training's.",
)
@click.option(
    "--student",
    help="Folder or hub id of the student that the training began with, if it has moved.",
)
@click.option(
    "--push-to-hub",
    metavar="OWNER/NAME",
    help="Then upload model/ to this repository of the Hugging Face Hub. A new one is private.",
)
@VERSION
def cli(checkpoint: Path, out: Path, student: str | None, push_to_hub: str | None) -> None:
    """Export CHECKPOINT as a Hugging Face model (safetensors), during or after its training.

    CHECKPOINT is a folder as RUN/checkpoints/step-000050 or best-000040, or the --out of
    mpd-train, whose newest checkpoint is exported. A training that finishes exports its model
    itself.
    """
    from mpd_data.common import hub

    if push_to_hub is not None:
        hub.require_name(push_to_hub)
    from mpd_train.export import export_checkpoint

    chosen = export_checkpoint(checkpoint, out, student)
    click.echo(f"wrote {out / 'model'} from {chosen}", err=True)
    if push_to_hub is not None:
        click.echo(hub.push_model(out / "model", push_to_hub, public=False))


def main() -> None:
    run_command(cli, needs="train")


if __name__ == "__main__":
    main()
