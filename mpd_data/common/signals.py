"""Being told to end, by a terminal (SIGINT) or a scheduler (SIGTERM): a KeyboardInterrupt, which
names the signal.

Python loses an exception that is raised in a weak reference's callback or in `__del__`, and a
signal's comes wherever the program is, thousands of imports at an engine's start included. So the
loops that take hours look again.
"""

import signal

_told: int | None = None


def listen() -> None:
    """From here on both signals interrupt. One that is ignored stays so (a job in the background of
    a shell)."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(number: int, _: object) -> None:
    global _told
    _told = number
    raise KeyboardInterrupt(number)


def check() -> None:
    """Raises KeyboardInterrupt where one was raised before, and got lost."""
    if _told is not None:
        raise KeyboardInterrupt(_told)
