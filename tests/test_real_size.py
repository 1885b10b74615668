"""Real sizes against transformers: the state after every layer, outputs, and gradients by name."""

import shutil

import jax
import numpy as np
import pytest
from foreign import CLOSE, CLOSE_GRADIENT, call
from test_hf import forward, results, whole_fields

import tljax
from tljax.weights.hf import HF5, file_of
from tljax.weights.table import to_foreign

pytestmark = [pytest.mark.torch, pytest.mark.slow]

SMALL = {"hidden_size": 384, "num_attention_heads": 6}
DINO = SMALL | {"mlp_ratio": 4, "patch_size": 14, "image_size": 518, "num_labels": 1000}
BASIC = {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]}
ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
FAMILIES = {
    "ViT-B/16": ("ViTForImageClassification", {"num_labels": 1000}),
    "DeiT-S": (
        "DeiTForImageClassificationWithTeacher",
        SMALL | {"intermediate_size": 1536, "num_labels": 1000},
    ),
    "DINOv2-S/14": ("Dinov2ForImageClassification", DINO),
    "DINOv2-S/14 with registers": ("Dinov2WithRegistersForImageClassification", DINO),
    "BERT-base": ("BertForMaskedLM", {}),
    "RoBERTa-base": ("RobertaForSequenceClassification", ROBERTA | {"num_labels": 3}),
    "DistilBERT-base": ("DistilBertForMaskedLM", {}),
    "ResNet-18": ("ResNetForImageClassification", BASIC | {"num_labels": 1000}),
    "ResNet-50": ("ResNetForImageClassification", {"num_labels": 1000}),
    "CLIP ViT-B/32, vision": ("CLIPVisionModelWithProjection", {}),
    "CLIP ViT-B/32, text": ("CLIPTextModelWithProjection", {}),
}
"""Name -> class of transformers, and what its configuration's defaults lack of this size."""
BRANCHES = (".attention.output.dense", ".o_proj", ".out_proj", ".out_lin")
BRANCHES += (".layer.1.normalization", ".layer.2.normalization")
"""What ends attention, and a ResNet's blocks (or is scaled away again by what follows)."""
KEYS = (".key.bias", ".k_proj.bias", ".k_lin.bias")
TIE = 5e-7
"""How near two values of one pooling window may be, of the largest: the stem's error is 2e-7."""


def randomise(model):
    """Draw every parameter so that values neither explode nor vanish in any depth.

    Kernels are normal / sqrt(inputs), which keeps the variance of what they multiply; tables,
    tokens and positions normal, as large as embedded patches of normal pixels; norms and
    LayerScale within .5 of one; biases a tenth of what they are added to.  What attention and a
    ResNet's blocks add is .3 of that, as else float32 does not suffice: averages over all tokens
    make these alike within few layers of BERT, and of the queries' gradients rounding is left;
    ResNet-50 amplifies rounding from block to block.  Against float64 torch itself is then off by
    7e-4 (the gradients) and 6e-5 (the states), and tljax by 2e-4 and 6e-5.
    """
    import torch

    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim == 1 and bool((tensor == 1).all()):
                tensor.uniform_(0.5, 1.5)
            elif tensor.ndim == 3 or id(tensor) in tables:
                tensor.normal_()
            else:
                tensor.normal_(0, 0.1 if tensor.ndim == 1 else tensor[0].numel() ** -0.5)
            if name.removesuffix(".weight").endswith(BRANCHES):
                tensor.mul_(0.3)


def settle(model, pixels):
    """Give BatchNorms statistics near those of what they read, and move every relu off its kink.

    Without the first, sums would grow from block to block.  The second: where a relu reads almost
    zero, rounding decides about a gradient of order one, by right.  Of the millions here some
    would, so every channel's last bias before a relu moves zero into the widest gap between the
    channel's values nearby.  Returns the least distance from a kink, and the least between the two
    largest of a pooling window, both as fractions of the largest value.
    """
    import torch

    mode = off_kinks()

    def settle_norm(norm, inputs):
        mode.last = norm
        var, mean = torch.var_mean(inputs[0], (0, 2, 3))
        norm.running_mean.copy_(mean + 0.1 * var.sqrt() * torch.randn_like(var))
        norm.running_var.copy_(var * (torch.rand_like(var) + 0.5))

    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(settle_norm) for norm in norms]
    with torch.no_grad(), mode:
        model(pixels)
    for hook in hooks:
        hook.remove()
    return mode.least, mode.tie


def off_kinks():
    """Return a mode of torch that shifts the bias of the norm before each relu."""
    import torch

    relus = (torch.relu, torch.nn.functional.relu)
    pools = (torch.max_pool2d, torch.nn.functional.max_pool2d)

    class Mode(torch.overrides.TorchFunctionMode):
        last, least, tie = None, 1.0, 1.0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            x = args[0] if args else None
            if function in relus:
                shift = to_widest_gap(x)
                self.last.bias += shift
                x = x + shift[:, None, None]
                self.least = min(self.least, float(x.abs().min() / x.abs().max()))
                return torch.relu(x)
            if function in pools:
                windows = torch.nn.functional.unfold(x.transpose(0, 1), 3, 1, 1, 2)
                first, second = windows.topk(2, dim=1).values.unbind(1)
                apart = (first - second)[first > 0]  # zeros have no gradient, whichever is taken
                self.tie = min(self.tie, float(apart.min() / x.max()))
            return function(*args, **(kwargs or {}))

    return Mode()


def to_widest_gap(x):
    """Return what to add to each channel so that zero is amid its widest gap nearby."""
    values = x.transpose(0, 1).flatten(1).sort(dim=1).values
    centres = (values[:, 1:] + values[:, :-1]) / 2
    near = centres.abs() < 0.5 * values.std(dim=1, keepdim=True)
    gaps = values.diff(dim=1).where(near, 0)
    widest = gaps.argmax(dim=1, keepdim=True)
    found = -centres.gather(1, widest)[:, 0]
    return found.where(near.any(dim=1), 0)  # few values, none of them near


def make(name):
    """Build a transformers model of a real size at random; also return what it is to read."""
    import torch
    import transformers

    kind, options = FAMILIES[name]
    cls = {kind: getattr(transformers, kind) for kind, _ in FAMILIES.values()}[kind]
    for seed in range(40):
        torch.manual_seed(seed)
        model = cls(cls.config_class(**options)).eval()
        randomise(model)
        inputs = inputs_of(model.config, seed)
        if "ResNet" not in name:
            return model, inputs
        kink, tie = settle(model, torch.from_numpy(inputs[0]).permute(0, 3, 1, 2))
        if kink > CLOSE and tie > TIE:
            return model, inputs
    raise AssertionError("no seed keeps clear of the kinks")


def inputs_of(config, seed):
    """Draw one picture of 224 pixels, or two texts of 32 tokens, the second shorter."""
    rng = np.random.default_rng(seed)
    if not hasattr(config, "vocab_size"):
        return (rng.normal(size=(1, 224, 224, 3)).astype(np.float32),)
    mask = (np.arange(32) < [[32], [25]]).astype(np.int32)
    ids = np.where(mask, rng.integers(5, config.vocab_size - 2, mask.shape), config.pad_token_id)
    if config.model_type.startswith("clip"):
        ids[[0, 1], [31, 24]] = config.eos_token_id
    types = rng.integers(0, getattr(config, "type_vocab_size", 0) or 1, mask.shape)
    texts = ids.astype(np.int32), mask, types.astype(np.int32)
    return texts if hasattr(config, "type_vocab_size") else texts[:2]


def run_torch(model, name, inputs):
    """Return what a model gives, and the state after its embedding and after every layer."""
    states = []
    for module in model.modules():  # its own list has only the stages of a ResNet
        if type(module).__name__ in ("ResNetBasicLayer", "ResNetBottleNeckLayer"):
            module.register_forward_hook(lambda _, __, found: states.append(found))
    model.config.output_hidden_states = True
    theirs = forward(model, name, inputs)
    if states:  # of a ResNet
        states = [x.permute(0, 2, 3, 1) for x in states]
    return results(theirs), states or list(theirs.hidden_states)


def run_tljax(pre, inputs, weights):
    """Return outputs, states and gradients of sum(weights * logits), or of pooled without."""
    rest = {name: x for name, x in pre.variables.items() if name != "params"}

    def is_layer(module, method):
        place = module.path == ("embed",) or module.path[:-1] == ("blocks",)
        return place and method == "__call__"

    def loss(params, rest, weights, inputs):
        options = {"capture_intermediates": is_layer, "mutable": ["intermediates"]}
        output, found = pre.model.apply({**rest, "params": params}, *inputs, **options)
        chosen = output.pooled if output.logits is None else output.logits
        return (chosen * weights).sum(), (output, found["intermediates"])

    arguments = pre.variables["params"], rest, weights, inputs
    grads, (output, found) = call(jax.grad(loss, has_aux=True), *arguments)
    blocks = found["blocks"]
    layers = [found["embed"]] if "embed" in found else []
    layers += [blocks[str(i)] for i in range(len(blocks))]
    return output, [layer["__call__"][0] for layer in layers], {"params": grads}


def named_gradients(pre, grads):
    """Name and lay out gradients as transformers has them in memory."""
    others = {name: x for name, x in pre.variables.items() if name != "params"}
    fields = whole_fields(pre.model)
    leaves = file_of(pre.source.kind, fields, HF5).leaves
    found = to_foreign(grads | jax.tree.map(np.zeros_like, others), leaves, fields)
    return {name: grad for name, grad in found.items() if "running_" not in name}


def error(given, expected, scale=None):
    """Return the largest difference as a fraction of the largest value."""
    given, expected = np.asarray(given), np.asarray(expected)
    assert given.shape == expected.shape
    scale = np.abs(expected).max() if scale is None else scale
    return float(np.abs(given - expected).max() / scale)


def worst(errors, tolerance):
    """Assert that all errors are within a tolerance; describe the largest."""
    name = max(errors, key=lambda name: errors[name])
    assert errors[name] <= tolerance, {k: f"{x:.1e}" for k, x in errors.items() if x > tolerance}
    return f"{errors[name]:.1e} ({name})"


def compare_outputs(given, expected, real):
    """Compare state by state what is no padding; returns the errors."""
    rows = lambda x: np.asarray(x)[real] if len(x.shape) == 3 else np.asarray(x)  # noqa: E731
    expected = [x.detach() for x in expected]
    sizes = [float(x.abs().max()) for x in expected]
    assert min(sizes) > 0.1 and max(sizes) < 500  # or the tolerances would mean little
    pairs = zip(given, expected, strict=True)
    return {f"state {i}": error(rows(ours), rows(x)) for i, (ours, x) in enumerate(pairs)}


def compare_gradients(given, expected):
    """Compare by name; returns the errors.

    The gradient of a key's bias is zero but for rounding: judged by the largest of all tensors.
    """
    assert given.keys() == expected.keys()
    largest = max(np.abs(grad).max() for grad in expected.values())
    scales = {name: largest if name.endswith(KEYS) else None for name in expected}
    return {name: error(given[name], grad, scales[name]) for name, grad in expected.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_real_size_equals_transformers(name, tmp_path):
    import torch

    model, inputs = make(name)
    model.save_pretrained(tmp_path / "model")
    pre = tljax.load(tmp_path / "model")
    assert pre.record["digest"] and pre.report.share == 1
    shutil.rmtree(tmp_path / "model")  # pytest would keep gigabytes
    theirs, states = run_torch(model, name, inputs)
    part = "pooled" if theirs["logits"] is None else "logits"
    real = inputs[1].astype(bool) if len(inputs) > 1 else ...
    weights = np.random.default_rng(1).normal(size=theirs[part].shape).astype(np.float32)
    weights *= inputs[1][:, :, None] if weights.ndim == 3 else 1  # padding counts for nothing
    ours, layers, grads = run_tljax(pre, inputs, weights)
    found = compare_outputs([*layers, getattr(ours, part)], [*states, theirs[part]], real)
    assert len(found) == len(pre.variables["params"]["blocks"]) + 1 + ("ResNet" not in name)
    print(name, "outputs", worst(found, CLOSE))  # shown by pytest -s
    (theirs[part] * torch.from_numpy(weights)).sum().backward()
    expected = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    found = compare_gradients(named_gradients(pre, grads), expected)
    print(name, "gradients", worst(found, CLOSE_GRADIENT))
