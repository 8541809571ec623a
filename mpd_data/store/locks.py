"""Who may write a folder: one process, or the parts of one stage side by side.

All locks are flock's: the kernel lets go when a process dies, also on another node where the file
system passes locks on (NFS does).

    .lock                    held for an instant, by whoever changes what others rely on
    .writers/rollouts-0-of-4 held for life by the process that writes this part
"""

import contextlib
import fcntl
import os
import re
import time
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from mpd_data.common.errors import ConfigError, MPDError

# Somebody who only looks whether a lock is held has it for an instant.
_GLANCE = 0.5
# The longest that one holds `.lock` is a look at every shard of a round, at its start.
_PATIENCE = 600.0


@dataclass(frozen=True)
class Part:
    """A share of a stage's work: the keys whose hash falls to `index` (from 0) of `count`. The
    default is all of it."""

    index: int = 0
    count: int = 1

    def holds(self, key: str) -> bool:
        """Whether `key` is of this part: the same for every process and on every machine."""
        return self.count == 1 or zlib.crc32(key.encode()) % self.count == self.index

    def share(self, keys: Collection[str]) -> int:
        """How many of `keys` are of this part."""
        return len(keys) if self.count == 1 else sum(map(self.holds, keys))

    def name(self, label: str) -> str:
        """What this part of the work `label` is called in file names."""
        return f"{label}-{self.index}-of-{self.count}"


WHOLE = Part()


def _open(path: Path) -> int:
    """`path` for locking, made with its folder where it is not there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(
            f"{path.parent}: cannot write here ({error.strerror}). Give a writable --out."
        ) from error


def _take(fd: int, path: Path, patience: float) -> bool:
    """Locks `fd`, waiting up to `patience` seconds; whether it did."""
    until = time.monotonic() + patience
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
    """Whether a living process holds the lock at `path`."""
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


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Makes `folder` and holds it for one writing process.

    Raises ConfigError where another process holds it or it cannot be written.
    """
    path = folder / ".lock"
    fd = _open(path)
    try:
        if not _take(fd, path, _GLANCE):
            raise ConfigError(
                f"{folder}: another process is writing here. Wait for it, or give another --out."
            )
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def moment(folder: Path) -> Iterator[None]:
    """Holds `folder` for a change that must be seen whole by its other writers; waits its turn.

    Raises ConfigError where the folder cannot be written, MPDError where the turn never comes.
    """
    path = folder / ".lock"
    fd = _open(path)
    try:
        if not _take(fd, path, _PATIENCE):
            raise MPDError(
                f"{path}: held by another process for {_PATIENCE:.0f} s. Is one stopped (Ctrl-Z) or"
                " its node unreachable? End it, then run the same command again."
            )
        yield
    finally:
        os.close(fd)


def member_path(folder: Path, label: str, part: Part) -> Path:
    """The file that `member` locks."""
    return folder / ".writers" / part.name(label)


@contextlib.contextmanager
def member(folder: Path, label: str, part: Part, when_alone: Callable[[], None]) -> Iterator[None]:
    """Makes `folder` and holds `part` of the work `label` in it. Beside it live only other parts of
    the same work, divided alike. Where there are none yet, what lies half-written in the folder
    is nobody's: `when_alone` is called before any can come.

    Raises ConfigError where another process is in the way or the folder cannot be written.
    """
    own = member_path(folder, label, part)
    with contextlib.ExitStack() as stack:
        with moment(folder):
            living = [p for p in _others(own) if is_held(p)]
            alike = re.compile(rf"{re.escape(label)}-\d+-of-{part.count}")
            stranger = next((p.name for p in living if not alike.fullmatch(p.name)), None)
            if stranger is not None:
                raise ConfigError(
                    f"{folder}: another process is writing here ({stranger}). Wait for it, or give"
                    " another --out. Parts of one stage may run side by side where all have the"
                    " same --num-shards."
                )
            fd = _open(own)
            stack.callback(os.close, fd)
            if not _take(fd, own, _GLANCE):
                raise ConfigError(
                    f"{folder}: another process is writing here ({own.name}). Wait for it, or give"
                    " another --out."
                )
            if not living:
                for dead in _others(own):
                    dead.unlink()
                when_alone()
        yield


def _others(own: Path) -> list[Path]:
    return [path for path in own.parent.glob("*") if path != own]
