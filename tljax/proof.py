"""What an export carries to prove itself: digests of its files, and inputs with their outputs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from tljax.types import BadInput, Output, Tree
from tljax.weights.files import digest_of, open_safetensors, read_json

NOTE, FIXTURE = "tljax.json", "tljax_fixture.safetensors"
RECORDED = ("pooled", "logits")
CLOSE = 2e-4  # of the largest value: other devices and versions, not other weights


class Note(NamedTuple):
    """What an export says of itself."""

    digest: str  # of the weights
    documents: Mapping[str, str]  # file beside them -> digest
    pool: dict[str, Any]  # the field `pool`, which not every format keeps; empty without one

    def changed(self, folder: Path) -> list[str]:
        """List the documents that are not there as they were written."""
        paths = {name: folder / name for name in self.documents}
        return [
            name
            for name, path in paths.items()
            if not path.is_file() or digest_of(path)() != self.documents[name]
        ]


def read_note(folder: Path) -> Note | None:
    """Read the note of an export; None where there is none.

    Raises: BadInput for one that tljax did not write.
    """
    if not (path := folder / NOTE).is_file():
        return None
    found = read_json(path)
    digest, documents, pool = (found.get(name) for name in ("digest", "documents", "pool"))
    if (
        not isinstance(digest, str)
        or not isinstance(documents, dict)
        or not all(Path(name).name == name and len(name) < 256 for name in documents)
        or not isinstance(pool, str | None)
    ):
        raise BadInput(f"{path} is damaged: it is not what tljax writes there; export again")
    return Note(digest, documents, {"pool": pool} if pool else {})


def example_inputs(model: nn.Module) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return inputs of the smallest shape the model takes, as shapes."""
    if hasattr(model, "vocab"):
        return (jax.ShapeDtypeStruct((1, 2), np.int32),)
    sides: tuple[int, ...] = (64, 64)
    if hasattr(model, "patch"):
        sides = tuple(int(side) for side in np.broadcast_to(model.patch, 2) * model.grid)
    return (jax.ShapeDtypeStruct((1, *sides, 3), np.float32),)


def fixture_inputs(model: nn.Module) -> dict[str, np.ndarray]:
    """Draw two small inputs, the same ones every time."""
    rng = np.random.default_rng(0)
    (like,) = example_inputs(model)
    if like.ndim == 4:
        return {"images": rng.normal(size=(2, *like.shape[1:])).astype(np.float32)}
    padded = getattr(model, "pad", None) is not None  # RoBERTa's positions begin after it
    length = max(1, min(16, model.positions - (model.pad + 1 if padded else 0)))
    ids = rng.integers(min(3, model.vocab - 1), model.vocab, (2, length)).astype(np.int32)
    ids[:, -1] = getattr(model, "eot", None) or ids[:, -1]
    mask = (np.arange(length) < [[length], [max(1, length - 2)]]).astype(np.int32)
    types = (ids % 2).astype(np.int32) if getattr(model, "types", 0) > 1 else 0 * ids
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def outputs(
    model: nn.Module, variables: Tree, inputs: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Run a fixture's inputs through a model, at the highest precision of products."""
    with jax.default_matmul_precision("highest"):
        found: Output = jax.jit(model.apply)(variables, *inputs.values())
    named = {name: getattr(found, name) for name in RECORDED}
    return {name: np.asarray(x, np.float32) for name, x in named.items() if x is not None}


def differing(found: Mapping[str, np.ndarray], expected: Mapping[str, Any]) -> str | None:
    """Name the first output that is not there, or not equal to `CLOSE` of the largest value."""
    for name, wanted in expected.items():
        if name not in found or found[name].shape != wanted.shape:
            return name
        wanted = np.asarray(wanted)
        if not np.abs(found[name] - wanted).max() <= CLOSE * np.abs(wanted).max():
            return name
    return None


def check_fixture(path: Path, changed: str, model: nn.Module, variables: Tree) -> None:
    """Compare what a model computes with what is recorded beside its weights, of which one changed.

    Nothing of a shape that the model would not have is read.
    Raises: BadInput for a fixture that is not the model's, or outputs that differ.
    """
    tensors, _ = open_safetensors(path)
    wanted = {name: array.shape for name, array in fixture_inputs(model).items()}
    given = {name: x.shape for name, x in tensors.items() if name not in RECORDED}
    if given != wanted or given.keys() == tensors.keys():
        raise BadInput(f"{path} holds {given} and outputs, expected {wanted}: export it again")
    inputs = {name: np.asarray(tensors[name]) for name in wanted}
    expected = {name: x for name, x in tensors.items() if name in RECORDED}
    if name := differing(outputs(model, variables, inputs), expected):
        raise BadInput(
            f"{changed}: the {name} differ from those recorded in {path}\n"
            "it was changed since its export: copy or export it again"
        )
