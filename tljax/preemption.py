"""Signals: the first one asks a run to save and stop, a second one ends it at once.

Of several processes one alone may get the signal, and all must stop after the same step.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

AGAIN = 85
"""Exit code of a run that was asked to stop, and lost nothing: run the same command again."""


PATIENCE, LIMIT = 60, 900
"""Seconds that data may take: then it is said, and at last the run ends."""


class Preempted(Exception):
    """A signal asked for an end, at a place where nothing is half done."""


class Meeting(Protocol):
    """What several processes stop by: meeting.py."""

    reason: str

    def ask(self, reason: str) -> None:
        """Ask all processes to stop."""

    def poll(self) -> bool:
        """Tell whether this is where all stop."""


class Signals:
    """Remembers the first SIGTERM, SIGINT or SIGUSR1; a context, for the main thread.

    Elsewhere it hears nothing.  After the first signal the next one has its usual effect.
    """

    heard = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        """Hear nothing yet."""
        self.asked: str | None = None
        self._waiting = False
        self._before: dict[int, Any] = {}
        self._meeting: Meeting | None = None

    def __enter__(self) -> "Signals":
        """Take the signals."""
        if threading.current_thread() is threading.main_thread():
            self._before = {one: signal.signal(one, self._hear) for one in self.heard}
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for one, handler in self._before.items():
            signal.signal(one, handler)

    def share(self, meeting: Meeting) -> None:
        """Stop together with other processes from now on; each of them calls this."""
        self._meeting = meeting
        if self.asked:
            meeting.ask(self.asked)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
        for one in self.heard:
            signal.signal(one, signal.SIG_DFL)
        if self._meeting:
            self._meeting.ask(self.asked)
        elif self._waiting:
            raise Preempted(self.asked)

    def poll(self) -> None:
        """Raise Preempted if a signal came; if to any process of several, in all at one poll."""
        if self._meeting:
            if self._meeting.poll():
                raise Preempted(self._meeting.reason)
        elif self.asked:
            raise Preempted(self.asked)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a signal interrupt what stands within, which must leave nothing half done.

        With several processes it waits for the end of that: all must have done the same.
        """
        self._waiting = True
        try:
            self.poll()
            yield
            self.poll()
        finally:
            self._waiting = False


@contextmanager
def patience(what: str) -> Iterator[None]:
    """Say what is waited for within if that takes long, and end the process if it takes too long.

    At once: the thread that hangs could not be ended, and would be waited for.  What is saved
    stays.  Only the main thread can hear the clock; elsewhere nothing is said.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waited = 0

    def say(number: int, frame: FrameType | None) -> None:
        nonlocal waited
        waited += PATIENCE
        print(f"tljax: {what} took {waited} s so far", file=sys.stderr, flush=True)
        if waited >= LIMIT:
            print(f"tljax: given up: {what} hangs", file=sys.stderr, flush=True)
            os._exit(1)

    before = signal.signal(signal.SIGALRM, say)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
