"""Foreign names and layouts as tables, read in both directions.

A row of a format: kinds of model, section, foreign module, tljax module, kind of module.  Section
`body` must be there, whole; of any other section all or nothing, and one that lies within another
that is there gives way to it.  {block} is the foreign name of
a block (`Format.blocks`) and {i} its number with us.  A row with {a} repeats for query, key and
value ({q} is its first letter); where the foreign name has neither, the one foreign tensor holds
all of them in this order.
A row with {k}, {n} or {c} repeats for every convolution of a block: {k} counts from 0, {n} from 1,
{c} a, b, c.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from einops import EinopsError, rearrange

from tljax.tree import flatten, nearest, unflatten
from tljax.types import BadInput, Tree
from tljax.weights.files import Empty, Tensor, Tensors

Modules = Mapping[str, tuple[tuple[str, str, str, str | None], ...]]
"""Kind of module -> foreign suffix, collection, tljax suffix and einops pattern of each leaf."""


@dataclass(frozen=True)
class Source:
    """Pretrained variables (arrays, or tensors not read yet) and what is needed to use them."""

    arch: str  # "vit", "bert", "resnet" or "clip_text"
    fields: Mapping[str, Any]  # arguments of the model's class, without its heads
    tree: Tree
    preprocess: Mapping[str, Any] | None  # mean and std (of 0..1) of images
    tokenizer: Path | None  # tokenizer.json
    labels: tuple[str, ...] | None
    digest: Callable[[], str]  # computes SHA-256 of the weights file
    ignored: Mapping[str, str]  # foreign tensor -> why it was left out
    format: str  # "hf", "onnx", "timm", "npz" or "run"
    kind: str  # the foreign type of model, as the format's rows name it; "" for a run
    config: Mapping[str, Any]  # the foreign configuration as it was read; of a run its record
    origin: str  # the file, or the folder of a run
    assumed: tuple[str, ...] = ()  # fields that the files do not tell, "field=value: why"


def settle(
    told: Mapping[str, Any], assumed: Mapping[str, tuple[Any, str]], given: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Join fields that files tell, those assumed (value and why), and a caller's, which win."""
    guessed = {name: value for name, (value, _) in assumed.items()}
    lines = (f"{k}={v!r}: {why}" for k, (v, why) in assumed.items() if k not in given)
    return {**told, **guessed, **given}, tuple(lines)


def shape_of(state: Tensors, name: str, rank: int, origin: str) -> tuple[int, ...]:
    """Return the shape of a tensor that tells sizes.

    Raises: BadInput if it is not there, or of another rank.
    """
    if name not in state:
        near = nearest(name, state)
        raise BadInput(f"{origin}: missing: {name} (nearest there: {near})")
    if len(shape := state[name].shape) != rank or 0 in shape:
        raise BadInput(
            f"{origin}: tensor {name} has shape {shape}, expected {rank} axes, not empty"
        )
    return shape


def square(rows: int) -> tuple[int, int] | None:
    """Return the square grid of so many patches, if there is one."""
    side = isqrt(max(rows, 0))
    return (side, side) if side and side * side == rows else None


def patch_of(tall: int, broad: int, confirmed: Any, origin: str) -> int | tuple[int, int]:
    """Return the field `patch`; an oblong one may be a square one that was cut.

    Raises: BadInput for an oblong one that nothing else confirms.
    """
    if tall == broad:
        return tall
    if not isinstance(confirmed, list | tuple) or tuple(confirmed) != (tall, broad):
        raise BadInput(
            f"{origin}: its patches have {tall} x {broad} pixels: if that is what they are, give"
            f" the field patch=({tall}, {broad})"
        )
    return tall, broad


class Leaf(NamedTuple):
    """One leaf with us and where it is found: `pattern` turns the foreign layout into ours.

    Where several leaves share a foreign tensor the pattern gives them stacked; `part` is its index.
    """

    section: str
    foreign: str
    ours: str
    pattern: str | None
    part: int | None = None


@dataclass(frozen=True)
class Format:
    """A way to name and lay out tensors.

    `ignored`: a tensor, or a module with its weight and bias, at the end of a name -> why it is
    left out.  `tied`: a tensor that must equal another one -> that one's name.  `renamed`: old
    spellings of parts of names.
    """

    rows: str
    modules: Modules
    blocks: Mapping[str, str]
    ignored: Mapping[str, str]
    tied: Mapping[str, str]
    renamed: Mapping[str, str]

    def spell(self, kind: str, fields: Mapping[str, Any], prefix: str = "") -> tuple[Leaf, ...]:
        """Spell out the rows for a model of these fields.

        `prefix` starts the foreign names of all sections but heads: "bert." in the file of a model
        with a head, "" in that of the bare one.
        """
        rows = [r.split() for r in self.rows.strip().split("\n")]
        rows = [row[1:] for row in rows if kind in row[0].split(",")]
        found: dict[tuple[str, str], Leaf] = {}
        for row, block, part in product(rows, _blocks(fields), _parts(fields)):
            where = {"block": self.blocks[kind].format(**block)} | block | part
            section, foreign, ours, module = (word.format(**where) for word in row)
            start = "" if section in HEADS else prefix
            for suffix, collection, own, pattern in self.modules[module]:
                names = f"{start}{foreign}{suffix}", f"{collection}/{ours}{own}"
                found[names] = Leaf(section, *names, pattern)
        return tuple(_number_parts(list(found.values())))


HEADS = ("head", "teacher", "sequence", "mlm", "projection")
"""Sections whose foreign names take no prefix."""


def _blocks(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Number the blocks: i in all, s and j of stage and block within it (s1, j1 from 1)."""
    stages = fields.get("stages", (fields.get("depth"),))
    places = [(s, j) for s, count in enumerate(stages) for j in range(count)]
    return [
        {"i": i, "s": s, "j": j, "s1": s + 1, "j1": j + 1} for i, (s, j) in enumerate(places)
    ] or [{"i": 0, "s": 0, "j": 0, "s1": 1, "j1": 1}]


def _parts(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    if "stages" not in fields:
        names = ("query", "key", "value")
        return [{"a": name, "q": name[0], "k": 0, "n": 1, "c": "a"} for name in names]
    count = 3 if fields.get("bottleneck", True) else 2
    return [{"a": "", "q": "", "k": k, "n": k + 1, "c": "abc"[k]} for k in range(count)]


def _number_parts(leaves: list[Leaf]) -> Iterator[Leaf]:
    sharing = _sharing(leaves)
    seen: dict[str, int] = {}
    for leaf in leaves:
        index = seen[leaf.foreign] = seen.get(leaf.foreign, -1) + 1
        yield leaf._replace(part=index) if sharing[leaf.foreign] > 1 else leaf


def to_tljax(
    state: Tensors,
    leaves: tuple[Leaf, ...],
    form: Format,
    origin: str = "state",
    heads: int | None = None,
) -> tuple[Tree, dict[str, str]]:
    """Rename and lay out foreign tensors as float32; also return what was left out, and why.

    heads: the length of an axis of that name, where the format has one.
    Nothing is read yet but tied tensors; reading a leaf raises BadInput if it is not finite.
    Raises: BadInput naming `origin` and a tensor that is unknown, missing, of another rank or
    type than its place asks.
    """
    state = rename(state, form.renamed, origin)
    known = {leaf.foreign: leaf for leaf in leaves}
    reasons = {name: _reason(name, state, form, origin) for name in state.keys() - known.keys()}
    ignored = {name: reason for name, reason in reasons.items() if reason}
    present = _account(origin, state.keys() - ignored.keys(), leaves, "foreign")
    count = _sharing(present)
    tree: dict[str, Tensor] = {}
    reads: dict[str, Callable[[Empty], np.ndarray]] = {}
    for leaf in present:
        lengths = {"n": count[leaf.foreign]} if leaf.part is not None else {}
        if heads is not None and "heads" in (leaf.pattern or ""):
            lengths["heads"] = heads
        tensor, where = state[leaf.foreign], f"{origin}: tensor {leaf.foreign}"
        if leaf.foreign not in reads:
            reads[leaf.foreign] = _checked(tensor, where)
        tree[leaf.ours] = _laid_out(tensor, leaf, lengths, reads[leaf.foreign], where)
    return unflatten(tree), ignored


def rename(state: Tensors, renamed: Mapping[str, str], origin: str) -> Tensors:
    """Spell parts of names as the table does.

    Raises: BadInput if two tensors then have one name.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new = name
        for old, part in renamed.items():
            new = new.replace(old, part)
        if new in found:
            raise BadInput(f"{origin}: {name} and another tensor are both what {new} means")
        found[new] = tensor
    return found


def to_foreign(
    tree: Tree, leaves: tuple[Leaf, ...], fields: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Name and lay out a tljax tree as the foreign format does: the inverse of `to_tljax`.

    Raises: BadInput naming a leaf that the format has no place for, or lacks.
    """
    values = flatten(tree)
    groups: dict[str, list[Leaf]] = {}
    for leaf in _account("tree", values.keys(), leaves, "ours"):
        groups.setdefault(leaf.foreign, []).append(leaf)
    found = {}
    for name, group in groups.items():
        parts = [np.asarray(values[leaf.ours]) for leaf in group]
        array = parts[0] if len(parts) == 1 else np.stack(parts)
        if pattern := group[0].pattern:
            theirs, own = pattern.split(" -> ")
            lengths = {"heads": fields["heads"]} if "heads" in theirs else {}
            array = rearrange(array, f"{own} -> {theirs}", **lengths)
        found[name] = np.ascontiguousarray(array)
    return found


def _sharing(leaves: list[Leaf]) -> Counter[str]:
    """Count the leaves of every foreign tensor."""
    return Counter(leaf.foreign for leaf in leaves)


def all_finite(array: np.ndarray) -> bool:
    """Tell whether there is neither NaN nor infinity; a finite sum tells it in one pass."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(array.sum()) or np.isfinite(array).all())


def _checked(tensor: Tensor, where: str) -> Callable[[Empty], np.ndarray]:
    """Return what reads a tensor in float32; raises BadInput if it is not finite."""
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise BadInput(f"{where} holds {tensor.dtype}, expected floating point")

    def read(empty: Empty) -> np.ndarray:
        array = tensor.read(empty)
        if not all_finite(array):
            raise BadInput(f"{where} holds NaN or infinity: the file is damaged")
        return array.astype(np.float32, copy=False)

    return read


def _laid_out(
    tensor: Tensor,
    leaf: Leaf,
    lengths: Mapping[str, int],
    read: Callable[[Empty], np.ndarray],
    where: str,
) -> Tensor:
    """View a foreign tensor, or a part of it, in our layout; checks what its header tells."""

    def cut(array: np.ndarray) -> np.ndarray:
        if leaf.pattern is None:
            return array
        stacked = rearrange(array, leaf.pattern, **lengths)
        return stacked if leaf.part is None else stacked[leaf.part]

    try:  # on one number that pretends to have the shape
        shape = cut(np.broadcast_to(np.float32(0), tensor.shape)).shape
    except EinopsError:
        wanted = leaf.pattern.split(" -> ")[0]
        raise BadInput(f"{where} has shape {tensor.shape}, expected axes {wanted}") from None
    return Tensor(shape, tensor.dtype, read, leaf.foreign, cut)


def _account(origin: str, given: Any, leaves: tuple[Leaf, ...], side: str) -> list[Leaf]:
    """Return the leaves of the sections that are there; raise unless `given` is just these."""
    names = {leaf: getattr(leaf, side) for leaf in leaves}
    sections = _sections(names, set(given))
    present = [leaf for leaf in leaves if leaf.section in sections]
    wanted = {names[leaf] for leaf in present}
    lines = [
        f"{what}: {', '.join(which[:3])} ({len(which)} in all; nearest: {nearest(which[0], pool)})"
        for what, which, pool in (
            ("unknown", sorted(given - set(names.values())), names.values()),
            ("missing", sorted(wanted - given), given),
        )
        if which
    ]
    if lines:
        lines.append("the weights and their configuration must be of one model")
        raise BadInput("\n".join([f"{origin}: these are not the tensors of the format", *lines]))
    return present


def _sections(names: Mapping[Leaf, str], given: set[str]) -> set[str]:
    """Choose the sections that are there, whole ones before those that something is missing of."""
    members: dict[str, set[str]] = {"body": set()}
    for leaf, name in names.items():
        members.setdefault(leaf.section, set()).add(name)
    whole = {section: own for section, own in members.items() if own <= given}
    chosen = {"body"} | {s for s, own in whole.items() if not any(own < x for x in whole.values())}
    told = set().union(*(members[section] for section in chosen))
    return chosen | {section for section, own in members.items() if (own & given) - told}


def _reason(name: str, state: Tensors, form: Format, origin: str) -> str | None:
    """Say why a tensor is left out; None for one that is not known."""
    if name not in form.tied:
        stem = f".{name}".removesuffix(".weight").removesuffix(".bias")
        return next((why for end, why in form.ignored.items() if stem.endswith(f".{end}")), None)
    other = form.tied[name]
    if other not in state or not np.array_equal(state[name], state[other]):
        raise BadInput(f"{origin}: {name} differs from {other}; tljax's BERT ties the two")
    return f"tied to {other}"
