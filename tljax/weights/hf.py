"""Hugging Face's names and layouts <-> tljax trees, in one table."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from tljax.types import BadInput, Tree
from tljax.weights.files import Tensors
from tljax.weights.table import HEADS, Format, Leaf, Modules, to_tljax

_BIAS = (".bias", "params", "/bias", None)
_NORM = ((".weight", "params", "/scale", None), _BIAS)
_KERNEL = (".weight", "params", "/kernel", "o i -> i o")
_CONV = (".weight", "params", "/kernel", "o i h w -> h w i o")
TORCH: Modules = {
    "leaf": (("", "params", "", None),),
    "vector": (("", "params", "", "d -> 1 1 d"),),
    "rows": ((".weight", "params", "", "n d -> 1 n d"),),
    "table": ((".weight", "params", "/embedding", None),),
    "dense": (_KERNEL, _BIAS),
    "kernel": (_KERNEL,),
    "bias": (_BIAS,),
    "conv": (_CONV,),
    "conv+bias": (_CONV, _BIAS),
    "norm": _NORM,
    "batchnorm": (
        *_NORM,
        (".running_mean", "batch_stats", "/mean", None),
        (".running_var", "batch_stats", "/var", None),
    ),
}

_IMAGES = """
VIT,DINO  body      embeddings.cls_token                    embed/cls                 leaf
deit      body      embeddings.distillation_token           embed/dist                leaf
REG       body      embeddings.register_tokens              embed/registers           leaf
VIT,DINO  body      embeddings.position_embeddings          embed/pos                 leaf
VIT,DINO  body      embeddings.patch_embeddings.projection  embed/patch               conv+bias
VIT,DINO  body      {block}.attention.attention.{a}         blocks/{i}/attention/{a}  kernel
VIT,DINO  qkv_bias  {block}.attention.attention.{a}         blocks/{i}/attention/{a}  bias
VIT,DINO  body      {block}.attention.output.dense          blocks/{i}/attention/out  dense
VIT       body      {block}.layernorm_before                blocks/{i}/norm1          norm
VIT       body      {block}.layernorm_after                 blocks/{i}/norm2          norm
VIT       body      {block}.intermediate.dense              blocks/{i}/mlp/up         dense
VIT       body      {block}.output.dense                    blocks/{i}/mlp/down       dense
DINO      body      {block}.norm1                           blocks/{i}/norm1          norm
DINO      body      {block}.layer_scale1.lambda1            blocks/{i}/scale1/gamma   leaf
DINO      body      {block}.norm2                           blocks/{i}/norm2          norm
DINO      body      {block}.mlp.fc1                         blocks/{i}/mlp/up         dense
DINO      body      {block}.mlp.fc2                         blocks/{i}/mlp/down       dense
DINO      body      {block}.layer_scale2.lambda1            blocks/{i}/scale2/gamma   leaf
VIT,DINO  body      layernorm                               norm                      norm
VIT       pooler    pooler.dense                            pooler                    dense
VIT,DINO  head      classifier                              head                      dense
deit      teacher   cls_classifier                          head                      dense
deit      teacher   distillation_classifier                 head_dist                 dense
"""
_OTHERS = """
BERT          body         embeddings.word_embeddings           embed/word                table
BERT          body         embeddings.position_embeddings       embed/position            table
bert,roberta  body         embeddings.token_type_embeddings     embed/type                table
BERT          body         embeddings.LayerNorm                 embed/norm                norm
bert,roberta  body         {block}.attention.self.{a}           blocks/{i}/attention/{a}  dense
bert,roberta  body         {block}.attention.output.dense       blocks/{i}/attention/out  dense
bert,roberta  body         {block}.attention.output.LayerNorm   blocks/{i}/norm1          norm
bert,roberta  body         {block}.intermediate.dense           blocks/{i}/mlp/up         dense
bert,roberta  body         {block}.output.dense                 blocks/{i}/mlp/down       dense
bert,roberta  body         {block}.output.LayerNorm             blocks/{i}/norm2          norm
distilbert    body         {block}.attention.{q}_lin            blocks/{i}/attention/{a}  dense
distilbert    body         {block}.attention.out_lin            blocks/{i}/attention/out  dense
distilbert    body         {block}.sa_layer_norm                blocks/{i}/norm1          norm
distilbert    body         {block}.ffn.lin1                     blocks/{i}/mlp/up         dense
distilbert    body         {block}.ffn.lin2                     blocks/{i}/mlp/down       dense
distilbert    body         {block}.output_layer_norm            blocks/{i}/norm2          norm
bert,roberta  pooler       pooler.dense                         pooler                    dense
bert          mlm          cls.predictions.transform.dense      mlm/dense                 dense
bert          mlm          cls.predictions.transform.LayerNorm  mlm/norm                  norm
bert          mlm          cls.predictions.bias                 mlm/bias                  leaf
roberta       mlm          lm_head.dense                        mlm/dense                 dense
roberta       mlm          lm_head.layer_norm                   mlm/norm                  norm
roberta       mlm          lm_head.bias                         mlm/bias                  leaf
distilbert    mlm          vocab_transform                      mlm/dense                 dense
distilbert    mlm          vocab_layer_norm                     mlm/norm                  norm
distilbert    mlm          vocab_projector.bias                 mlm/bias                  leaf
BERT          head         classifier                           head                      dense
roberta       sequence     classifier.dense                     pooler                    dense
roberta       sequence     classifier.out_proj                  head                      dense
distilbert    sequence     pre_classifier                       pooler                    dense
resnet        body         embedder.embedder.convolution        stem/conv                 conv
resnet        body         embedder.embedder.normalization      stem/norm                 batchnorm
resnet        body         {block}.layer.{k}.convolution        blocks/{i}/conv{n}        conv
resnet        body         {block}.layer.{k}.normalization      blocks/{i}/norm{n}        batchnorm
resnet        shortcut{i}  {block}.shortcut.convolution         blocks/{i}/shortcut/conv  conv
resnet        shortcut{i}  {block}.shortcut.normalization       blocks/{i}/shortcut/norm  batchnorm
resnet        head         classifier.1                         head                      dense
IMAGE         body         embeddings.class_embedding           embed/cls                 vector
IMAGE         body         embeddings.position_embedding        embed/pos                 rows
IMAGE         body         embeddings.patch_embedding           embed/patch               conv
IMAGE         body         pre_layrnorm                         embed/norm                norm
TEXT          body         embeddings.token_embedding           embed/word                table
TEXT          body         embeddings.position_embedding        embed/position            table
CLIP          body         {block}.layer_norm1                  blocks/{i}/norm1          norm
CLIP          body         {block}.self_attn.{q}_proj           blocks/{i}/attention/{a}  dense
CLIP          body         {block}.self_attn.out_proj           blocks/{i}/attention/out  dense
CLIP          body         {block}.layer_norm2                  blocks/{i}/norm2          norm
CLIP          body         {block}.mlp.fc1                      blocks/{i}/mlp/up         dense
CLIP          body         {block}.mlp.fc2                      blocks/{i}/mlp/down       dense
IMAGE         body         post_layernorm                       norm                      norm
TEXT          body         final_layer_norm                     norm                      norm
IMAGE         projection   visual_projection                    projection                kernel
TEXT          projection   text_projection                      projection                kernel
"""
GROUPS = {
    "VIT": "vit,deit", "DINO": "dinov2,dinov2_with_registers", "REG": "dinov2_with_registers",
    "BERT": "bert,roberta,distilbert", "CLIP": "clip_vision_model,clip_text_model",
    "IMAGE": "clip_vision_model", "TEXT": "clip_text_model",
}  # fmt: skip
"""How tables abbreviate kinds of model."""


def expand(text: str) -> str:
    """Write the kinds out."""
    for short, kinds in GROUPS.items():
        text = text.replace(short, kinds)
    return text


ARCHS = {
    "vit": "vit", "deit": "vit", "dinov2": "vit", "dinov2_with_registers": "vit",
    "clip_vision_model": "vit", "clip_text_model": "clip_text", "bert": "bert", "roberta": "bert",
    "distilbert": "bert", "resnet": "resnet",
}  # fmt: skip
"""Foreign model type -> tljax model."""
HF = Format(
    rows=expand(_IMAGES + _OTHERS.lstrip()),
    modules=TORCH,
    blocks={
        **dict.fromkeys(ARCHS, "encoder.layer.{i}"),
        "distilbert": "transformer.layer.{i}",
        "clip_vision_model": "encoder.layers.{i}",
        "clip_text_model": "encoder.layers.{i}",
        "resnet": "encoder.stages.{s}.layers.{j}",
    },
    ignored={
        "embeddings.mask_token": "for masked image pretraining only",
        "embeddings.position_ids": "0, 1, 2, .. made in the call",
        "num_batches_tracked": "a counter that inference does not read",
        "cls.seq_relationship": "next-sentence head: tljax's BERT has none",
        "logit_scale": "for contrasting images with texts only",
    },
    tied={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
        "vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight",
    },
    # The names that BERT's authors gave, still found in its oldest files.
    renamed={"Norm.gamma": "Norm.weight", "Norm.beta": "Norm.bias"},
)
"""The names in files, the same for transformers 4 and 5."""


def _in_memory(rows: str) -> str:
    for old, new in {
        ".attention.attention.{a}": ".attention.{q}_proj",
        ".attention.output.dense": ".attention.o_proj",
        ".intermediate.dense": ".mlp.fc1",
        ".output.dense": ".mlp.fc2",
    }.items():
        rows = rows.replace(old, new)
    return rows


HF5 = replace(
    HF,
    rows=expand(_in_memory(_IMAGES) + _OTHERS.lstrip()),
    blocks={**HF.blocks, "vit": "layers.{i}", "deit": "layers.{i}"},
)
"""The names in memory of transformers 5, which adapters and some files have."""

PREFIXES = {kind: f"{kind}." for kind in ARCHS} | {
    "clip_vision_model": "vision_model.",
    "clip_text_model": "text_model.",
}
"""What starts a body's names beside a head; always in CLIP's files."""
FILES = """
VIT                   pooler      Model                              pooler       cls,mean,pooler
VIT                   bare        ForImageClassification             -            cls,mean,cls+mean
VIT                   classes     ForImageClassification             head         cls
deit                  teacher     ForImageClassificationWithTeacher  teacher      cls
DINO                  bare        Model                              -            cls,mean,cls+mean
DINO                  classes     ForImageClassification             head         cls+mean
bert,roberta          pooler      Model                              pooler       mean,cls,pooler
BERT                  mlm         ForMaskedLM                        mlm          mean,cls,pooler
bert                  classes     ForSequenceClassification          pooler,head  pooler
roberta               classes     ForSequenceClassification          sequence     pooler
distilbert            classes     ForSequenceClassification          sequence,head  pooler
BERT                  tokens      ForTokenClassification             head         mean,cls,pooler
distilbert            bare        Model                              -            mean,cls
resnet                bare        Model                              -            -
resnet                classes     ForImageClassification             head         -
IMAGE                 bare        Model                              -            cls
IMAGE                 projection  ModelWithProjection                projection   cls
TEXT                  bare        Model                              -            -
TEXT                  projection  ModelWithProjection                projection   -
"""
"""Kinds, use, class of transformers, optional sections of its file, and what it may pool."""
_STEMS = {
    "vit": "ViT", "deit": "DeiT", "dinov2": "Dinov2", "bert": "Bert", "roberta": "Roberta",
    "dinov2_with_registers": "Dinov2WithRegisters", "distilbert": "DistilBert", "resnet": "ResNet",
    "clip_vision_model": "CLIPVision", "clip_text_model": "CLIPText",
}  # fmt: skip
_OPTIONAL = {*HEADS, "pooler"}


class File(NamedTuple):
    """A class of transformers, and the leaves that its file holds."""

    cls: str
    leaves: tuple[Leaf, ...]


def file_of(kind: str, fields: Mapping[str, Any], form: Format = HF) -> File:
    """Choose the class of transformers for a model of these fields, heads included.

    Raises: BadInput naming a field that no class of this kind has.
    """
    signs = ("mlm", "tokens", "distilled_head", "num_classes", "projection", "pooler")
    uses = ("mlm", "tokens", "teacher", "classes", "projection", "pooler")
    headed = [sign for sign in signs if fields.get(sign) not in (None, False)]
    if "num_classes" not in headed:  # the others tell what is done with classes
        headed = [sign for sign in headed if sign not in ("tokens", "distilled_head")]
    use = dict(zip(signs, uses, strict=True))[headed[0]] if headed else "bare"
    rows = [line.split() for line in expand(FILES).strip().split("\n")]
    rows = [row for row in rows if kind in row[0].split(",")]
    row = next((row for row in rows if row[1] == use), None)
    if row is None:
        given = f"{headed[0]}={fields[headed[0]]!r}" if headed else "pooler=False"
        raise BadInput(f"transformers' {kind} has no class for {given}")
    _, _, end, sections, pools = row
    pool = fields.get("pool", "-")
    if pools != "-" and pool not in pools.split(","):
        raise BadInput(
            f"transformers' {_STEMS[kind]}{end} cannot express pool={pool!r}, only {pools}: "
            f"train it with one of these"
        )
    prefix = "" if end == "Model" and not kind.startswith("clip") else PREFIXES[kind]
    left = _OPTIONAL - set(sections.split(","))
    leaves = [leaf for leaf in form.spell(kind, fields, prefix) if leaf.section not in left]
    return File(_STEMS[kind] + end, tuple(leaves))


def prefix_in(kind: str, names: Collection[str]) -> str:
    """Return what starts the body's names in a file that holds these."""
    return PREFIXES[kind] if any(name.startswith(PREFIXES[kind]) for name in names) else ""


def format_in(names: Collection[str]) -> Format:
    """Return the format that has such names: that of files, or that of memory."""
    return HF5 if any(".attention.q_proj." in name for name in names) else HF


def read_tree(
    state: Tensors, config: Mapping[str, Any], fields: Mapping[str, Any], origin: str
) -> tuple[Tree, dict[str, Any], dict[str, str]]:
    """Name and lay out the tensors of a file; add to the fields what only the file tells.

    Raises: BadInput for tensors that are not those of such a model.
    """
    kind, form = config["model_type"], format_in(state)
    leaves = form.spell(kind, fields, prefix_in(kind, state))
    tree, ignored = to_tljax(state, leaves, form, origin)
    return tree, complete(fields, tree["params"], config), ignored


def complete(fields: Mapping[str, Any], params: Tree, config: Mapping[str, Any]) -> dict[str, Any]:
    """Add to a configuration's fields what only the parameters tell: heads, and what they read."""
    kind = config["model_type"]
    told: dict[str, Any] = {
        name: None for name in ("projection", "pooler") if name in fields and name not in params
    }
    if ARCHS[kind] == "bert":
        told["pooler"] = "pooler" in params
        tagger = "ForTokenClassification" in str(config.get("architectures"))
        told["tokens"] = "head" in params and (tagger or not told["pooler"])
        told |= {"pool": "pooler"} if "head" in params and not told["tokens"] else {}
    if "head" in params and kind.startswith("dinov2"):
        told["pool"] = "cls+mean"
    told |= {"distilled_head": True} if "head_dist" in params else {}
    return {**fields, **told}


def fillers(kind: str, state: Collection[str], width: int) -> dict[str, np.ndarray]:
    """Return tensors that transformers asks of such a file, though no output depends on them."""
    var, cls = ".running_var", "embeddings.cls_token"
    norms = [name.removesuffix(var) for name in state if name.endswith(var)]
    found = {f"{name}.num_batches_tracked": np.zeros((), np.int64) for name in norms}
    if kind in expand("DINO").split(","):
        starts = [name.removesuffix(cls) for name in state if name.endswith(cls)]
        masks = [f"{start}embeddings.mask_token" for start in starts]
        found |= {name: np.zeros((1, width), np.float32) for name in masks}
    return found


def unread(kind: str, names: Collection[str]) -> dict[str, str]:
    """Name the tensors that belong to something else in the file, and say why."""
    towers = {
        "clip_vision_model": ("text_model.", "text_projection."),
        "clip_text_model": ("vision_model.", "visual_projection."),
    }
    other = [name for name in names if name.startswith(towers.get(kind, ()))]
    found = dict.fromkeys(other, "of the other tower")
    if kind == "roberta" and "classifier.dense.weight" in names:
        old = [name for name in names if name.startswith("roberta.pooler.")]
        found |= dict.fromkeys(old, "left over: the head has a dense layer of its own")
    return found
