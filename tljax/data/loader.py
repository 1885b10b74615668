"""In which order examples are seen: batches as a pure function of (seed, step)."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from tljax.data.sources import Joined, Source
from tljax.types import BadInput, Batch

Transform = Callable[[dict, np.random.Generator], dict]
Prepare = Callable[[dict], dict]
_FOREVER = 2**40  # steps; grain wants a length
_ORDER, _EXAMPLE, _BATCH, _EVALUATION, _REPLAY = range(5)  # first word of a stream's seed


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
        replay: Source | None = None,
        share: float = 0.0,
    ) -> Iterator[Batch]:
        """Yield batches without end, from any step at once.

        Row j of step s stands at position s * size + j of an endless row of epochs, each in its
        own order; its transform draws from a generator of (seed, position), `mix` from one of
        (seed, step).  replay: this share of every batch, in whole rows, stands in such a row of
        its own, spread evenly.
        """
        order, older = _order(len(source), _ORDER, seed), None
        if replay is not None:
            older, source = _order(len(replay), _REPLAY, seed), Joined(source, replay)
            own, rows = len(source.first), round(share * self.size)
            if not 0 < rows < self.size:
                raise BadInput(f"replay.share={share} of {self.size} rows is none, or all of them")

        def index(position: int) -> int:
            if older is None:
                return int(order[position])
            before, after = (p * rows // self.size for p in (position, position + 1))
            return own + int(older[before]) if after > before else int(order[position - before])

        def build(step: int) -> Batch:
            positions = self._positions(step)
            indices = [index(p) for p in positions]
            seeds = [(_EXAMPLE, seed, p) for p in positions]
            batch = _stack(source, transform, indices, seeds)
            return mix(batch, np.random.default_rng([_BATCH, seed, step])) if mix else batch

        return self._run(build, range(start, _FOREVER))

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

        return self._run(build, range(-(-len(source) // self.size)))

    def _positions(self, step: int) -> range:
        share = self.size // self.processes
        first = step * self.size + self.process * share
        return range(first, first + share)

    def _run(self, build: Callable[[int], Batch], steps: range) -> Iterator[Batch]:
        # An element is a whole batch, so a small buffer is enough to keep every thread busy.
        options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=2 * self.threads)
        dataset = grain.MapDataset.range(steps.start, steps.stop).map(build)
        return iter(dataset.to_iter_dataset(options))


def prefetch_to_device(batches: Iterable[Batch], put: Callable[[Batch], Any]) -> Iterator[Any]:
    """Start the transfer of the next batch before this one is used; `put` must not wait for it."""
    waiting: deque[Any] = deque()
    for batch in batches:
        waiting.append(put(batch))
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


def _order(count: int, stream: int, seed: int) -> grain.MapDataset:
    """Return the numbers below `count` in an endless row of epochs, each in its own order."""
    # Hashed, because grain's epoch e of seed s has the order of epoch e - 1 of seed s + 1.
    drawn = int(np.random.SeedSequence([stream, seed]).generate_state(1)[0])
    return grain.MapDataset.range(count).shuffle(seed=drawn).repeat()


def _stack(
    source: Source, transform: Transform | None, indices: list[int], seeds: list[tuple]
) -> dict[str, np.ndarray]:
    rows = source.__getitems__(indices)
    if transform:
        rows = [transform(r, np.random.default_rng(s)) for r, s in zip(rows, seeds, strict=True)]
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
