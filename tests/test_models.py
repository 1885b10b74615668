"""Every model against an independent one, and the rules that all models keep."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax.models.bert import Bert
from tljax.models.resnet import ResNet
from tljax.models.vit import RESAMPLERS, ViT, resample
from tljax.tree import flatten, unflatten
from tljax.types import BadInput

# Right float32 code sits near 1e-6 of the largest value; a tanh GELU is 1.2e-4 away.
OUTPUTS, GRADIENTS = 2e-5, 2e-4

IMAGE = {"width": 16, "depth": 2, "heads": 2, "mlp": 32, "patch": 4, "grid": (4, 4)}
TEXT = {"vocab": 50, "width": 16, "depth": 2, "heads": 2, "mlp": 32, "positions": 24}

COMMON = [
    ("patch_embeddings.projection", "patch"),
    ("cls_token", "cls"),
    ("position_embeddings.weight", "position.embedding"),
    ("word_embeddings.weight", "word.embedding"),
    ("token_type_embeddings.weight", "type.embedding"),
    ("position_embeddings", "pos"),
    ("classifier.1.", "head."),
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


def renamed(name, stages=()):
    """Return our dotted name of a transformers leaf."""
    for prefix in ("vit.", "dinov2.", "bert.", "resnet."):
        name = name.removeprefix(prefix)
    flat = 0
    for stage, count in enumerate(stages):
        for layer in range(count):
            name = name.replace(f"encoder.stages.{stage}.layers.{layer}.", f"blocks.{flat}.")
            flat += 1
    for old, new in CONVOLUTION if stages else COMMON + TRANSFORMER:
        name = name.replace(old, new)
    return name.replace("classifier.1.", "head.")


def to_ours(tensors, stages=()):
    """Convert named torch tensors (weights or gradients) to our tree."""
    leaves = {}
    for name, tensor in tensors.items():
        value = tensor.detach().numpy()
        *module, leaf = renamed(name, stages).split(".")
        collection = "batch_stats" if leaf.startswith("running") else "params"
        leaf = leaf.removeprefix("running_")
        if leaf == "weight":
            leaf = "scale" if value.ndim == 1 else "kernel"
        if leaf == "kernel":
            value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
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
                centre = 1.0 if name.endswith(("weight", "lambda1")) else 0.0
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


def weights(model, stages=()):
    """Return the model's parameters (tied ones once) and running statistics as our tree."""
    leaves = dict(model.named_parameters())
    leaves |= {name: leaf for name, leaf in model.named_buffers() if "running" in name}
    return to_ours({n: v for n, v in leaves.items() if "mask_token" not in n}, stages)


def close(ours, reference, tolerance, scale=None):
    """Assert equality relative to the reference's largest value."""
    ours, reference = np.asarray(ours), np.asarray(reference)
    assert ours.shape == reference.shape
    scale = np.abs(reference).max() if scale is None else scale
    worst = np.abs(ours - reference).max() / scale
    assert worst < tolerance, f"off by {worst:.2e} of the largest value"


def agree(model, variables, inputs, reference, theirs, stages=(), mutable=False):
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
    expected, found = flatten(to_ours(named, stages)), flatten({"params": gradients})
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


@pytest.mark.torch
@pytest.mark.parametrize(("before", "after"), [(37, 16), (4, 7), (3, 3)])
def test_cubic_matrix_equals_torch(before, after):
    import torch

    identity = torch.eye(before)[None, :, None, :]  # resample each row along the last axis
    expected = torch.nn.functional.interpolate(identity, size=(1, after), mode="bicubic")
    close(RESAMPLERS["bicubic"](before, after), expected[0, :, 0].T, 1e-6)


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


def resnets(bottleneck):
    from transformers import ResNetConfig, ResNetForImageClassification

    stages, growth = (1, 2, 1), 4 if bottleneck else 1
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8 * growth, 16 * growth, 32 * growth], depths=list(stages),
        layer_type="bottleneck" if bottleneck else "basic", num_labels=5,
    )  # fmt: skip
    model = ResNet(stages=stages, width=8, bottleneck=bottleneck, num_classes=5)
    return model, ResNetForImageClassification(config), stages


@pytest.mark.torch
@pytest.mark.parametrize("bottleneck", [True, False])
@pytest.mark.parametrize("training", [False, True])
def test_resnet_equals_transformers(bottleneck, training):
    model, reference, stages = resnets(bottleneck)
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
    before = weights(reference, stages)
    features = reference.resnet(to_torch(x))
    pooled = features.pooler_output.flatten(1)
    tokens = features.last_hidden_state.permute(0, 2, 3, 1).flatten(1, 2)
    theirs = {"tokens": tokens, "pooled": pooled, "logits": reference.classifier(pooled)}
    updates = agree(model, before, [jnp.array(x)], reference, theirs, stages, mutable=training)
    old, new = flatten({"batch_stats": before["batch_stats"]}), flatten(updates)
    assert new.keys() == (old.keys() if training else set())
    expected = flatten(weights(reference, stages))
    for name in norms if training else ():
        path = "batch_stats/" + renamed(name, stages).replace(".", "/")
        close(new[f"{path}/mean"], expected[f"{path}/mean"], OUTPUTS)
        # torch stores the variance with n - 1, we store it with n.
        unbiased = counts[name] / (counts[name] - 1)
        kept = 0.9 * old[f"{path}/var"]
        close(kept + (new[f"{path}/var"] - kept) * unbiased, expected[f"{path}/var"], OUTPUTS)


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
    model = ResNet(stages=(1, 2), width=32, norm="group", num_classes=5)
    agree(model, weights(reference), [jnp.array(x)], reference, theirs)


# Rules that every model keeps

KINDS = ["vit", "bert", "resnet", "bit"]


def build(kind, **fields):
    """Return a small model and its inputs."""
    if kind == "vit":
        return ViT(**IMAGE, **fields), [jnp.array(images(2, 16, 16, 3))]
    if kind == "bert":
        return Bert(**TEXT, **fields), ours_text()
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


@pytest.mark.parametrize("kind", KINDS)
def test_reading_a_block_equals_the_model_without_the_blocks_above(kind):
    shallow = {"stages": (1,)} if kind in ("resnet", "bit") else {"depth": 1}
    whole, inputs = build(kind, read="blocks/0", num_classes=3)
    variables = start(whole, inputs)
    assert "1" in variables["params"]["blocks"]
    fields = (IMAGE if kind == "vit" else TEXT if kind == "bert" else {}) | shallow
    if kind == "vit":
        cut = ViT(**fields, num_classes=3)
    elif kind == "bert":
        cut = Bert(**fields, num_classes=3)
    else:
        cut, _ = build(kind, **shallow, num_classes=3)
    ours, expected = apply(whole, variables, inputs), None
    if kind == "bit":  # without blocks above, BiT's final norm applies: compare before it
        assert variables["params"]["norm"]["scale"].shape == (64,)
        assert ours.tokens.shape == (2, 144, 32)
        return
    expected = apply(cut, variables, inputs)
    for name in ("tokens", "pooled", "logits"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(expected, name))


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_starts_at_zero(kind):
    model, inputs = build(kind, num_classes=3)
    variables = jax.jit(model.init)(jax.random.key(0), *inputs)
    assert not apply(model, variables, inputs).logits.any()
    without, _ = build(kind)
    shapes = jax.eval_shape(without.init, jax.random.key(0), *inputs)
    assert "head" not in shapes["params"]
    assert jax.eval_shape(without.apply, shapes, *inputs).logits is None


@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("kind", ["vit", "bert"])
@pytest.mark.parametrize("field", ["dropout", "drop_path"])
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
    ],
)
def test_a_wrong_field_is_answered_with_the_right_name(kind, fields, named):
    model, inputs = build(kind, **fields)
    with pytest.raises(BadInput, match=named):
        model.init(jax.random.key(0), *inputs)


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(BadInput, match="multiple of the patch"):
        ViT(**IMAGE).init(jax.random.key(0), jnp.zeros((1, 18, 16, 3)))
    with pytest.raises(BadInput, match="24 positions"):
        Bert(**TEXT).init(jax.random.key(0), jnp.zeros((1, 25), jnp.int32))


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
