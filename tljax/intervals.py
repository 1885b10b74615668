"""What a run logs between its steps, and when that says that it must not simply go on."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from clu.metrics import Average

from tljax.config import Run
from tljax.metrics import Logger, accumulate, averages

JUDGED = 5  # intervals, whose median a loss is compared with


class Spiked(Exception):
    """The loss of an interval is far above those before it."""

    def __init__(self, step: int, good: int):
        self.step, self.good = step, good  # where it was seen; the last step before that interval


class NotFinite(Exception):
    """Too many steps in a row had a loss or gradient that is not finite."""

    def __init__(self, step: int, count: int):
        self.step, self.count = step, count


class Intervals:
    """Averages over intervals of steps; nothing waits for the device before it must."""

    def __init__(self, logger: Logger, run: Run, notes: Mapping[str, Any]):
        """Log every so many steps, and at the last one; notes: what `notes` gave, or nothing."""
        self.logger, self.run = logger, run
        began = notes.get("running", {})
        self.running: Any = {
            name: Average(np.float32(total), np.int32(count))
            for name, (total, count) in began.items()
        }
        self.due: tuple[int, Any, jax.Array] | None = None
        self.losses: list[float] = list(notes.get("losses", []))

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Take one step's metrics, and log the interval that ended before it.

        Raises: NotFinite for too many steps in a row, or Spiked.
        """
        self.flush()
        values = {name: x for name, x in metrics.items() if name != "in_a_row"}
        row = metrics["in_a_row"]
        self.running = accumulate(self.running or None, values, row == 0)
        self.logger.advance(step)
        if step % self.run.log_every == 0 or step == self.run.steps:
            self.due, self.running = (step, self.running, row), None

    def flush(self) -> None:
        """Log the interval that is due, and judge it."""
        if not self.due:
            return
        (step, running, row), self.due = self.due, None
        values = averages(running)
        self.logger.write(step, values)
        if int(row) >= self.run.max_skipped:
            raise NotFinite(step, int(row))
        if not np.isfinite(loss := values["loss"]):  # all of it was skipped
            return
        before, self.losses = self.losses, [*self.losses, loss][-JUDGED:]
        full = self.run.spike is not None and len(before) == JUDGED
        if full and loss > self.run.spike * np.median(before):
            raise Spiked(step, (step - 1) // self.run.log_every * self.run.log_every)

    def notes(self) -> dict[str, Any]:
        """Return what a checkpoint must hold of the logging, for it to go on as if never ended."""
        sums = jax.device_get(self.running or {})
        running = {name: [float(x.total), int(x.count)] for name, x in sums.items()}
        return {"running": running, "losses": self.losses}
