"""Click commands with help in sections, and `run_command`, which turns errors into one message."""

import difflib
import errno
import sys
from collections import deque
from typing import Any

import click

from mpd_data.common import signals
from mpd_data.common.errors import MPDError, did_you_mean, missing_package
from mpd_data.common.files import DISK_ERRORS
from mpd_data.common.text import plain, plain_lines
from mpd_data.common.version import __version__

# Packages that come with the extras; commands that only read shards need none of them.
_EXTRAS = {"torch", "transformers", "safetensors", "huggingface_hub", "httpx", "vllm"}
# Something else has the name of a file or folder, or nothing has.
_PLACE_ERRORS = {
    errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EEXIST,
    errno.ENOTEMPTY,
}  # fmt: skip
_MAIN_SECTION = "Options"


class Option(click.Option):
    """An option that is listed under `section` in the help. With `multiple` it takes several
    values (`--shards A B`) and may also be repeated."""

    def __init__(self, *args: Any, section: str | None = None, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.section = section or _MAIN_SECTION

    def make_metavar(self, ctx: click.Context) -> str:
        """Return the placeholder of the option's value in the help."""
        return f"{super().make_metavar(ctx)}{'...' if self.multiple else ''}"


class Command(click.Command):
    """A command with help in sections and with options that take several values. `instead` says for
    options of other tools what to use here."""

    def __init__(self, *args: Any, instead: dict[str, str] | None = None, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._instead = instead or {}

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse a command line. Raise click.UsageError with the nearest options to a wrong one."""
        given = [option for option in self.get_params(ctx) if isinstance(option, click.Option)]
        options = {flag: option for option in given for flag in option.opts}
        try:
            return super().parse_args(ctx, _repeated(options, args))
        except click.NoSuchOption as error:
            if why := self._instead.get(_dashed(error.option_name)):
                raise click.UsageError(f"No {error.option_name}: {why}.", ctx) from None
            names = [flag for flag in options if flag.startswith("--")]
            # click's own error would keep only those with a similar spelling.
            near = " or ".join(map(repr, _near_options(error.option_name, names)))
            hint = f" Did you mean {near}?" if near else ""
            raise click.UsageError(f"No such option {error.option_name!r}.{hint}", ctx) from None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one list of options for each section, the main one first."""
        sections: dict[str, list[tuple[str, str]]] = {_MAIN_SECTION: []}
        for option in self.get_params(ctx):
            if record := option.get_help_record(ctx):
                name = getattr(option, "section", _MAIN_SECTION)
                sections.setdefault(name, []).append(record)
        for name, records in sections.items():
            with formatter.section(name):
                formatter.write_dl(records, col_max=36)


class Group(click.Group):
    """A group that lists its commands in the order of their definition. `replaced` says for each
    command that no longer exists what to run instead."""

    command_class = Command

    def __init__(self, *args: Any, replaced: dict[str, str] | None = None, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._replaced = replaced or {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands' names, in the order of their definition."""
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Return the command that `args` begin with. Raise click.UsageError if none does."""
        if instead := self._replaced.get(args[0]):
            raise click.UsageError(f"{args[0]!r} no longer exists. Use: {instead}", ctx)
        if self.get_command(ctx, args[0]) is None and args[0][:1] != "-":
            # Before click 8.3 its own message names none.
            hint = did_you_mean(args[0], self.commands)
            raise click.UsageError(f"No such command {args[0]!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _repeated(options: dict[str, click.Option], args: list[str]) -> list[str]:
    """Return `args` with `--shards A B` as `--shards A --shards B`, which click understands."""
    rest, result = deque(args), list[str]()
    while rest:
        word = rest.popleft()
        result.append(word)
        if word == "--":
            return [*result, *rest]
        option = options.get(_dashed(word))
        if option is None or option.is_flag or option.count or not rest:
            continue
        result.append(rest.popleft())
        while isinstance(option, Option) and option.multiple and rest and rest[0][:1] != "-":
            result += [word, rest.popleft()]
    return result


def _near_options(given: str, known: list[str]) -> list[str]:
    """Return the options that `given` may stand for: those with its initials (--lr), else those
    with its words (--steps), else those with a similar spelling."""
    words = _dashed(given).strip("-").split("-")
    parts = {name: name.strip("-").split("-") for name in known}
    initials = [name for name in known if [word[0] for word in parts[name]] == list(words[0])]
    same_words = [name for name in known if set(words) <= set(parts[name])]
    return initials or same_words or difflib.get_close_matches(given, known)


def example(*lines: str) -> str:
    """Return the end of a command's help: one command line to start from."""
    return "\n".join(["\b", "Example:", *(f"  {line}" for line in lines)])


# For every command: `_` and `-` are the same in names of options, and help fills the terminal.
CONTEXT: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 10_000,
    "token_normalize_func": _dashed,
}

VERSION = click.version_option(__version__)

DRY_RUN = click.option(
    "--dry-run",
    is_flag=True,
    is_eager=True,  # known when --json is read
    help="Check all settings and inputs, show the first prompt, predict tokens, disk and time."
    " Nothing is written.",
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
    help="With --dry-run: print the plan as JSON.",
)


def run_command(command: click.Command, needs: str = "gpu") -> None:
    """Run a click command with the words of the command line, as `exit_code` does, and exit."""
    sys.exit(exit_code(command, None, needs))


def exit_code(command: click.Command, words: list[str] | None, needs: str = "gpu") -> int:
    """Run a click command with `words` (None: of the command line). Return its exit code. An error
    of ours becomes one message and exit code 1; SIGTERM, which schedulers send first, is an
    interrupt: finished rows are committed. `needs`: the extra to name if a package is missing that
    the base does not install."""
    signals.listen()
    try:
        # Without standalone mode click returns the code of an Exit instead of raising it.
        code = command.main(words, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; run the same command again to resume.", err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except MPDError as error:
        message = plain_lines(str(error))
    except OSError as error:
        remedy = "Free space or choose a writable folder"
        if error.errno in _PLACE_ERRORS and error.filename is not None:
            remedy = "Move away or restore what has this name"
        elif error.errno not in DISK_ERRORS:
            raise
        place = "" if error.filename is None else f"{plain(str(error.filename))}: "
        message = (
            f"{place}{error.strerror}. Committed rows are safe. {remedy}, then run the same command"
            " again."
        )
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRAS:
            raise
        message = str(missing_package("this command", needs, error))
    click.echo(f"error: {message}", err=True)
    return 1
