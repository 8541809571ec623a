"""Run a click command: errors become one message and an exit code."""

import errno
import sys

import click

from mpd_data.common import signals
from mpd_data.common.errors import MPDError, pip_install
from mpd_data.common.text import plain, plain_lines

# What the extras bring; looking at shards needs none of it.
_EXTRAS = {"torch", "transformers", "safetensors", "huggingface_hub", "httpx", "vllm"}
# What a disk says that is full, read-only, not ours or broken.
_DISK = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO
}  # fmt: skip
DRY_RUN = click.option(
    "--dry-run",
    is_flag=True,
    is_eager=True,  # known when --json is read
    help="Check everything, show the first prompt, predict tokens, disk and time; write nothing.",
)


def _with_dry_run(context: click.Context, _: click.Parameter, value: bool) -> bool:
    if value and not context.params.get("dry_run"):
        raise click.UsageError("--json goes with --dry-run.")
    return value


PLAN_JSON = click.option(
    "--json",
    "as_json",
    is_flag=True,
    callback=_with_dry_run,
    help="With --dry-run: print JSON to stdout.",
)


def run_command(command: click.Command) -> None:
    """Runs a click command; our own errors become one message and exit code 1. SIGTERM, with which
    schedulers announce the end, is an interrupt: what is finished is committed."""
    signals.listen()
    try:
        # Without standalone mode click returns the code of an Exit instead of raising it.
        code = command.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.Abort:
        click.echo("interrupted; run the same command again to go on.", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        click.echo("interrupted; run the same command again to go on.", err=True)
        sys.exit(130)
    except MPDError as error:
        click.echo(f"error: {plain_lines(str(error))}", err=True)
        sys.exit(1)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        place = "" if error.filename is None else f"{plain(str(error.filename))}: "
        click.echo(
            f"error: {place}{error.strerror}. What is committed is safe; free space or give a"
            " writable place, then run the same command again.",
            err=True,
        )
        sys.exit(1)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRAS:
            raise
        click.echo(
            f"error: this command needs a package that is not installed ({error}). Install it:"
            f" {pip_install('gpu')}.",
            err=True,
        )
        sys.exit(1)
