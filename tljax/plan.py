"""What a step costs before it runs: compiled for the devices there are, or for TPUs elsewhere.

Compiling for a TPU takes its compiler alone, libtpu (extra: plan), and no TPU.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from tljax.build import Experiment, build, precision
from tljax.config import Config
from tljax.sharding import Mesh
from tljax.types import BadInput

UNITS = ("", "k", "M", "G", "T", "P")
SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
SLICES = {"v5e": SQUARES, "v5p": CUBES, "v6e": SQUARES}
"""TPU generations whose chips are one device each, and the sizes of their slices."""
GIB = 2**30
USABLE = {"TPU v5 lite": 15.75 * GIB, "TPU v5": 95.73 * GIB, "TPU v6 lite": 31.24 * GIB}
"""Bytes of a chip's memory that libtpu 0.0.52 lets a program have, as its refusals say."""
NOWHERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Answers to what libtpu would ask of a TPU's host; they do not enter what is compiled."""


@dataclass(frozen=True)
class Cost:
    """What one device does and holds in a step: floating-point operations, and bytes.

    peak: the most at one time, arguments and outputs included; on a CPU without temporaries.
    aliased: outputs that take the place of donated arguments.
    """

    flops: float
    arguments: int
    outputs: int
    aliased: int
    temporary: int
    code: int
    peak: int


def require_room(experiment: Experiment) -> None:
    """Estimate, before anything is compiled or held, whether what a step holds fits.

    That is the state and the frozen leaves, beside which come activations and gradients.
    Raises: BadInput if even that does not: of an accelerator's memory, or of this host's.
    """
    device = experiment.mesh.local_devices[0]
    leaves = jax.tree.leaves(experiment.abstract)
    held = sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in leaves
    )
    limit, where = (device.memory_stats() or {}).get("bytes_limit"), "each device"
    if limit is None and device.platform == "cpu":  # they share the memory of their host
        held *= len(experiment.mesh.local_devices)
        limit, where = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this host"
        with suppress(OSError, ValueError):  # a container's own limit, or "max"
            limit = min(limit, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    if limit and held > limit:
        state, frozen = experiment.abstract
        raise BadInput(
            f"{where} would hold {human(held)}B and has {human(limit)}B: trainable "
            f"{human(size(state.params))}B, optimizer {human(size(state.opt))}B, frozen "
            f"{human(size(frozen))}B in all\n"
            "try a larger mesh.fsdp, a strategy that trains less, such as lora, or a smaller model"
        )


def compile_step(experiment: Experiment) -> jax.stages.Compiled:
    """Compile the step ahead of time: the run's only compilation of it.

    Raises: BadInput if the compiler finds that a device has too little memory.
    """
    where = experiment.shardings.batch
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), experiment.batch
    )
    return compile_lowered(experiment.step.lower(*experiment.abstract, placed), experiment.mesh)


def compile_lowered(
    lowered: jax.stages.Lowered, mesh: Mesh, compiler_options: dict[str, Any] | None = None
) -> jax.stages.Compiled:
    """Compile a program for a mesh, whose devices may be elsewhere.

    compiler_options: XLA's, by their names, for this program alone.
    Raises: BadInput if the compiler finds that a device has too little memory.
    """
    try:
        with nullcontext() if mesh.devices.flat[0] in jax.devices() else uncached():
            return lowered.compile(compiler_options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise BadInput(
            f"the step does not fit: {str(error).splitlines()[0]}\n"
            "try --config.run.remat=True, more microbatches, a smaller batch or a larger mesh.fsdp"
        ) from None


@contextmanager
def uncached() -> Iterator[None]:
    """Compile without writing to jax's cache: a program for a TPU elsewhere cannot be read back."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[name]
    jax.config.update(name, float("inf"))
    try:
        yield
    finally:
        jax.config.update(name, before)


def cost_of(compiled: jax.stages.Compiled, microbatches: int = 1) -> Cost:
    """Read what XLA says of a step; it counts a scan's body once, hence times microbatches.

    That multiplies what runs once a step too, the optimizer and the metrics: with microbatches
    `flops` is above the true count by so many times their few operations a parameter.
    """
    memory = compiled.memory_analysis()
    return Cost(
        flops=compiled.cost_analysis()["flops"] * microbatches,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
    )


def devices_of(topology: str) -> Sequence[jax.Device]:
    """Return the chips of a TPU slice such as "v5e:2x2": to compile for, not to run on.

    Raises: BadInput for a slice that does not exist, or without TPU's compiler.
    """
    kind, _, size = topology.partition(":")
    if size not in SLICES.get(kind, ()):
        known = "; ".join(f"{kind}: {' '.join(sizes)}" for kind, sizes in SLICES.items())
        raise BadInput(f"topology {topology!r} is no GENERATION:SIZE of {known}")
    for name, answer in NOWHERE.items():
        os.environ.setdefault(name, answer)
    try:
        return topologies.get_topology_desc(topology, "tpu").devices
    except RuntimeError as error:
        raise BadInput(
            f"{topology}: {str(error).splitlines()[0]}\n"
            "compiling for a TPU takes libtpu: pip install 'tljax[plan]'"
        ) from None


def compile_for(topology: str, config: Config, parts: Any = None) -> Cost:
    """Compile the step of a config for a TPU slice that need not be there.

    parts: what `open_parts` gave, if several configs share it.
    Raises: BadInput for an unknown slice, without libtpu, or for a step that does not fit.
    """
    with precision(config):
        experiment = build(config, parts, devices_of(topology))
        return cost_of(compile_step(experiment), config.run.microbatches)


def human(number: float) -> str:
    """Write a number with three digits and a decimal unit."""
    power = int(np.clip(np.log10(max(number, 1)) // 3, 0, len(UNITS) - 1))
    return f"{number / 1000**power:.3g} {UNITS[power]}"


def size(tree: Any) -> int:
    """Count the bytes of a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def describe(experiment: Experiment, cost: Cost) -> str:
    """Say what a step costs; FLOPs, temporaries and peak are per device."""
    (state, frozen), devices = experiment.abstract, experiment.mesh.devices
    kind = devices.flat[0].device_kind
    held = f", peak {human(cost.peak)}B of {human(USABLE[kind])}B" if kind in USABLE else ""
    return (
        f"plan: {human(cost.flops)}FLOPs a step; bytes: trainable {human(size(state.params))}B, "
        f"optimizer {human(size(state.opt))}B, frozen {human(size(frozen))}B, "
        f"temporary {human(cost.temporary)}B{held} a device; {experiment.config.run.steps} steps "
        f"of {experiment.config.run.batch} on {devices.size} {kind}; "
        f"features {experiment.features}"
    )
