"""In which order examples are seen: batches as a pure function of (seed, step)."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from tljax.data.sources import Labels, Source
from tljax.types import BadInput, Batch

Transform = Callable[[dict, np.random.Generator], dict]
_FOREVER = 2**40  # steps; grain wants a length
_ORDER, _EXAMPLE, _BATCH, _EVALUATION = range(4)  # first word of a stream's seed: what it is for


class Cached(Source):
    """A source after `prepare`, in memory: prepared if that fits in `limit` bytes, else decoded."""

    def __init__(
        self, parent: Source, prepare: Callable[[dict], dict] | None = None, limit: int = 1 << 30
    ):
        """Judge by the first example whether prepared, decoded or no examples fit."""
        self._parent = parent
        keep = lambda example: example  # noqa: E731
        prepare, raw = prepare or keep, parent[0]
        fits = [_nbytes(example) * len(parent) <= limit for example in (prepare(raw), raw)]
        self._memory: list[dict | None] | None = [None] * len(parent) if any(fits) else None
        self._before, self._after = (prepare, keep) if fits[0] else (keep, prepare)

    def __len__(self) -> int:
        return len(self._parent)

    @property
    def labels(self) -> Labels | None:  # type: ignore[override]
        """Pass the parent's labels on."""
        return self._parent.labels

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        if self._memory is None:
            return [self._after(row) for row in self._parent.__getitems__(indices)]
        missing = [int(i) for i in indices if self._memory[i] is None]
        for i, row in zip(missing, self._parent.__getitems__(missing), strict=True):
            self._memory[i] = self._before(row)
        return [self._after(self._memory[i]) for i in indices]


def _nbytes(example: dict) -> int:
    return sum(value.nbytes for value in example.values() if isinstance(value, np.ndarray))


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
    # Hashed, because grain's epoch e of seed s has the order of epoch e - 1 of seed s + 1.
    order_seed = int(np.random.SeedSequence([_ORDER, seed]).generate_state(1)[0])
    order = grain.MapDataset.range(len(source)).shuffle(seed=order_seed).repeat()

    def build(step: int) -> Batch:
        positions = _rows(step, batch_size, process_index, process_count)
        indices = [int(order[p]) for p in positions]
        batch = _stack(source, transform, indices, [(_EXAMPLE, seed, p) for p in positions])
        return mix(batch, np.random.default_rng([_BATCH, seed, step])) if mix else batch

    _rows(0, batch_size, process_index, process_count)
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
    """Yield every example once, in order; rows with valid False repeat the last one to the end.

    A transform that draws (masking) does so by the example's index: the same in each pass.  All
    processes get equally many batches.
    """

    def build(step: int) -> Batch:
        positions = np.asarray(_rows(step, batch_size, process_index, process_count))
        indices = np.minimum(positions, len(source) - 1).tolist()
        batch = _stack(source, transform, indices, [(_EVALUATION, i) for i in indices])
        return {**batch, "valid": positions < len(source)}

    _rows(0, batch_size, process_index, process_count)
    return _run(grain.MapDataset.range(-(-len(source) // batch_size)).map(build), threads)


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


def _rows(step: int, batch_size: int, process_index: int, process_count: int) -> range:
    local, odd = divmod(batch_size, process_count)
    if odd or local < 1:
        raise BadInput(
            f"a global batch of {batch_size} does not divide over {process_count} processes"
        )
    first = step * batch_size + process_index * local
    return range(first, first + local)


def _stack(
    source: Source, transform: Transform | None, indices: list[int], seeds: list[tuple]
) -> dict[str, np.ndarray]:
    rows = source.__getitems__(indices)
    if transform:
        rows = [transform(r, np.random.default_rng(s)) for r, s in zip(rows, seeds, strict=True)]
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def _run(dataset: grain.MapDataset, threads: int) -> Iterator[Batch]:
    # An element is a whole batch, so a small buffer is enough to keep every thread busy.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(dataset.to_iter_dataset(options))
