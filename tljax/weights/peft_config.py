"""PEFT's adapter_config.json: checked on the way in, made on the way out."""

from collections import Counter
from collections.abc import Collection, Mapping
from math import sqrt
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from tljax.types import BadInput

PEFT_VERSION = "0.21.2"
"""The version that the tests open adapters with."""


def _ends(entry: str, module: str) -> bool:
    """Tell whether an entry is the name of a module, or whole parts at its end."""
    return f".{module}".endswith(f".{entry}")


def _names(pattern: str, module: str) -> bool:
    """Tell whether a pattern is the name of a module, or its end; "^" binds it to the start."""
    return module == pattern[1:] if pattern.startswith("^") else _ends(pattern, module)


def _chosen(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    found = (value for pattern, value in (patterns or {}).items() if _names(pattern, module))
    return next(found, default)


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
        partly = self.exclude_modules not in (None, []) or self.layers_to_transform is not None
        return isinstance(self.target_modules, list) and not partly

    def saves(self, tensor: str) -> list[str]:
        """List the entries of `modules_to_save` that a tensor lies below."""
        parts = tensor.split(".")
        above = [".".join(parts[:end]) for end in range(1, len(parts))]
        return [x for x in self.modules_to_save or () if any(path.endswith(x) for path in above)]

    def dead(self, modules: Collection[str]) -> list[str]:
        """List the patterns that name none of the modules."""
        patterns = [*(self.rank_pattern or ()), *(self.alpha_pattern or ())]
        return [x for x in patterns if not any(_names(x, module) for module in modules)]

    def rank_of(self, module: str) -> int:
        """Return the rank that the factors of a module must have."""
        return _chosen(self.rank_pattern, module, self.r)

    def scale_of(self, module: str) -> float:
        """Return what the product of a module's factors is multiplied by.

        alpha / r, or for rsLoRA alpha / sqrt(r): Kalajdzievski 2023, arXiv 2312.03732, theorem 3.2.
        """
        alpha, rank = _chosen(self.alpha_pattern, module, self.lora_alpha), self.rank_of(module)
        return alpha / (sqrt(rank) if self.use_rslora else rank)


def parse(values: Mapping[str, Any], origin: str) -> Settings:
    """Check the contents of an adapter_config.json.

    Raises: BadInput naming `origin` and an option that is wrong, or that tljax does not have.
    """
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place, reason = str(first["loc"][0]), first["msg"].removeprefix("Value error, ")
        given = f"={values[place]!r:.80}" if place in values else ""
        raise BadInput(f"{origin}: {place}{given}: {reason}") from None
    empty: tuple[Any, ...] = (None, False, {}, [])
    rest = (settings.model_extra or {}).items()
    on = [f"{name:.80}={x!r:.80}" for name, x in rest if x not in empty]
    if on:
        raise BadInput(f"{origin}: {', '.join(on[:3])}: tljax reads LoRA, rsLoRA and DoRA only")
    for pattern in [*(settings.rank_pattern or ()), *(settings.alpha_pattern or ())]:
        if not pattern.removeprefix("^").replace(".", "").replace("_", "").isalnum():
            raise BadInput(
                f"{origin}: {pattern!r:.80} in rank_pattern or alpha_pattern is no name of a "
                "module; tljax reads names there, or their last parts, and no patterns"
            )
    return settings


def describe(places: Mapping[str, str], lora: Mapping[str, Any]) -> dict[str, Any]:
    """Say what is the modules' own in an adapter_config.json: `places` tells where factors lie.

    rsLoRA becomes LoRA of the same scale.
    Raises: BadInput if the modules' dropout rates differ.
    """
    ranks = {module: lora[f"{own}/a"].shape[1] for module, own in places.items()}
    alphas = {m: _alpha(float(lora[f"{own}/scale"]), ranks[m]) for m, own in places.items()}
    rates = sorted({float(np.float32(lora.get(f"{own}/rate", 0))) for own in places.values()})
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
