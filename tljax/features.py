"""Features once: what frozen layers give for inputs that repeat is computed once, and kept.

A cut is a place of the port `cut` (ports.py).  Where everything below it is frozen, training and
evaluation start at the cut, from a table of what passed it: the same step, from other batches.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial, wraps
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental import multihost_utils
from tqdm import tqdm

from tljax import sharding
from tljax.data.loader import prefetch_to_device
from tljax.data.pipeline import Pipeline
from tljax.data.sources import Source, cache_folder
from tljax.objectives import forward, passing
from tljax.tree import Parts, flatten, join, reads, unflatten
from tljax.types import BadInput, Batch, Key, Objective, Tree
from tljax.weights.files import read_json

INPUTS = ("image", "input_ids", "token_type_ids")
"""Inputs that nothing may read beside a cut; an attention mask may stay in the batch."""
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4  # bytes of a table in memory
STATED = "features.json"

Columns = dict[str, Any]
"""Path in a batch -> rows of every part, one after another: training (all views), validation, test.
"""
Predict = Callable[[Tree, Batch], Mapping[str, Any]]
Put = Callable[[Batch], Batch]


class Cut(NamedTuple):
    """Where a run starts: paths in `cut`, the frozen leaves below, and the batches' shapes."""

    names: tuple[str, ...]
    below: tuple[str, ...]
    batch: Batch


def filled(function: Callable[..., Any], like: Batch) -> Callable[..., Any]:
    """Give a function of (tree, batch, ..) zeros for the inputs that a batch with a cut lacks.

    Nothing reads them: they are dead code, as is what the model would compute from them.
    """

    @wraps(function)
    def whole(tree: Tree, batch: Batch, *rest: Any) -> Any:
        rows = jax.tree.leaves(batch)[0].shape[0]
        lacks = like.keys() - batch.keys() - {"label"} if "cut" in batch else ()
        zeros = {k: jnp.zeros((rows, *like[k].shape[1:]), like[k].dtype) for k in lacks}
        return function(tree, zeros | dict(batch), *rest)

    return whole


def find_cut(
    model: nn.Module, objective: Objective, predict: Predict, parts: Parts, batch: Batch, key: Key
) -> Cut | str:
    """Find the last cut that may be computed once, or say what is in the way.

    What passes the cut depends on frozen leaves and inputs alone; with it neither objective nor
    prediction reads the inputs, and nothing else below it that they would read without it (a second
    model on the same inputs).  Decided on shapes, by dead-code elimination of what is traced.
    """
    met: dict[str, jax.ShapeDtypeStruct] = {}

    def activations(parts: Parts, batch: Batch, key: Key) -> list[dict[str, Any]]:
        evaluated = passing(model, join(*parts), batch)
        # In forward order, which the result of a traced function forgets.
        met.update({k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in evaluated.items()})
        _, moved = forward(model, join(*parts), batch, key, ("cut",))
        return [evaluated, flatten(moved["cut"])]

    def everything(parts: Parts, batch: Batch, key: Key) -> Any:
        tree = join(*parts)
        found = jax.tree.leaves((objective(tree, batch, key), predict(tree, batch)))
        return sum(jnp.sum(jnp.asarray(leaf, jnp.float32)) for leaf in found)

    read_by = reads(activations, parts, batch, key)
    heads = tuple(name for name in met if not name.startswith("blocks/"))
    blocks = [(name,) for name in met if name.startswith("blocks/")]
    needed: set[str] = set()
    blame = "the model has no cut"
    for names in reversed([*blocks, *([heads] if heads else [])]):
        uses = [by[name] for by in read_by for name in names]
        below = {path for own, *_ in uses for path in leaves_read(own.freeze)}
        if moving := [p for own, *_ in uses for p in leaves_read((own.train, own.track))]:
            blame = f"{min(moving)} is not frozen"
            continue
        if any(drawn for *_, drawn in uses):
            blame = f"chance (dropout) lies below {', '.join(names)}"
            continue
        needed = needed or leaves_read(reads(everything, parts, batch, key)[0].freeze)
        given = dict(batch) | {"cut": unflatten({name: met[name] for name in names})}
        own, used, _ = reads(everything, parts, given, key)
        still = [name for name in INPUTS if used.get(name)]
        still += sorted(needed - leaves_read(own.freeze) - below)
        if not still:
            kept = {k: leaf for k, leaf in batch.items() if used[k]}
            return Cut(names, tuple(sorted(below)), kept | {"cut": given["cut"]})
        blame = f"{still[0]} is read beside {', '.join(names)}"
    return blame


def leaves_read(marks: Tree) -> set[str]:
    """Name the leaves that are marked as read."""
    trees = marks if isinstance(marks, tuple) else (marks,)
    return {path for tree in trees for path, is_read in flatten(tree).items() if is_read}


def size_of(shapes: Batch, rows: int) -> int:
    """Count the bytes of so many rows of a batch."""
    leaves = jax.tree.leaves(shapes)
    return sum(rows * int(np.prod(leaf.shape[1:])) * leaf.dtype.itemsize for leaf in leaves)


def rows_of(pipeline: Pipeline) -> list[tuple[Source, Any]]:
    """List the parts of a table, each with the transform of its examples."""
    splits, own = pipeline.splits, pipeline.eval_transform
    return [(pipeline.versions, None), (splits.validation, own), (splits.test, own)]


def decide(
    mode: str, pipeline: Pipeline, passes: int, find: Callable[[], Cut | str]
) -> tuple[Cut | None, str]:
    """Choose the cut that a run starts from, or none, and say why.

    mode: run.features.  passes: examples that the run would send through the model without a cut.
    Raises: BadInput if mode is "on" and features cannot be computed once.
    """
    if mode == "off":
        return None, "computed at every step (run.features)"
    if pipeline.replay is not None:
        found: Cut | str = "batches hold replayed examples too"
    elif pipeline.versions is None:
        found = "the inputs of training never repeat (data.augment.views bounds them)"
    else:
        total = sum(len(source) for source, _ in rows_of(pipeline))
        few = mode == "auto" and passes <= total
        found = "most examples are seen no more than once" if few else find()
        if isinstance(found, Cut):
            held, names = size_of(found.batch, total), ", ".join(found.names)
            if not (why := too_large(held)):
                return found, f"computed once up to {names}: {total:,} rows, {held:,} bytes"
            found = why
    if mode == "on":
        raise BadInput(f"run.features='on', but features cannot be computed once: {found}")
    return None, f"computed at every step, as {found}"


def too_large(size: int) -> str:
    """Say why so many bytes can be kept nowhere, or nothing."""
    there = next(path for path in (cache_folder(), *cache_folder().parents) if path.exists())
    if size <= max(MEMORY, (free := shutil.disk_usage(there).free) // 2):
        return ""
    return f"their {size:,} bytes fit neither in memory nor in half of the {free:,} free in {there}"


def compute(
    values: Callable[[Batch], Columns], pipeline: Pipeline, put: Put, made_of: Callable[[], Any]
) -> Columns:
    """Send every part through `values` (a batch -> columns of its rows) once, in order.

    The table is in memory if it fits there, else in files named by the hash of `made_of()`, which a
    later run with the same hash only opens.  Training reads rows in any order, so every process
    holds all of them.
    Raises: BadInput for files that are not what their folder states.
    """
    total = sum(len(source) for source, _ in rows_of(pipeline))
    shapes = jax.eval_shape(values, put(next(pipeline.eval_batches("validation"))))
    wanted = {k: jax.ShapeDtypeStruct((total, *v.shape[1:]), v.dtype) for k, v in shapes.items()}
    if size_of(shapes, total) <= MEMORY:
        table = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in wanted.items()}
        fill(table, values, pipeline, put)
        return table
    key = hashlib.sha256(json.dumps(made_of(), sort_keys=True).encode()).hexdigest()
    folder = cache_folder() / "features" / key[:32]
    there = folder.exists() and open_table(folder, key, wanted) is not None
    if not np.all(multihost_utils.process_allgather(np.array(there))):
        part = folder.with_name(f"{folder.name}.{os.getpid()}.{jax.process_index()}.tmp")
        part.mkdir(parents=True)
        files: dict[str, np.memmap] = {
            name: np.lib.format.open_memmap(place(part, name), "w+", leaf.dtype, leaf.shape)
            for name, leaf in wanted.items()
        }
        try:
            fill(files, values, pipeline, put)
            for column in files.values():
                column.flush()
            (part / STATED).write_text(json.dumps({"key": key, "made_of": made_of()}, indent=2))
            with suppress(OSError):  # another process was first, with the same rows
                part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return open_table(folder, key, wanted)


def place(folder: Path, name: str) -> Path:
    """Name the file of a column."""
    return folder / f"{name.replace('/', '.')}.npy"


def open_table(folder: Path, key: str, wanted: Columns) -> Columns:
    """Open the columns of a folder without reading them.

    Raises: BadInput if it states another key, or a file has not the size that its rows take.
    """
    path = folder / STATED
    stated = read_json(path).get("key") if path.is_file() else None
    if stated != key:
        raise BadInput(f"{folder} states key {stated}, this run's features have {key}: remove it")
    table = {}
    for name, leaf in wanted.items():
        file = place(folder, name)
        with suppress(OSError, ValueError):  # shorter than its own header says, or not there
            column = np.load(file, mmap_mode="r").view(leaf.dtype)
            if column.shape == leaf.shape and file.stat().st_size == column.offset + column.nbytes:
                table[name] = column
        if name not in table:
            size = file.stat().st_size if file.exists() else 0
            raise BadInput(
                f"{file} has {size:,} bytes, {list(leaf.shape)} of {leaf.dtype} take more or fewer:"
                f" remove {folder}"
            )
    return table


def fill(table: Columns, values: Callable[[Batch], Columns], pipeline: Pipeline, put: Put) -> None:
    """Write every row of every part into a table."""

    def computed() -> Iterator[Columns]:
        for source, transform in rows_of(pipeline):
            for batch in pipeline.loader.evaluate(source, transform):
                placed = put(batch)
                yield values(placed) | {"valid": placed["valid"]}

    first, total = 0, len(next(iter(table.values())))
    quiet = not sys.stdout.isatty() or jax.process_index() > 0
    with tqdm(total=total, desc="features", file=sys.stdout, disable=quiet) as bar:
        # A batch is fetched after the next one is dispatched: the device never waits.
        for columns in prefetch_to_device(computed(), lambda columns: columns):
            host = multihost_utils.process_allgather(columns, tiled=True)
            valid = host.pop("valid")
            for name, column in host.items():
                table[name][first : first + valid.sum()] = column[valid]
            first += int(valid.sum())
            bar.update(int(valid.sum()))


@dataclass(frozen=True)
class Part(Source):
    """Rows of a table: those of one part of the data."""

    columns: Columns
    first: int
    count: int

    def __len__(self) -> int:
        return self.count

    def stack(self, indices: Any) -> dict[str, Any]:
        """Read rows by one index array."""
        rows = self.first + np.asarray(indices)
        return unflatten({name: column[rows] for name, column in self.columns.items()})


def room() -> int:
    """Count the bytes a table may take on every device; a CPU's memory is the host's own."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return (stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)) // 2


def serve(columns: Columns, pipeline: Pipeline, mesh: sharding.Mesh) -> tuple[Pipeline, Put]:
    """Return the pipeline that reads a table in place of the data, and what puts its batches.

    A table that fits lies on every device, which picks the rows: the host sends their numbers.
    """
    rows = len(next(iter(columns.values())))
    put: Put = partial(sharding.put_batch, mesh=mesh)
    if sum(column.nbytes for column in columns.values()) <= room():
        there = sharding.on(mesh, sharding.REPLICATED)
        table = {name: sharding.put(np.asarray(x), there) for name, x in columns.items()}
        columns = {"row": np.arange(rows, dtype=np.int32)}
        put = partial(pick, make_gather(mesh), table, put)
    ends = np.cumsum([0, *(len(source) for source, _ in rows_of(pipeline))])
    parts = [Part(columns, int(a), int(b - a)) for a, b in pairwise(ends)]
    splits = pipeline.splits._replace(validation=parts[1], test=parts[2])
    return replace(pipeline, splits=splits, versions=parts[0], eval_transform=None), put


def make_gather(mesh: sharding.Mesh) -> Callable[[Columns, jax.Array], Columns]:
    """Return the jitted function that reads rows of a table on every device."""
    read = lambda x, rows: x.at[rows].get(mode="promise_in_bounds")  # noqa: E731
    gather = lambda table, rows: {name: read(x, rows) for name, x in table.items()}  # noqa: E731
    return jax.jit(gather, out_shardings=sharding.on(mesh, sharding.BATCH))


def pick(gather: Callable[..., Columns], table: Columns, put: Put, batch: Batch) -> Batch:
    """Replace a batch's row numbers by the rows of a table on the devices."""
    placed = dict(put(batch))
    return unflatten(gather(table, placed.pop("row"))) | placed
