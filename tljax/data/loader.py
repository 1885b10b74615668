"""In which order examples are seen: batches as a pure function of (seed, step)."""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import grain
import numpy as np

from tljax.data.corrupt import Allowance
from tljax.data.sources import Joined, Source, stacked
from tljax.preemption import patience
from tljax.types import BadInput, Batch

Transform = Callable[[dict, np.random.Generator], dict]
Prepare = Callable[[dict], dict]
_FOREVER = 2**40  # steps; grain wants a length
_ORDER, _EXAMPLE, _BATCH, _EVALUATION, _VIEW, _REPLAY = range(6)  # first word of a stream's seed


class Cached(Source):
    """A source after `prepare`, in memory: prepared if that fits in `limit` bytes, else decoded."""

    def __init__(self, parent: Source, prepare: Prepare | None = None, limit: int = 1 << 30):
        """Judge by the first example whether prepared, decoded or no examples fit."""
        self._parent = parent
        keep = lambda example: example  # noqa: E731
        prepare, raw = prepare or keep, parent[0]
        fits = [_nbytes(example) * len(parent) <= limit for example in (prepare(raw), raw)]
        self._memory: list[dict | None] | None = [None] * len(parent) if any(fits) else None
        self._before, self._after = (prepare, keep) if fits[0] else (keep, prepare)

    def __len__(self) -> int:
        return len(self._parent)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        if self._memory is None:
            return [self._after(row) for row in self._parent.__getitems__(indices)]
        missing = [int(i) for i in indices if self._memory[i] is None]
        for i, row in zip(missing, self._parent.__getitems__(missing), strict=True):
            self._memory[i] = self._before(row)
        return [self._after(self._memory[i]) for i in indices]


class Sparing(Source):
    """A source of which a few examples may be corrupt: the next one that can be read stands in.

    Which one stands in depends on the files alone, so that runs stay reproducible.
    """

    def __init__(self, parent: Source, allowance: Allowance):
        """Leave out as many as are allowed."""
        self._parent, self._allowance, self.labels = parent, allowance, parent.labels

    def __len__(self) -> int:
        return len(self._parent)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        try:
            return self._parent.__getitems__(indices)
        except BadInput:
            return [self._readable(int(index)) for index in indices]

    def _readable(self, index: int) -> dict[str, Any]:
        for place in chain(range(index, len(self)), range(index)):
            try:
                return self._parent[place]
            except BadInput as error:
                self._allowance.leave_out(place, error)
        raise BadInput("every training example is corrupt")


@dataclass(frozen=True)
class Versions(Source):
    """Every version of every example: row j is view j // n of example j % n, drawn by both."""

    parent: Source
    transform: Transform | None
    seed: int
    views: int = 1

    def __len__(self) -> int:
        return self.views * len(self.parent)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        places = [divmod(int(j), len(self.parent)) for j in indices]
        rows = self.parent.__getitems__([i for _, i in places])
        if self.transform is None:
            return rows
        seeds = [(_VIEW, self.seed, i, view) for view, i in places]
        return _transformed(rows, self.transform, seeds)


def _nbytes(example: dict) -> int:
    return sum(value.nbytes for value in example.values() if isinstance(value, np.ndarray))


@dataclass(frozen=True)
class Loader:
    """Cuts sources into batches of `size` rows over all processes; each reads its contiguous share.

    threads: that prepare batches ahead.
    """

    size: int
    threads: int = 4
    process: int = 0
    processes: int = 1

    def __post_init__(self):
        """Refuse a size that does not divide."""
        if self.size % self.processes:
            raise BadInput(
                f"a global batch of {self.size} does not divide over {self.processes} processes"
            )

    def train(
        self,
        source: Source,
        transform: Transform | None,
        seed: int,
        mix: Transform | None = None,
        start: int = 0,
        views: int = 1,
        replay: Source | None = None,
        share: float = 0.0,
    ) -> Iterator[Batch]:
        """Yield batches without end, from any step at once.

        Row j of step s stands at position s * size + j of an endless row of epochs, each in its
        own order; its transform draws from a generator of (seed, position), `mix` from one of
        (seed, step).  views: the source holds all examples so many times, and epoch e reads the
        (e mod views)-th of them.  replay: this share of every batch, in whole rows, stands in such
        a row of its own, spread evenly.
        """
        chosen = self.order(len(source), seed, views, len(replay or ()), share)
        source = source if replay is None else Joined(source, replay)

        def build(step: int) -> Batch:
            positions = self._positions(step)
            indices = chosen(np.asarray(positions)).tolist()
            seeds = [(_EXAMPLE, seed, p) for p in positions]
            batch = _stack(source, transform, indices, seeds)
            return mix(batch, np.random.default_rng([_BATCH, seed, step])) if mix else batch

        return self._run(build, range(start, _FOREVER), "training")

    def order(
        self, count: int, seed: int, views: int = 1, replayed: int = 0, share: float = 0.0
    ) -> Callable[[np.ndarray], np.ndarray]:
        """Return what reads the examples at positions: of a source of `count`, then the replayed.

        Raises: BadInput if the replay's share is no row of a batch, or every one.
        """
        own, rows = _order(count, _ORDER, seed, views), 0
        if replayed:
            older, rows = _order(replayed, _REPLAY, seed), round(share * self.size)
            if not 0 < rows < self.size:
                raise BadInput(f"replay.share={share} of {self.size} rows is none, or all of them")

        def chosen(positions: np.ndarray) -> np.ndarray:
            before, after = (p * rows // self.size for p in (positions, positions + 1))
            is_new = after == before
            indices = np.empty(len(positions), int)
            indices[is_new] = own((positions - before)[is_new])
            if rows:
                indices[~is_new] = count + older(before[~is_new])
            return indices

        return chosen

    def evaluate(self, source: Source, transform: Transform | None) -> Iterator[Batch]:
        """Yield every example once, in order; rows with valid False repeat the last to the end.

        A transform that draws (masking) does so by the example's index: the same in each pass.
        All processes get equally many batches.
        """

        def build(step: int) -> Batch:
            positions = np.asarray(self._positions(step))
            indices = np.minimum(positions, len(source) - 1).tolist()
            batch = _stack(source, transform, indices, [(_EVALUATION, i) for i in indices])
            return {**batch, "valid": positions < len(source)}

        return self._run(build, range(-(-len(source) // self.size)), "an evaluation")

    def _positions(self, step: int) -> range:
        share = self.size // self.processes
        first = step * self.size + self.process * share
        return range(first, first + share)

    def _run(self, build: Callable[[int], Batch], steps: range, what: str) -> Iterator[Batch]:
        # An element is a whole batch, so a small buffer is enough to keep every thread busy.
        options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=2 * self.threads)
        dataset = grain.MapDataset.range(steps.start, steps.stop).map(build)
        batches = iter(dataset.to_iter_dataset(options))
        for step in steps:
            with patience(f"batch {step} of {what}"):
                batch = next(batches)
            yield batch


def prefetch_to_device(batches: Iterable[Batch], put: Callable[[Batch], Any]) -> Iterator[Any]:
    """Start the transfer of the next batch before this one is used; `put` must not wait for it."""
    waiting: deque[Any] = deque()
    for batch in batches:
        waiting.append(put(batch))
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


def _order(
    count: int, stream: int, seed: int, views: int = 1
) -> Callable[[np.ndarray], np.ndarray]:
    """Return what reads places in an endless row of epochs, each in its own order.

    count: of the examples of all views, of which epoch e holds the (e mod views)-th.
    """
    count //= views

    # A whole epoch at once: one by one, a batch of cached features would wait for its numbers.
    @functools.lru_cache(maxsize=2)
    def drawn(epoch: int) -> np.ndarray:
        order = np.random.default_rng([stream, seed, epoch]).permutation(count)
        return order + epoch % views * count

    def read(positions: np.ndarray) -> np.ndarray:
        epochs, places = np.divmod(positions, count)
        parts = [drawn(int(e))[places[epochs == e]] for e in np.unique(epochs)]
        return np.concatenate([np.empty(0, int), *parts])

    return read


def _stack(
    source: Source, transform: Transform | None, indices: list[int], seeds: list[tuple]
) -> dict[str, np.ndarray]:
    if transform is None:
        return source.stack(indices)
    return stacked(_transformed(source.__getitems__(indices), transform, seeds))


def _transformed(rows: list[dict], transform: Transform, seeds: list[tuple]) -> list[dict]:
    return [transform(r, np.random.default_rng(s)) for r, s in zip(rows, seeds, strict=True)]
