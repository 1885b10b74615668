"""timm's names, layouts and configurations <-> tljax trees and fields: ViT and ResNet.

What tensors do not show is taken from config.json where there is one, and else assumed by the rules
below; every assumption is named in `Source.assumed`, and a caller's fields win over it.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tljax.models import MODELS
from tljax.tree import matches
from tljax.types import BadInput
from tljax.weights.files import Tensors, digest_of, open_safetensors, read_json
from tljax.weights.hf import TORCH
from tljax.weights.preprocess import from_timm, to_timm
from tljax.weights.table import (
    Format,
    Leaf,
    Modules,
    Source,
    patch_of,
    settle,
    shape_of,
    square,
    to_tljax,
)

MODULES: Modules = {
    **TORCH,
    "bias": ((".bias", "params", "/bias", None),),
    "fused": ((".weight", "params", "/kernel", "(n o) i -> n i o"),),
    "fused_bias": ((".bias", "params", "/bias", "(n o) -> n o"),),
}
ROWS = """
vit           cls         cls_token            embed/cls                       leaf
vit           dist        dist_token           embed/dist                      leaf
vit           registers   reg_token            embed/registers                 leaf
vit           body        pos_embed            embed/pos                       leaf
vit           body        patch_embed.proj     embed/patch                     conv
vit           patch_bias  patch_embed.proj     embed/patch                     bias
vit           embed_norm  norm_pre             embed/norm                      norm
vit           body        {block}.norm1        blocks/{i}/norm1                norm
vit           body        {block}.attn.qkv     blocks/{i}/attention/{a}        fused
vit           qkv_bias    {block}.attn.qkv     blocks/{i}/attention/{a}        fused_bias
vit           qk_norm     {block}.attn.q_norm  blocks/{i}/attention/norm_query norm
vit           qk_norm     {block}.attn.k_norm  blocks/{i}/attention/norm_key   norm
vit           body        {block}.attn.proj    blocks/{i}/attention/out        dense
vit           scale       {block}.ls1.gamma    blocks/{i}/scale1/gamma         leaf
vit           body        {block}.norm2        blocks/{i}/norm2                norm
vit           body        {block}.mlp.fc1      blocks/{i}/mlp/up               dense
vit           body        {block}.mlp.fc2      blocks/{i}/mlp/down             dense
vit           scale       {block}.ls2.gamma    blocks/{i}/scale2/gamma         leaf
norm          body        norm                 norm                            norm
fc_norm       body        fc_norm              norm                            norm
vit           map         attn_pool.latent     map/probe                       leaf
vit           map         attn_pool.q          map/attention/query             dense
vit           map         attn_pool.kv         map/attention/key               fused
vit           map         attn_pool.kv         map/attention/value             fused
vit           map         attn_pool.kv         map/attention/key               fused_bias
vit           map         attn_pool.kv         map/attention/value             fused_bias
vit           map         attn_pool.proj       map/attention/out               dense
vit           map         attn_pool.norm       map/norm                        norm
vit           map         attn_pool.mlp.fc1    map/mlp/up                      dense
vit           map         attn_pool.mlp.fc2    map/mlp/down                    dense
vit           head        head                 head                            dense
vit           head_dist   head_dist            head_dist                       dense
imagenet      body        conv1                stem/conv                       conv
deep          body        conv1.0              stem/conv1                      conv
deep          body        conv1.1              stem/norm1                      batchnorm
deep          body        conv1.3              stem/conv2                      conv
deep          body        conv1.4              stem/norm2                      batchnorm
deep          body        conv1.6              stem/conv                       conv
imagenet,deep body        bn1                  stem/norm                       batchnorm
resnet        body        {block}.conv{n}      blocks/{i}/conv{n}              conv
resnet        body        {block}.bn{n}        blocks/{i}/norm{n}              batchnorm
conv          shortcut{i} {block}.downsample.0 blocks/{i}/shortcut/conv        conv
conv          shortcut{i} {block}.downsample.1 blocks/{i}/shortcut/norm        batchnorm
avg           shortcut{i} {block}.downsample.1 blocks/{i}/shortcut/conv        conv
avg           shortcut{i} {block}.downsample.2 blocks/{i}/shortcut/norm        batchnorm
resnet        head        fc                   head                            dense
"""
TIMM = Format(
    rows=ROWS,
    modules=MODULES,
    blocks=dict.fromkeys(("vit", "norm", "fc_norm"), "blocks.{i}")
    | dict.fromkeys(("resnet", "imagenet", "deep", "conv", "avg"), "layer{s1}.{j}"),
    ignored={"num_batches_tracked": "a counter that inference does not read"},
    tied={},
    renamed={},
)

KNOWN = ("vit_*", "deit*", "flexivit_*", "test_vit*", "resnet*", "tv_resnet*", "test_resnet")
REFUSED = {
    "vit_*_rpn_*": "norms after attention and MLP",
    "vit_pe_*": "rotary positions",
    "test_vit3": "pooling over class and register tokens",
    "resnetv2_*": "pre-activation blocks with timm's own names",
    "resnetaa*": "anti-aliasing",
    "resnetblur*": "anti-aliasing",
}
"""Architectures of other make than their tensors tell -> what tljax does not have."""
EXCEPTIONS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("*_clip_*", {"eps": 1e-5}),
    ("*_clip_quickgelu_*", {"activation": "quick_gelu"}),
    ("vit_giantopt_*", {"heads": 16, "activation": "gelu_tanh"}),
    ("vit_base_patch32_siglip_*", {"activation": "gelu_tanh"}),
    ("vit_large_patch16_siglip_*512", {"activation": "gelu_tanh"}),
    ("vit_so400m_patch16_siglip_*", {"activation": "gelu_tanh"}),
    ("vit_base_patch16_gap_224", {"heads": 16}),
    ("test_vit", {"heads": 2}),
    ("*_gap_*", {"pool": "mean"}),
)
"""Architecture -> fields that differ from the rules."""
SIXTEEN_HEADS = (1152, 1280, 1408, 1664)  # the widths of So400m, H, g and G
POOLS = {"token": "cls", "avg": "mean", "map": "map"}
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu")
ARGUMENTS = {
    "embed_dim": "width", "depth": "depth", "reg_tokens": "registers", "class_token": "class_token",
    "qkv_bias": "qkv_bias", "pre_norm": "embed_norm", "layers": "stages",
}  # fmt: skip
"""Arguments of timm's models that must agree with the tensors -> our field."""
HANDLED = {
    *ARGUMENTS, "num_heads", "act_layer", "norm_layer", "global_pool", "fc_norm", "mlp_ratio",
    "qk_norm", "init_values", "no_embed_class", "patch_size", "img_size", "in_chans", "num_classes",
    "dynamic_img_size", "strict_img_size", "weight_init", "fix_init", "stem_type", "stem_width",
    "avg_down", "channels", "zero_init_last", "final_norm", "proj_bias", "block",
}  # fmt: skip
"""Those that tensors show, that are read below, or that change no output."""


Facts = dict[str, Any]
Guesses = dict[str, tuple[Any, str]]


class Config(NamedTuple):
    """What a config.json says; without one, nothing."""

    architecture: str  # "" where it is not known
    arguments: Mapping[str, Any]
    weights: Mapping[str, Any]  # pretrained_cfg: pictures and labels
    pool: str
    origin: str


def open_timm(path: Path, given: Mapping[str, Any] | None = None) -> Source:
    """Open a safetensors file with timm's names, alone or beside its config.json.

    given: fields that win over what is told or assumed, such as heads or pool.
    Raises: BadInput for a file that is damaged, or of a model that tljax does not have.
    """
    path = path / "model.safetensors" if path.is_dir() else path
    origin, digest, given = str(path), digest_of(path), given or {}
    config = _read_config(path.with_name("config.json"))
    state, _ = open_safetensors(path)
    arch = "resnet" if any(name.startswith("layer1.") for name in state) else "vit"
    read = {"resnet": _read_resnet, "vit": _read_vit}[arch]
    told, assumed = read(state, config, given, origin)
    _compare(told, config)
    fields, lines = settle(told, assumed, given)
    if "blocks.0.attn.q_norm.weight" in state:
        fields["qk_norm"] = given.get("qk_norm", fields["eps"])
    heads, width = fields.get("heads", 1), fields["width"]
    if type(heads) is not int or heads < 1 or width % heads:
        raise BadInput(f"{origin}: heads={heads!r} do not divide the width, {width}")
    tree, ignored = to_tljax(state, spell(fields), TIMM, origin)
    return Source(
        arch=arch,
        fields=fields,
        tree=tree,
        preprocess=_read_preprocess(config),
        tokenizer=None,
        labels=_read_labels(config),
        digest=digest,
        ignored=ignored,
        format="timm",
        kind=arch,
        config=read_json(path.with_name("config.json")),
        origin=origin,
        assumed=lines,
    )


def spell(fields: Mapping[str, Any]) -> tuple[Leaf, ...]:
    """Spell out the table for a model of these fields."""
    if "stages" in fields:
        kinds = [fields.get("stem", "imagenet"), "resnet", fields.get("shortcut", "conv")]
        if kinds[0] not in ("imagenet", "deep"):
            raise BadInput(f"timm has no stem {kinds[0]!r}: expected 'imagenet' or 'deep'")
    else:
        kinds = ["vit", "fc_norm" if fields.get("norm_pooled") else "norm"]
    return tuple(leaf for kind in kinds for leaf in TIMM.spell(kind, fields))


def _read_config(path: Path) -> Config:
    config = read_json(path)
    weights = config.get("pretrained_cfg", config)  # old files have one level
    arguments = config.get("model_args") or {}
    if not isinstance(weights, dict) or not isinstance(arguments, dict):
        raise BadInput(f"{path}: pretrained_cfg and model_args must be objects")
    name = config.get("architecture", weights.get("architecture")) if config else ""
    if not isinstance(name, str):
        raise BadInput(f"{path} names no architecture of timm: is it of another library?")
    if name and not any(matches(glob, name) for glob in KNOWN):
        raise BadInput(f"{path}: tljax has no {name!r}; of timm it reads {', '.join(KNOWN)}")
    for glob, what in REFUSED.items():
        if matches(glob, name):
            raise BadInput(f"{path}: tljax has no {name!r}: {what}")
    if odd := [key for key, value in arguments.items() if value and not _handled(key, value)]:
        raise BadInput(f"{path}: model_args.{odd[0]}={arguments[odd[0]]!r} is not in tljax")
    if "label_names" in config:
        weights = weights | {"label_names": config["label_names"]}
    pool = config.get("global_pool") or arguments.get("global_pool") or ""
    pool = pool if isinstance(pool, str) else repr(pool)  # refused where it is read
    return Config(name, arguments, weights, pool, str(path))


def _handled(name: str, value: Any) -> bool:
    if name in ("act_layer", "norm_layer"):
        return value in (*ACTIVATIONS, "layernorm", "batchnorm2d")
    return name in HANDLED or name.endswith("_rate")


def _compare(told: Mapping[str, Any], config: Config) -> None:
    """Raise if arguments in the configuration contradict the tensors."""
    for name, field in ARGUMENTS.items():
        value = config.arguments.get(name)
        value = tuple(value) if isinstance(value, list) else value
        if value is not None and field in told and value != told[field]:
            raise BadInput(
                f"{config.origin}: model_args.{name}={value!r}, but the tensors say {told[field]!r}"
            )


def _read_vit(
    state: Tensors, config: Config, given: Mapping[str, Any], origin: str
) -> tuple[Facts, Guesses]:
    told = _vit_shape(state, origin)
    tall, broad = shape_of(state, "patch_embed.proj.weight", 4, origin)[2:]
    confirmed = given.get("patch", config.arguments.get("patch_size"))
    told |= {
        "patch": patch_of(tall, broad, confirmed, origin),
        "map_head": "attn_pool.latent" in state,
        "resample": "bicubic_antialias",
    }
    assumed: Guesses = {}
    for facts, guesses in (
        _vit_details(state, told, config, origin),
        _vit_grid(told, shape_of(state, "pos_embed", 3, origin)[1], config, given, origin),
        _vit_pool(told, config, given, origin),
    ):
        told |= facts
        assumed |= guesses
    if not config.architecture and not (told["class_token"] and told["prefix_positions"]):
        # Only rows of the position table, or a configuration, would miss these.
        for field, name in (("class_token", "cls_token"), ("registers", "reg_token")):
            if name not in state:
                assumed[field] = (told[field], f"there is no {name}")
    return told, assumed


def _vit_shape(state: Tensors, origin: str) -> Facts:
    """Return what tensors tell."""
    width = shape_of(state, "patch_embed.proj.weight", 4, origin)[0]
    up, down = (shape_of(state, f"blocks.0.mlp.fc{i}.weight", 2, origin) for i in (1, 2))
    if up[0] != down[1]:
        raise BadInput(
            f"{origin}: blocks.0.mlp.fc1.weight gives {up[0]} values, fc2.weight reads {down[1]}:"
            " transposed, or a gated MLP, which tljax does not have"
        )
    registers = shape_of(state, "reg_token", 3, origin)[1] if "reg_token" in state else 0
    return {
        "width": width,
        "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "mlp": up[0],
        "patch_bias": "norm_pre.weight" not in state,  # timm's rule; a missing one is missed
        "class_token": "cls_token" in state,
        "distilled": "dist_token" in state,
        "registers": registers,
        "embed_norm": "norm_pre.weight" in state,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "layer_scale": 1e-5 if "blocks.0.ls1.gamma" in state else None,
        "norm_pooled": "fc_norm.weight" in state,
        "distilled_head": "head_dist.weight" in state,
    }


def _vit_details(state: Tensors, told: Facts, config: Config, origin: str) -> tuple[Facts, Guesses]:
    """Decide heads, eps and activation: by tensors, arguments, architecture, then by rule."""
    width, arguments = told["width"], config.arguments
    few = 16 if width in SIXTEEN_HEADS else max(width // 64, 1)
    eps = (1e-5, "CLIP's, as norm_pre is") if told["embed_norm"] else (1e-6, "timm's usual")
    rules = {"heads": (few, f"usual for width {width}"), "eps": eps}
    rules |= {"activation": ("gelu", "timm's usual, by erf")}
    facts: Facts = {}
    for glob, fields in EXCEPTIONS:
        facts |= {k: v for k, v in fields.items() if matches(glob, config.architecture)}
    facts.pop("pool", None)
    if "embed_dim" in arguments and "num_heads" not in arguments:
        raise BadInput(f"{config.origin}: model_args has embed_dim without num_heads: add it")
    if "num_heads" in arguments:
        facts["heads"] = arguments["num_heads"]
    if "act_layer" in arguments:
        facts["activation"] = arguments["act_layer"]
    if "norm_layer" in arguments:
        facts["eps"] = 1e-6
    if "blocks.0.attn.q_norm.weight" in state:
        facts["heads"] = width // shape_of(state, "blocks.0.attn.q_norm.weight", 1, origin)[0]
    if config.architecture:
        return {name: value for name, (value, _) in rules.items()} | facts, {}
    return facts, {name: rule for name, rule in rules.items() if name not in facts}


def _vit_grid(
    told: Facts, rows: int, config: Config, given: Mapping[str, Any], origin: str
) -> tuple[Facts, Guesses]:
    """Decide the grid of the position table, and whether class and distillation token have rows."""
    prefix = told["class_token"] + told["distilled"]
    asked = tuple(given.get("grid") or ())
    for own in (prefix, 0):
        for grid in (asked, _configured_grid(told, config)):
            if grid and math.prod(grid) + own == rows:
                return {"grid": grid, "prefix_positions": own == prefix}, {}
    for own in (prefix, 0):
        if not asked and (grid := square(rows - own)):
            return {"prefix_positions": own == prefix}, {"grid": (grid, "a square")}
    more = "; register tokens among them are not supported" if told["registers"] else ""
    raise BadInput(
        f"{origin}: pos_embed has {rows} rows, with {prefix} for class and distillation token or"
        f" without these no {'x'.join(map(str, asked)) or 'square'} grid{more}\n"
        "if the pictures are not square, give the field grid=(rows, columns)"
    )


def _configured_grid(told: Facts, config: Config) -> tuple[int, ...]:
    size = config.arguments.get("img_size") or config.weights.get("input_size") or ()
    sides = [size, size] if isinstance(size, int) else size
    patch = told["patch"] if isinstance(told["patch"], tuple) else (told["patch"],) * 2
    if not isinstance(sides, list | tuple) or not all(isinstance(side, int) for side in sides):
        raise BadInput(f"{config.origin}: the image size is {size!r}, expected whole numbers")
    return tuple(side // own for side, own in zip(sides[-2:], patch, strict=False))


def _vit_pool(
    told: Facts, config: Config, given: Mapping[str, Any], origin: str
) -> tuple[Facts, Guesses]:
    """Decide what the head reads."""
    if told["map_head"]:
        return {"pool": "map"}, {}
    pool = POOLS.get(config.pool)
    if config.pool and pool in (None, "map"):
        raise BadInput(f"{config.origin}: global_pool={config.pool!r} is not one of {list(POOLS)}")
    if pool == "cls" and not told["class_token"]:
        raise BadInput(f"{config.origin}: global_pool='token', but {origin} has no cls_token")
    if pool:
        return {"pool": pool}, {}
    if told["norm_pooled"] or matches("*_gap_*", config.architecture):
        return {}, {"pool": ("mean", "fc_norm follows a mean")}
    if told["class_token"]:
        return {}, {"pool": ("cls", "there is a class token")}
    if "pool" in given:
        return {}, {}
    raise BadInput(
        f"{origin}: without cls_token, fc_norm and attn_pool the pooling cannot be told:"
        " give the field pool='mean', if that is what it is"
    )


def _read_resnet(
    state: Tensors, config: Config, given: Mapping[str, Any], origin: str
) -> tuple[Facts, Guesses]:
    names = [name.split(".") for name in state if name.startswith("layer")]
    found = {(parts[0], parts[1]) for parts in names if len(parts) > 2}
    count = len({stage for stage, _ in found})
    stages = tuple(sum(stage == f"layer{s}" for stage, _ in found) for s in range(1, count + 1))
    bottleneck, deep = "layer1.0.conv3.weight" in state, "conv1.0.weight" in state
    width = shape_of(state, "conv1.6.weight" if deep else "conv1.weight", 4, origin)[0]
    if deep and shape_of(state, "conv1.0.weight", 4, origin)[0] != width // 2:
        raise BadInput(f"{origin}: conv1.0 is narrower than conv1.3: tljax has no tiered stem")
    outer = tuple(
        shape_of(state, f"layer{s + 1}.0.conv{3 if bottleneck else 2}.weight", 4, origin)[0]
        for s in range(len(stages))
    )
    for s, out in enumerate(outer if bottleneck else ()):
        inner = shape_of(state, f"layer{s + 1}.0.conv2.weight", 4, origin)
        if inner[:2] != (out // 4, out // 4):
            raise BadInput(
                f"{origin}: tensor layer{s + 1}.0.conv2.weight has shape {inner}, expected"
                f" {(out // 4, out // 4, 3, 3)}: tljax has no grouped or widened bottlenecks"
            )
    doubled = tuple((4 if bottleneck else 1) * width * 2**s for s in range(len(stages)))
    average = any(name.endswith(".downsample.2.weight") for name in state)
    told = {"stages": stages, "width": width, "bottleneck": bottleneck}
    told |= {"widths": None if outer == doubled else outer, "stem": "deep" if deep else "imagenet"}
    told |= {"shortcut": "avg" if average else "conv"}
    rules = {
        "eps": (1e-5, "timm's usual"),
        "stride_first": (False, "v1.5 without anti-aliasing, as most of timm's"),
    }
    if config.architecture:
        return told | {name: value for name, (value, _) in rules.items()}, {}
    return told, rules


def _read_preprocess(config: Config) -> dict[str, Any] | None:
    """Translate what timm does to a picture before evaluation; None without a configuration."""
    if not config.architecture or "mean" not in config.weights:
        return None
    return from_timm(config.weights, config.origin)


def _read_labels(config: Config) -> tuple[str, ...] | None:
    names = config.weights.get("label_names")
    try:
        if isinstance(names, dict):
            names = [names[key] for key in sorted(names, key=int)]
        if not isinstance(names, list | None):
            raise TypeError(f"{names!r} is no list")
        return tuple(map(str, names)) if names else None
    except (TypeError, ValueError) as error:
        raise BadInput(f"{config.origin}: no usable label_names: {error}") from None


def to_timm_config(
    arch: str,
    fields: Mapping[str, Any],
    labels: tuple[str, ...] | None,
    preprocess: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the config.json with which timm builds the model of these fields again.

    Raises: BadInput for a model that timm cannot be told to build.
    """
    classes = fields.get("num_classes", len(labels or ())) or 0
    if labels and len(labels) != classes:
        raise BadInput(f"{len(labels)} labels for {classes} classes: expected one for each")
    model = MODELS[arch](**{**fields, "num_classes": classes or None})
    name, arguments, traits = (_timm_vit if arch == "vit" else _timm_resnet)(model)
    weights = {"num_classes": classes, **traits}
    if preprocess:
        weights |= to_timm(preprocess)
    config = {"architecture": name, "num_classes": classes}
    if "global_pool" in arguments:
        config["global_pool"] = arguments["global_pool"]
    if labels:
        config["label_names"] = list(labels)
    return config | {"model_args": {**arguments, "num_classes": classes}, "pretrained_cfg": weights}


def _require(model: Any, values: Mapping[str, Any], why: str) -> None:
    for field, value in values.items():
        if getattr(model, field) != value:
            raise BadInput(f"{why} has {field}={value!r} only, the model {getattr(model, field)!r}")


def _timm_vit(model: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return architecture, its arguments, and what timm wants to know of the weights."""
    _require(model, {"pooler": None, "projection": None}, "timm's ViT")
    _require(model, {"qk_norm": model.eps if model.qk_norm else None}, "timm's ViT of its eps")
    _require(model, {"patch_bias": not model.embed_norm}, "timm's ViT with its embed_norm")
    names = {1e-6: "vit_base_patch16_224", 1e-5: "vit_base_patch16_clip_224"}
    own, pools = bool(model.class_token or model.distilled), {v: k for k, v in POOLS.items()}
    if model.distilled:
        own, names = True, {1e-6: "deit_base_distilled_patch16_224"}
        values = {"class_token": True, "distilled_head": True, "prefix_positions": True}
        _require(model, values | {"registers": 0, "pool": "cls"}, "timm's distilled ViT")
    if own and model.prefix_positions:
        _require(model, {"registers": 0}, "timm's ViT with a position of the class token")
    if model.eps not in names or model.pool not in pools:
        raise BadInput(
            f"timm has no such ViT: eps={model.eps!r}, expected one of {list(names)};"
            f" pool={model.pool!r}, expected one of {list(pools)}"
        )
    _require(model, {"map_head": model.pool == "map" and model.map_head}, "timm's ViT of its pool")
    tall, broad = (model.patch,) * 2 if isinstance(model.patch, int) else model.patch
    size = [model.grid[0] * tall, model.grid[1] * broad]
    arguments = {
        "img_size": size, "patch_size": [tall, broad], "embed_dim": model.width,
        "depth": model.depth, "num_heads": model.heads, "mlp_ratio": _ratio(model),
        "qkv_bias": model.qkv_bias, "qk_norm": model.qk_norm is not None,
        "init_values": model.layer_scale, "class_token": model.class_token,
        "no_embed_class": not (own and model.prefix_positions), "reg_tokens": model.registers,
        "pre_norm": model.embed_norm, "fc_norm": model.norm_pooled,
        "global_pool": pools[model.pool], "act_layer": model.activation,
    }  # fmt: skip
    classifier = ["head", "head_dist"] if model.distilled else "head"
    traits: Facts = {"input_size": [3, *size], "fixed_input_size": True, "classifier": classifier}
    return names[model.eps], arguments, traits | {"first_conv": "patch_embed.proj"}


def _ratio(model: Any) -> float:
    """Return the ratio of which timm cuts the fraction off to get the MLP's width."""
    ratio = model.mlp / model.width
    return ratio if int(model.width * ratio) == model.mlp else math.nextafter(ratio, math.inf)


def _timm_resnet(model: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
    values = {"norm": "batch", "stride_first": False, "downsample_first": False, "eps": 1e-5}
    _require(model, values | ({"width": 64} if model.stem == "imagenet" else {}), "timm's ResNet")
    if model.stem not in ("imagenet", "deep") or len(model.stages) != 4:
        raise BadInput(
            f"timm has no ResNet with stem={model.stem!r} and {len(model.stages)} stages:"
            " expected 'imagenet' or 'deep', and 4"
        )
    channels = [model.channels(stage)[0] for stage in range(4)]
    arguments: Facts = {"layers": list(model.stages), "channels": channels}
    if model.stem == "deep":
        arguments |= {"stem_type": "deep", "stem_width": model.width // 2}
    arguments |= {"avg_down": True} if model.shortcut == "avg" else {}
    traits = {"classifier": "fc", "first_conv": "conv1.0" if model.stem == "deep" else "conv1"}
    return "resnet50" if model.bottleneck else "resnet18", arguments, traits
