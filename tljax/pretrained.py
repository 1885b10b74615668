"""`tljax.load`: a pretrained model in one call, with an account of every leaf."""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import SingleDeviceSharding

from tljax import sharding
from tljax.data.tokens import Tokenizer
from tljax.data.transforms import Preprocess
from tljax.edits.load import Report, match
from tljax.layers import last_block
from tljax.models import MODELS
from tljax.models.vit import resample
from tljax.source import open_source
from tljax.tree import flatten, unflatten
from tljax.types import BadInput, Output, Rules, Tree
from tljax.weights import Source
from tljax.weights.files import Empty, Tensor, digest_of, open_safetensors, read_json, recycled

HEADS = ("head", "head_dist", "mlm")
IMAGES = ("vit", "resnet")
"""Architectures that read images."""
NOTE, FIXTURE = "tljax.json", "tljax_fixture.safetensors"
"""What an export carries: the digest of its weights, and inputs with their outputs."""
READERS = 2  # threads, each with one leaf on its way to the devices
CLOSE = 2e-4  # of the largest value: other devices and versions, not other weights


@dataclass(frozen=True)
class Pretrained:
    """A model with its weights: `model.apply(variables, inputs)` gives an Output.

    preprocess: pictures -> what the model reads.  tokenizer: texts -> what the model reads.
    report: what became of every leaf.  verified: by what the values are known to be right.
    """

    model: nn.Module
    variables: Tree
    preprocess: Preprocess | None
    tokenizer: Tokenizer | None
    labels: tuple[str, ...] | None
    report: Report
    source: Source
    verified: str

    @property
    def origin(self) -> str:
        """Name the file or folder that the weights come from."""
        return self.source.origin

    @cached_property
    def record(self) -> dict[str, Any]:
        """Say where this came from; reads the file once more, for its digest."""
        source = self.source
        names = ("origin", "format", "kind", "config", "assumed", "ignored")
        found = {name: getattr(source, name) for name in names}
        if self.preprocess and source.preprocess is None:
            found["assumed"] += ("preprocess: ImageNet's mean and std, which no file says",)
        return found | {"digest": source.digest(), "verified": self.verified}


def load(
    source: str | Path,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    *,
    tower: str | None = None,
    mesh: sharding.Mesh | None = None,
    **fields: Any,
) -> Pretrained:
    """Open pretrained weights of any known format as a model and its variables, in float32.

    source: a Hugging Face folder or hub name, a timm file or folder, an .npz of big_vision or
    vision_transformer, a PEFT adapter, an asset's name, or the folder of a finished run.
    image_size: pixels, a side or (height, width); a position table is resampled to its grid as
    the source's own code does.  num_classes: None keeps the head there is, 0 leaves it out, and a
    number other than the source's gives a new head that starts at zero.  tower: "vision" or
    "text" of a CLIP.  mesh: spread the variables over its axis fsdp; else they are on one device.
    fields: further fields of the model's class, such as read="blocks/8", pool or dtype.

    Raises: BadInput for whatever does not fit, naming file and tensor; nothing is half loaded.
    """
    if not _is_size(image_size):
        raise BadInput(f"image_size={image_size!r}: expected pixels, a side or (height, width)")
    found = open_source(str(source), tower, fields)
    if tower is not None and not found.kind.startswith("clip_"):
        raise BadInput(f"{found.origin} is no CLIP of two towers: tower={tower!r} means nothing")
    if found.arch not in IMAGES and image_size is not None:
        raise BadInput(f"{found.origin} reads texts: image_size means nothing there")
    verified = verify(found)
    return assemble(found, verified, image_size, num_classes, mesh, **fields)


def _is_size(size: Any) -> bool:
    sides = size if isinstance(size, tuple) and len(size) == 2 else (size,)
    return size is None or all(type(side) is int and side > 0 for side in sides)


def assemble(
    source: Source,
    verified: str,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    mesh: sharding.Mesh | None = None,
    **fields: Any,
) -> Pretrained:
    """Build the model of a source and read the weights into it, leaf by leaf."""
    tree, chosen = source.tree, head_fields(source, num_classes) | fields
    adapted: Rules = ()
    if source.arch == "vit" and image_size is not None:
        chosen["grid"] = grid_of(image_size, chosen["patch"])
        tree, adapted = regrid(tree, source.fields, chosen)
    known = MODELS[source.arch].__dataclass_fields__
    if odd := sorted(chosen.keys() - known.keys()):
        raise BadInput(f"a {source.arch} has no field {odd[0]!r}; it has {', '.join(known)}")
    model = MODELS[source.arch](**chosen)
    if getattr(model, "read", None) is not None and "depth" in known:
        last_block(model.read, model.depth)  # raises for one that is not there
    try:
        target = target_of(model, tree)
    except BadInput:
        raise
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise BadInput(f"{source.origin}: no model has the fields {fields}: {error}") from None
    try:
        values, report = match(tree, target, adapted=adapted, **head_rules(tree, target))
    except BadInput as error:
        raise BadInput(f"{source.origin}: {error}") from None
    return Pretrained(
        model=model,
        variables=place(values, target, mesh),
        preprocess=preprocess_of(source, model, image_size),
        tokenizer=Tokenizer.from_file(source.tokenizer) if source.tokenizer else None,
        labels=source.labels if chosen.get("num_classes") == len(source.labels or ()) else None,
        report=report,
        source=source,
        verified=verified,
    )


def preprocess_of(
    source: Source, model: nn.Module, image_size: int | tuple[int, int] | None
) -> Preprocess | None:
    """Return what pictures go through: at the size that is asked for, else the source's own."""
    if source.arch not in IMAGES:
        return None
    own = Preprocess.read(source.preprocess)
    if image_size is None and own.size is None and own.resize is None:
        sides = example_inputs(model)[0].shape[1:3] if source.arch == "vit" else (224, 224)
        image_size = sides[0] if sides[0] == sides[1] else sides
    return own if image_size is None else own.at(image_size)


def head_fields(source: Source, num_classes: int | None) -> dict[str, Any]:
    """Return the source's fields with those that say which heads the model has."""
    if num_classes is not None and (type(num_classes) is not int or num_classes < 0):
        raise BadInput(f"num_classes={num_classes!r}: expected None, 0 or a number of classes")
    there = source.tree["params"]
    own = there["head"]["kernel"].shape[-1] if "head" in there else None
    fields = dict(source.fields) | {"num_classes": own if num_classes is None else num_classes}
    if source.arch == "clip_text":
        del fields["num_classes"]
        if num_classes:
            raise BadInput("CLIP's text tower has no head: num_classes must be None or 0")
        return fields
    fields["num_classes"] = fields["num_classes"] or None
    if "head_dist" in there:
        fields["distilled_head"] = fields["num_classes"] is not None
    if source.arch == "bert":
        fields["mlm"] = "mlm" in there and num_classes is None
    return fields


def head_rules(tree: Tree, target: Tree) -> dict[str, Rules]:
    """Say which heads start anew, and which of the source's are left out.

    All do for another number of classes; for the same one none does, so that one that does not fit
    is refused like any leaf.
    """
    have, want = ({k: x for k, x in t["params"].items() if k in HEADS} for t in (tree, target))
    here, there = (x["head"]["kernel"].shape[-1] if "head" in x else None for x in (have, want))
    same = have.keys() & want.keys() if here == there else set()
    fresh = [(f"params/{name}/**", "a new head, zero") for name in want if name not in same]
    ignored = [(f"params/{name}/**", "its head is not asked for") for name in have.keys() - same]
    return {"fresh": fresh, "ignored": ignored}


def grid_of(image_size: int | tuple[int, int], patch: int | tuple[int, int]) -> tuple[int, int]:
    """Return rows and columns of patches.

    Raises: BadInput if the patch does not divide the image.
    """
    sides, cells = np.broadcast_to(image_size, 2), np.broadcast_to(patch, 2)
    if (sides < cells).any() or (sides % cells).any():
        raise BadInput(f"image_size={image_size} is no multiple of the patch, {patch} pixels")
    return int(sides[0] // cells[0]), int(sides[1] // cells[1])


def regrid(tree: Tree, before: Any, after: dict[str, Any]) -> tuple[Tree, Rules]:
    """Resample a ViT's position table to another grid, and say so."""
    old, new = tuple(before["grid"]), tuple(after["grid"])
    if old == new:
        return tree, ()
    defaults = {k: f.default for k, f in MODELS["vit"].__dataclass_fields__.items()}
    own = defaults | dict(after)
    prefix = (own["class_token"] + own["distilled"]) * own["prefix_positions"]
    table = tree["params"]["embed"]["pos"]

    def read(_: Empty) -> np.ndarray:
        return np.array(resample(jnp.asarray(table), old, new, own["resample"], prefix))

    shape = (1, prefix + new[0] * new[1], table.shape[-1])
    leaves = flatten(tree) | {"params/embed/pos": Tensor(shape, table.dtype, read)}
    how = f"resampled from {old} to {new}, {own['resample']}"
    return unflatten(leaves), (("params/embed/pos", how),)


def example_inputs(model: nn.Module) -> tuple[Any, ...]:
    """Return inputs of the smallest shape the model takes, zeros."""
    if hasattr(model, "vocab"):
        return (np.zeros((1, 2), np.int32),)
    sides = (64, 64)
    if hasattr(model, "patch"):
        sides = np.broadcast_to(model.patch, 2) * model.grid
    return (np.zeros((1, *sides, 3), np.float32),)


def target_of(model: nn.Module, tree: Tree) -> Tree:
    """Return the model's variables as shapes, with what is grafted onto the source's.

    Blocks of one depth are alike, so that tracing one tells all: for ViT-L .1 s instead of 1.6 s.
    """
    depth = getattr(model, "depth", None)
    one = model if depth is None else model.clone(depth=1, read=None)
    init = lambda *inputs: one.init(jax.random.key(0), *inputs)  # noqa: E731
    target = jax.eval_shape(init, *example_inputs(model))
    if depth is not None:
        blocks = {str(i): target["params"]["blocks"]["0"] for i in range(depth)}
        target["params"]["blocks"] = blocks
    grafts = {path: leaf for path, leaf in flatten(tree).items() if "/lora/" in path}
    like = {path: jax.ShapeDtypeStruct(leaf.shape, np.float32) for path, leaf in grafts.items()}
    return unflatten(flatten(target) | like)


def place(values: dict[str, Any], target: Tree, mesh: sharding.Mesh | None) -> Tree:
    """Read the leaves onto the devices, a few at a time; a leaf without values is zero.

    On a mesh every device copies its own part out of the host's.
    """
    leaves = flatten(target)
    places = flatten(sharding.on(mesh, sharding.specs(target, mesh))) if mesh else {}
    first = SingleDeviceSharding(jax.devices()[0])

    def read(path: str) -> jax.Array:
        like = leaves[path]
        leaf = values[path] if path in values else np.zeros(like.shape, like.dtype)
        array = leaf.read(own.empty) if isinstance(leaf, Tensor) else np.asarray(leaf)
        return sharding.put(array, places.get(path, first))

    own = threading.local()
    begin = lambda: setattr(own, "empty", recycled())  # noqa: E731
    # Several processes must give their devices the same programs in the same order.
    readers = READERS if jax.process_count() == 1 else 1
    with ThreadPoolExecutor(readers, initializer=begin) as pool:
        return unflatten(dict(zip(leaves, pool.map(read, leaves), strict=True)))


def verify(source: Source) -> str:
    """Check the values of an export against what it says of itself; returns how they are known.

    Raises: BadInput for weights that are neither those that were exported nor give their outputs.
    """
    folder = Path(source.origin).parent
    note = {} if source.format == "run" else read_json(folder / NOTE)
    if not note:
        return "values unverified"
    documents, pool = note.get("documents", {}), note.get("pool", "")
    if not isinstance(documents, dict) or not isinstance(pool, str):
        raise BadInput(f"{folder / NOTE} is damaged: documents or pool are not what tljax writes")
    if note.get("digest") == source.digest() and all(
        (folder / name).is_file() and digest_of(folder / name)() == known
        for name, known in documents.items()
    ):
        return "values verified: the digest of the export"
    if not (folder / FIXTURE).is_file():
        raise BadInput(f"{source.origin} is not the file that {NOTE} describes: export it again")
    tensors, _ = open_safetensors(folder / FIXTURE)
    fixture = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    pooling: dict[str, Any] = {"pool": pool} if pool else {}
    try:
        output = outputs(assemble(source, "", **pooling), fixture)
    except TypeError as error:  # of inputs whose shapes the model does not take
        raise BadInput(f"{folder / FIXTURE} does not fit the model: {error}") from None
    recorded = [name for name in ("pooled", "logits") if name in fixture]
    if not recorded:
        raise BadInput(f"{folder / FIXTURE} records no outputs: export it again")
    for name in recorded:
        if name not in output or not close(output[name], fixture[name]):
            raise BadInput(
                f"{source.origin}: its {name} differ from those recorded in {folder / FIXTURE}\n"
                "the weights were changed since their export: copy or export them again"
            )
    told = "values verified by their outputs only: the file has changed since its export"
    warnings.warn(f"{source.origin}: {told}", stacklevel=3)  # a small change shows in none
    return told


def outputs(pre: Pretrained, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a fixture's inputs through a model, at the highest precision of products."""
    like = example_inputs(pre.model)[0]
    names = ("images",) if like.ndim == 4 else ("input_ids", "attention_mask", "token_type_ids")
    given = [inputs.get(name, np.zeros(0)) for name in names]
    if any(array.ndim != like.ndim or array.shape[-1] < 3 for array in given):
        raise BadInput(f"a fixture of {list(inputs)} does not hold {', '.join(names)}")
    with jax.default_matmul_precision("highest"):
        found: Output = jax.jit(pre.model.apply)(pre.variables, *given)
    named = {"pooled": found.pooled, "logits": found.logits}
    return {name: np.asarray(x, np.float32) for name, x in named.items() if x is not None}


def close(given: np.ndarray, expected: np.ndarray) -> bool:
    """Tell whether two arrays are equal to `CLOSE` of the largest value."""
    if given.shape != expected.shape:
        return False
    return bool(np.abs(given - expected).max() <= CLOSE * np.abs(expected).max())
