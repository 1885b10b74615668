"""Features once: what frozen layers give for inputs that repeat is computed once, and kept.

A cut is a place of the port `cut` (ports.py).  Where everything below it is frozen, training and
evaluation start at the cut, from a table of what passed it: the same step, from other batches.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
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
        # In the batch's order, not a set's: the program must be the same in every process.
        lacks = [k for k in like if k not in batch and k != "label"] if "cut" in batch else []
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
    mode: str, pipeline: Pipeline, mesh: sharding.Mesh, passes: int, find: Callable[[], Cut | str]
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
            if not (why := too_large(held, mesh)):
                return found, f"computed once up to {names}: {total:,} rows, {held:,} bytes"
            found = why
    if mode == "on":
        raise BadInput(f"run.features='on', but features cannot be computed once: {found}")
    return None, f"computed at every step, as {found}"


def too_large(size: int, mesh: sharding.Mesh) -> str:
    """Say why so many bytes can be kept nowhere, or nothing."""
    there = next(path for path in (cache_folder(), *cache_folder().parents) if path.exists())
    if size <= max(room(mesh), MEMORY, (free := shutil.disk_usage(there).free) // 2):
        return ""
    return f"their {size:,} bytes fit neither in memory nor in half of the {free:,} free in {there}"


class Table(NamedTuple):
    """What passed a cut, by the path in a batch: rows of every part, one part after another.

    held: on the host, the same in every process, in the order of `rows_of`.  spread: on the
    devices, [batch of the pass, place in it, ..], each row where it was computed.
    """

    held: Columns
    spread: Columns


def compute(
    values: Callable[[Batch], Columns], pipeline: Pipeline, put: Put, made_of: Callable[[], Any],
    mesh: sharding.Mesh,
) -> Table:  # fmt: skip
    """Send every part through `values` (a batch -> columns of its rows) once, in order.

    What passed the cut stays on the devices if it fits there, else it is in memory, else in files
    named by the hash of `made_of()`, which a later run with the same hash only opens.  Training
    reads rows in any order: on the host every process holds all of them.
    Raises: BadInput for files that are not what their folder states.
    """
    total = sum(len(source) for source, _ in rows_of(pipeline))
    shapes = jax.eval_shape(values, put(next(pipeline.eval_batches("validation"))))
    passed = {name: leaf for name, leaf in shapes.items() if "cut" in name.split("/")}
    on_devices = size_of(passed, padded(pipeline)) <= room(mesh)
    spread = born_on(mesh, passed, padded(pipeline)) if on_devices else {}
    wanted = {
        name: jax.ShapeDtypeStruct((total, *leaf.shape[1:]), leaf.dtype)
        for name, leaf in shapes.items()
        if name not in spread
    }
    if on_devices or size_of(shapes, total) <= MEMORY:
        held = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in wanted.items()}
        return Table(held, fill(held, spread, values, pipeline, put))
    stated = made_of()
    key = hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()
    folder = cache_folder() / "features" / key[:32]
    if not all_have(folder, key, wanted):
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Nobody else's name, whatever process numbers and hosts share the folder.
        part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            files: Columns = {
                name: np.lib.format.open_memmap(place(part, name), "w+", leaf.dtype, leaf.shape)
                for name, leaf in wanted.items()
            }
            fill(files, {}, values, pipeline, put)
            for column in files.values():
                column.flush()
            contents = {name: content(place(part, name)) for name in wanted}
            document = {"key": key, "contents": contents, "made_of": stated}
            (part / STATED).write_text(json.dumps(document, indent=2))
            publish(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return Table(open_table(folder, key, wanted), {})


def padded(pipeline: Pipeline) -> int:
    """Count the rows of all batches that a pass over every part takes."""
    size = pipeline.loader.size
    return size * sum(-(-len(source) // size) for source, _ in rows_of(pipeline))


def all_have(folder: Path, key: str, wanted: Columns) -> bool:
    """Tell whether every process finds the table; raises BadInput in all if one's is damaged."""
    found, refusal = False, ""
    try:
        found = folder.exists() and open_table(folder, key, wanted) is not None
    except BadInput as error:
        refusal = str(error)
    states = np.atleast_2d(multihost_utils.process_allgather(np.array([found, bool(refusal)])))
    if states[:, 1].any():
        raise BadInput(refusal or f"{folder} of another process is not what it states")
    return bool(states[:, 0].all())


def publish(part: Path, folder: Path) -> None:
    """Give a whole table its name, unless another process was first, with the same rows."""
    try:
        part.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def place(folder: Path, name: str) -> Path:
    """Name the file of a column."""
    return folder / f"{name.replace('/', '.')}.npy"


def content(file: Path) -> str:
    """Return the hash of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def open_table(folder: Path, key: str, wanted: Columns) -> Columns:
    """Open the columns of a folder; each is read once, to see that it is what was written.

    Raises: BadInput if the folder states another key, or a file has another content.
    """
    path = folder / STATED
    document = read_json(path) if path.is_file() else {}
    if (stated := document.get("key")) != key:
        raise BadInput(f"{folder} states key {stated}, this run's features have {key}: remove it")
    table = {}
    for name, leaf in wanted.items():
        file = place(folder, name)
        if not file.is_file() or content(file) != document.get("contents", {}).get(name):
            raise BadInput(f"{file} is not the file that was written: remove {folder}")
        table[name] = np.load(file, mmap_mode="r").view(leaf.dtype)
    return table


def fill(
    held: Columns, spread: Columns, values: Callable[[Batch], Columns], pipeline: Pipeline, put: Put
) -> Columns:
    """Write every row of every part into a table; returns the columns on the devices."""

    def computed() -> Iterator[Columns]:
        for source, transform in rows_of(pipeline):
            for batch in pipeline.loader.evaluate(source, transform):
                placed = put(batch)
                yield values(placed) | {"valid": placed["valid"]}

    write = jax.jit(
        lambda table, new, at: {name: x.at[at].set(new[name]) for name, x in table.items()},
        donate_argnums=0,
    )
    first, total = 0, sum(len(source) for source, _ in rows_of(pipeline))
    quiet = not sys.stdout.isatty() or jax.process_index() > 0
    with tqdm(total=total, desc="features", file=sys.stdout, disable=quiet) as bar:
        # A batch is fetched after the next one is dispatched: the device never waits.
        for number, columns in enumerate(prefetch_to_device(computed(), lambda columns: columns)):
            if new := {name: columns.pop(name) for name in spread}:
                spread = write(spread, new, np.int32(number))
            host = multihost_utils.process_allgather(columns, tiled=True)
            valid = host.pop("valid")
            for name, column in host.items():
                held[name][first : first + valid.sum()] = column[valid]
            first += int(valid.sum())
            bar.update(int(valid.sum()))
    return spread


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


def room(mesh: sharding.Mesh) -> int:
    """Count the bytes that a table may take on all devices; a CPU's memory is the host's own."""
    stats = jax.local_devices()[0].memory_stats() or {}
    free = (stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)) // 2
    return max(free, 0) * sharding.ways(mesh)


def born_on(mesh: sharding.Mesh, shapes: Columns, rows: int) -> Columns:
    """Create the columns of a table on the devices, [batches, batch, ..]."""
    make = lambda: {  # noqa: E731
        name: jnp.zeros((rows // leaf.shape[0], *leaf.shape), leaf.dtype)
        for name, leaf in shapes.items()
    }
    return jax.jit(make, out_shardings=sharding.stacked(sharding.on(mesh, sharding.BATCH)))()


def serve(table: Table, pipeline: Pipeline, mesh: sharding.Mesh) -> tuple[Pipeline, Put]:
    """Return the pipeline that reads a table in place of the data, and what puts its batches.

    Of columns on the devices the host sends the numbers of rows alone.
    """
    put: Put = partial(sharding.put_batch, mesh=mesh)
    columns, counts = dict(table.held), [len(source) for source, _ in rows_of(pipeline)]
    if table.spread:
        size = pipeline.loader.size
        first = np.cumsum([0, *(-(-count // size) * size for count in counts)])
        rows = [at + np.arange(count) for at, count in zip(first, counts, strict=False)]
        columns["row"] = np.concatenate(rows).astype(np.int32)
        put = partial(pick, sharding.make_gather(mesh), table.spread, put)
    ends = np.cumsum([0, *counts])
    parts = [Part(columns, int(a), int(b - a)) for a, b in pairwise(ends)]
    splits = pipeline.splits._replace(validation=parts[1], test=parts[2])
    return replace(pipeline, splits=splits, versions=parts[0], eval_transform=None), put


def pick(gather: Callable[..., Columns], table: Columns, put: Put, batch: Batch) -> Batch:
    """Replace a batch's row numbers by the rows of a table on the devices."""
    placed = dict(put(batch))
    return unflatten(gather(table, placed.pop("row"))) | placed
