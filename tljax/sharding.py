"""Where arrays live: a mesh, a spec for every leaf, the batch over the data axes.

Models are single-device programs; `jit` with shardings (what `pjit` became) does the rest.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tljax.tree import flatten, label, map_with_path
from tljax.types import BadInput, Rules, Tree

AXES = ("data", "fsdp", "tensor")
REPLICATED = P()
BATCH = P(("data", "fsdp"))
Arrays = dict[str, jax.Array]


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Arrange devices (all there are) as (data, fsdp, tensor); one axis may be -1, the rest.

    Raises: BadInput if the product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    try:
        sizes = np.empty(count).reshape(data, fsdp, tensor).shape
    except ValueError:
        raise BadInput(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not multiply to the "
            f"{count} devices there are; give sizes whose product is {count}, or one -1"
        ) from None
    # Auto axes: jax.make_mesh defaults to Explicit ones, which type every array by its sharding.
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def fsdp_spec(shape: tuple[int, ...], mesh: Mesh) -> P:
    """Put the largest axis that divides over `fsdp`, else replicate.

    Small leaves (under 2^14 elements) are replicated: gathering them costs more than they weigh.
    """
    size = mesh.shape["fsdp"]
    axes = [i for i in np.argsort(shape)[::-1] if shape[i] % size == 0]
    if size == 1 or not axes or int(np.prod(shape)) < 2**14:
        return P()
    return P(*("fsdp" if i == axes[0] else None for i in range(len(shape))))


def specs(tree: Tree, mesh: Mesh, rules: Rules = ()) -> Tree:
    """Give every leaf a PartitionSpec: by rule, else `fsdp_spec`.

    Raises: BadInput for a dead rule, or a spec that does not fit its leaf or the mesh.
    """
    chosen = flatten(label(tree, [(glob, P(*axes)) for glob, axes in rules], None))

    def spec(path: str, leaf: Any) -> P:
        own = chosen[path] if path in chosen else fsdp_spec(leaf.shape, mesh)
        named = [np.atleast_1d(axis or ()) for axis in own]
        if unknown := {str(axis) for axes in named for axis in axes} - set(mesh.shape):
            raise BadInput(f"{path}: the mesh has axes {', '.join(AXES)}, not {min(unknown)}")
        if len(used := np.concatenate([(), *named])) > len(set(used)):
            raise BadInput(f"{path}: {own} names an axis of the mesh twice")
        ways = [int(np.prod([mesh.shape[axis] for axis in axes])) for axes in named]
        if len(ways) > leaf.ndim or any(n % w for n, w in zip(leaf.shape, ways, strict=False)):
            raise BadInput(f"{path} {leaf.shape} does not divide over {own} of {dict(mesh.shape)}")
        return own

    return map_with_path(spec, tree)


def on(mesh: Mesh, spec_tree: Tree) -> Tree:
    """Turn PartitionSpecs into shardings on a mesh."""
    return map_with_path(lambda _, spec: NamedSharding(mesh, spec), spec_tree)


def stacked(where: NamedSharding) -> NamedSharding:
    """Return the sharding of several such arrays in one: along the new first axis whole."""
    return NamedSharding(where.mesh, P(None, *where.spec))


def under(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Trace a function with the mesh around it, so that layers can pin activations to its axes.

    Wrap what runs a model, below `jit`: whoever traces it, and whenever, the mesh is then there.
    """

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


SMALL = 1 << 20  # bytes that numpy turns sooner than a program for it is compiled


def put(array: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
    """Copy an array to its devices, and wait; a transposed view goes as it lies in memory.

    It is turned there, on a CPU by its layout alone: no number moves, where numpy would take
    longer than reading the file took.
    """
    order = tuple(sorted(range(array.ndim), key=lambda axis: (-array.strides[axis], axis)))
    if array.nbytes < SMALL:
        array, order = np.asarray(array, order="C"), tuple(range(array.ndim))
    lying, there = array.transpose(order), where
    if isinstance(where, NamedSharding):
        own = (*where.spec, *[None] * array.ndim)
        there = NamedSharding(where.mesh, P(*(own[axis] for axis in order)))

    def cut(index: Any) -> np.ndarray:
        part = np.asarray(lying[index])
        # A CPU device would keep an aligned one, and the caller uses its memory again.
        return part.copy() if part.ctypes.data % 16 == 0 else part

    # Not device_put: over several processes that compares the values, for each leaf anew.
    whole = jax.make_array_from_callback(lying.shape, there, cut)
    turned = whole if order == tuple(range(array.ndim)) else _turn(order, where)(whole)
    return turned.block_until_ready()


@functools.cache
def _turn(order: tuple[int, ...], where: jax.sharding.Sharding) -> Callable[[jax.Array], jax.Array]:
    """Return what undoes a transposition; its argument is used up."""
    back = tuple(int(axis) for axis in np.argsort(order))
    place = Format(Layout(order), where) if jax.default_backend() == "cpu" else where
    return jax.jit(lambda x: x.transpose(back), out_shardings=place, donate_argnums=0)


def ways(mesh: Mesh) -> int:
    """Return in how many parts a batch is cut."""
    return int(mesh.shape["data"] * mesh.shape["fsdp"])


def check_batch(batch_size: int, mesh: Mesh, microbatches: int = 1) -> None:
    """Raise BadInput unless every device gets the same whole number of examples."""
    least = ways(mesh) * microbatches
    if batch_size % least:
        raise BadInput(
            f"batch size {batch_size} does not divide into {microbatches} microbatches over "
            f"{ways(mesh)} devices (data x fsdp); use a multiple of {least}"
        )


def make_gather(mesh: Mesh) -> Callable[[Arrays, jax.Array], Arrays]:
    """Return the jitted `(columns, numbers) -> rows` on the devices of a batch.

    Columns are [batches, batch, ..], each device with its places of every batch.  It offers those
    of the rows that it holds, zeros for others, and gets the sum of its share: the bytes of one
    batch travel, never the table.
    """
    [axes] = BATCH

    def read(columns: Arrays, rows: jax.Array) -> Arrays:
        wanted = jax.lax.all_gather(rows, axes, tiled=True)

        def one(column: jax.Array) -> jax.Array:
            share = column.shape[1]
            number, at = jnp.divmod(wanted, share * ways(mesh))
            mine = at // share == jax.lax.axis_index(axes)
            found = column.at[number, at % share].get(mode="promise_in_bounds")
            found = jnp.where(mine.reshape((-1,) + (1,) * (found.ndim - 1)), found, 0)
            return jax.lax.psum_scatter(found, axes, tiled=True)

        return {name: one(column) for name, column in columns.items()}

    specs = (P(None, *BATCH), BATCH)
    return jax.jit(jax.shard_map(read, mesh=mesh, in_specs=specs, out_specs=BATCH))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Assemble the global batch on the mesh from this process's part of it."""
    here = NamedSharding(mesh, BATCH)
    place = functools.partial(jax.make_array_from_process_local_data, here)
    return jax.tree.map(place, dict(batch))
