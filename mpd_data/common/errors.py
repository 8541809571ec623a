"""The errors that a user can act on, and the hints that end their messages.

Each message names the place, what was expected, what was found and what to do next. The commands
print it without a traceback and exit with 1.
"""

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class MPDError(Exception):
    """Root of every error this project raises on purpose."""


class ConfigError(MPDError, ValueError):
    """Settings that contradict each other, the data, or an earlier run of the same round."""


class DataError(MPDError, ValueError):
    """A file or a row that is not what the contract says."""


class EngineError(MPDError, RuntimeError):
    """The generation engine cannot start, or died."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that `name` is most likely a misspelling of; None if none is near."""
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=1)
    return by_lower[close[0]] if close else None


def suggestion(name: str | None) -> str:
    """Return " Did you mean 'name'?"; "" for None."""
    return "" if name is None else f" Did you mean {name!r}?"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the suggestion of the known name nearest to `name`."""
    return suggestion(nearest(name, known))


def pip_install(extra: str) -> str:
    """Return the command that installs an optional part of this project."""
    command = f"pip install 'mixed-policy-distillation[{extra}]'"
    if extra == "gpu":
        command += " on a CUDA machine, [cpu] in place of [gpu] on another"
    return command


def missing_package(needed_by: str, extra: str, error: ImportError) -> ConfigError:
    """Return the error that says that `needed_by` needs the packages of `extra`."""
    return ConfigError(
        f"{needed_by} needs a package that is not installed ({error}). Install it:"
        f" {pip_install(extra)}."
    )


@contextlib.contextmanager
def requires(extra: str, purpose: str) -> Iterator[None]:
    """Turn an ImportError inside into a ConfigError: `purpose` needs the packages of `extra`."""
    try:
        yield
    except ImportError as error:
        raise missing_package(purpose, extra, error) from error
