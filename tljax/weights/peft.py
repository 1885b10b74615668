"""LoRA adapters in PEFT's format <-> LoRA leaves of tljax trees.

An adapter names modules as the transformers that trained it did in memory.  Version 5 renamed some
of them, while the files of whole models keep the names of 4.x: both namings are read and written.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tljax.tree import flatten, nearest, unflatten
from tljax.types import BadInput, Tree
from tljax.weights.files import Tensors, digest_of, open_safetensors, read_json
from tljax.weights.hf import ARCHS, HF, HF5, PREFIXES, file_of, unread
from tljax.weights.peft_config import Settings, describe, parse
from tljax.weights.table import HEADS, Leaf, to_foreign, to_tljax

ROOT = "base_model.model."
"""What PEFT puts before the name of every module."""
PLAIN = replace(HF, ignored={}, tied={}, renamed={})  # an adapter holds nothing to leave out
FORMATS = {"5": HF5, "4": HF}
"""Major version of transformers -> names that it has in memory."""
FRESH = ("head", "teacher", "sequence")  # sections that a base model need not have


@dataclass(frozen=True)
class Adapter:
    """An adapter's tensors, not read yet, under the names of its file, and its settings."""

    origin: str
    tensors: Tensors
    settings: Settings
    digest: Callable[[], str]  # computes SHA-256 of the weights file


def base_of(adapter: Adapter) -> str | None:
    """Return the name or the folder of the model that the adapter was trained on."""
    return adapter.settings.base_model_name_or_path


def class_of(adapter: Adapter) -> list[str]:
    """Name the class of transformers that the adapter was trained on, as far as it says so."""
    mapping = adapter.settings.auto_mapping
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    tagger = adapter.settings.task_type == "TOKEN_CLS"
    return [name] if isinstance(name, str) else ["ForTokenClassification"] * tagger


def read_adapter(folder: str | Path) -> Adapter:
    """Open a folder with adapter_config.json and adapter_model.safetensors.

    Raises: BadInput for a file that is missing or damaged, and for an adapter of another method.
    """
    weights, config = Path(folder, "adapter_model.safetensors"), Path(folder, "adapter_config.json")
    for path in (config, weights):
        if not path.is_file():
            there = sorted(x.name for x in Path(folder).iterdir()) if Path(folder).is_dir() else []
            pickled = "adapter_model.bin" in there and path == weights
            raise BadInput(
                f"{folder} has no {path.name}; it holds: {', '.join(there[:8]) or 'nothing'}"
                + ("\nadapter_model.bin is a pickle, which is never opened" * pickled)
            )
    settings = parse(read_json(config), str(config))
    tensors, _ = open_safetensors(weights)
    parts = [name.removeprefix(ROOT).partition(".lora_") for name in tensors]
    modules = [module for module, lora, _ in parts if lora]
    if dead := settings.dead(modules):
        raise BadInput(
            f"{config}: {dead[0]!r:.80} in rank_pattern or alpha_pattern names no module with "
            f"LoRA (nearest: {nearest(dead[0], modules)})"
        )
    return Adapter(str(weights), tensors, settings, digest_of(weights))


def _below_root(leaves: Iterable[Leaf]) -> list[Leaf]:
    return [leaf._replace(foreign=ROOT + leaf.foreign) for leaf in leaves]


def _factors(table: Iterable[Leaf], dora: bool) -> list[tuple[str, tuple[Leaf, ...]]]:
    """List every dense module with the leaves of its LoRA."""
    found = []
    for leaf in table:
        if leaf.pattern == "o i -> i o" and leaf.part is None:
            module, ours = leaf.foreign.removesuffix(".weight"), leaf.ours.removesuffix("/kernel")
            rows = [("lora_A.weight", "a", "r i -> i r"), ("lora_B.weight", "b", "o r -> r o")]
            rows += [("lora_magnitude_vector", "magnitude", None)] * dora
            leaves = (
                Leaf(leaf.section, f"{module}.{x}", f"{ours}/lora/{y}", p) for x, y, p in rows
            )
            found.append((module.removeprefix(ROOT), tuple(leaves)))
    return found


def _check_kind(kind: str) -> None:
    if kind not in ARCHS:
        raise BadInput(f"adapters are for models of transformers: {', '.join(ARCHS)}; not {kind!r}")


def _recognise(adapter: Adapter, kind: str, fields: Mapping[str, Any]) -> list[Leaf]:
    """Return the table of the naming in which the adapter is written.

    Raises: BadInput if it names no module of such a model in any.
    """
    prefixes = "", PREFIXES[kind]
    tables = [_below_root(f.spell(kind, fields, p)) for f in FORMATS.values() for p in prefixes]

    def known(table: list[Leaf]) -> int:
        factors = {leaf.foreign for _, leaves in _factors(table, True) for leaf in leaves}
        return len(adapter.tensors.keys() & factors)

    table = max(tables, key=known)
    if not known(table):
        given = next(iter(sorted(adapter.tensors)), "nothing")
        names = [leaf.foreign for t in tables for _, leaves in _factors(t, True) for leaf in leaves]
        raise BadInput(
            f"{adapter.origin}: no LoRA of a dense layer of {kind}; it holds {given} "
            f"(nearest: {nearest(given, names)})\nwas it trained on another architecture?"
        )
    return table


def _expected(adapter: Adapter, table: list[Leaf]) -> list[Leaf]:
    """List the leaves that the adapter may hold; in section "body" those that it must.

    Raises: BadInput for factors that the settings do not name, and the other way about.
    """
    _refuse_elsewhere(adapter, table)
    settings, origin = adapter.settings, adapter.origin
    leaves = []
    for module, factors in _factors(table, settings.use_dora):
        saved, named = settings.saves(f"{module}.weight"), settings.targets(module)
        must = factors[0].section == "body" and settings.targets_all() and named and not saved
        if not named and any(leaf.foreign in adapter.tensors for leaf in factors):
            raise BadInput(
                f"{origin}: {factors[0].foreign} is there, but target_modules of its "
                f"adapter_config.json names {', '.join(settings.target_modules)} only"
            )
        section = "body" if must else f"LoRA of {module}"
        leaves += [leaf._replace(section=section) for leaf in factors]
    names = {leaf: settings.saves(leaf.foreign.removeprefix(ROOT)) for leaf in table}
    for entry in settings.modules_to_save or ():
        below = [leaf.foreign for leaf in table if entry in names[leaf]]
        if below and not adapter.tensors.keys() & set(below):
            raise BadInput(f"{origin}: modules_to_save names {entry!r}, but there is no {below[0]}")
    return leaves + [leaf for leaf in table if names[leaf]]


def _refuse_elsewhere(adapter: Adapter, table: list[Leaf]) -> None:
    """Raise BadInput for LoRA on embeddings, convolutions or norms."""
    dense = {module for module, _ in _factors(table, False)}
    modules = {leaf.foreign.removeprefix(ROOT).rpartition(".")[0] for leaf in table}
    for name in sorted(adapter.tensors):
        if name.removeprefix(ROOT).partition(".lora_")[0] in modules - dense:
            raise BadInput(f"{adapter.origin}: {name} is LoRA on what is no dense layer")


def graft_adapter(tree: Tree, adapter: Adapter, kind: str, fields: Mapping[str, Any]) -> Tree:
    """Add the adapter's factors beside their kernels, and put in the modules it saved whole.

    `{kernel}  ->  {kernel, lora: {a, b, scale}}`, with `magnitude` for DoRA and `rate` for dropout.
    `kind` is the base model's type in transformers; `fields` are its own with us, heads or none.
    Raises: BadInput for a tensor that has no place, is missing, or does not fit its kernel.
    """
    _check_kind(kind)
    adapter = _without_others(adapter, kind)
    table = _recognise(adapter, kind, fields)
    leaves = _expected(adapter, table)
    found, _ = to_tljax(adapter.tensors, tuple(leaves), PLAIN, adapter.origin)
    new, old = flatten(found), flatten(tree)
    if len(new) < len(adapter.tensors):
        raise BadInput(f"{adapter.origin}: two of its tensors are for the same leaf of tljax's")
    for leaf in table:
        if leaf.foreign in adapter.tensors:
            _check_saved(leaf, new, old, adapter.origin)
    for module, (first, *_) in _factors(table, False):
        if first.foreign in adapter.tensors:
            own = first.ours.removesuffix("/a")
            rank = _check_factors(own, new, old, f"{adapter.origin}: {first.foreign}")
            if rank != (told := adapter.settings.rank_of(module)):
                raise BadInput(
                    f"{adapter.origin}: {first.foreign} is of rank {rank}, "
                    f"but r and rank_pattern of its adapter_config.json say {told}"
                )
            new[f"{own}/scale"] = np.float32(adapter.settings.scale_of(module))
            if rate := adapter.settings.lora_dropout:
                new[f"{own}/rate"] = np.float32(rate)
    return unflatten(old | {path: np.asarray(leaf) for path, leaf in new.items()})


def _without_others(adapter: Adapter, kind: str) -> Adapter:
    """Leave out what belongs to the other tower of a CLIP."""
    other = unread(kind, [name.removeprefix(ROOT) for name in adapter.tensors])
    own = {name: x for name, x in adapter.tensors.items() if name.removeprefix(ROOT) not in other}
    return replace(adapter, tensors=own)


def _check_saved(leaf: Leaf, new: Mapping[str, Any], old: Mapping[str, Any], origin: str) -> None:
    """Raise BadInput if a leaf of a module that was saved whole does not fit the base."""
    if leaf.ours not in old:
        return
    given, there = new[leaf.ours].shape, old[leaf.ours].shape
    # A head may come with another number of classes; all else fits the base as it is.
    cut = -1 if leaf.section in HEADS else None
    if given[:cut] != there[:cut]:
        raise BadInput(
            f"{origin}: {leaf.foreign} would give {leaf.ours} the shape {given}, "
            f"the base model has {there}"
        )


def _check_factors(own: str, new: Mapping[str, Any], old: Mapping[str, Any], origin: str) -> int:
    """Return the rank of factors that fit their kernel."""
    kernel = own.removesuffix("lora") + "kernel"
    if kernel not in old:
        raise BadInput(f"{origin} is there, but the base model has no {kernel}")
    if f"{own}/a" in old:
        raise BadInput(f"{origin} is there, but the model has a {own} already: merge that first")
    (rows, columns), rank = old[kernel].shape, new[f"{own}/a"].shape[1]
    wanted = {"a": (rows, rank), "b": (rank, columns), "magnitude": (columns,)}
    for name, shape in wanted.items():
        leaf = new.get(f"{own}/{name}")
        if leaf is not None and leaf.shape != shape:
            raise BadInput(
                f"{origin}: {own}/{name} would have the shape {leaf.shape}, expected {shape} "
                f"beside a kernel of {rows} x {columns}"
            )
    return rank


def to_peft(
    tree: Tree,
    kind: str,
    fields: Mapping[str, Any],
    base: str | None,
    *,
    naming: Literal["4", "5"] = "5",
    saved: Sequence[str] = (),
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Name and lay out the LoRA leaves of a tree, and make their adapter_config.json.

    A head without factors goes out whole, and so does what lies below the paths in `saved`; what
    else differs from the model named `base` is lost.  `fields` are those of the model with its
    heads, which tell the class of transformers.  rsLoRA goes out as LoRA of the same scale.
    Raises: BadInput for what an adapter has no place for.
    """
    _check_kind(kind)
    values = flatten(tree)
    lora = {path: x for path, x in values.items() if path.split("/")[-2] == "lora"}
    if not lora:
        raise BadInput("the tree has no LoRA: nothing to make an adapter of")
    cls, table = _in_memory(kind, fields, naming, values.keys() - lora)
    dora = any(path.endswith("/magnitude") for path in lora)
    factors = {m: x for m, x in _factors(table, dora) if x[0].ours in lora}
    whole = _saved(table, values, saved)
    leaves = [leaf for group in [*factors.values(), *whole.values()] for leaf in group]
    chosen = {path: x for path, x in lora.items() if not path.endswith(("/scale", "/rate"))}
    chosen |= {leaf.ours: values[leaf.ours] for group in whole.values() for leaf in group}
    tensors = to_foreign(unflatten(chosen), tuple(leaves), fields)
    config = describe({m: x[0].ours.removesuffix("/a") for m, x in factors.items()}, lora)
    config |= {"base_model_name_or_path": base, "modules_to_save": sorted(whole) or None}
    config |= {"auto_mapping": {"base_model_class": cls, "parent_library": "transformers"}}
    return tensors, config | {"use_dora": dora}


def _in_memory(
    kind: str, fields: Mapping[str, Any], naming: str, paths: set[str]
) -> tuple[str, list[Leaf]]:
    """Choose the class of transformers, and name the leaves at these paths as it does in memory."""
    cls, leaves = file_of(kind, fields, FORMATS[naming])
    if unknown := sorted(paths - {leaf.ours for leaf in leaves}):
        raise BadInput(f"transformers' {cls} has no place for {unknown[0]} of the tree")
    leaves = tuple(leaf for leaf in leaves if leaf.ours in paths)
    # A model without a head is a base as it is; in 4.x CLIP's towers are parts even so.
    if not any(leaf.section in HEADS for leaf in leaves):
        cls = f"{cls.removesuffix('Model').partition('For')[0]}Model"
        cut = PREFIXES[kind] if naming == "5" or not kind.startswith("clip") else ""
        leaves = tuple(leaf._replace(foreign=leaf.foreign.removeprefix(cut)) for leaf in leaves)
    return cls, _below_root(leaves)


def _saved(
    table: list[Leaf], values: Mapping[str, Any], saved: Sequence[str]
) -> dict[str, list[Leaf]]:
    """Group the leaves that go out whole by their module."""
    for path in saved:
        if not any(f"{leaf.ours}/".startswith(f"{path}/") for leaf in table):
            near = nearest(path, [leaf.ours for leaf in table])
            raise BadInput(f"{path} is to be saved, but is no part of the tree (nearest: {near})")
    found: dict[str, list[Leaf]] = {}
    for leaf in table:
        named = any(f"{leaf.ours}/".startswith(f"{path}/") for path in saved)
        factors = f"{leaf.ours.rpartition('/')[0]}/lora/a" in values
        if named and factors:
            raise BadInput(f"{leaf.ours} is to be saved whole, but has factors: merge them first")
        if named or (leaf.section in FRESH and not factors):
            found.setdefault(leaf.foreign.rpartition(".")[0], []).append(leaf)
    for module, leaves in found.items():
        if others := [x for x in table if x.foreign.startswith(f"{module}.") and x not in leaves]:
            raise BadInput(
                f"{leaves[0].ours} cannot be saved alone: PEFT saves modules whole, "
                f"and {module} holds {others[0].foreign} as well"
            )
    return {module.removeprefix(ROOT): leaves for module, leaves in found.items()}
