"""Hugging Face's names, layouts and configurations <-> tljax trees and fields."""

from collections.abc import Mapping
from typing import Any

from tljax.types import BadInput
from tljax.weights.table import Format, Modules

_BIAS = (".bias", "params", "/bias", None)
_NORM = ((".weight", "params", "/scale", None), _BIAS)
_KERNEL = (".weight", "params", "/kernel", "o i -> i o")
_CONV = (".weight", "params", "/kernel", "o i h w -> h w i o")
TORCH: Modules = {
    "leaf": (("", "params", "", None),),
    "table": ((".weight", "params", "/embedding", None),),
    "dense": (_KERNEL, _BIAS),
    "conv": (_CONV,),
    "conv+bias": (_CONV, _BIAS),
    "norm": _NORM,
    "batchnorm": (
        *_NORM,
        (".running_mean", "batch_stats", "/mean", None),
        (".running_var", "batch_stats", "/var", None),
    ),
}

ROWS = """
vit,dinov2  body         embeddings.cls_token                    embed/cls                 leaf
vit,dinov2  body         embeddings.position_embeddings          embed/pos                 leaf
vit,dinov2  body         embeddings.patch_embeddings.projection  embed/patch               conv+bias
vit,dinov2  body         {block}.attention.attention.{a}         blocks/{i}/attention/{a}  dense
vit,dinov2  body         {block}.attention.output.dense          blocks/{i}/attention/out  dense
vit,dinov2  body         layernorm                               norm                      norm
vit         body         {block}.layernorm_before                blocks/{i}/norm1          norm
vit         body         {block}.layernorm_after                 blocks/{i}/norm2          norm
dinov2      body         {block}.norm1                           blocks/{i}/norm1          norm
dinov2      body         {block}.layer_scale1.lambda1            blocks/{i}/scale1/gamma   leaf
dinov2      body         {block}.norm2                           blocks/{i}/norm2          norm
dinov2      body         {block}.mlp.fc1                         blocks/{i}/mlp/up         dense
dinov2      body         {block}.mlp.fc2                         blocks/{i}/mlp/down       dense
dinov2      body         {block}.layer_scale2.lambda1            blocks/{i}/scale2/gamma   leaf
dinov2      head         classifier                              head                      dense
bert        body         embeddings.word_embeddings              embed/word                table
bert        body         embeddings.position_embeddings          embed/position            table
bert        body         embeddings.token_type_embeddings        embed/type                table
bert        body         embeddings.LayerNorm                    embed/norm                norm
bert        body         {block}.attention.self.{a}              blocks/{i}/attention/{a}  dense
bert        body         {block}.attention.output.dense          blocks/{i}/attention/out  dense
bert        body         {block}.attention.output.LayerNorm      blocks/{i}/norm1          norm
bert        body         {block}.output.LayerNorm                blocks/{i}/norm2          norm
bert        pooler       pooler.dense                            pooler                    dense
bert        mlm          cls.predictions.transform.dense         mlm/dense                 dense
bert        mlm          cls.predictions.transform.LayerNorm     mlm/norm                  norm
bert        mlm          cls.predictions.bias                    mlm/bias                  leaf
vit,bert    body         {block}.intermediate.dense              blocks/{i}/mlp/up         dense
vit,bert    body         {block}.output.dense                    blocks/{i}/mlp/down       dense
vit,bert    head         classifier                              head                      dense
resnet      body         embedder.embedder.convolution           stem/conv                 conv
resnet      body         embedder.embedder.normalization         stem/norm                 batchnorm
resnet      body         {block}.layer.{k}.convolution           blocks/{i}/conv{n}        conv
resnet      body         {block}.layer.{k}.normalization         blocks/{i}/norm{n}        batchnorm
resnet      shortcut{i}  {block}.shortcut.convolution            blocks/{i}/shortcut/conv  conv
resnet      shortcut{i}  {block}.shortcut.normalization          blocks/{i}/shortcut/norm  batchnorm
resnet      head         classifier.1                            head                      dense
"""
ARCHS = {"vit": "vit", "dinov2": "vit", "bert": "bert", "resnet": "resnet"}
"""Foreign model type -> tljax model."""
HF = Format(
    rows=ROWS,
    modules=TORCH,
    blocks={
        "vit": "encoder.layer.{i}",
        "dinov2": "encoder.layer.{i}",
        "bert": "encoder.layer.{i}",
        "resnet": "encoder.stages.{s}.layers.{j}",
    },
    ignored={
        "embeddings.mask_token": "for masked image pretraining only",
        "embeddings.position_ids": "0, 1, 2, .. made in the call",
        "num_batches_tracked": "a counter that inference does not read",
        "cls.seq_relationship": "next-sentence head: tljax's BERT has none",
        "pooler.dense": "tanh layer on the class token: tljax's ViT has none",
    },
    tied={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    # The names that BERT's authors gave, still found in its oldest files.
    renamed={"Norm.gamma": "Norm.weight", "Norm.beta": "Norm.bias"},
)
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_ENCODER = {
    "width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads",
    "eps": "layer_norm_eps",
}  # fmt: skip
FIELDS = {
    "vit": _ENCODER | {"mlp": "intermediate_size"},
    "dinov2": _ENCODER | {"layer_scale": "layerscale_value"},
    "bert": _ENCODER | {
        "mlp": "intermediate_size", "vocab": "vocab_size", "types": "type_vocab_size",
        "positions": "max_position_embeddings",
    },
    "resnet": {"width": "embedding_size"},
}  # fmt: skip
REQUIRED = {
    "qkv_bias": True, "use_swiglu_ffn": False, "position_embedding_type": "absolute",
    "is_decoder": False, "downsample_in_bottleneck": False, "downsample_in_first_stage": False,
}  # fmt: skip
"""What a configuration must say, if it says anything about it."""


def read_fields(config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Translate a config.json to the fields of tljax's model.

    Raises: BadInput for a model type or an option that tljax does not have.
    """
    kind = config.get("model_type")
    if kind not in ARCHS:
        raise BadInput(f"{origin}: model_type {kind!r} is not one of {', '.join(ARCHS)}")
    for name, value in (REQUIRED | ({"hidden_act": "relu"} if kind == "resnet" else {})).items():
        if config.get(name, value) != value:
            raise BadInput(f"{origin}: {name}={config[name]!r}; tljax has {value!r} only")
    try:
        fields = {own: config[name] for own, name in FIELDS[kind].items()}
        if odd := [name for name, value in fields.items() if not isinstance(value, int | float)]:
            raise TypeError(f"{odd[0]!r}")
        if kind == "resnet":
            bottleneck = config["layer_type"] == "bottleneck"
            return fields | {"stages": tuple(config["depths"]), "bottleneck": bottleneck}
        fields["activation"] = ACTIVATIONS[config["hidden_act"]]
        if kind == "dinov2":
            fields["mlp"] = fields["width"] * config["mlp_ratio"]
        if ARCHS[kind] == "vit":
            side = config["image_size"] // config["patch_size"]
            fields |= {"patch": config["patch_size"], "grid": (side, side)}
    except (KeyError, TypeError) as error:
        raise BadInput(f"{origin}: no or no usable value for {error}") from None
    return fields
