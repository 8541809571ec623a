"""Start the project's programs quickly, as forks of a process that has imported everything.

A fresh Python takes 15 seconds to import torch, vLLM and transformers on two slow cores; a fork of
a process that has them takes none. The nursery's process has no engine, no thread and no CUDA. A
child runs a whole program, from `sys.argv` on, with its own environment, folder and output, as
`python -m PROGRAM` would.

Tests need not know: conftest.py gives them nursery_client.py in the place of `python`, and the
programs that they start find it as `sys.executable`. A child whose environment differs in what
imports read gets a fresh Python. The kill matrix starts children itself:

    child = nursery.start(["rollouts", ...])
    child.kill()
    assert child.wait() == -signal.SIGKILL

There a child can also kill itself, by SIGKILL too: at the n-th change that it makes to a folder, or
before the n-th line that the writer's thread runs of some functions (`Death`).
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import resource
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import traceback
import warnings
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_ENGINES = ("vllm", "mpd_data.engines.vllm", "mpd_data.engines.transformers")
# A process reads these when it starts or imports, so a fork cannot have others.
_READ_AT_START = (
    *("PYTHON", "LANG", "LC_", "TZ", "OMP_", "MKL_", "CUDA_", "TRITON", "TORCH_", "TORCHINDUCTOR"),
    *("PYTORCH", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "VLLM_", "POLARS_", "RAY_"),
)
# An engine in a test's own process leaves these to the programs that follow; mpd-rounds and
# torchrun give one each. None is read when a program starts.
_LEFT_BEHIND = {
    "AITER_SITUV2_A4W4",
    "LD_PRELOAD",
    "NUMEXPR_MAX_THREADS",
    "RAY_CLIENT_MODE",
    "TOKENIZERS_PARALLELISM",
    "TORCHINDUCTOR_CPP_DYNAMIC_THREADS",
    "TORCH_CPP_LOG_LEVEL",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "VLLM_DISABLE_SHARED_EXPERTS_STREAM",
    "VLLM_DIST_IDENT",
    "VLLM_OBJECT_STORAGE_SHM_BUFFER_NAME",
}
# What a program has imported, the nursery imports too, of these packages.
_IMPORTED = (
    "mpd_data",
    "mpd_train",
    "mpd_rounds",
    "torch",
    "transformers",
    "vllm",
    "peft",
    "matplotlib",
    "pandas",
    "pyarrow",
)
_LONGEST_ORDER = 1 << 17
_CHANGES = ("os.link", "os.rename", "os.remove", "os.mkdir", "os.truncate", "os.rmdir")


@dataclass
class Death:
    """Where a child kills itself: at its `at`-th change under `folder`, or before the `at`-th line
    that its writer's threads run of `functions` of mpd_data/store and common/files.py."""

    at: int
    folder: str | None = None
    functions: tuple[str, ...] = ()


class Child:
    """One process of the nursery."""

    def __init__(self, connection, log):
        self.log = log
        self._connection = connection
        self._code = None
        answer, pid = connection.recv(64).split()
        assert answer == b"pid", answer
        self.pid = int(pid)

    def kill(self):
        """Send SIGKILL, if the process still lives."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    @property
    def running(self):
        with contextlib.suppress(TimeoutError):
            self._end(0)
        return self._code is None

    def wait(self, seconds=300):
        """Return the exit code, negative for a signal. Fail where the process hangs."""
        try:
            self._end(seconds)
        except TimeoutError:
            os.kill(self.pid, signal.SIGKILL)
            message = f"still running after {seconds} s:\n{self.said()}"
            raise AssertionError(message) from None
        return self._code

    def said(self):
        return self.log.read_text(errors="replace")

    def _end(self, seconds):
        if self._code is None:
            try:
                self._connection.settimeout(seconds)
                _, status = self._connection.recv(64).split()
            except BlockingIOError as error:
                raise TimeoutError from error
            self._code = os.waitstatus_to_exitcode(int(status))


class Nursery:
    """The process that forks, a context manager. Several children may live at a time, and several
    threads may start them."""

    def __init__(self, folder, environment):
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._environment = environment
        self._serial = 0
        self._lock = threading.Lock()
        # What stands in for `python`, and what the environment of its callers must have.
        self.python = self._folder / "python"
        self.variables = {
            "MPD_NURSERY": str(self._folder / "socket"),
            "MPD_NURSERY_PYTHON": sys.executable,
        }

    def __enter__(self):
        client = (ROOT / "tests" / "nursery_client.py").read_text()
        self.python.write_text(f"#!{sys.executable} -SIE\n{client}")
        self.python.chmod(0o755)
        self._process = subprocess.Popen(
            [sys.executable, __file__, self.python],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self._environment | self.variables,
        )
        assert self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait()

    def start(self, arguments, *deaths, limit=None, user=None):
        """Start `mpd-gen ARGUMENTS`. It kills itself at the first of `deaths`. `limit`: the largest
        size of its files in bytes. `user`: the uid that it runs as."""
        with self._lock:
            self._serial += 1
            log = self._folder / f"{self._serial}.log"
        order = {
            "words": ["mpd_data.cli", *map(str, arguments)],
            "env": self._environment | self.variables,
            "cwd": str(ROOT),
            "ignored": [],
            "deaths": [asdict(death) for death in deaths],
            "limit": limit,
            "user": user,
            "counts": str(log.with_suffix(".json")),
        }
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(self.variables["MPD_NURSERY"])
        with log.open("wb") as file, Path(os.devnull).open("rb") as nothing:
            files = [nothing.fileno(), file.fileno(), file.fileno()]
            socket.send_fds(connection, [json.dumps(order).encode()], files)
        return Child(connection, log)

    def finish(self, arguments, code=0, **options):
        """Run `mpd-gen ARGUMENTS` and return its output. Fail unless it exits with `code`."""
        child = self.start(arguments, **options)
        ended = child.wait()
        assert ended == code, f"exit {ended}\n{child.said()}"
        return child.said()

    def count(self, arguments, *deaths):
        """Run `mpd-gen ARGUMENTS`. Return how often it reaches the place of each of `deaths`. Fail
        where it never does: a function that was renamed would be a death that never comes."""
        child = self.start(arguments, *(replace(death, at=0) for death in deaths))
        assert child.wait() == 0, child.said()
        counts = json.loads(child.log.with_suffix(".json").read_text())
        assert all(counts), dict(zip(deaths, counts, strict=True))
        return counts


# -- in the nursery's process ----------------------------------------------------------


class _Counter:
    """Count how often this process reaches a place, and kill it at the n-th time."""

    def __init__(self, death):
        self.death = death
        self.seen = 0
        self._lock = threading.Lock()

    def pass_by(self):
        with self._lock:
            self.seen += 1
            if self.seen == self.death["at"]:
                os.kill(os.getpid(), signal.SIGKILL)


def _arm(deaths):
    """Make this process die at the first of `deaths`."""
    counters = [_Counter(death) for death in deaths]
    changes = [counter for counter in counters if counter.death["folder"] is not None]
    lines = [counter for counter in counters if counter.death["folder"] is None]
    ours = {str(path) for path in (ROOT / "mpd_data" / "store").glob("*.py")}
    ours.add(str(ROOT / "mpd_data" / "common" / "files.py"))

    def audit(event, arguments):
        if event == "open":
            _, mode, flags = arguments
            if not (set("wax+") & set(mode or "")) and not (flags or 0) & os.O_CREAT:
                return
        elif event not in _CHANGES:
            return
        for counter in changes:
            if counter.death["folder"] in str(arguments[0]):
                counter.pass_by()

    def trace(frame, event, _):
        code = frame.f_code
        if code.co_filename not in ours:
            return None
        counting = [c for c in lines if code.co_name in c.death["functions"]]
        if event == "line":
            for counter in counting:
                counter.pass_by()
        return trace if counting else None

    if changes:
        sys.addaudithook(audit)
    if lines:
        threading.settrace(trace)
    return counters


def _be_child(order, files):
    """Run one of our programs in a child. Does not return."""
    for number, file in enumerate(files):
        os.dup2(file, number)
    for file in files:
        os.close(file)
    os.setsid()
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", buffering=1 if os.isatty(1) else -1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    for number in (signal.SIGINT, signal.SIGTERM):
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in order["ignored"] else default)
    if order.get("limit") is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], order["limit"]))
    if order.get("user") is not None:
        os.setgroups([])
        os.setgid(order["user"])
        os.setuid(order["user"])
    program, *arguments = order["words"]
    sys.argv = [program, *arguments]
    # Python warns of a program that another one has imported.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")
    counters = _arm(order.get("deaths", ()))
    code = 1
    try:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ending:
        code = ending.code
        if not isinstance(code, int | None):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:  # noqa: BLE001  # as Python does with an exception that nobody catches
        traceback.print_exc()
    # Wait for a thread that is still at work, as Python does at its end.
    threading._shutdown()
    atexit._run_exitfuncs()
    if not code:
        _modules_of(os.getpid()).write_text("\n".join(sys.modules))
    if counters:
        counts = json.dumps([counter.seen for counter in counters])
        Path(order["counts"]).write_text(counts)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code or 0)


def _modules_of(pid):
    return Path(f"{os.environ['MPD_NURSERY']}.{pid}")


def _import_what_it_did(pid):
    """Import what the child imported, so that later children need not."""
    file = _modules_of(pid)
    if not file.exists():
        return
    new = {
        name
        for name in set(file.read_text().split()) - set(sys.modules)
        if name.split(".")[0] in _IMPORTED
    }
    file.unlink()
    for name in sorted(new):
        # Some modules are made by others, not imported.
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    _freeze()


def _freeze():
    """Check that a fork loses no thread. Exempt all objects from garbage collection: a child's
    would visit them and copy their pages. vLLM undoes that when an engine closes, and collects
    three times: a second of a core, for a process that ends."""
    assert threading.active_count() == 1
    gc.collect()
    gc.freeze()
    gc.unfreeze = lambda: None


def _read_at_start(environment):
    return {name: x for name, x in environment.items() if name.startswith(_READ_AT_START)}


class _Server:
    """Forks a child for each connection, and tells it how the child ended."""

    def __init__(self):
        self._all = set(os.environ)
        self._environment = _read_at_start(os.environ)
        # It may have been started after an engine, before others.
        self._left_behind = {name: os.environ[name] for name in self._all & _LEFT_BEHIND}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(os.environ["MPD_NURSERY"])
        self._listener.listen(128)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(0, selectors.EVENT_READ, sys.exit)

    def serve(self):
        while True:
            for key, _ in self._selector.select():
                if key.fd in self._selector.get_map():
                    key.data()

    def _accept(self):
        connection, _ = self._listener.accept()
        take = partial(self._fork, connection)
        self._selector.register(connection, selectors.EVENT_READ, take)

    def _fork(self, connection):
        self._selector.unregister(connection)
        order, files, _, _ = socket.recv_fds(connection, _LONGEST_ORDER, 3)
        if not order:
            connection.close()
            return
        order = json.loads(order)
        # So do imports, of which ours have left the same.
        order["env"] = self._left_behind | {
            name: value
            for name, value in order["env"].items()
            if name not in _LEFT_BEHIND and (name in self._all or os.environ.get(name) != value)
        }
        was, now = self._environment, _read_at_start(order["env"])
        if was != now:
            unlike = sorted(name for name in was | now if was.get(name) != now.get(name))
            connection.send(" ".join(["refused", *unlike]).encode())
            connection.close()
        else:
            pid = os.fork()
            if pid == 0:
                for key in list(self._selector.get_map().values()):
                    if key.fd != 0:
                        os.close(key.fd)
                self._selector.close()
                connection.close()
                _be_child(order, files)
            connection.send(b"pid %d" % pid)
            process = os.pidfd_open(pid)
            ended = partial(self._ended, connection, pid, process)
            self._selector.register(process, selectors.EVENT_READ, ended)
            orphan = partial(self._kill, ended, pid)
            self._selector.register(connection, selectors.EVENT_READ, orphan)
        for file in files:
            os.close(file)

    def _kill(self, ended, pid):
        """Let the child die with its client, and the clients that it has in its group."""
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        ended()

    def _ended(self, connection, pid, process):
        _, status = os.waitpid(pid, 0)
        for file in (connection, process):
            self._selector.unregister(file)
        os.close(process)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.send(b"ended %d" % status)
        connection.close()
        _import_what_it_did(pid)


def _serve():
    """Answer orders until the parent closes our input."""
    sys.path[0] = str(ROOT)  # as `python -m` has it
    sys.executable = sys.argv[1]
    server = _Server()
    from mpd_data.engines.vllm import prepare_environment

    prepare_environment(on_cpu=True)
    for name in _ENGINES:
        with contextlib.suppress(ImportError):  # vLLM is not everywhere
            importlib.import_module(name)
    import mpd_data.rewrite
    import mpd_data.rollouts  # noqa: F401

    _freeze()
    # A terminal's interrupt is for the clients.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("ready", flush=True)
    server.serve()


if __name__ == "__main__":
    _serve()
