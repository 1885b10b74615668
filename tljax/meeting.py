"""How the processes of a run stay together: when one must stop, and when one meets an error."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

LONGEST = 1000  # bytes of an error that processes tell each other


@contextmanager
def agreeing(*kinds: type[Exception]) -> Iterator[None]:
    """Raise an error of these kinds in every process if it is raised in one of them.

    Without it the others would wait for the one that left.  What stands within is done by all
    processes, or by some, and raises nothing else in one alone.
    """
    mine = np.zeros(1 + LONGEST, np.uint8)  # which kind, from 1, and its text
    own: Exception | None = None
    try:
        yield
    except kinds as error:
        if jax.process_count() == 1:
            raise
        own = error
        mine[0] = 1 + next(i for i, kind in enumerate(kinds) if isinstance(error, kind))
        text = str(error).encode()[:LONGEST]
        mine[1 : 1 + len(text)] = list(text)
    if jax.process_count() > 1:
        rows = multihost_utils.process_allgather(mine)
        if (met := np.flatnonzero(rows[:, 0])).size:
            if own and met[0] == jax.process_index():
                raise own
            which, text = int(rows[met[0], 0]) - 1, rows[met[0], 1:]
            raise kinds[which](bytes(text[text > 0]).decode(errors="replace"))


def as_first(values: list[int]) -> list[int]:
    """Return what the first process gives, in all of them: what one alone must decide."""
    if jax.process_count() == 1:
        return values
    count = multihost_utils.broadcast_one_to_all(np.int32(len(values)))
    mine = values if jax.process_index() == 0 else [0] * int(count)
    return np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(mine, np.int32))).tolist()


class Meeting:
    """Finds the poll at which all processes stop, once one of them wants to.

    Every process polls the same sequence of times.  When one asks, each of them names the farthest
    poll that it may reach without an answer, by a thread of its own: its main thread may be waiting
    for the others' next step.  The farthest of all is where they stop.
    """

    ahead = 2  # polls that a process may go on without an answer
    patience = 600_000  # milliseconds for the other processes' threads; one that died ends all
    _numbers = count()

    def __init__(self, store: Any, process: int, processes: int):
        """Listen; store: keys and values that the processes share, jax's coordination service."""
        self._store, self._process, self._processes = store, process, processes
        self._name = f"tljax/meeting/{next(self._numbers)}"
        self._polls, self._farthest, self._place = 0, 0, 0  # 0: not known
        self._asked, self.reason = threading.Event(), ""
        self._changed = threading.Condition()
        works = (self._propose, self._listen)
        self._threads = [threading.Thread(target=work, daemon=True) for work in works]
        for thread in self._threads:
            thread.start()

    def ask(self, reason: str) -> None:
        """Ask all processes to stop; returns at once."""
        self.reason = f"{reason} in process {self._process}"
        self._asked.set()

    def poll(self) -> bool:
        """Tell whether this is where all stop; called equally often in every process."""
        with self._changed:
            self._polls += 1
            self._changed.wait_for(lambda: self._place or not 0 < self._farthest <= self._polls)
            return 0 < self._place <= self._polls

    def close(self) -> None:
        """End the threads, which must not outlive the service; a later signal stops nobody."""
        self._asked.set()
        for thread in self._threads:
            thread.join(timeout=60)

    def _propose(self) -> None:
        self._asked.wait()
        # Without a reason, of a process that closes: it ends all that listen.
        self._store.key_value_set(f"{self._name}/asked", self.reason, allow_overwrite=True)

    def _listen(self) -> None:
        while True:
            try:
                reason = self._store.blocking_key_value_get(f"{self._name}/asked", self.patience)
                break
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):  # the service has ended, and so has this
                    return
        if not reason:
            return
        with self._changed:
            self.reason, self._farthest = reason, self._polls + self.ahead
        names = [f"{self._name}/{process}" for process in range(self._processes)]
        try:
            self._store.key_value_set(names[self._process], str(self._farthest))
            polls = [int(self._store.blocking_key_value_get(x, self.patience)) for x in names]
        except jax.errors.JaxRuntimeError:  # one has ended meanwhile: nobody waits any more
            polls = []
        with self._changed:
            self._farthest, self._place = 0, max(polls, default=0)
            self._changed.notify_all()


def meet() -> Meeting:
    """Let this run's processes meet by jax's coordination service; each of them calls this.

    What jax offers publicly, multihost_utils.reached_preemption_sync_point, hears SIGTERM alone.
    """
    from jax._src import distributed

    return Meeting(distributed.global_state.client, jax.process_index(), jax.process_count())
