"""Stages as forks of a process that has imported their libraries.

vLLM, torch and transformers take some seconds to import, a third of what a stage of small models
takes. A fork has its own memory, its own exit code and its own end, as any process.
Not for machines with a GPU, whose state does not survive a fork, and where an engine's start
takes a minute anyway.
"""

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerProcess
from threading import Lock

from mpd_data.common.errors import MPDError

# A fork's exit code can be read once, and whoever starts another looks for it.
_reading = Lock()


class Fork(ForkServerProcess):
    """A stage, with `subprocess.Popen`'s way of waiting for it."""

    def wait(self) -> int:
        connection.wait([self.sentinel])
        with _reading:
            self.join()
        assert self.exitcode is not None
        return self.exitcode


class Forks:
    """Starts stages in `environment`. The libraries are imported once, when this is made."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["mpd_rounds.run.preloaded"])
        # Some settings are read when a library is imported.
        with _as_environment(self._environment):
            forkserver.ensure_running()

    def start(self, module: str, command: list[str], stderr: connection.Connection | None) -> Fork:
        """Runs the `main` of `module`; `stderr`: where its standard error goes, None: to this
        process's. Raises MPDError where it cannot be started."""
        fork = Fork(target=_run, args=(module, command, self._environment, stderr))
        try:
            # A server that was killed is started anew.
            with _reading, _as_environment(self._environment):
                fork.start()
        except (OSError, EOFError) as error:
            raise MPDError(
                f"{module}: cannot be started as a fork ({type(error).__name__}: {error}). Leave"
                " preload out to start stages as processes of their own."
            ) from error
        return fork


def _run(
    module: str,
    command: list[str],
    environment: dict[str, str],
    stderr: connection.Connection | None,
) -> None:
    # Which the server of the forks does not hear (mpd_rounds/run/preloaded.py).
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if stderr is not None:
        os.dup2(stderr.fileno(), sys.stderr.fileno())
        stderr.close()
    os.environ.clear()
    os.environ.update(environment)
    # A fork says "forkserver" to what it starts itself, which makes locks that are to be unlinked.
    multiprocessing.set_start_method(None, force=True)
    sys.argv = [module, *command]
    importlib.import_module(module).main()


@contextlib.contextmanager
def _as_environment(environment: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
