"""`tljax.load`: a pretrained model in one call, with an account of every leaf."""

import os
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
from tljax.edits.fold import grafts
from tljax.edits.load import Report, match
from tljax.layers import last_block
from tljax.models import MODELS
from tljax.models.vit import resample
from tljax.proof import FIXTURE, NOTE, Note, check_fixture, example_inputs, read_note
from tljax.source import open_source
from tljax.tree import flatten, unflatten
from tljax.types import BadInput, Rules, Tree
from tljax.weights import Source
from tljax.weights.files import Empty, Tensor, held, recycled

HEADS = ("head", "head_dist", "mlm")
IMAGES = ("vit", "resnet")
"""Architectures that read images."""
READERS = 2  # threads, each with one leaf on its way to the devices
MAX_SIDE, MAX_CLASSES = 1 << 14, 1 << 20  # pixels; a number that is no typing error


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
    source: str | os.PathLike[str],
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
    if not isinstance(source, str | os.PathLike) or not str(source):
        raise BadInput(f"source={source!r}: expected a name or a path")
    if not _is_size(image_size):
        raise BadInput(f"image_size={image_size!r}: expected pixels, a side or (height, width)")
    if not isinstance(mesh, sharding.Mesh | None):
        raise BadInput(f"mesh={mesh!r}: expected a mesh of tljax.sharding.make_mesh")
    try:
        found = open_source(os.path.expanduser(source), tower, fields)
        if tower is not None and not found.kind.startswith("clip_"):
            raise BadInput(
                f"{found.origin} is no CLIP of two towers: tower={tower!r} means nothing"
            )
        if found.arch not in IMAGES and image_size is not None:
            raise BadInput(f"{found.origin} reads texts: image_size means nothing there")
        note = None if found.format == "run" else read_note(Path(found.origin).parent)
        verified = verify(found, note)
        chosen = {**(note.pool if note else {}), **fields}
        return assemble(found, verified, image_size, num_classes, mesh, **chosen)
    except OSError as error:  # it names the file: no permission, a name too long, a broken link
        raise BadInput(f"{source}: {error}") from None


def _is_size(size: Any) -> bool:
    sides = size if isinstance(size, tuple) and len(size) == 2 else (size,)
    return size is None or all(type(side) is int and 0 < side <= MAX_SIDE for side in sides)


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
    known = MODELS[source.arch].__dataclass_fields__.keys() - {"parent", "name"}
    if odd := sorted(chosen.keys() - known):
        raise BadInput(
            f"a {source.arch} has no field {odd[0]!r}; it has {', '.join(sorted(known))}"
        )
    try:
        if not jnp.issubdtype(jnp.dtype(chosen.get("dtype", "float32")), jnp.floating):
            raise BadInput(f"dtype={chosen['dtype']!r}: expected float32, bfloat16 or float16")
        if source.arch == "vit" and image_size is not None:
            chosen["grid"] = grid_of(image_size, chosen["patch"])
            tree, adapted = regrid(tree, source.fields, chosen)
        model = MODELS[source.arch](**chosen)
        if "depth" in known:
            last_block(getattr(model, "read", None), model.depth)  # raises if it is not there
        target = target_of(model, tree)
    except BadInput:
        raise
    except (TypeError, ValueError, IndexError, ArithmeticError) as error:
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
    if num_classes is not None and not (
        type(num_classes) is int and 0 <= num_classes <= MAX_CLASSES
    ):
        raise BadInput(
            f"num_classes={num_classes!r}: expected None, 0 or up to {MAX_CLASSES:,} classes"
        )
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
    added = {path: leaf for path, leaf in flatten(tree).items() if grafts(path)}
    kind = lambda leaf: leaf.dtype if leaf.dtype.kind in "iu" else np.float32  # noqa: E731
    like = {path: jax.ShapeDtypeStruct(x.shape, kind(x)) for path, x in added.items()}
    parents = {path.rpartition("/")[0] for path in added}  # a quantised kernel is a tree itself
    own = {path: leaf for path, leaf in flatten(target).items() if path not in parents}
    return unflatten(own | like)


def place(values: dict[str, Any], target: Tree, mesh: sharding.Mesh | None) -> Tree:
    """Read the leaves onto the devices, a few at a time; a leaf without values is zero.

    On a mesh every device copies its own part out of the host's.
    """
    leaves = flatten(target)
    places = flatten(sharding.on(mesh, sharding.specs(target, mesh))) if mesh else {}
    first = SingleDeviceSharding(jax.devices()[0])

    def tensor_of(path: str, like: jax.ShapeDtypeStruct) -> Tensor:
        if path not in values:
            return Tensor(like.shape, like.dtype, lambda _: np.zeros(like.shape, like.dtype))
        leaf = values[path]
        return leaf if isinstance(leaf, Tensor) else held(np.asarray(leaf))

    def put(paths: list[str]) -> dict[str, jax.Array]:
        whole = given[paths[0]].read(own.empty)
        return {x: sharding.put(given[x].cut(whole), places.get(x, first)) for x in paths}

    given = {path: tensor_of(path, like) for path, like in leaves.items()}
    groups: dict[Any, list[str]] = {}  # the parts of one tensor of the file, which is read once
    for path, tensor in given.items():
        groups.setdefault(tensor.read, []).append(path)
    own = threading.local()
    begin = lambda: setattr(own, "empty", recycled())  # noqa: E731
    # Several processes must give their devices the same programs in the same order.
    readers = READERS if jax.process_count() == 1 else 1
    with ThreadPoolExecutor(readers, initializer=begin) as pool:
        found = {
            path: leaf for part in pool.map(put, groups.values()) for path, leaf in part.items()
        }
    return unflatten({path: found[path] for path in leaves})


def verify(source: Source, note: Note | None) -> str:
    """Check the values of an export against what it says of itself; returns how they are known.

    Raises: BadInput for weights that are neither those that were exported nor give their outputs.
    """
    if note is None:
        return "values unverified"
    folder = Path(source.origin).parent
    same = note.digest == source.digest()
    changed = [] if same else [source.origin]
    if not (changed := changed + [str(folder / name) for name in note.changed(folder)]):
        return "values verified: the digest of the export"
    if not (folder / FIXTURE).is_file():
        raise BadInput(f"{changed[0]} is not the file that {NOTE} describes: export it again")
    made = assemble(source, "", **note.pool)
    check_fixture(folder / FIXTURE, changed[0], made.model, made.variables)
    told = f"{changed[0]} has changed since its export: values verified by their outputs only"
    warnings.warn(told, stacklevel=3)  # a small change shows in none
    return told
