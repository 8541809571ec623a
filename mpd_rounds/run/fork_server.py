"""Start stages as forks of a process that has imported their libraries.

Importing vLLM, torch and transformers takes some seconds, a third of a stage of small models. Not
for machines with a GPU: its state does not survive a fork, and an engine takes a minute to start
anyway.
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

# An exit code can be read only once, and starting another fork reads it too.
_reading = Lock()


class Fork(ForkServerProcess):
    """A stage that is waited for like a `subprocess.Popen`."""

    def wait(self) -> int:
        connection.wait([self.sentinel])
        with _reading:
            self.join()
        assert self.exitcode is not None
        return self.exitcode


class Forks:
    """Starts stages in `environment`. The constructor imports the libraries, once."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["mpd_rounds.run.preloaded"])
        # Libraries read some variables when they are imported.
        with _as_environment(self._environment):
            forkserver.ensure_running()

    def start(self, module: str, command: list[str], stderr: connection.Connection | None) -> Fork:
        """Run the `main` of `module`, with its standard error sent to `stderr` (None: inherited).

        Raises MPDError if the fork cannot be started.
        """
        fork = Fork(target=_run, args=(module, command, self._environment, stderr))
        try:
            # If the server was killed, this starts a new one.
            with _reading, _as_environment(self._environment):
                fork.start()
        except (OSError, EOFError) as error:
            raise MPDError(
                f"{module}: cannot be started as a fork ({type(error).__name__}: {error})."
                " Remove preload to start stages as separate processes."
            ) from error
        return fork


def _run(
    module: str,
    command: list[str],
    environment: dict[str, str],
    stderr: connection.Connection | None,
) -> None:
    # The server ignores this signal (see preloaded.py).
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if stderr is not None:
        os.dup2(stderr.fileno(), sys.stderr.fileno())
        stderr.close()
    os.environ.clear()
    os.environ.update(environment)
    # Reset the start method: a fork inherits "forkserver", whose semaphores would leak.
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
