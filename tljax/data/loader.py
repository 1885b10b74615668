"""In which order examples are seen: batches as a pure function of (seed, step)."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from tljax.data.sources import Source
from tljax.types import Batch, BadInput

Rng = np.random.Generator
Transform = Callable[[dict, Rng], dict]
_FOREVER = 2**40  # steps; grain wants a length

_ORDER, _EXAMPLE, _BATCH, _EVALUATION = range(4)
"""What a random stream is for: the first word of its seed."""


class Cached(Source):
    """A source after a deterministic `prepare`, remembered in memory as far as `limit` allows."""

    def __init__(self, parent: Source, prepare: Callable[[dict], dict] | None, limit: int):
        """Estimate from the first example whether prepared, raw or no examples fit in `limit`."""
        self._parent, self.labels = parent, parent.labels
        prepare = prepare or (lambda example: example)
        raw = parent[0]
        fits = [_nbytes(example) * len(parent) <= limit for example in (prepare(raw), raw)]
        self._memory: list[dict | None] | None = [None] * len(parent) if any(fits) else None
        same = lambda example: example  # noqa: E731
        self._before, self._after = (prepare, same) if fits[0] else (same, prepare)

    def __len__(self) -> int:
        return len(self._parent)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        memory = self._memory
        if memory is None:
            return [self._after(row) for row in self._parent.__getitems__(indices)]
        missing = [int(i) for i in indices if memory[i] is None]
        for i, row in zip(missing, self._parent.__getitems__(missing), strict=True):
            memory[i] = self._before(row)
        return [self._after(memory[i]) for i in indices]


def _nbytes(example: dict) -> int:
    return sum(value.nbytes for value in example.values() if isinstance(value, np.ndarray))


def cached(
    source: Source, prepare: Callable[[dict], dict] | None = None, limit: int = 1 << 30
) -> Source:
    """Apply `prepare` to each example and decode none twice, within `limit` bytes.

    What does not fit prepared is kept raw (decoded); what does not fit raw is read each time.
    """
    return Cached(source, prepare, limit)


def train_batches(
    source: Source,
    transform: Transform | None,
    batch_size: int,
    seed: int,
    *,
    mix: Transform | None = None,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
) -> Iterator[Batch]:
    """Yield batches without end, from any step at once.

    Row j of step s stands at position s * batch_size + j of an endless row of epochs, each in its
    own order; its transform draws from a generator of (seed, position), `mix` from one of
    (seed, step).  batch_size is global; each process gets its contiguous rows.
    """
    local = _local(batch_size, process_count)
    # Hashed, because grain's epoch e of seed s has the order of epoch e - 1 of seed s + 1.
    order_seed = int(np.random.SeedSequence([_ORDER, seed]).generate_state(1)[0])
    order = grain.MapDataset.range(len(source)).shuffle(seed=order_seed).repeat()

    def build(step: int) -> Batch:
        first = step * batch_size + process_index * local
        positions = range(first, first + local)
        rows = source.__getitems__([int(order[p]) for p in positions])
        if transform:
            rows = [
                transform(row, np.random.default_rng([_EXAMPLE, seed, p]))
                for row, p in zip(rows, positions, strict=True)
            ]
        batch = _stack(rows)
        return mix(batch, np.random.default_rng([_BATCH, seed, step])) if mix else batch

    return _run(grain.MapDataset.range(start_step, _FOREVER).map(build), threads)


def eval_batches(
    source: Source,
    transform: Transform | None,
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
) -> Iterator[Batch]:
    """Yield every example once, in order; rows with valid False fill the last batch.

    A transform that draws (masking) does so from a generator of the example's index: the same in
    each pass.  All processes get equally many batches.
    """
    local = _local(batch_size, process_count)

    def build(step: int) -> Batch:
        first = step * batch_size + process_index * local
        valid = np.arange(first, first + local) < len(source)
        # Filling repeats the last example, so that padded rows cannot hold anything unusual.
        indices = [min(i, len(source) - 1) for i in range(first, first + local)]
        rows = source.__getitems__(indices)
        if transform:
            rows = [
                transform(row, np.random.default_rng([_EVALUATION, i]))
                for row, i in zip(rows, indices, strict=True)
            ]
        return {**_stack(rows), "valid": valid}

    steps = -(-len(source) // batch_size)
    return _run(grain.MapDataset.range(steps).map(build), threads)


def prefetch_to_device(
    batches: Iterable[Batch], put: Callable[[Batch], Any], depth: int = 2
) -> Iterator[Any]:
    """Start the transfer of `depth` batches ahead; `put` must return before it is done."""
    waiting: deque[Any] = deque()
    for batch in batches:
        waiting.append(put(batch))
        if len(waiting) >= depth:
            yield waiting.popleft()
    yield from waiting


def _local(batch_size: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise BadInput(
            f"a global batch of {batch_size} for {process_count} processes: expected a positive "
            "multiple of the number of processes"
        )
    return batch_size // process_count


def _stack(rows: list[dict]) -> dict[str, np.ndarray]:
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def _run(dataset: grain.MapDataset, threads: int) -> Iterator[Batch]:
    # An element is a whole batch, so a small buffer is enough to keep every thread busy.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(dataset.to_iter_dataset(options))
