"""Every model against an independent one, and the rules that all models keep."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax.build import check_options
from tljax.models import MODELS
from tljax.models.bert import Bert
from tljax.models.clip import ClipText
from tljax.models.resnet import ResNet
from tljax.models.vit import ViT, resample
from tljax.tree import flatten, unflatten
from tljax.types import BadInput

# Right float32 code sits near 1e-6 of the largest value; a tanh GELU is 1.2e-4 away.
OUTPUTS, GRADIENTS = 2e-5, 2e-4
pytestmark = pytest.mark.once

IMAGE = {"width": 16, "depth": 2, "heads": 2, "mlp": 32, "patch": 4, "grid": (4, 4)}
TEXT = {"vocab": 50, "width": 16, "depth": 2, "heads": 2, "mlp": 32, "positions": 24}

COMMON = [
    ("patch_embeddings.projection", "patch"),
    ("cls_token", "cls"),
    ("distillation_token", "dist"),
    ("register_tokens", "registers"),
    ("position_embeddings.weight", "position.embedding"),
    ("word_embeddings.weight", "word.embedding"),
    ("token_type_embeddings.weight", "type.embedding"),
    ("position_embeddings", "pos"),
    ("classifier.1.", "head."),
    ("cls_classifier.", "head."),
    ("distillation_classifier.", "head_dist."),
    ("classifier.", "head."),
]
TRANSFORMER = [
    ("q_proj", "query"),
    ("k_proj", "key"),
    ("v_proj", "value"),
    ("o_proj", "out"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("layernorm", "norm"),
    ("mlp.fc1", "mlp.up"),
    ("mlp.fc2", "mlp.down"),
    ("layer_scale1.lambda1", "scale1.gamma"),
    ("layer_scale2.lambda1", "scale2.gamma"),
    ("attention.self.", "attention."),
    ("attention.output.dense", "attention.out"),
    ("attention.output.LayerNorm", "norm1"),
    ("intermediate.dense", "mlp.up"),
    ("output.dense", "mlp.down"),
    ("output.LayerNorm", "norm2"),
    ("embeddings.", "embed."),
    ("embed.LayerNorm", "embed.norm"),
    ("pooler.dense", "pooler"),
    ("cls.predictions.transform.LayerNorm", "mlm.norm"),
    ("cls.predictions.transform.", "mlm."),
    ("cls.predictions.", "mlm."),
    ("encoder.layer.", "blocks."),
    ("layers.", "blocks."),
]
CONVOLUTION = [
    ("embedder.embedder", "stem"),
    ("shortcut.convolution", "shortcut.conv"),
    ("shortcut.normalization", "shortcut.norm"),
    ("stem.convolution", "stem.conv"),
    ("stem.normalization", "stem.norm"),
    *[(f"layer.{i}.convolution", f"conv{i + 1}") for i in range(3)],
    *[(f"layer.{i}.normalization", f"norm{i + 1}") for i in range(3)],
]


ROBERTA = [
    ("roberta.", ""),
    ("lm_head.layer_norm", "mlm.norm"),
    ("lm_head.", "mlm."),
    ("classifier.dense", "pooler"),
    ("classifier.out_proj", "head"),
    *COMMON,
    *TRANSFORMER,
]
DISTILBERT = [
    ("distilbert.", ""),
    ("pre_classifier", "pooler"),
    ("vocab_transform", "mlm.dense"),
    ("vocab_layer_norm", "mlm.norm"),
    ("vocab_projector", "mlm"),
    ("transformer.layer.", "blocks."),
    *[(f"{name[0]}_lin.", f"{name}.") for name in ("query", "key", "value")],
    ("out_lin", "out"),
    ("sa_layer_norm", "norm1"),
    ("output_layer_norm", "norm2"),
    ("ffn.lin1", "mlp.up"),
    ("ffn.lin2", "mlp.down"),
    *COMMON,
    ("embeddings.", "embed."),
    ("embed.LayerNorm", "embed.norm"),
]
CLIP = [
    ("text_model.embeddings.token_embedding.weight", "embed.word.embedding"),
    ("text_model.embeddings.position_embedding.weight", "embed.position.embedding"),
    ("vision_model.embeddings.position_embedding.weight", "embed.pos"),
    ("vision_model.embeddings.class_embedding", "embed.cls"),
    ("vision_model.embeddings.patch_embedding", "embed.patch"),
    ("vision_model.", ""),
    ("text_model.", ""),
    ("visual_projection", "projection"),
    ("text_projection", "projection"),
    ("pre_layrnorm", "embed.norm"),
    ("post_layernorm", "norm"),
    ("final_layer_norm", "norm"),
    ("layer_norm", "norm"),
    ("self_attn.out_proj", "attention.out"),
    ("self_attn.", "attention."),
    ("encoder.layers.", "blocks."),
    *TRANSFORMER[:3],
    ("mlp.fc1", "mlp.up"),
    ("mlp.fc2", "mlp.down"),
]
TIMM = [
    ("patch_embed.proj", "embed.patch"),
    ("cls_token", "embed.cls"),
    ("dist_token", "embed.dist"),
    ("reg_token", "embed.registers"),
    ("pos_embed", "embed.pos"),
    ("norm_pre", "embed.norm"),
    ("fc_norm", "norm"),
    ("attn_pool.latent", "map.probe"),
    *[(f"attn_pool.{name}.", f"map.attention.{name}.") for name in ("key", "value")],
    ("attn_pool.q.", "map.attention.query."),
    ("attn_pool.proj", "map.attention.out"),
    ("attn_pool.", "map."),
    ("attn.q_norm", "attention.norm_query"),
    ("attn.k_norm", "attention.norm_key"),
    ("attn.proj", "attention.out"),
    ("attn.", "attention."),
    ("ls1", "scale1"),
    ("ls2", "scale2"),
    ("mlp.fc1", "mlp.up"),
    ("mlp.fc2", "mlp.down"),
]
TIMM_RESNET = [
    *[(f"conv1.{i}.", f"stem.{name}.") for i, name in ((0, "conv1"), (1, "norm1"))],
    *[(f"conv1.{i}.", f"stem.{name}.") for i, name in ((3, "conv2"), (4, "norm2"), (6, "conv"))],
    *[(f"layer{block + 1}.0.downsample.1", f"blocks.{block}.shortcut.conv") for block in range(4)],
    *[(f"layer{block + 1}.0.downsample.2", f"blocks.{block}.shortcut.norm") for block in range(4)],
    *[(f"layer{block + 1}.0.bn", f"blocks.{block}.norm") for block in range(4)],
    *[(f"layer{block + 1}.0.", f"blocks.{block}.") for block in range(4)],
    ("bn1", "stem.norm"),
    ("fc.", "head."),
]


def renamed(name, stages=()):
    """Return our dotted name of a transformers leaf."""
    for prefix in ("vit.", "deit.", "dinov2.", "dinov2_with_registers.", "bert.", "resnet."):
        name = name.removeprefix(prefix)
    flat = 0
    for stage, count in enumerate(stages):
        for layer in range(count):
            name = name.replace(f"encoder.stages.{stage}.layers.{layer}.", f"blocks.{flat}.")
            flat += 1
    for old, new in CONVOLUTION if stages else COMMON + TRANSFORMER:
        name = name.replace(old, new)
    return name.replace("classifier.1.", "head.")


def by(table):
    """Return the function that makes the replacements of a table, in order."""
    return lambda name: functools.reduce(lambda name, pair: name.replace(*pair), table, name)


def unfused(tensors):
    """Cut timm's fused projections, of query, key and value and of key and value."""
    parts = {".qkv.": ("query", "key", "value"), ".kv.": ("key", "value")}
    for name, tensor in tensors.items():
        fused = next((mark for mark in parts if mark in name), None)
        if fused is None:
            yield name, tensor
            continue
        for part, piece in zip(parts[fused], tensor.chunk(len(parts[fused])), strict=True):
            yield name.replace(fused, f".{part}."), piece


def to_ours(tensors, rename=renamed):
    """Convert named torch tensors (weights or gradients) to our tree."""
    leaves = {}
    for name, tensor in unfused(tensors):
        value = tensor.detach().numpy()
        *module, leaf = rename(name).split(".")
        collection = "batch_stats" if leaf.startswith("running") else "params"
        leaf = leaf.removeprefix("running_")
        if leaf == "weight":
            leaf = "scale" if value.ndim == 1 else "kernel"
        if leaf == "kernel":
            value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        if leaf in ("cls", "pos"):  # CLIP's come without the leading axes
            value = value.reshape(1, -1, value.shape[-1])
        leaves["/".join([collection, *module, leaf])] = jnp.array(value)
    return unflatten(leaves)


def randomise(model, seed=0):
    """Draw every parameter and running statistic anew: zero biases and unit norms hide bugs."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            noise = torch.randn(leaf.shape, generator=generator)
            if leaf.ndim == 1:
                centre = 1.0 if name.endswith(("weight", "lambda1", "gamma")) else 0.0
                leaf.copy_(centre + 0.3 * noise)
            else:
                leaf.copy_(noise / np.sqrt(leaf[0].numel() / 2) if leaf.ndim in (2, 4) else noise)
        for name, leaf in model.named_buffers():
            if name.endswith("running_mean"):
                leaf.copy_(0.3 * torch.randn(leaf.shape, generator=generator))
            if name.endswith("running_var"):
                leaf.copy_(0.5 + torch.rand(leaf.shape, generator=generator))
    return model


def randomise_off_kinks(model, *inputs):
    """Randomise so that no relu gets a value near zero.

    There a difference in rounding flips a gradient of order one, in torch or here, by right.
    """
    import torch

    class Margin(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in (torch.relu, torch.nn.functional.relu):
                size = args[0].detach().abs()
                self.least = min(self.least, float(size.min() / size.max()))
            return function(*args, **(kwargs or {}))

    for seed in range(100):
        randomise(model, seed)
        kept = {name: leaf.clone() for name, leaf in model.named_buffers()}
        with Margin() as margin, torch.no_grad():
            margin.least = 1.0
            model(*inputs)
        model.load_state_dict(kept, strict=False)  # a training pass moved the statistics
        if margin.least > 3e-6:  # forward differences are up to 3e-6 of the largest value
            return model
    raise AssertionError("no seed keeps clear of relu's kink")


def weights(model, rename=renamed):
    """Return the model's parameters (tied ones once) and running statistics as our tree."""
    leaves = dict(model.named_parameters())
    leaves |= {name: leaf for name, leaf in model.named_buffers() if "running" in name}
    return to_ours({n: v for n, v in leaves.items() if "mask_token" not in n}, rename)


def close(ours, reference, tolerance, scale=None):
    """Assert equality relative to the reference's largest value."""
    ours, reference = np.asarray(ours), np.asarray(reference)
    assert ours.shape == reference.shape
    scale = np.abs(reference).max() if scale is None else scale
    worst = np.abs(ours - reference).max() / scale
    assert worst < tolerance, f"off by {worst:.2e} of the largest value"


def agree(model, variables, inputs, reference, theirs, rename=renamed, mutable=False):
    """Compare outputs, and the gradients of one random linear functional of all outputs.

    theirs: the outputs of the torch model `reference` by our names.  Returns the new statistics.
    """
    import torch

    random = np.random.default_rng(1)
    directions = {n: random.normal(size=v.shape).astype(np.float32) for n, v in theirs.items()}

    def functional(params, rest, inputs, directions):
        collections = ["batch_stats"] if mutable else []
        output, updates = model.apply({"params": params} | rest, *inputs, mutable=collections)
        total = sum((getattr(output, n) * d).sum() for n, d in directions.items())
        return total, (output, updates)

    compute = jax.jit(jax.value_and_grad(functional, has_aux=True))
    rest = {name: tree for name, tree in variables.items() if name != "params"}
    (_, (output, updates)), gradients = compute(variables["params"], rest, inputs, directions)
    for name, value in theirs.items():
        close(getattr(output, name), value.detach(), OUTPUTS)

    reference.zero_grad()
    sum((v * torch.tensor(directions[n])).sum() for n, v in theirs.items()).backward()
    named = {n: p.grad for n, p in reference.named_parameters() if "mask_token" not in n}
    expected, found = flatten(to_ours(named, rename)), flatten({"params": gradients})
    assert expected.keys() == found.keys()
    largest = max(np.abs(value).max() for value in expected.values())
    for path, value in expected.items():
        # A key bias moves all scores of a query alike: its true gradient is zero.
        close(found[path], value, GRADIENTS, largest if path.endswith("key/bias") else None)
    return updates


def images(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def to_torch(array):
    import torch

    array = np.asarray(array)
    return torch.tensor(array.transpose(0, 3, 1, 2) if array.ndim == 4 else array)


@pytest.mark.torch
def test_vit_equals_transformers():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=4, layer_norm_eps=1e-12, hidden_act="gelu", num_labels=5,
    )  # fmt: skip
    reference = randomise(ViTForImageClassification(config).eval())
    x = images(3, 16, 16, 3)
    tokens = reference.vit(to_torch(x)).last_hidden_state
    theirs = {
        "tokens": tokens,
        "pooled": tokens[:, 0],
        "logits": reference.classifier(tokens[:, 0]),
    }
    model = ViT(**IMAGE, eps=1e-12, num_classes=5)
    agree(model, weights(reference), [jnp.array(x)], reference, theirs)


@pytest.mark.torch
def test_dinov2_equals_transformers_at_another_image_size():
    from transformers import Dinov2Config, Dinov2ForImageClassification

    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2,
        image_size=16, patch_size=4, num_labels=5,
    )  # fmt: skip
    reference = randomise(Dinov2ForImageClassification(config).eval())
    x = images(2, 24, 20, 3)
    tokens = reference.dinov2(to_torch(x)).last_hidden_state
    logits = reference(to_torch(x)).logits
    model = ViT(**IMAGE, layer_scale=1.0, pool="cls+mean", num_classes=5)
    theirs = {"tokens": tokens, "logits": logits}
    agree(model, weights(reference), [jnp.array(x)], reference, theirs)


def vit_config(kind, **fields):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "image_size": 16, "patch_size": 4, "num_labels": 5}
    return kind(**sizes | fields)


ONE = IMAGE | {"depth": 1}
"""The fields of our ViT that go with vit_config."""


@pytest.mark.torch
@pytest.mark.parametrize(
    ("activation", "theirs"),
    [("gelu_tanh", "gelu_new"), ("relu", "relu"), ("quick_gelu", "quick_gelu")],
)
def test_vit_activations_without_qkv_bias_equal_transformers(activation, theirs):
    from transformers import ViTConfig, ViTModel

    config = vit_config(ViTConfig, hidden_act=theirs, qkv_bias=False, pooler_output_size=6)
    x = images(2, 16, 16, 3)
    reference = randomise_off_kinks(ViTModel(config).eval(), to_torch(x))
    output = reference(to_torch(x))
    model = ViT(**ONE, eps=1e-12, activation=activation, qkv_bias=False, pooler=6, pool="pooler")
    theirs = {"tokens": output.last_hidden_state, "pooled": output.pooler_output}
    agree(model, weights(reference), [jnp.array(x)], reference, theirs)


@pytest.mark.torch
def test_rectangular_patches_and_images_equal_transformers():
    from transformers import ViTConfig, ViTModel

    sizes = {"image_size": (16, 24), "patch_size": (4, 8)}
    reference = ViTModel(vit_config(ViTConfig, **sizes), add_pooling_layer=False)
    reference = randomise(reference.eval())
    x = images(2, 16, 24, 3)
    theirs = {"tokens": reference(to_torch(x)).last_hidden_state}
    model = ViT(**ONE | {"patch": (4, 8), "grid": (4, 3)}, eps=1e-12)
    agree(model, weights(reference), [jnp.array(x)], reference, theirs)


@pytest.mark.torch
@pytest.mark.parametrize("teacher", [True, False])
def test_deit_equals_transformers_at_another_image_size(teacher):
    from transformers import (
        DeiTConfig,
        DeiTForImageClassification,
        DeiTForImageClassificationWithTeacher,
    )

    kind = DeiTForImageClassificationWithTeacher if teacher else DeiTForImageClassification
    reference = randomise(kind(vit_config(DeiTConfig)).eval())
    x = images(2, 12, 20, 3)
    output = reference(to_torch(x), interpolate_pos_encoding=True)
    tokens = reference.deit(to_torch(x), interpolate_pos_encoding=True).last_hidden_state
    theirs = {"tokens": tokens, "logits": output.logits}
    model = ViT(**ONE, eps=1e-12, distilled=True, distilled_head=teacher, num_classes=5)
    agree(model, weights(reference), [jnp.array(x)], reference, theirs)


@pytest.mark.torch
def test_registers_equal_transformers_at_another_image_size():
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersForImageClassification

    config = vit_config(Dinov2WithRegistersConfig, num_register_tokens=3, mlp_ratio=2)
    reference = randomise(Dinov2WithRegistersForImageClassification(config).eval())
    x = images(2, 24, 12, 3)
    tokens = reference.dinov2_with_registers(to_torch(x)).last_hidden_state
    theirs = {"tokens": tokens, "logits": reference(to_torch(x)).logits}
    fields = {"registers": 3, "resample": "bicubic_antialias", "pool": "cls+mean"}
    model = ViT(**ONE, **fields, layer_scale=1.0, num_classes=5)
    agree(model, weights(reference), [jnp.array(x)], reference, theirs)


def timm_vit(timm, **fields):
    sizes = {"embed_dim": 16, "depth": 1, "num_heads": 2, "mlp_ratio": 2, "num_classes": 5}
    sizes |= {"img_size": 16, "patch_size": 4, "dynamic_img_size": True}
    return randomise(timm.models.vision_transformer.VisionTransformer(**sizes | fields).eval())


@pytest.mark.torch
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"qk_norm": True, "init_values": 1.0}, {"qk_norm": 1e-6, "layer_scale": 1.0}),
        (
            {"reg_tokens": 3, "no_embed_class": True, "qkv_bias": False},
            {"registers": 3, "prefix_positions": False, "qkv_bias": False},
        ),
        ({"global_pool": "avg"}, {"pool": "mean", "norm_pooled": True}),
        ({"global_pool": "avg", "fc_norm": False, "reg_tokens": 2, "no_embed_class": True},
         {"pool": "mean", "registers": 2, "prefix_positions": False}),
        ({"global_pool": "avg", "class_token": False}, {"pool": "mean", "norm_pooled": True,
                                                        "class_token": False}),
        ({"global_pool": "map", "class_token": False}, {"pool": "map", "class_token": False}),
        ({"global_pool": "map"}, {"pool": "map"}),
        ({"pre_norm": True}, {"embed_norm": True, "patch_bias": False}),
        ({"img_size": (16, 24), "patch_size": (4, 8)}, {"grid": (4, 3), "patch": (4, 8)}),
    ],
    ids=["qk_norm", "registers", "fc_norm", "avg", "gap", "siglip", "map", "pre_norm", "rectangle"],
)  # fmt: skip
@pytest.mark.few(1)
def test_vit_equals_timm_at_another_image_size(timm, theirs, ours):
    reference = timm_vit(timm, **theirs)
    x = images(2, 12, 24, 3)
    features = reference.forward_features(to_torch(x))
    pooled = reference.forward_head(features, pre_logits=True)
    theirs = {"tokens": features, "pooled": pooled, "logits": reference.head(pooled)}
    model = ViT(**ONE | ours, resample="bicubic_antialias", num_classes=5)
    agree(model, weights(reference, by(TIMM)), [jnp.array(x)], reference, theirs, by(TIMM))


@pytest.mark.torch
def test_distilled_vit_equals_timm(timm):
    from timm.models.deit import VisionTransformerDistilled

    sizes = {"embed_dim": 16, "depth": 1, "num_heads": 2, "mlp_ratio": 2, "num_classes": 5}
    reference = randomise(VisionTransformerDistilled(img_size=16, patch_size=4, **sizes).eval())
    x = images(2, 16, 16, 3)
    theirs = {"tokens": reference.forward_features(to_torch(x)), "logits": reference(to_torch(x))}
    model = ViT(**ONE, distilled=True, distilled_head=True, num_classes=5)
    agree(model, weights(reference, by(TIMM)), [jnp.array(x)], reference, theirs, by(TIMM))


CLIP_VISION = {"patch_bias": False, "embed_norm": True, "eps": 1e-5, "activation": "quick_gelu"}


@pytest.mark.torch
@pytest.mark.parametrize(("kind", "eps"), [("vit", 1e-12), ("dinov2", 1e-6), ("clip", 1e-5)])
@pytest.mark.few(1)
def test_a_wrong_eps_is_seen_at_tiny_activations(kind, eps):
    import torch
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
        Dinov2Config,
        Dinov2Model,
        ViTConfig,
        ViTModel,
    )

    make, config, fields, names = {
        "vit": (ViTModel, ViTConfig, {"pooler": 16}, renamed),
        "dinov2": (Dinov2Model, Dinov2Config, {"layer_scale": 1.0}, renamed),
        "clip": (
            *(CLIPVisionModelWithProjection, CLIPVisionConfig),
            *(CLIP_VISION | {"norm_pooled": True, "projection": 512}, by(CLIP)),
        ),
    }[kind]
    config = vit_config(config, mlp_ratio=2)
    assert config.layer_norm_eps == eps
    reference, x = randomise(make(config).eval()), images(2, 16, 16, 3)
    with torch.no_grad():
        for name, leaf in reference.named_parameters():
            leaf /= 1024 if "embeddings." in name else 1
    theirs = reference(to_torch(x)).last_hidden_state.detach()

    def tokens(eps):
        model = ViT(**ONE | fields | {"eps": eps})
        return apply(model, weights(reference, names), [jnp.array(x)]).tokens

    close(tokens(eps), theirs, OUTPUTS)
    for wrong in {1e-12, 1e-6, 1e-5} - {eps}:
        with pytest.raises(AssertionError, match="off by"):
            close(tokens(wrong), theirs, 10 * OUTPUTS)


GRIDS = [
    ((37, 37), (16, 16)),
    ((4, 6), (7, 3)),
    ((3, 3), (8, 5)),
    ((5, 4), (1, 9)),
    ((1, 5), (4, 2)),
]


def by_torch(before, after, table, antialias=False):
    import torch

    grid = torch.tensor(table.reshape(1, *before, -1)).permute(0, 3, 1, 2)
    fields = {"mode": "bicubic", "antialias": antialias}
    grid = torch.nn.functional.interpolate(grid, size=after, **fields)
    return grid.permute(0, 2, 3, 1).flatten(1, 2).numpy()


def by_scipy(before, after, table):
    from scipy import ndimage

    factors = (after[0] / before[0], after[1] / before[1], 1)
    grid = ndimage.zoom(table.reshape(*before, -1), factors, order=1)
    return grid.reshape(1, after[0] * after[1], -1)


@pytest.mark.torch
@pytest.mark.parametrize(("before", "after"), GRIDS)
@pytest.mark.parametrize(
    ("kind", "reference"),
    [
        ("bicubic", by_torch),
        ("bicubic_antialias", functools.partial(by_torch, antialias=True)),
        ("bilinear", by_scipy),
    ],
)
def test_position_tables_are_resampled_as_their_source_does(kind, reference, before, after):
    table = images(1, 2 + before[0] * before[1], 3)
    ours = resample(jnp.array(table), before, after, kind, 2)
    np.testing.assert_array_equal(ours[:, :2], table[:, :2])
    close(ours[:, 2:], reference(before, after, table[:, 2:]), 2e-6)


@pytest.mark.torch
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_position_tables_are_resampled_as_timm_does(timm, prefix):
    from timm.layers import resample_abs_pos_embed

    table = images(1, prefix + 4 * 6, 3)
    theirs = resample_abs_pos_embed(to_torch(table), (7, 3), (4, 6), num_prefix_tokens=prefix)
    close(resample(jnp.array(table), (4, 6), (7, 3), "bicubic_antialias", prefix), theirs, 2e-6)


def test_resampling_to_the_same_grid_changes_nothing():
    table = jnp.array(images(1, 13, 2))
    assert resample(table, (3, 4), (3, 4), "bicubic", 1) is table


def bert_config():
    from transformers import BertConfig

    return BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=24,
    )  # fmt: skip


def sentences():
    """Three padded texts: ids, mask, and a second sentence from the sixth token on.

    Without the id 0: transformers gives its embedding no gradient (padding_idx).
    """
    ids = np.random.default_rng(0).integers(1, 50, (3, 9))
    mask = np.arange(9)[None] < np.array([[9], [4], [6]])
    types = np.broadcast_to(np.arange(9) > 5, (3, 9))
    return [np.asarray(value, np.int32) for value in (ids, mask, types)]


def torch_text():
    import torch

    names = ("input_ids", "attention_mask", "token_type_ids")
    return {n: torch.tensor(v.astype(np.int64)) for n, v in zip(names, sentences(), strict=True)}


def ours_text():
    return [jnp.array(value) for value in sentences()]


@pytest.mark.torch
def test_bert_equals_transformers():
    from transformers import BertModel

    reference = randomise(BertModel(bert_config()).eval())
    output = reference(**torch_text())
    theirs = {"tokens": output.last_hidden_state, "pooled": output.pooler_output}
    agree(Bert(**TEXT, pool="pooler"), weights(reference), ours_text(), reference, theirs)


@pytest.mark.torch
def test_bert_mean_pool_is_the_mean_over_the_mask():
    from transformers import BertModel

    reference = randomise(BertModel(bert_config(), add_pooling_layer=False).eval())
    tokens = reference(**torch_text()).last_hidden_state
    mask = torch_text()["attention_mask"][..., None]
    theirs = {"pooled": (tokens * mask).sum(1) / mask.sum(1)}
    agree(Bert(**TEXT, pooler=False), weights(reference), ours_text(), reference, theirs)


@pytest.mark.torch
def test_masked_language_head_equals_transformers():
    from transformers import BertForMaskedLM

    reference = randomise(BertForMaskedLM(bert_config()).eval())
    theirs = {"logits": reference(**torch_text()).logits}
    model = Bert(**TEXT, pooler=False, mlm=True)
    agree(model, weights(reference), ours_text(), reference, theirs)


@pytest.mark.torch
def test_token_head_equals_transformers():
    from transformers import BertForTokenClassification

    reference = randomise(BertForTokenClassification(bert_config()).eval())
    theirs = {"logits": reference(**torch_text()).logits}
    model = Bert(**TEXT, pooler=False, tokens=True, num_classes=reference.config.num_labels)
    agree(model, weights(reference), ours_text(), reference, theirs)


def roberta_text():
    """Three texts padded by the id 1, and their mask."""
    ids, mask, _ = sentences()
    ids = np.where(mask == 1, np.maximum(ids, 2), 1)
    return [np.asarray(value, np.int32) for value in (ids, mask)]


@pytest.mark.torch
@pytest.mark.parametrize("head", ["classify", "mlm"])
def test_roberta_with_padding_equals_transformers(head):
    import torch
    from transformers import RobertaConfig, RobertaForMaskedLM, RobertaForSequenceClassification

    sizes = bert_config().to_dict() | {"type_vocab_size": 1, "model_type": "roberta"}
    kind = RobertaForMaskedLM if head == "mlm" else RobertaForSequenceClassification
    config = RobertaConfig(**sizes | {"pad_token_id": 1, "num_labels": 5, "layer_norm_eps": 1e-5})
    reference = randomise(kind(config).eval())
    ids, mask = roberta_text()
    inputs = torch.tensor(ids.astype(np.int64)), torch.tensor(mask.astype(np.int64))
    tokens = reference.roberta(*inputs).last_hidden_state
    logits = reference(*inputs).logits
    fields = TEXT | {"types": 1, "pad": 1, "eps": 1e-5}
    if head == "mlm":
        model = Bert(**fields, mlm=True, pooler=False)
    else:
        model = Bert(**fields, pool="pooler", num_classes=5)
    variables, inputs = weights(reference, by(ROBERTA)), [jnp.array(ids), jnp.array(mask)]
    if head == "mlm":  # where torch reads the row of padding, it learns nothing from it
        kept = mask == 1
        ours = apply(model, variables, inputs)
        close(ours.tokens[kept], tokens.detach().numpy()[kept], OUTPUTS)
        close(ours.logits[kept], logits.detach().numpy()[kept], OUTPUTS)
        return
    agree(model, variables, inputs, reference, {"logits": logits}, by(ROBERTA))


@pytest.mark.torch
@pytest.mark.parametrize("head", ["classify", "mlm"])
def test_distilbert_equals_transformers(head):
    from transformers import (
        DistilBertConfig,
        DistilBertForMaskedLM,
        DistilBertForSequenceClassification,
    )

    config = DistilBertConfig(
        vocab_size=50, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=24,
        num_labels=5,
    )  # fmt: skip
    kind = DistilBertForMaskedLM if head == "mlm" else DistilBertForSequenceClassification
    text = {name: value for name, value in torch_text().items() if name != "token_type_ids"}
    reference = randomise_off_kinks(kind(config).eval(), *text.values())
    fields = {"mlm": True, "pooler": False} if head == "mlm" else {"pool": "pooler"}
    fields |= {} if head == "mlm" else {"pooler_activation": "relu", "num_classes": 5}
    theirs = {"logits": reference(**text).logits}
    theirs |= {"tokens": reference.distilbert(**text).last_hidden_state}
    model, names = Bert(**TEXT, types=0, **fields), by(DISTILBERT)
    # Ours takes types, as every text has them, and reads none.
    agree(model, weights(reference, names), ours_text(), reference, theirs, names)


def clip_text(**fields):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        vocab_size=50, max_position_embeddings=24, projection_dim=6, bos_token_id=48, **fields,
    )  # fmt: skip
    return randomise(CLIPTextModelWithProjection(config).eval())


def clip_ids():
    """Texts that end with 49, which also pads; the third has a second end inside."""
    ids, mask, _ = sentences()
    ids = np.minimum(ids, 47)
    ids[2, 3] = 49
    ends = mask.sum(1, keepdims=True) - 1
    return [np.asarray(np.where(np.arange(9) < ends, ids, 49), np.int32), mask]


@pytest.mark.torch
@pytest.mark.parametrize(("eos", "eot"), [(49, 49), (2, None)])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.few(1)
def test_clip_text_equals_transformers(eos, eot, masked):
    import torch

    reference = clip_text(eos_token_id=eos)
    inputs = clip_ids()[: 1 + masked]
    output = reference(*(torch.tensor(value.astype(np.int64)) for value in inputs))
    # A row of padding alone cannot be: every token sees at least the first.
    theirs = {"tokens": output.last_hidden_state, "pooled": output.text_embeds}
    model = ClipText(**TEXT, projection=6, eot=eot)
    inputs = [jnp.array(value) for value in inputs]
    agree(model, weights(reference, by(CLIP)), inputs, reference, theirs, by(CLIP))


@pytest.mark.torch
@pytest.mark.parametrize("norm_pooled", [True, False])
def test_clip_vision_equals_transformers_at_another_image_size(norm_pooled):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = vit_config(CLIPVisionConfig, projection_dim=6)
    reference = randomise(CLIPVisionModelWithProjection(config).eval())
    x = images(2, 12, 20, 3)
    output = reference(to_torch(x), interpolate_pos_encoding=True)
    tokens, norm = output.last_hidden_state, reference.vision_model.post_layernorm
    theirs = {"tokens": tokens if norm_pooled else norm(tokens), "pooled": output.image_embeds}
    model = ViT(**ONE, **CLIP_VISION, projection=6, norm_pooled=norm_pooled)
    names = by(CLIP)
    agree(model, weights(reference, names), [jnp.array(x)], reference, theirs, names)


def resnets(bottleneck, stages=(1, 2, 1), config=None, **fields):
    from transformers import ResNetConfig, ResNetForImageClassification

    growth = 4 if bottleneck else 1
    sizes = {"hidden_sizes": [8 * growth * 2**i for i in range(len(stages))]} | (config or {})
    config = ResNetConfig(
        embedding_size=8, depths=list(stages),
        layer_type="bottleneck" if bottleneck else "basic", num_labels=5, **sizes,
    )  # fmt: skip
    model = ResNet(stages=stages, width=8, bottleneck=bottleneck, num_classes=5, **fields)
    names = functools.partial(renamed, stages=stages)
    return model, ResNetForImageClassification(config), names


@pytest.mark.torch
@pytest.mark.parametrize("bottleneck", [True, False])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.few(1)
def test_resnet_equals_transformers(bottleneck, training):
    model, reference, names = resnets(bottleneck)
    x = images(3, 35, 38, 3)
    reference = randomise_off_kinks(reference.train(training), to_torch(x))
    norms = {n: m for n, m in reference.named_modules() if n.endswith("normalization")}
    counts = {}
    for name, norm in norms.items():
        norm.register_forward_hook(
            lambda m, inputs, _, name=name: counts.update(
                {name: inputs[0].numel() // m.num_features}
            )
        )
    before = weights(reference, names)
    features = reference.resnet(to_torch(x))
    pooled = features.pooler_output.flatten(1)
    tokens = features.last_hidden_state.permute(0, 2, 3, 1).flatten(1, 2)
    theirs = {"tokens": tokens, "pooled": pooled, "logits": reference.classifier(pooled)}
    updates = agree(model, before, [jnp.array(x)], reference, theirs, names, mutable=training)
    old, new = flatten({"batch_stats": before["batch_stats"]}), flatten(updates)
    assert new.keys() == (old.keys() if training else set())
    expected = flatten(weights(reference, names))
    for name in norms if training else ():
        path = "batch_stats/" + names(name).replace(".", "/")
        close(new[f"{path}/mean"], expected[f"{path}/mean"], OUTPUTS)
        # torch stores the variance with n - 1, we store it with n.
        unbiased = counts[name] / (counts[name] - 1)
        kept = 0.9 * old[f"{path}/var"]
        close(kept + (new[f"{path}/var"] - kept) * unbiased, expected[f"{path}/var"], OUTPUTS)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("bottleneck", "config", "fields"),
    [
        (True, {"downsample_in_bottleneck": True}, {"stride_first": True}),
        (True, {"downsample_in_first_stage": True}, {"downsample_first": True}),
        (False, {"downsample_in_first_stage": True}, {"downsample_first": True}),
        (True, {"hidden_sizes": [16, 40]}, {"widths": (16, 40)}),
        (False, {"hidden_sizes": [8, 24]}, {"widths": (8, 24)}),
    ],
    ids=["v1", "first_stage", "basic_first_stage", "widths", "basic_widths"],
)
@pytest.mark.few(1)
def test_resnet_variants_equal_transformers(bottleneck, config, fields):
    model, reference, names = resnets(bottleneck, (1, 1), config, **fields)
    x = images(2, 37, 45, 3)
    reference = randomise_off_kinks(reference.eval(), to_torch(x))
    features = reference.resnet(to_torch(x))
    tokens = features.last_hidden_state.permute(0, 2, 3, 1).flatten(1, 2)
    theirs = {"tokens": tokens, "logits": reference(to_torch(x)).logits}
    agree(model, weights(reference, names), [jnp.array(x)], reference, theirs, names)


@pytest.mark.torch
def test_resnet_d_equals_timm(timm):
    fields = {"stem_type": "deep", "stem_width": 4, "avg_down": True, "num_classes": 5}
    channels, block = (4, 4, 8, 8), timm.models.resnet.Bottleneck
    reference = timm.models.resnet.ResNet(block, (1, 1, 1, 1), channels=channels, **fields)
    x = images(2, 37, 45, 3)  # the later shortcuts average maps of 10 x 12 and 5 x 6
    reference = randomise_off_kinks(reference.eval(), to_torch(x))
    tokens = reference.forward_features(to_torch(x)).permute(0, 2, 3, 1).flatten(1, 2)
    theirs = {"tokens": tokens, "logits": reference(to_torch(x))}
    fields = {"width": 8, "widths": tuple(4 * count for count in channels), "num_classes": 5}
    model = ResNet(stages=(1, 1, 1, 1), **fields, stem="deep", shortcut="avg")
    names = by(TIMM_RESNET)
    agree(model, weights(reference, names), [jnp.array(x)], reference, theirs, names)


def bit_in_torch():
    """A small BiT from big_transfer's published description, in torch."""
    import torch
    from torch import nn

    class Conv(nn.Conv2d):
        def forward(self, x):
            w = self.weight
            var, mean = torch.var_mean(w, dim=(1, 2, 3), keepdim=True, unbiased=False)
            w = (w - mean) / torch.sqrt(var + 1e-10)
            return nn.functional.conv2d(x, w, None, self.stride, self.padding)

    class Block(nn.Module):
        def __init__(self, before, middle, after, stride):
            super().__init__()
            self.norm1 = nn.GroupNorm(32, before)
            self.conv1 = Conv(before, middle, 1, bias=False)
            self.norm2 = nn.GroupNorm(32, middle)
            self.conv2 = Conv(middle, middle, 3, stride, 1, bias=False)
            self.norm3 = nn.GroupNorm(32, middle)
            self.conv3 = Conv(middle, after, 1, bias=False)
            if stride != 1 or before != after:
                self.shortcut = nn.ModuleDict({"conv": Conv(before, after, 1, stride, bias=False)})

        def forward(self, x):
            y = torch.relu(self.norm1(x))
            if hasattr(self, "shortcut"):
                x = self.shortcut["conv"](y)
            y = self.conv2(torch.relu(self.norm2(self.conv1(y))))
            return x + self.conv3(torch.relu(self.norm3(y)))

    class BiT(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.ModuleDict({"conv": Conv(3, 32, 7, 2, 3, bias=False)})
            sizes = [(32, 32, 128, 1), (128, 64, 256, 2), (256, 64, 256, 1)]
            self.blocks = nn.ModuleList([Block(*size) for size in sizes])
            self.norm = nn.GroupNorm(32, 256)
            self.head = nn.Linear(256, 5)

        def forward(self, x):
            x = nn.functional.pad(self.stem["conv"](x), (1, 1, 1, 1))
            x = nn.functional.max_pool2d(x, 3, 2)
            for block in self.blocks:
                x = block(x)
            x = torch.relu(self.norm(x))
            return x, self.head(x.mean((2, 3)))

    return BiT()


@pytest.mark.torch
def test_bit_equals_torch():
    x = images(2, 41, 38, 3)
    reference = randomise_off_kinks(bit_in_torch(), to_torch(x))
    features, logits = reference(to_torch(x))
    theirs = {"tokens": features.permute(0, 2, 3, 1).flatten(1, 2), "logits": logits}
    model = ResNet(stages=(1, 2), width=32, norm="group", pool="zero", num_classes=5)
    agree(model, weights(reference), [jnp.array(x)], reference, theirs)


# Rules that every model keeps

KINDS = ["vit", "wide", "bert", "resnet", "bit"]
WIDE = {
    **{"distilled": True, "registers": 2, "embed_norm": True, "qk_norm": 1e-6, "pool": "map"},
    **{"norm_pooled": True, "pooler": 8, "projection": 6, "distilled_head": True},
}


def build(kind, **fields):
    """Return a small model and its inputs."""
    if kind in ("vit", "wide"):
        wide = WIDE if kind == "wide" else {}
        return ViT(**IMAGE | wide | fields), [jnp.array(images(2, 16, 16, 3))]
    if kind in ("bert", "clip_text"):
        return {"bert": Bert, "clip_text": ClipText}[kind](**TEXT | fields), ours_text()
    norm = "batch" if kind == "resnet" else "group"
    fields = {"stages": (1, 1), "width": 8, "norm": norm, "stem": "small"} | fields
    return ResNet(**fields), [jnp.array(images(2, 12, 12, 3))]


@functools.partial(jax.jit, static_argnums=0)
def apply(model, variables, inputs, rngs=None):
    """Run a model in one compiled program."""
    return model.apply(variables, *inputs, rngs=rngs)


def start(model, inputs, seed=0):
    """Initialise, then move every parameter: zero heads and biases hide bugs."""
    variables = jax.jit(model.init)(jax.random.key(seed), *inputs)
    random = np.random.default_rng(seed)
    move = lambda leaf: leaf + 0.1 * random.normal(size=leaf.shape).astype(np.float32)  # noqa: E731
    return variables | {"params": jax.tree.map(move, variables["params"])}


@pytest.mark.parametrize("kind", [*KINDS, "clip_text"])
@pytest.mark.few(1)
def test_reading_a_block_equals_the_model_without_the_blocks_above(kind):
    shallow = {"stages": (1,)} if kind in ("resnet", "bit") else {"depth": 1}
    head = {} if kind == "clip_text" else {"num_classes": 3}
    whole, inputs = build(kind, read="blocks/0", **head)
    variables = start(whole, inputs)
    assert "1" in variables["params"]["blocks"]
    ours = apply(whole, variables, inputs)
    if kind == "bit":  # without blocks above, BiT's final norm applies: compare before it
        assert variables["params"]["norm"]["scale"].shape == (64,)
        assert ours.tokens.shape == (2, 144, 32)
        return
    expected = apply(build(kind, **shallow, **head)[0], variables, inputs)
    for name in ("tokens", "pooled", "logits"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(expected, name))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.few(1)
def test_the_head_starts_at_zero(kind):
    model, inputs = build(kind, num_classes=3)
    variables = jax.jit(model.init)(jax.random.key(0), *inputs)
    assert not apply(model, variables, inputs).logits.any()
    without, _ = build(kind)
    shapes = jax.eval_shape(without.init, jax.random.key(0), *inputs)
    assert "head" not in shapes["params"]
    assert jax.eval_shape(without.apply, shapes, *inputs).logits is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.few(1)
def test_bfloat16_runs_and_stays_near_float32(kind):
    exact, inputs = build(kind, num_classes=3)
    variables = start(exact, inputs)
    half, _ = build(kind, num_classes=3, dtype=jnp.bfloat16)
    low = {"params": jax.tree.map(lambda v: v.astype(jnp.bfloat16), variables["params"])}
    ours, expected = apply(half, variables | low, inputs), apply(exact, variables, inputs)
    assert ours.tokens.dtype == jnp.bfloat16
    assert ours.logits.dtype == jnp.float32
    # Rounding to 8 bits, a few layers deep, in the mean over all values.
    for name in ("tokens", "logits"):
        difference = np.abs(np.asarray(getattr(ours, name), np.float32) - getattr(expected, name))
        assert difference.mean() < 0.05 * np.abs(getattr(expected, name)).max()


@pytest.mark.parametrize("kind", ["vit", "bert", "clip_text"])
@pytest.mark.parametrize("field", ["dropout", "drop_path"])
@pytest.mark.few(2)
def test_dropout_is_on_only_with_its_rng(kind, field):
    model, inputs = build(kind, **{field: 0.5})
    plain, _ = build(kind)
    variables = start(plain, inputs)
    still = apply(model, variables, inputs).tokens
    np.testing.assert_array_equal(still, apply(plain, variables, inputs).tokens)
    key = jax.random.key(1)
    dropped = apply(model, variables, inputs, {"dropout": key}).tokens
    assert np.abs(dropped - still).max() > 0.1
    again = apply(model, variables, inputs, {"dropout": key}).tokens
    np.testing.assert_array_equal(dropped, again)


def test_padding_does_not_affect_the_other_tokens():
    model, (ids, mask, types) = build("bert")
    variables = start(model, [ids, mask, types])
    other = jnp.where(mask == 1, ids, (ids + 7) % 50)
    assert (other != ids).any()
    ours, changed = (apply(model, variables, [i, mask, types]) for i in (ids, other))
    np.testing.assert_array_equal(ours.pooled, changed.pooled)
    kept = np.asarray(mask, bool)
    np.testing.assert_array_equal(ours.tokens[kept], changed.tokens[kept])


def test_a_text_alone_equals_the_text_padded():
    model, (ids, mask, types) = build("bert")
    variables = start(model, [ids, mask, types])
    padded = apply(model, variables, [ids, mask, types]).pooled[1]
    alone = apply(model, variables, [ids[1:2, :4]]).pooled[0]
    # Sums of other lengths round differently.
    close(padded, alone, 1e-5)


def test_a_row_of_padding_alone_stays_finite():
    model, (ids, mask, types) = build("bert")
    variables = start(model, [ids, mask, types])
    output = apply(model, variables, [ids, jnp.zeros_like(mask), types])
    assert np.isfinite(output.tokens).all()
    assert not output.pooled.any()


def test_pools_of_the_vit_are_made_of_the_same_tokens():
    outputs = {}
    for pool in ("cls", "mean", "cls+mean"):
        model, inputs = build("vit", pool=pool)
        outputs[pool] = apply(model, start(model, inputs), inputs)
    tokens = outputs["cls"].tokens
    np.testing.assert_array_equal(outputs["cls"].pooled, tokens[:, 0])
    close(outputs["mean"].pooled, tokens[:, 1:].mean(1), 1e-6)
    both = np.concatenate([outputs["cls"].pooled, outputs["mean"].pooled], axis=-1)
    np.testing.assert_array_equal(outputs["cls+mean"].pooled, both)


def test_the_exact_gelu_is_not_the_tanh_one():
    exact, inputs = build("vit")
    tanh, _ = build("vit", activation="gelu_tanh")
    variables = start(exact, inputs)
    ours, other = apply(exact, variables, inputs).tokens, apply(tanh, variables, inputs).tokens
    assert np.abs(ours - other).max() > OUTPUTS * np.abs(ours).max()


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        ("vit", {"read": "blocks/2"}, "blocks/1"),
        ("vit", {"pool": "meen"}, "mean"),
        ("vit", {"activation": "gelu_than"}, "gelu_tanh"),
        ("bert", {"pool": "pooler", "activation": "Gelu"}, "gelu"),
        ("resnet", {"norm": "groups"}, "group"),
        ("resnet", {"stem": "imagnet"}, "imagenet"),
        ("resnet", {"shortcut": "average"}, "avg"),
        ("resnet", {"widths": (8,)}, "stages"),
        ("bit", {"stem": "deep"}, "imagenet"),
        ("vit", {"resample": "bicubic_aa"}, "bicubic_antialias"),
        ("vit", {"class_token": False}, "mean"),
        ("vit", {"distilled_head": True, "num_classes": 3}, "distilled=True"),
        ("bert", {"pool": "pooler", "pooler_activation": "tan"}, "tanh"),
    ],
)
@pytest.mark.few(1)
def test_a_wrong_field_is_answered_with_the_right_name(kind, fields, named):
    model, inputs = build(kind, **fields)
    with pytest.raises(BadInput, match=named):
        model.init(jax.random.key(0), *inputs)


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(BadInput, match="multiple of the patch"):
        ViT(**IMAGE).init(jax.random.key(0), jnp.zeros((1, 18, 16, 3)))
    with pytest.raises(BadInput, match="24 positions"):
        Bert(**TEXT).init(jax.random.key(0), jnp.zeros((1, 25), jnp.int32))
    with pytest.raises(BadInput, match="22 positions"):
        Bert(**TEXT, pad=1).init(jax.random.key(0), jnp.zeros((1, 23), jnp.int32))
    with pytest.raises(BadInput, match="24 positions"):
        ClipText(**TEXT).init(jax.random.key(0), jnp.zeros((1, 25), jnp.int32))


def leaves(kind, **fields):
    """Return the shapes of a model's leaves outside its blocks, and those of its first block."""
    model, inputs = build(kind, **fields)
    found = flatten(jax.eval_shape(model.init, jax.random.key(0), *inputs))
    names = {path.removeprefix("params/"): leaf.shape for path, leaf in found.items()}
    return {path: shape for path, shape in names.items() if not path.startswith("blocks/1/")}


@pytest.mark.parametrize(
    ("kind", "fields", "added", "dropped"),
    [
        (
            *("vit", {"class_token": False, "pool": "mean"}),
            *({"embed/pos": (1, 16, 16)}, {"embed/cls"}),
        ),
        ("vit", {"distilled": True}, {"embed/dist": (1, 1, 16), "embed/pos": (1, 18, 16)}, {}),
        ("vit", {"prefix_positions": False}, {"embed/pos": (1, 16, 16)}, {}),
        ("vit", {"registers": 3}, {"embed/registers": (1, 3, 16)}, {}),
        ("vit", {"patch": (2, 8)}, {"embed/patch/kernel": (2, 8, 3, 16)}, {}),
        ("vit", {"patch_bias": False}, {}, {"embed/patch/bias"}),
        ("vit", {"embed_norm": True}, {f"embed/norm/{x}": (16,) for x in ("scale", "bias")}, {}),
        (
            *("vit", {"qk_norm": 1e-6}),
            {
                f"blocks/0/attention/norm_{x}/{leaf}": (8,)
                for x in ("query", "key")
                for leaf in ("scale", "bias")
            },
            {},
        ),
        (
            *("vit", {"qkv_bias": False}, {}),
            {f"blocks/0/attention/{x}/bias" for x in ("query", "key", "value")},
        ),
        ("vit", {"norm_pooled": True, "pool": "cls+mean"}, {}, {}),
        ("vit", {"pooler": 6}, {"pooler/kernel": (16, 6), "pooler/bias": (6,)}, {}),
        ("vit", {"projection": 6}, {"projection/kernel": (16, 6)}, {}),
        ("bert", {"types": 0}, {}, {"embed/type/embedding"}),
        ("bert", {"pad": 1, "pooler_activation": "relu"}, {}, {}),
    ],
)
def test_a_field_adds_its_own_leaves_and_no_other(kind, fields, added, dropped):
    plain = leaves(kind)
    kept = {path: shape for path, shape in plain.items() if path not in dropped}
    assert plain.keys() >= set(dropped)
    assert leaves(kind, **fields) == kept | added


def test_what_a_file_may_hold_has_its_place_and_is_not_read():
    model, inputs = build("vit", depth=1, pooler=6, map_head=True)
    variables = start(model, inputs)
    head = {path.split("/")[1] for path in flatten(variables["params"]) if path[:4] == "map/"}
    assert head == {"probe", "attention", "norm", "mlp"}
    plain = {name: v for name, v in variables["params"].items() if name not in ("map", "pooler")}
    np.testing.assert_array_equal(
        apply(model, variables, inputs).pooled,
        apply(build("vit", depth=1)[0], {"params": plain}, inputs).pooled,
    )


def test_the_pooler_reads_the_mean_where_there_is_no_class_token():
    model, inputs = build("vit", depth=1, class_token=False, pool="pooler", pooler=6)
    variables = start(model, inputs)
    output = apply(model, variables, inputs)
    dense = jax.tree.map(np.asarray, variables["params"]["pooler"])
    mean = np.asarray(output.tokens).mean(1)
    expected = np.tanh(mean @ dense["kernel"] + dense["bias"])
    close(output.pooled, expected, 1e-5)


def test_a_text_tower_does_not_see_what_follows():
    model, (ids, *_) = build("clip_text", eot=None)
    variables = start(model, [ids])
    other = jnp.concatenate([ids[:, :4], (ids[:, 4:] + 7) % 50], axis=1)
    ours, changed = (apply(model, variables, [i]).tokens for i in (ids, other))
    close(ours[:, :4], changed[:, :4], 1e-6)
    assert np.abs(ours[:, 4:] - changed[:, 4:]).max() > 0.1


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("vit", {"patch": (4, 8), "grid": (4, 3), "registers": 0, "pooler": 8, "qk_norm": 1e-6}),
        ("vit", {"patch": 4, "registers": 4, "pooler": None, "qk_norm": None}),
        ("bert", {"types": 0, "pad": 0}),
        ("bert", {"pad": None}),
        ("resnet", {"widths": (8, 16), "stages": (1, 1)}),
        ("resnet", {"widths": None}),
        ("clip_text", {"eot": 0, "projection": None}),
    ],
)
def test_a_config_may_give_every_field(name, fields):
    check_options(MODELS[name], fields, "model")


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        *[("vit", "patch", value) for value in (0, (4, 0), (4, 4, 4), "4", None)],
        *[("vit", "pooler", value) for value in (0, -1, 1.5)],
        *[("vit", "registers", -1), ("vit", "class_token", 1), ("bert", "pad", -1)],
        *[("resnet", "widths", (8, 0)), ("clip_text", "eot", 0.5)],
    ],
)
def test_a_config_may_not_give_nonsense(name, field, value):
    with pytest.raises(BadInput, match=f"model.{field}"):
        check_options(MODELS[name], {field: value}, "model")


@pytest.mark.parametrize(
    ("model", "inputs", "count"),
    [
        # DINOv2 ViT-S/14 (22,056,576 with its mask token), MiniLM-L6, torchvision's ResNet-50.
        (ViT(layer_scale=1.0), (1, 28, 28, 3), 22_056_576 - 384),
        (Bert(), (1, 4), 22_713_216),
        (ResNet(num_classes=1000), (1, 32, 32, 3), 25_557_032),
    ],
)
def test_the_defaults_have_the_published_number_of_parameters(model, inputs, count):
    kind = jnp.int32 if len(inputs) == 2 else jnp.float32
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(inputs, kind))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == count
