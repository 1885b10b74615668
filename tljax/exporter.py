"""`tljax export`: a trained or loaded model as other libraries read it, with proof."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from tljax.card import make_card
from tljax.edits.fold import is_grafted
from tljax.edits.fold import merge as fold
from tljax.edits.load import match
from tljax.layers import choose
from tljax.models import MODELS
from tljax.pretrained import IMAGES, Pretrained, load, target_of
from tljax.proof import FIXTURE, NOTE, differing, fixture_inputs, outputs
from tljax.source import ADAPTER, open_source
from tljax.storage import (
    Name,
    Place,
    absolute,
    in_store,
    names,
    on_disk,
    place,
    write_json,
    write_text,
)
from tljax.tree import flatten, map_with_path, unflatten
from tljax.types import BadInput, Tree
from tljax.weights import NAMES as ASSETS
from tljax.weights import hf, npz, peft, timm
from tljax.weights.files import DTYPES, digest_of
from tljax.weights.hf_config import kind_of, to_config
from tljax.weights.preprocess import shift, to_hf
from tljax.weights.table import all_finite, to_foreign

OURS = {"parent", "name", "dtype", "remat", "read", "dropout", "drop_path", "momentum"}
"""Fields that say how a model is trained or run here, not what it is."""
WEIGHTS = ("kernel", "embedding")
NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Written:
    """What a format wants on disk: tensors of one file, JSON documents, words for the card."""

    tensors: Mapping[str, np.ndarray]
    weights: str
    documents: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    use: Mapping[str, str] = field(default_factory=dict)


def export(
    pre: Pretrained,
    folder: Name,
    to: str = "hf",
    *,
    merge: bool = False,
    dtype: str | None = None,
    naming: str | None = None,
    base: str | None = None,
) -> Place:
    """Write a model to a new folder, open it again, and compare what the two compute.

    to: "hf" (transformers), "timm", "npz" (big_vision) or "peft" (the LoRA alone).  merge: fold
    LoRA into the kernels, in float32; the error of casting the sum to `dtype` goes to the card.
    dtype: of the file, by default the source's.  naming: the major version of transformers whose
    module names a PEFT adapter uses (5).  base: where the adapter's base model is.

    Raises: BadInput if the folder is not empty or the format has no place for the model.
    """
    writer = choose(WRITERS, to, "to")
    require_new(where := absolute(place(folder)))
    require_complete(pre)
    if (arch := pre.source.arch) not in ARCHS[to]:
        raise BadInput(f"{to} has no {arch}; it has {', '.join(ARCHS[to])}")
    if to != "peft" and (naming or base):
        raise BadInput(f"naming and base are an adapter's: they mean nothing for to={to!r}")
    tree, notes = prepare(pre, to, merge, kind := file_dtype(pre, dtype))
    written = writer(pre, tree, {"dtype": kind, "naming": naming or "5", "base": base})
    with whole(where) as local:
        write_weights(local / written.weights, written.tensors, kind)
        for name, document in written.documents.items():
            write_json(local / name, document)
        if pre.tokenizer:
            pre.tokenizer.save(local / "tokenizer.json")
        # Of an adapter and its base together, so that both are proved.
        digest = open_source(str(local / written.weights), tower_of(pre)).digest()
        beside = sorted(file.name for file in local.iterdir() if file.name != written.weights)
        documents = {name: digest_of(local / name)() for name in beside}
        note = {"digest": digest, "documents": documents, "exported": to}
        pool = {"pool": pre.model.pool} if hasattr(pre.model, "pool") else {}
        write_json(local / NOTE, note | pool)
        parameters = sum(tensor.size for tensor in written.tensors.values())
        facts = pre.record | {"notes": [*notes, *written.notes]}
        text = make_card(where.name, to, parameters, facts, **written.use)
        write_text(local / "README.md", text)
        prove(replace(pre, variables=tree), local, written, kind)
    for note in facts["notes"]:
        print(note)
    return where


def require_new(folder: Place) -> None:
    """Raise BadInput for a folder that something would be lost in, or that cannot be made."""
    if "\0" in str(folder):
        raise BadInput(f"{str(folder)!r} is no name of a folder")
    link = not in_store(folder) and os.path.islink(folder)
    if link or (folder.exists() and (not folder.is_dir() or names(folder))):
        raise BadInput(f"{folder} is there already: name a new folder")
    if in_store(folder):
        return
    above = next(parent for parent in folder.parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise BadInput(f"{folder} cannot be made: {above} is no folder that you may write to")


def require_complete(pre: Pretrained) -> None:
    """Raise BadInput for variables that are not the model's, or not finite."""
    if not isinstance(pre, Pretrained) or not isinstance(pre.variables, Mapping):
        raise BadInput("expected what tljax.load returns, its variables a dict of dicts")
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(pre.variables).items()}
    try:
        match(unflatten(leaves), target_of(pre.model, pre.variables))
    except BadInput as error:
        raise BadInput(f"these are not the variables of the model: {error}") from None
    for path, leaf in leaves.items():
        if not jnp.issubdtype(leaf.dtype, jnp.number) or not all_finite(leaf):
            raise BadInput(f"{path} ({leaf.dtype}) holds no numbers, or NaN or infinity")


def file_dtype(pre: Pretrained, name: str | None) -> Any:
    """Return the type of the file's numbers: as asked, else the source's if it has but one."""
    if name:
        return DTYPES[NAMES[choose({n: n for n in NAMES}, name, "dtype")]]
    kinds = {np.dtype(leaf.dtype) for leaf in flatten(pre.source.tree).values()}
    return kinds.pop() if len(kinds) == 1 else np.float32


def prepare(pre: Pretrained, to: str, merge: bool, kind: Any) -> tuple[Tree, list[str]]:
    """Return the tree to write, rounded to the file's type, and what rounding a fold cost.

    Raises: BadInput for a LoRA that the format cannot hold, or none where it is wanted.
    """
    grafted = is_grafted(pre.variables)
    if to == "peft" and (merge or not grafted):
        raise BadInput("--to=peft writes a LoRA: " + ("leave --merge out" if grafted else "none"))
    if to != "peft" and grafted and not merge:
        raise BadInput(
            f"--to={to} has no place for what is grafted (LoRA, quantised kernels, ..): fold it "
            "with --merge, or write LoRA with --to=peft"
        )
    if merge and not grafted:
        raise BadInput("there is no LoRA, nor anything else, to fold: leave --merge out")
    tree = fold(pre.variables) if merge else pre.variables
    if to == "peft":  # its base stays as it is
        return tree, []
    cast = map_with_path(lambda path, x: rounded(path, x, kind), tree)
    if not merge:
        return cast, []
    lost = fold_errors(pre.variables, tree, cast, np.dtype(kind).name)
    return cast, [*lost, fold_drift(pre, tree)]


def fold_drift(pre: Pretrained, tree: Tree) -> str:
    """Say how far the outputs of the folded model lie from those of the unfolded one."""
    inputs = fixture_inputs(pre.model)
    before, after = (outputs(pre.model, variables, inputs) for variables in (pre.variables, tree))
    drifts = {k: np.abs(after[k] - x).max() / np.abs(x).max() for k, x in before.items() if x.any()}
    worst = max(drifts, key=lambda name: drifts[name])
    return f"folding changes the outputs by {drifts[worst]:.2g} of the largest at most ({worst})"


def rounded(path: str, leaf: Any, kind: Any) -> np.ndarray:
    """Round a leaf as the file will; raises BadInput if a number becomes infinite."""
    array = np.asarray(leaf, np.float32)
    with np.errstate(over="ignore"):
        cast = array.astype(kind).astype(np.float32)
    if not all_finite(cast):
        largest = np.abs(array).max()
        raise BadInput(f"{path} holds {largest:.3g}: more than {np.dtype(kind).name} can")
    return cast


def fold_errors(before: Tree, exact: Tree, rounded: Tree, name: str) -> list[str]:
    """Say how much of every LoRA's update is lost where its sum with the kernel is rounded."""
    old, new, cast = flatten(before), flatten(exact), flatten(rounded)
    lost = {}  # percent
    modules = [path.removesuffix("/lora/a") for path in old if path.endswith("/lora/a")]
    weights = {f"{path}/{name}": path for path in modules for name in WEIGHTS}
    for kernel in weights.keys() & old.keys():  # of a quantised one the sum is all there is
        path = weights[kernel]
        update = np.linalg.norm(new[kernel] - old[kernel])
        missed = np.linalg.norm(cast[kernel] - new[kernel])
        lost[path] = 100 * float(missed) / max(float(update), 1e-30)
    folded = f"LoRA folded into {len(lost)} kernels in float32"
    if name == "float32" or not lost:
        return [f"{folded}, the file's type: their sums are rounded no further"]
    worst, mean = max(lost, key=lambda path: lost[path]), np.mean([*lost.values()])
    return [
        f"{folded}; rounding the sums to {name} changes the updates by {mean:.3g} % of their norm "
        f"in the mean, {lost[worst]:.3g} % at most ({worst})"
    ]


@contextmanager
def whole(folder: Place) -> Iterator[Path]:
    """Give a temporary folder; it takes the folder's place when all went well.

    It is beside the folder; for one in an object store it is on this disk, and uploaded.
    """
    if in_store(folder):
        with on_disk(folder) as local:
            yield local
        return
    local = Path(folder.with_name(f".{folder.name}.{os.getpid()}"))
    local.mkdir(parents=True)  # an error if it is there: it would be somebody else's
    try:
        yield local
        if folder.exists():
            os.rmdir(folder)  # it is empty
        local.rename(folder)
    except BadInput as error:
        raise BadInput(str(error).replace(str(local), str(folder))) from None
    finally:
        shutil.rmtree(local, ignore_errors=True)


def write_weights(path: Path, tensors: Mapping[str, np.ndarray], kind: Any) -> None:
    """Write the tensors, numbers with fractions in the file's type."""
    fractions = {name: np.issubdtype(x.dtype, np.floating) for name, x in tensors.items()}
    cast = {
        name: np.array(x, kind if fractions[name] else x.dtype, order="C")
        for name, x in tensors.items()
    }
    if path.suffix == ".npz":
        npz.write_npz(path, cast)
    else:
        safetensors.numpy.save_file(cast, path, metadata={"format": "pt"})
        path.chmod(path.parent.stat().st_mode & 0o666)  # the library lets nobody else read it


def prove(pre: Pretrained, place: Path, written: Written, kind: Any) -> None:
    """Write inputs with their outputs beside the weights, and compare what the folder gives.

    Raises: BadInput if the folder, opened again, gives something else.
    """
    inputs = fixture_inputs(pre.model)
    again = load(place / written.weights, tower=tower_of(pre))
    read = flatten(again.variables)

    def as_written(path: str, leaf: Any) -> np.ndarray:  # an adapter's base is not rounded
        cast = rounded(path, leaf, kind)
        return cast if path in read and np.array_equal(read[path], cast) else leaf

    variables = map_with_path(as_written, pre.variables)
    expected = outputs(pre.model.clone(dtype=again.model.dtype), variables, inputs)
    safetensors.numpy.save_file(inputs | expected, place / FIXTURE)
    if name := differing(outputs(again.model, again.variables, inputs), expected):
        base = written.use.get("base")
        why = f": is {base} what it was trained on, and is all that was trained LoRA or head?"
        raise BadInput(
            f"the exported folder gives other {name}, nothing was written{why if base else ''}"
        )


def tower_of(pre: Pretrained) -> str | None:
    """Return which tower of a CLIP it is, as `load` asks when a folder holds both."""
    kind = pre.source.kind
    return kind.split("_")[1] if kind.startswith("clip_") else None


def fields_of(pre: Pretrained) -> dict[str, Any]:
    """Return the fields of a whole model; raises BadInput for one that is cut at a block."""
    if getattr(pre.model, "read", None) is not None:
        raise BadInput(
            f"a model read at {pre.model.read} is no whole model elsewhere: load or train it "
            "without `read` to export it"
        )
    names = MODELS[pre.source.arch].__dataclass_fields__.keys() - OURS
    return {name: getattr(pre.model, name) for name in sorted(names)}


def kind_in_hf(pre: Pretrained, fields: Mapping[str, Any]) -> str:
    """Return the type of model in transformers: the one it came as, else by its fields."""
    kept = pre.source.format in ("hf", "peft") and pre.source.kind in hf.ARCHS
    return pre.source.kind if kept else kind_of(pre.source.arch, fields)


def to_transformers(pre: Pretrained, tree: Tree, options: Mapping[str, Any]) -> Written:
    """Lay a model out as transformers' save_pretrained does."""
    fields = fields_of(pre)
    kind = kind_in_hf(pre, fields)
    name, leaves = hf.file_of(kind, fields)
    held = {leaf.ours for leaf in leaves}
    kept = {path: leaf for path, leaf in flatten(tree).items() if path in held}
    tensors = to_foreign(unflatten(kept), leaves, fields)
    tensors |= hf.fillers(kind, tensors, fields.get("width", 0))
    config = to_config(
        pre.source.arch, fields, pre.labels, kind, dtype=np.dtype(options["dtype"]).name
    )
    documents = {"config.json": config}
    left = sorted(flatten(tree).keys() - held)  # a pooler that nothing reads
    notes = tuple(f"{path} is left out: {name} does not read it" for path in left)
    if pre.preprocess:
        own = asdict(pre.preprocess)
        documents["preprocessor_config.json"] = to_hf(own)
        notes += tuple(filter(None, [shift(own, "hf")]))
    return Written(tensors, "model.safetensors", documents, notes, {"auto": name})


def to_timm_folder(pre: Pretrained, tree: Tree, _: Mapping[str, Any]) -> Written:
    """Lay a model out as timm's save_for_hf does."""
    fields, own = fields_of(pre), asdict(pre.preprocess) if pre.preprocess else None
    config = timm.to_timm_config(pre.source.arch, fields, pre.labels, own)
    notes = tuple(filter(None, [shift(own, "timm")])) if own else ()
    tensors = to_foreign(tree, timm.spell(fields), fields)
    return Written(tensors, "model.safetensors", {"config.json": config}, notes)


def to_big_vision(pre: Pretrained, tree: Tree, _: Mapping[str, Any]) -> Written:
    """Lay a model out as big_vision's checkpoints are."""
    notes = []
    if pre.labels:
        notes.append("an .npz has no place for the names of the labels: they are left out")
    own = pre.preprocess
    if own and (own.mean, own.std) != ((0.5,) * 3, (0.5,) * 3):
        notes.append(
            "big_vision's pictures lie in [-1, 1], this model's do not, and an .npz cannot say so: "
            f"mean={own.mean}, std={own.std}"
        )
    return Written(npz.to_npz(tree, fields_of(pre)), "model.npz", notes=tuple(notes))


def to_adapter(pre: Pretrained, tree: Tree, options: Mapping[str, Any]) -> Written:
    """Lay the LoRA out as PEFT's save_pretrained does."""
    fields = fields_of(pre)
    named, naming = options["base"] or base_name(pre), options["naming"]
    config_of = choose({"4": "4", "5": "5"}, naming, "naming")
    tensors, config = peft.to_peft(tree, kind_in_hf(pre, fields), fields, named, naming=config_of)
    auto = config["auto_mapping"]["base_model_class"]
    documents = {"adapter_config.json": config}
    return Written(tensors, ADAPTER, documents, use={"auto": auto, "base": named})


def base_name(pre: Pretrained) -> str:
    """Return name or path of the model that a LoRA was trained on, in transformers' format.

    Raises: BadInput if there is none that PEFT could open.
    """
    config, form = pre.source.config, pre.source.format
    bases = {"peft": config.get("base"), "run": config.get("config", {}).get("weights")}
    named = bases.get(form, pre.origin)
    found = open_source(named, tower_of(pre)) if named else None
    if found is None or found.format != "hf":
        raise BadInput(
            f"the LoRA's base is {named or 'random'}, not a model of transformers: export it first "
            f"(tljax export {named or 'RUN'} BASE --to=hf) and say --base=BASE"
        )
    local = named in ASSETS or Path(named).exists()
    return str(Path(found.origin).parent.absolute()) if local else named


ARCHS = {"hf": tuple(MODELS), "peft": tuple(MODELS), "timm": IMAGES, "npz": IMAGES}
"""What the formats have models of."""
WRITERS: Mapping[str, Callable[[Pretrained, Tree, Mapping[str, Any]], Written]] = {
    "hf": to_transformers,
    "timm": to_timm_folder,
    "npz": to_big_vision,
    "peft": to_adapter,
}
