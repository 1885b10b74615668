"""Every adaptation against PEFT in torch: same weights in, same logits, merges and counts."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import assert_close, call, prepare
from theirs import inputs_of, logits_of, make_base, ours

from tljax.edits.fold import merge
from tljax.state import apply_edits
from tljax.strategies import make
from tljax.tree import flatten, label, unflatten
from tljax.weights import open_weights

pytestmark = [
    pytest.mark.torch,
    # PEFT itself reads an attribute that transformers has deprecated, whatever the adapter.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]
MERGED = 1e-6  # of the largest: one sum in float32
QV = tuple(f"params/**/{name}" for name in ("query", "value"))
ALPHA = {"rank": 3, "alpha": 5.0}
THEIRS = {"r": 3, "lora_alpha": 5}
BERT_QV, VIT_QV = ["query", "value"], ["q_proj", "v_proj"]
CONVS = {"target_modules": r".*layers.*convolution"}
LORA = {  # the model, PEFT's settings, our options
    "lora-bert": ("Bert", THEIRS | {"target_modules": BERT_QV}, ALPHA),
    "rslora-vit": (
        "ViT",
        THEIRS | {"target_modules": VIT_QV, "use_rslora": True},
        ALPHA | {"use_rslora": True},
    ),
    "dora-vit": (
        "ViT",
        THEIRS | {"target_modules": ["q_proj", "fc1", "fc2"], "use_dora": True},
        ALPHA | {"use_dora": True, "targets": ("params/**/query", "params/blocks/*/mlp/*")},
    ),
    "patterns-vit": (
        "ViT",
        THEIRS
        | {"target_modules": [*VIT_QV, "fc1"], "rank_pattern": {"v_proj": 4, "1.mlp.fc1": 5}}
        | {"alpha_pattern": {"1.attention.q_proj": 7, "v_proj": 2.5}},
        ALPHA
        | {"targets": (*QV, "params/**/up")}
        | {"rank_pattern": {"params/**/value": 4, "params/blocks/1/mlp/up": 5}}
        | {"alpha_pattern": {"params/blocks/1/attention/query": 7.0, "params/**/value": 2.5}},
    ),
    "bias-all-bert": (
        "Bert",
        THEIRS | {"target_modules": BERT_QV, "bias": "all"},
        ALPHA | {"bias": "all"},
    ),
    "bias-of-lora-vit": (
        "ViT",
        THEIRS | {"target_modules": VIT_QV, "bias": "lora_only"},
        ALPHA | {"bias": "lora_only"},
    ),
    "conv-resnet": (
        "ResNet",
        THEIRS | CONVS,
        ALPHA | {"targets": ("params/blocks/**/conv*",)},
    ),
    "dora-conv-resnet": (
        "ResNet",
        THEIRS | CONVS | {"use_dora": True},
        ALPHA | {"targets": ("params/blocks/**/conv*",), "use_dora": True},
    ),
    "patch-vit": (
        "ViT",
        THEIRS | {"target_modules": ["projection"]},
        ALPHA | {"targets": ("params/embed/patch",)},
    ),
    "embed-bert": (
        "Bert",
        THEIRS | {"target_modules": ["word_embeddings", "key"]},
        ALPHA | {"targets": ("params/embed/word", "params/**/key")},
    ),
    "pissa-vit": (
        "ViT",
        THEIRS | {"target_modules": VIT_QV, "init_lora_weights": "pissa"},
        ALPHA | {"init": "pissa"},
    ),
    "olora-bert": (
        "Bert",
        THEIRS | {"target_modules": BERT_QV, "init_lora_weights": "olora"},
        ALPHA | {"init": "olora"},
    ),
}


def stir(model, words):
    """Draw anew what an adapter starts at zero or one, so that all of it has an effect."""
    import torch

    torch.manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if any(word in name for word in words):
                tensor.add_(torch.randn_like(tensor) * 0.2)


def start(name, folder, method, options):
    """Open the same base here, with a method grafted onto it."""
    model, variables = prepare(open_weights(str(folder)), *inputs_of(name))
    strategy = make(variables, None, [(method, options)])
    tree = jax.jit(lambda tree: apply_edits(strategy.edits, tree, jax.random.key(0)))(variables)
    return model, jax.device_get(tree), label(tree, strategy.roles, "freeze")


def trained(tree, roles):
    leaves, role_of = flatten(tree), flatten(roles)
    return sum(leaf.size for path, leaf in leaves.items() if role_of[path] == "train")


def put(tree, values):
    """Put values in the place of leaves that are there, in the same shape."""
    leaves = flatten(tree)
    for path, value in values.items():
        value = np.asarray(value)
        assert leaves[path].shape == value.shape, path
        leaves[path] = value
    return unflatten(leaves)


def factors_of(module, layer):
    """Return a PEFT layer's LoRA in our names and layouts."""
    kind = type(module.get_base_layer()).__name__
    if kind == "Embedding":
        a, b = module.lora_embedding_A["default"], module.lora_embedding_B["default"]
        found = {"a": a.detach().numpy().T, "b": b.detach().numpy().T}
    else:
        a, b = (getattr(module, x)["default"].weight.detach().numpy() for x in ("lora_A", "lora_B"))
        if kind == "Conv2d":
            found = {"a": a.transpose(2, 3, 1, 0), "b": b[:, :, 0, 0].T}
        else:
            found = {"a": a.T, "b": b.T}
    if "default" in getattr(module, "lora_magnitude_vector", {}):
        length = module.lora_magnitude_vector["default"].weight.detach().numpy()
        found["magnitude"] = length.reshape(-1)
    return {f"{layer}/lora/{leaf}": x for leaf, x in found.items()}


def kernel_of(module):
    weight = module.get_base_layer().weight.detach().numpy()
    if type(module.get_base_layer()).__name__ == "Embedding":
        return "embedding", weight
    return "kernel", weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T


def grafted_modules(model, attribute):
    root = "base_model.model."
    found = {n.removeprefix(root): m for n, m in model.named_modules() if hasattr(m, attribute)}
    return {ours(name): module for name, module in found.items()}


def assert_merges(model, tree, adapted, base):
    """Compare the folded weights, and what the folded model computes."""
    folded = flatten(merge(jax.tree.map(jnp.asarray, tree)))
    merged = adapted.merge_and_unload()
    modules = {ours(name): module for name, module in merged.named_modules()}
    compared = 0
    for path, leaf in folded.items():
        layer, _, kind = path.rpartition("/")
        if kind in ("kernel", "embedding") and layer in modules:
            weight = modules[layer].weight.detach().numpy()
            if kind == "kernel":
                weight = weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T
            assert_close(leaf, weight, MERGED)
            compared += 1
    assert compared
    assert_close(call(model.apply, unflatten(folded), *inputs_of(base)).logits,
                 logits_of(merged, base))  # fmt: skip


@pytest.fixture
def get_peft(peft):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return peft


def saved(name):
    return [{"ResNet": "classifier.1"}.get(name, "classifier")]


@pytest.mark.parametrize("case", LORA)
@pytest.mark.few(6)
def test_lora_and_its_relatives_equal_peft(case, get_peft, tmp_path):
    name, settings, options = LORA[case]
    base = make_base(name, tmp_path)
    before = logits_of(base, name)
    config = get_peft.LoraConfig(**settings, modules_to_save=saved(name))
    theirs = get_peft.get_peft_model(base, config).eval()
    model, tree, roles = start(name, tmp_path, "lora", options)
    assert trained(tree, roles) == theirs.get_nb_trainable_parameters()[0]
    modules = grafted_modules(theirs, "lora_A")
    modules = {path: module for path, module in modules.items() if hasattr(module, "scaling")}
    leaves = flatten(tree)
    assert set(modules) == {p.removesuffix("/lora/a") for p in leaves if p.endswith("/lora/a")}
    for path, module in modules.items():
        assert leaves[f"{path}/lora/scale"] == pytest.approx(module.scaling["default"])
        if options.get("init"):  # singular vectors are known up to their sign, the product is not
            mine, theirs_too = leaves, factors_of(module, path)
            products = [x[f"{path}/lora/a"] @ x[f"{path}/lora/b"] for x in (mine, theirs_too)]
            assert_close(*products)
            assert_close(leaves[f"{path}/kernel"], kernel_of(module)[1])
    # The start is the base model, whatever part of it the factors hold.
    assert_close(call(model.apply, tree, *inputs_of(name)).logits, before)
    stir(theirs, ["lora_"])
    values = {}
    for path, module in modules.items():
        leaf, weight = kernel_of(module)
        values |= factors_of(module, path) | {f"{path}/{leaf}": weight}
    tree = put(tree, values)
    expected = logits_of(theirs, name)
    assert np.abs(expected - before).max() > 0.01 * np.abs(before).max()  # the factors do something
    assert_close(call(model.apply, tree, *inputs_of(name)).logits, expected)
    assert_merges(model, tree, theirs, name)


IA3 = {
    "bert": (
        "Bert",
        {"target_modules": ["key", "value", "intermediate.dense"], "feedforward_modules": []},
        {"targets": ("params/**/key", "params/**/value", "params/**/up"), "feedforward": ()},
    ),
    "vit": (
        "ViT",
        {"target_modules": ["k_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]},
        {},
    ),
    "resnet": (
        "ResNet",
        {"target_modules": r".*layers.*convolution", "feedforward_modules": r".*layer.1.*"},
        {"targets": ("params/blocks/*/conv1", "params/blocks/1/shortcut/conv")}
        | {"feedforward": ("params/blocks/*/conv2",)},
    ),
}


@pytest.mark.parametrize("case", IA3)
def test_ia3_equals_peft(case, get_peft, tmp_path):
    name, settings, options = IA3[case]
    base = make_base(name, tmp_path)
    config = get_peft.IA3Config(**settings, modules_to_save=saved(name))
    theirs = get_peft.get_peft_model(base, config).eval()
    model, tree, roles = start(name, tmp_path, "ia3", options)
    assert trained(tree, roles) == theirs.get_nb_trainable_parameters()[0]
    stir(theirs, ["ia3_l"])
    values = {}
    for path, module in grafted_modules(theirs, "ia3_l").items():
        if hasattr(module, "is_feedforward"):
            end = "in" if module.is_feedforward else "out"
            vector = module.ia3_l["default"].detach().numpy().reshape(-1)
            values[f"{path}/rescale/{end}"] = vector
    tree = put(tree, values)
    assert len(values) == sum("/rescale/" in path for path in flatten(tree))
    assert_close(call(model.apply, tree, *inputs_of(name)).logits, logits_of(theirs, name))
    assert_merges(model, tree, theirs, name)


def test_vera_equals_peft(get_peft, tmp_path):
    base = make_base("Bert", tmp_path)
    settings = {"r": 6, "target_modules": ["query", "intermediate.dense"], "d_initial": 0.1}
    config = get_peft.VeraConfig(**settings, modules_to_save=["classifier"])
    theirs = get_peft.get_peft_model(base, config).eval()
    options = {"rank": 6, "targets": ("params/**/query", "params/**/up")}
    model, tree, roles = start("Bert", tmp_path, "vera", options)
    assert trained(tree, roles) == theirs.get_nb_trainable_parameters()[0]
    stir(theirs, ["vera_lambda"])
    values = {}
    for path, module in grafted_modules(theirs, "vera_lambda_d").items():
        if not hasattr(module, "get_delta_weight"):
            continue
        shape = flatten(tree)[f"{path}/kernel"].shape
        values |= {
            f"{path}/lora/a": module.vera_A["default"].numpy()[:, : shape[0]].T,
            f"{path}/lora/b": module.vera_B["default"].numpy()[: shape[1]].T,
            f"{path}/lora/inner": module.vera_lambda_d["default"].detach().numpy(),
            f"{path}/lora/outer": module.vera_lambda_b["default"].detach().numpy(),
        }
    leaves = flatten(tree)
    for path, value in values.items():  # the same distribution: within the bound, and near it
        if path.endswith(("/a", "/b")):
            assert np.abs(leaves[path]).max() == pytest.approx(np.abs(value).max(), rel=0.2)
    tree = put(tree, values)
    assert_close(call(model.apply, tree, *inputs_of("Bert")).logits, logits_of(theirs, "Bert"))
    assert_merges(model, tree, theirs, "Bert")


def dense_of_head(name):
    """Count what PEFT trains with RoBERTa's head, and is our pooler."""
    return 32 * 32 + 32 if name == "Roberta" else 0


@pytest.mark.parametrize("name", ["Bert", "Roberta"])
def test_a_soft_prompt_equals_peft(name, get_peft, tmp_path):
    base = make_base(name, tmp_path)
    config = get_peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    theirs = get_peft.get_peft_model(base, config).eval()
    model, tree, roles = start(name, tmp_path, "prompt", {"count": 4})
    assert trained(tree, roles) + dense_of_head(name) == theirs.get_nb_trainable_parameters()[0]
    prompt = theirs.prompt_encoder["default"].embedding.weight.detach().numpy()
    tree = put(tree, {"params/embed/prompt": prompt})
    assert_close(call(model.apply, tree, *inputs_of(name)).logits, logits_of(theirs, name))


@pytest.mark.parametrize("name", ["Bert", "Roberta"])
def test_a_prefix_equals_peft(name, get_peft, tmp_path):
    base = make_base(name, tmp_path)
    config = get_peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    theirs = get_peft.get_peft_model(base, config).eval()
    model, tree, roles = start(name, tmp_path, "prefix", {"count": 4})
    assert trained(tree, roles) + dense_of_head(name) == theirs.get_nb_trainable_parameters()[0]
    table = theirs.prompt_encoder["default"].embedding.weight.detach().numpy()
    layers = table.reshape(4, 2, 2, 32)  # tokens, layers, key and value, width
    values = {
        f"params/blocks/{layer}/attention/prefix/{leaf}": layers[:, layer, index]
        for layer in range(2)
        for index, leaf in enumerate(("key", "value"))
    }
    tree = put(tree, values)
    assert_close(call(model.apply, tree, *inputs_of(name)).logits, logits_of(theirs, name))


def drawn(tree, words, seed=3):
    """Draw grafted leaves anew, so that none starts without effect."""
    rng = np.random.default_rng(seed)
    leaves = flatten(tree)
    moved = {p: x for p, x in leaves.items() if any(f"/{word}" in p for word in words)}
    values = {
        path: np.float32(x + rng.normal(0, 0.2, x.shape))
        for path, x in moved.items()
        if not path.endswith("/scale")
    }
    return put(tree, values), unflatten(values)["params"]


def first(output):
    return output[0] if isinstance(output, tuple) else output


def replaced(output, tensor):
    return (tensor, *output[1:]) if isinstance(output, tuple) else tensor


@pytest.mark.parametrize(
    ("name", "place", "activation"), [("ViT", "serial", "swish"), ("Bert", "parallel", "relu")]
)
def test_adapters_equal_their_formula(name, place, activation, tmp_path):
    import torch

    theirs = make_base(name, tmp_path)
    options = {"place": place, "activation": activation, "width": 5, "scale": 0.5}
    model, tree, _ = start(name, tmp_path, "adapter", options)
    assert_close(call(model.apply, tree, *inputs_of(name)).logits, logits_of(theirs, name))
    tree, values = drawn(tree, [place])
    modules = dict(theirs.named_modules())
    for layer in range(2):
        # BERT's MLP is two modules, of which the second adds the residual and normalises.
        at = f"vit.layers.{layer}" if name == "ViT" else f"bert.encoder.layer.{layer}"
        ends = {"attention": f"{at}.attention", "mlp": f"{at}.mlp"}
        if name == "Bert":
            ends = {"attention": f"{at}.attention.output.dense", "mlp": f"{at}.output.dense"}
            begins = {"attention": f"{at}.attention.self", "mlp": f"{at}.intermediate"}
        for part, end in ends.items():
            leaves = values["blocks"][str(layer)][part][place][activation]
            seen = {}

            def keep(module, args, kwargs, seen=seen):
                seen["x"] = args[0] if args else kwargs["hidden_states"]

            def add(module, args, output, leaves=leaves, seen=seen):
                y = first(output)
                tokens = y if place == "serial" else seen["x"]
                act = {"relu": torch.relu, "swish": torch.nn.functional.silu}[activation]
                down, up = (
                    {k: torch.tensor(v) for k, v in leaves[x].items()} for x in ("down", "up")
                )
                hidden = act(tokens @ down["kernel"] + down["bias"])
                return replaced(output, y + 0.5 * (hidden @ up["kernel"] + up["bias"]))

            if name == "Bert":
                modules[begins[part]].register_forward_pre_hook(keep, with_kwargs=True)
            modules[end].register_forward_hook(add)
    assert_close(call(model.apply, tree, *inputs_of(name)).logits, logits_of(theirs, name))


@pytest.mark.parametrize("deep", [True, False])
def test_visual_prompts_equal_tokens_put_into_the_sequence(deep, tmp_path):
    import torch

    theirs = make_base("ViT", tmp_path)
    model, tree, _ = start("ViT", tmp_path, "vpt", {"count": 3, "deep": deep})
    tree, values = drawn(tree, ["prompt"])
    modules = dict(theirs.named_modules())
    for layer, leaves in values["blocks"].items():
        prompt = torch.tensor(leaves["prompt"])

        def insert(module, args, prompt=prompt, layer=layer):
            x = args[0]
            rest = x[:, 1:] if layer == "0" else x[:, 4:]  # those of the layer below go
            return (torch.cat([x[:, :1], prompt.expand(len(x), -1, -1), rest], 1), *args[1:])

        modules[f"vit.layers.{layer}"].register_forward_pre_hook(insert)
    assert len(values["blocks"]) == (2 if deep else 1)
    assert_close(call(model.apply, tree, *inputs_of("ViT")).logits, logits_of(theirs, "ViT"))


@pytest.mark.parametrize("name", ["ViT", "Bert", "ResNet"])
def test_scales_and_shifts_equal_their_formula_and_fold(name, tmp_path):
    import torch

    theirs = make_base(name, tmp_path)
    model, tree, _ = start(name, tmp_path, "ssf", {})
    tree, values = drawn(tree, ["rescale"])
    hooked = 0
    leaves = {p.removesuffix("/rescale/out") for p in flatten(tree) if p.endswith("/rescale/out")}
    for path, module in theirs.named_modules():
        at = norm_at(path) or ours(path)
        if at not in leaves:
            continue
        node = values
        for part in at.split("/")[1:]:
            node = node[part]
        out, shift = (torch.tensor(node["rescale"][x]) for x in ("out", "shift"))

        def hook(module, args, y, out=out, shift=shift):
            axis = (slice(None), None, None) if y.ndim == 4 else slice(None)
            return y * out[axis] + shift[axis]

        module.register_forward_hook(hook)
        hooked += 1
    assert hooked == len(leaves)
    found = call(model.apply, tree, *inputs_of(name)).logits
    assert_close(found, logits_of(theirs, name))
    folded = merge(jax.tree.map(jnp.asarray, tree))
    assert not any("rescale" in path for path in flatten(folded))
    assert_close(call(model.apply, folded, *inputs_of(name)).logits, found)


NORMS = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.LayerNorm": "norm1",
    "output.LayerNorm": "norm2",
    "bert.embeddings.LayerNorm": "embed.norm",
    "vit.layernorm": "norm",
    "resnet.embedder.embedder.normalization": "stem.norm",
    "layer.0.normalization": "norm1",
    "layer.1.normalization": "norm2",
    "shortcut.normalization": "shortcut.norm",
}


def norm_at(path):
    """Name a norm of transformers here, nothing for other modules."""
    end = next((end for end in NORMS if path.endswith(end)), None)
    return end and ours(path.removesuffix(end) + NORMS[end])
