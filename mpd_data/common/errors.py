"""Errors a user can act on. Each message names the place, what was expected, what was
found and what to do next; the commands print it without a traceback and exit with 1."""

import difflib
from collections.abc import Iterable


class MPDError(Exception):
    """Root of every error this project raises on purpose."""


class ConfigError(MPDError, ValueError):
    """Settings that contradict each other, the data, or an earlier run of the same round."""


class DataError(MPDError, ValueError):
    """A file or a row that is not what the contract says."""


class EngineError(MPDError, RuntimeError):
    """The generation engine cannot start, or died."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` is most likely a misspelling of, if any comes close."""
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=1)
    return by_lower[close[0]] if close else None
