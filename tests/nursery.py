"""Start many real `mpd-gen` processes quickly, by forks of a parent that has imported everything.

A fresh Python takes almost ten seconds to import torch, vLLM and transformers; a fork of a process
that has them takes none. The parent has no engine, no thread of its own and no CUDA. A child runs
the whole command, from `sys.argv` on, with the engine in its process.

    with Nursery(log_folder) as nursery:
        child = nursery.start(["rollouts", ...])
        child.kill()
        assert child.wait() == -signal.SIGKILL

A child can also kill itself, by SIGKILL too: at the n-th change that it makes to a folder, or
before the n-th line that the writer's thread runs of some functions (`Death`).
"""

import contextlib
import gc
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_ENGINES = ("vllm", "mpd_data.engines.vllm", "mpd_data.engines.transformers")
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

    def __init__(self, pid, log):
        self.pid = pid
        self.log = log
        self._ended = threading.Event()
        self._status = None

    def end(self, status):
        self._status = status
        self._ended.set()

    def kill(self, number=signal.SIGKILL):
        """Sends a signal, if the process still lives."""
        if not self._ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    @property
    def running(self):
        return not self._ended.is_set()

    def wait(self, seconds=300):
        """The exit code, negative for a signal. Fails where the process hangs."""
        if not self._ended.wait(seconds):
            os.kill(self.pid, signal.SIGKILL)
            raise AssertionError(f"still running after {seconds} s:\n{self.said()}")
        return os.waitstatus_to_exitcode(self._status)

    def said(self):
        return self.log.read_text(errors="replace")


class Nursery:
    """The parent process, a context manager. Several children may live at a time, and several
    threads may start them."""

    def __init__(self, folder):
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._serial = 0
        self._lock = threading.Lock()
        self._children = {}
        self._started = threading.Condition()
        self._pids = {}

    def __enter__(self):
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            },
        )
        assert self._process.stdout.readline() == "ready\n"
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_):
        for child in list(self._children.values()):
            child.kill()
        self._process.stdin.close()
        self._process.wait()

    def start(self, arguments, *deaths, limit=None, user=None):
        """Start `mpd-gen ARGUMENTS`. It kills itself at the first of `deaths`. `limit`: the largest
        size of its files in bytes. `user`: the uid that it runs as."""
        with self._lock:
            self._serial += 1
            serial = self._serial
            log = self._folder / f"{serial}.log"
            order = {
                "serial": serial,
                "arguments": [str(argument) for argument in arguments],
                "log": str(log),
                "deaths": [asdict(death) for death in deaths],
                "limit": limit,
                "user": user,
            }
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        with self._started:
            assert self._started.wait_for(lambda: serial in self._pids, 60), "the nursery is dead"
            return self._children[self._pids[serial]]

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

    def _listen(self):
        for line in self._process.stdout:
            word, *numbers = line.split()
            if word == "started":
                serial, pid = map(int, numbers)
                with self._started:
                    self._children[pid] = Child(pid, self._folder / f"{serial}.log")
                    self._pids[serial] = pid
                    self._started.notify_all()
            else:
                pid, status = map(int, numbers)
                self._children.pop(pid).end(status)


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


def _be_child(order):
    """Run all of `mpd-gen` in a child, with its own output. Does not return."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if order["limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], order["limit"]))
    if order["user"] is not None:
        os.setgroups([])
        os.setgid(order["user"])
        os.setuid(order["user"])
    sys.argv = ["mpd-gen", *order["arguments"]]
    counters = _arm(order["deaths"])
    code = 1
    try:
        from mpd_data.cli import main

        main()
    except SystemExit as ending:
        code = ending.code or 0
    except BaseException:  # noqa: BLE001  # as Python does with an exception that nobody catches
        traceback.print_exc()
    # Wait for a thread that is still at work, as Python does at its end.
    threading._shutdown()
    if counters:
        counts = json.dumps([counter.seen for counter in counters])
        Path(order["log"]).with_suffix(".json").write_text(counts)
    if code == 0:
        Path(order["log"]).with_suffix(".modules").write_text("\n".join(sys.modules))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _import_what_it_did(log):
    """Import what the child's engine imported at its start, so that later children need not."""
    file = Path(log).with_suffix(".modules")
    new = set(file.read_text().split()) - set(sys.modules) if file.exists() else set()
    for name in sorted(new):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    assert threading.active_count() == 1
    if new:
        # A garbage collection in a child would visit all these objects and copy their pages.
        gc.collect()
        gc.freeze()


def _serve():
    from mpd_data.engines.vllm import prepare_environment

    prepare_environment(on_cpu=True)
    for name in _ENGINES:
        importlib.import_module(name)
    import mpd_data.rewrite
    import mpd_data.rollouts  # noqa: F401

    assert threading.active_count() == 1
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    unread = b""
    living = {}
    while True:
        if select.select([0], [], [], 0.005 if living else None)[0]:
            data = os.read(0, 1 << 16)
            if not data:
                return
            *lines, unread = (unread + data).split(b"\n")
            for line in lines:
                order = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    _be_child(order)
                living[pid] = order["log"]
                print("started", order["serial"], pid, flush=True)
        while living:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            print("ended", pid, status, flush=True)
            _import_what_it_did(living.pop(pid))


if __name__ == "__main__":
    _serve()
