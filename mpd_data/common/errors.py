"""The errors that a user can act on, and the hints that end their messages.

Each message names the place, what was expected, what was found and what to do next. The commands
print it without a traceback and exit with 1.
"""

import contextlib
import difflib
import logging
import traceback
from collections.abc import Iterable, Iterator

_log = logging.getLogger(__name__)


class MPDError(Exception):
    """Root of every error this project raises on purpose."""


class ConfigError(MPDError, ValueError):
    """Settings that contradict each other, the data, or an earlier run of the same round."""


class OtherSettingsError(ConfigError):
    """Settings other than those that a folder was begun with. The message names an option of the
    command that begins anew, or applies them."""


class DataError(MPDError, ValueError):
    """A file or a row that is not what the contract says."""


class EngineError(MPDError, RuntimeError):
    """The generation engine cannot start, or died."""


def reason_of(error: Exception) -> str:
    """Return what another library's error says, for a message, and what it came from; its traceback
    goes to the debug log. Libraries raise all kinds where they cannot run a model, and some have no
    text."""
    _log.debug("%s", error, exc_info=error)
    origin: BaseException = error
    while origin.__cause__ is not None:
        origin = origin.__cause__
    if origin is not error and (first := str(origin).strip().partition("\n")[0]):
        # Its own message blames the model.
        remedy = _TORCHVISION if "torchvision::" in first else ""
        return f"{type(error).__name__}: {error} ({type(origin).__name__}: {first}{remedy})"
    name, text = type(error).__name__, str(error).strip()
    if not text and (frames := traceback.extract_tb(error.__traceback__)):
        return f"{name} in {frames[-1].filename}, line {frames[-1].lineno}"
    return f"{name}: {text}" if text else name


_TORCHVISION = (
    ": the installed torchvision is not for the installed torch. Nothing here needs it: pip"
    " uninstall torchvision, or install the one for this torch"
)


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
        command += ". Or give --backend transformers, which is slower and needs no vLLM"
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
