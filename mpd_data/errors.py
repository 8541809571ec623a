"""Errors a user can act on. Each message names the place, what was expected, what was
found and what to do next; the commands print it without a traceback and exit with 1."""


class MPDError(Exception):
    """Root of every error this project raises on purpose."""


class ConfigError(MPDError, ValueError):
    """Settings that contradict each other, the data, or an earlier run of the same round."""


class DataError(MPDError, ValueError):
    """A file or a row that is not what the contract says."""


class EngineError(MPDError, RuntimeError):
    """The generation engine cannot start, or died."""
