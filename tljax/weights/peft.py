"""LoRA adapters in PEFT's format <-> LoRA leaves of tljax trees.

An adapter names modules as the transformers that trained it did in memory.  Version 5 renamed some
of them, while the files of whole models keep the names of 4.x: both namings are read and written.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from tljax.tree import flatten, nearest, unflatten
from tljax.types import BadInput, Tree
from tljax.weights.files import Tensors, open_safetensors, read_json, start_digest
from tljax.weights.hf import HF, HF5, PREFIXES, file_of, unread
from tljax.weights.table import HEADS, Leaf, to_foreign, to_tljax

ROOT = "base_model.model."
"""What PEFT puts before the name of every module."""
PLAIN = replace(HF, ignored={}, tied={}, renamed={})  # an adapter holds nothing to leave out
FORMATS = {"5": HF5, "4": HF}
"""Major version of transformers -> names that it has in memory."""
FRESH = ("head", "teacher", "sequence")  # sections that a base model need not have
PEFT_VERSION = "0.21.2"  # that the tests open adapters with


def _leaves_the_base_alone(value: Any) -> Any:
    if value not in (True, False, None, "gaussian", "eva", "orthogonal", "mica"):
        raise ValueError(
            "this start moves the base weights too, so the factors alone are not what was trained; "
            "in torch, save_pretrained(.., path_initial_model_for_weight_conversion=..) turns the "
            "adapter into plain LoRA"
        )
    return value


Rank = Annotated[int, Field(gt=0)]
Alpha = Annotated[float, Field(ge=-1e6, le=1e6)]


class Settings(BaseModel):
    """What tljax reads of an adapter_config.json; of anything else only that it is off."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)
    peft_type: Literal["LORA"]
    base_model_name_or_path: str | None = None
    r: Rank = 8
    lora_alpha: Alpha = 8
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: Literal["none"] = "none"
    init_lora_weights: Annotated[Any, AfterValidator(_leaves_the_base_alone)] = True
    # Which of the targets have factors: the tensors say so themselves.
    exclude_modules: Any = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    # Of no effect on what the adapter computes.
    task_type: Any = None
    auto_mapping: Any = None
    revision: Any = None
    peft_version: Any = None
    inference_mode: Any = None
    eva_config: Any = None
    megatron_core: Any = None
    qalora_group_size: Any = None

    def targets(self, module: str) -> bool:
        """Tell whether a list of targets names a module; a pattern is not judged."""
        if not isinstance(self.target_modules, list):
            return True
        return any(_ends(entry, module) for entry in self.target_modules)

    def targets_all(self) -> bool:
        """Tell whether every module of the encoder that is named must have factors."""
        partly = (self.exclude_modules, self.layers_to_transform)
        return isinstance(self.target_modules, list) and not any(
            x not in (None, []) for x in partly
        )

    def saves(self, tensor: str) -> list[str]:
        """List the entries of `modules_to_save` that a tensor lies below."""
        parts = tensor.split(".")
        above = [".".join(parts[:end]) for end in range(1, len(parts))]
        return [x for x in self.modules_to_save or () if any(path.endswith(x) for path in above)]


@dataclass(frozen=True)
class Adapter:
    """An adapter's tensors, not read yet, under the names of its file, and its settings."""

    origin: str
    tensors: Tensors
    settings: Settings
    digest: Callable[[], str]  # SHA-256 of the weights file, computed in the background


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
    settings = _parse(read_json(config), str(config))
    tensors, _ = open_safetensors(weights)
    return Adapter(str(weights), tensors, settings, start_digest(weights))


def _parse(values: Mapping[str, Any], origin: str) -> Settings:
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place, reason = str(first["loc"][0]), first["msg"].removeprefix("Value error, ")
        given = f"={values[place]!r:.80}" if place in values else ""
        raise BadInput(f"{origin}: {place}{given}: {reason}") from None
    empty: tuple[Any, ...] = (None, False, {}, [])
    on = [
        f"{name:.80}={x!r:.80}"
        for name, x in (settings.model_extra or {}).items()
        if x not in empty
    ]
    if on:
        raise BadInput(f"{origin}: {', '.join(on[:3])}: tljax reads LoRA, rsLoRA and DoRA only")
    for pattern in [*(settings.rank_pattern or ()), *(settings.alpha_pattern or ())]:
        if not pattern.removeprefix("^").replace(".", "").replace("_", "").isalnum():
            raise BadInput(
                f"{origin}: {pattern!r:.80} in rank_pattern or alpha_pattern is no name of a "
                "module; tljax reads names there, or their last parts, and no patterns"
            )
    return settings


def _ends(entry: str, module: str) -> bool:
    """Tell whether an entry is the name of a module, or whole parts at its end."""
    return f".{module}".endswith(f".{entry}")


def _chosen(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Return the value of the first pattern that names a module; "^" binds it to the start."""
    for pattern, value in (patterns or {}).items():
        whole = pattern.startswith("^")
        if module == pattern[1:] if whole else _ends(pattern, module):
            return value
    return default


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
    dense = {module for module, _ in _factors(table, False)}
    for name in sorted(adapter.tensors):
        module, lora, _ = name.removeprefix(ROOT).partition(".lora_")
        if (
            lora
            and module not in dense
            and any(x.foreign.startswith(f"{ROOT}{module}.") for x in table)
        ):
            raise BadInput(f"{origin}: {name} is LoRA on what is no dense layer")
    names = {leaf: settings.saves(leaf.foreign.removeprefix(ROOT)) for leaf in table}
    for entry in settings.modules_to_save or ():
        below = [leaf.foreign for leaf in table if entry in names[leaf]]
        if below and not adapter.tensors.keys() & set(below):
            raise BadInput(f"{origin}: modules_to_save names {entry!r}, but there is no {below[0]}")
    return leaves + [leaf for leaf in table if names[leaf]]


def graft_adapter(tree: Tree, adapter: Adapter, kind: str, fields: Mapping[str, Any]) -> Tree:
    """Add the adapter's factors beside their kernels, and put in the modules it saved whole.

    `{kernel}  ->  {kernel, lora: {a, b, scale, rate}}`, with `magnitude` for DoRA.  scale is
    alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, arXiv 2312.03732, theorem 3.2).
    `kind` and `fields` are those of the base model in Hugging Face's words and in ours.
    Raises: BadInput for a tensor that has no place, is missing, or does not fit its kernel.
    """
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
            new |= _scalars(adapter, module, rank, own)
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


def _scalars(adapter: Adapter, module: str, rank: int, own: str) -> dict[str, np.ndarray]:
    settings = adapter.settings
    told = _chosen(settings.rank_pattern, module, settings.r)
    if rank != told:
        raise BadInput(
            f"{adapter.origin}: the factors of {module} are of rank {rank}, "
            f"but r and rank_pattern of its adapter_config.json say {told}"
        )
    alpha = _chosen(settings.alpha_pattern, module, settings.lora_alpha)
    scale = alpha / (sqrt(rank) if settings.use_rslora else rank)
    scalars = {"scale": scale, "rate": settings.lora_dropout}
    return {f"{own}/{name}": np.asarray(x, np.float32) for name, x in scalars.items()}


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
    config = _describe({m: x[0].ours.removesuffix("/a") for m, x in factors.items()}, lora)
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


def _describe(places: Mapping[str, str], lora: Mapping[str, Any]) -> dict[str, Any]:
    """Make an adapter_config.json for modules and where their factors lie."""
    ranks = {module: lora[f"{own}/a"].shape[1] for module, own in places.items()}
    alphas = {m: _alpha(float(lora[f"{own}/scale"]), ranks[m]) for m, own in places.items()}
    rates = sorted({float(np.float32(lora[f"{own}/rate"])) for own in places.values()})
    if len(rates) > 1:
        raise BadInput(f"an adapter has one dropout rate; the tree has {rates}")
    rank, alpha = (Counter(x.values()).most_common(1)[0][0] for x in (ranks, alphas))
    return {
        "peft_type": "LORA", "peft_version": PEFT_VERSION, "task_type": None, "bias": "none",
        "r": rank, "rank_pattern": {m: x for m, x in ranks.items() if x != rank},
        "lora_alpha": alpha, "alpha_pattern": {m: x for m, x in alphas.items() if x != alpha},
        "lora_dropout": float(str(np.float32(rates[0]))), "use_rslora": False,
        "target_modules": sorted(places), "fan_in_fan_out": False, "init_lora_weights": True,
        "inference_mode": True, "revision": None,
    }  # fmt: skip


def _alpha(scale: float, rank: int) -> float:
    """Return the alpha that gives this scale, a whole one if there is."""
    whole = round(scale * rank)
    return whole if np.float32(whole / rank) == np.float32(scale) else scale * rank
