"""Locks: who may write a folder, one process or the parts of one stage side by side.

All are flock's: the kernel drops them when a process dies, also on another node where the file
system forwards locks (NFS does).

    .lock                      short_lock: held for a moment by whoever changes shared files;
                               folder_lock: held by a training for as long as it runs
    .writers/rollouts-0-of-4   part_lock: held by the process that writes this part, for its life

A file says which process took its lock last, for messages alone: PID on HOST.
"""

import contextlib
import fcntl
import os
import re
import socket
import time
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from mpd_data.common.errors import ConfigError, MPDError

# A process that tests whether a lock is held has it for an instant.
_TEST_SECONDS = 0.5
# A short lock is held longest at a stage's start, for a look at every shard of the round.
_SHORT_LOCK_SECONDS = 600.0
# Bytes of a lock file that are read.
_LONGEST_NAME = 300


@dataclass(frozen=True)
class Part:
    """A part of a stage's work: the keys whose hash falls to `index` (from 0) of `count`. The
    default is all of it."""

    index: int = 0
    count: int = 1

    def holds(self, key: str) -> bool:
        """Return whether `key` is in this part: the same in every process and on every machine."""
        return self.count == 1 or zlib.crc32(key.encode()) % self.count == self.index

    def share(self, keys: Collection[str]) -> int:
        """Return how many of `keys` are in this part."""
        return len(keys) if self.count == 1 else sum(map(self.holds, keys))

    def name(self, label: str) -> str:
        """Return the name of this part of the work `label` in file names."""
        return f"{label}-{self.index}-of-{self.count}"


WHOLE = Part()


def _open(path: Path) -> int:
    """Open `path` for locking; make it where it does not exist. Raise ConfigError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(
            f"{path.parent}: cannot write here ({error.strerror}). Give a writable --out."
        ) from error


def _take(fd: int, path: Path, seconds: float) -> bool:
    """Lock `fd`, waiting for up to `seconds`; return whether that succeeded."""
    until = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.01)
        except OSError as error:
            raise ConfigError(
                f"{path}: the file system cannot lock files ({error.strerror}), so two processes"
                " could write one folder. Give an --out on one that can."
            ) from error


def is_held(path: Path) -> bool:
    """Return whether a living process holds the lock at `path`."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _holder(path: Path) -> str:
    """Return "pid PID on HOST" of the process that took the lock at `path` last; "" where the file
    does not say: an older one is empty."""
    with contextlib.suppress(OSError):
        with path.open("rb") as file:
            said = file.read(_LONGEST_NAME).decode(errors="replace")
        if re.fullmatch(r"\d+ on \S+\n", said):
            return f"pid {said.strip()}"
    return ""


@contextlib.contextmanager
def _hold(path: Path, seconds: float, refusal: Callable[[str], MPDError]) -> Iterator[None]:
    """Hold the lock at `path`. Raise what `refusal` makes of the holder's name where another
    process holds it for `seconds`."""
    fd = _open(path)
    try:
        if not _take(fd, path, seconds):
            raise refusal(_holder(path))
        # Nothing but messages depends on it: a full disk does not stop whoever holds the lock.
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
            os.write(fd, f"{os.getpid()} on {socket.gethostname()}\n".encode())
        # The file's time says since when the folder is held (mpd-gen status).
        os.utime(fd)
        yield
    finally:
        os.close(fd)


def _busy(folder: Path, *who: str, hint: str = "") -> ConfigError:
    """Return the error that another process writes `folder`; `who` it is, as far as is known."""
    known = f" ({', '.join(filter(None, who))})" if any(who) else ""
    return ConfigError(
        f"{folder}: another process is writing here{known}. Wait for it, or give another --out."
        f"{hint}"
    )


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Make `folder` and hold it for one writing process. Raise ConfigError where another process
    holds it or it cannot be written."""
    with _hold(folder / ".lock", _TEST_SECONDS, lambda holder: _busy(folder, holder)):
        yield


@contextlib.contextmanager
def short_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for a change that its other writers must see whole; wait for them. Raise
    ConfigError where the folder cannot be written, MPDError where another process holds it for too
    long."""
    path = folder / ".lock"

    def refusal(holder: str) -> MPDError:
        return MPDError(
            f"{path}: held by {holder or 'another process'} for {_SHORT_LOCK_SECONDS:.0f} s. Is it"
            " stopped (Ctrl-Z) or its node unreachable? End it, then run the same command again."
        )

    with _hold(path, _SHORT_LOCK_SECONDS, refusal):
        yield


def part_lock_path(folder: Path, label: str, part: Part) -> Path:
    """Return the file that `part_lock` locks."""
    return folder / ".writers" / part.name(label)


@contextlib.contextmanager
def part_lock(folder: Path, label: str, part: Part, if_alone: Callable[[], None]) -> Iterator[None]:
    """Make `folder` and hold `part` of the work `label` in it, next to other parts of the same
    division of the same work alone. `if_alone` is called where no other process writes, before
    any can begin: half-written files belong to nobody then.

    Raise ConfigError where another process is in the way or the folder cannot be written.
    """
    own = part_lock_path(folder, label, part)
    with contextlib.ExitStack() as stack:
        with short_lock(folder):
            others = [path for path in own.parent.glob("*") if path != own]
            writing = [path for path in others if is_held(path)]
            sibling = re.compile(rf"{re.escape(label)}-\d+-of-{part.count}")
            stranger = next((path for path in writing if not sibling.fullmatch(path.name)), None)
            if stranger is not None:
                hint = " Parts of one stage run side by side if all have the same --num-shards."
                raise _busy(folder, stranger.name, _holder(stranger), hint=hint)
            refusal = lambda holder: _busy(folder, own.name, holder)  # noqa: E731
            stack.enter_context(_hold(own, _TEST_SECONDS, refusal))
            if not writing:
                for dead in others:
                    dead.unlink()
                if_alone()
        yield
