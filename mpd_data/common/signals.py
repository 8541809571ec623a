"""Interrupts: SIGINT (a terminal) and SIGTERM (a scheduler) raise KeyboardInterrupt.

A signal interrupts the program wherever it is, and Python drops an exception that is raised in a
weak reference's callback or in `__del__`. So the loops that run for hours call `check`.
"""

import signal

_received: int | None = None


def listen() -> None:
    """Make both signals interrupt from here on. A signal that is ignored stays ignored (a job in
    the background of a shell)."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(number: int, _: object) -> None:
    global _received
    _received = number
    raise KeyboardInterrupt(number)


def check() -> None:
    """Raise KeyboardInterrupt, with the signal's number, where one was raised before and lost."""
    if _received is not None:
        raise KeyboardInterrupt(_received)
