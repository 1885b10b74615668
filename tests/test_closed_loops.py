"""Fifty steps on the same batches, in torch and here: the losses stay together."""

import functools
import os

import jax
import numpy as np
import pytest
from theirs import FIELDS, make_base, ours
from tiny import QUICK, assemble, one_device

from tljax.edits.load import load
from tljax.models import MODELS
from tljax.sharding import put_batch
from tljax.tree import flatten
from tljax.weights import open_weights

pytestmark = [
    pytest.mark.torch,
    # PEFT itself reads an attribute that transformers has deprecated, whatever the adapter.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]
STEPS, BATCHES, EXAMPLES = 50, 5, 8
# What float32 rounding grows to in fifty steps of Adam (1e-5) and of the models (1e-6 a step).
CLOSE = 2e-4
LAYER_DECAY = 0.7
METHODS = {
    "full": ("full", {}),
    "layer_decay": ("full", {"layer_decay": LAYER_DECAY}),
    "bitfit": ("bitfit", {}),
    "probe": ("probe", {}),
    "lora": ("lora", {"rank": 3, "alpha": 6.0}),
}
RATES = {"adamw": 1e-3, "sgd": 0.02}
NO_DECAY = ("cls_token", "vit.embeddings.position_embeddings")
FAST = {
    ("ViT", "full", "adamw"),
    ("ViT", "bitfit", "sgd"),
    ("ResNet", "full", "sgd"),
    ("ResNet", "lora", "adamw"),
    ("Bert", "layer_decay", "adamw"),
    ("Bert", "lora", "sgd"),
    ("Bert", "probe", "adamw"),
}
CASES = [(model, m, o) for model in ("ViT", "ResNet", "Bert") for m in METHODS for o in RATES]


def batches(name):
    rng = np.random.default_rng(0)
    for _ in range(BATCHES):
        label = rng.integers(0, 3, EXAMPLES).astype(np.int32)
        if name == "Bert":
            ids = rng.integers(3, 60, (EXAMPLES, 11)).astype(np.int32)
            mask = (np.arange(11) < rng.integers(4, 12, (EXAMPLES, 1))).astype(np.int32)
            texts = {"input_ids": ids, "attention_mask": mask, "token_type_ids": 0 * ids}
            yield texts | {"label": label}
        else:
            image = rng.normal(size=(EXAMPLES, 16, 16, 3)).astype(np.float32)
            yield {"image": image, "label": label}


def layer_of(name, depth):
    """Number a parameter's layer as MAE does: 0 below the blocks, depth + 1 above them."""
    path = ours(name).split("/")
    if path[1] == "blocks":
        return int(path[2]) + 1
    below = any(word in name for word in ("embeddings", "embedder"))
    return 0 if below else depth + 1


def trains(method, name):
    head = "classifier" in name
    chosen = {"bitfit": name.endswith("bias"), "probe": False, "lora": "lora_" in name}
    return head or chosen.get(method, True)


def torch_losses(model, name, method, optimizer, depth):
    """Train in torch, by groups of one parameter each."""
    import torch

    # In a frozen network BatchNorm's statistics stay.
    model.train(METHODS[method][0] == "full")
    groups = []
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(trains(method, path))
        if not parameter.requires_grad:
            continue
        power = depth + 1 - layer_of(path, depth) if method == "layer_decay" else 0
        decay = 0.05 if parameter.ndim > 1 and not path.endswith(NO_DECAY) else 0.0
        group = {"params": [parameter], "lr": RATES[optimizer] * LAYER_DECAY**power}
        groups.append(group | ({"weight_decay": decay} if optimizer == "adamw" else {}))
    kinds = {"adamw": torch.optim.AdamW, "sgd": functools.partial(torch.optim.SGD, momentum=0.9)}
    rule, data, losses = kinds[optimizer](groups), list(batches(name)), []
    for step in range(STEPS):
        batch = {key: torch.from_numpy(x) for key, x in data[step % BATCHES].items()}
        label = batch.pop("label").long()
        if "image" in batch:
            found = model(batch["image"].permute(0, 3, 1, 2)).logits
        else:
            found = model(**{key: x.long() for key, x in batch.items()}).logits
        loss = torch.nn.functional.cross_entropy(found, label)
        rule.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rule.step()
        losses.append(loss.item())
    return losses


def our_losses(source, name, method, optimizer, factors):
    """Train the same weights through the step."""
    head = source.tree["params"]["head"]["bias"].shape[0]
    model = MODELS[source.arch](**(dict(source.fields) | {"num_classes": head}))
    data = list(batches(name))
    like = (data[0]["image"],) if "image" in data[0] else tuple(data[0].values())[:3]
    edit, _ = load(source.tree, jax.eval_shape(model.init, jax.random.key(0), *like))
    decay = {"decay": 0.05 if optimizer == "adamw" else 0.0}
    settings = {"lr": RATES[optimizer], "fall": "constant", "steps": STEPS, **decay}
    word, options = METHODS[method]
    run = assemble(
        model, data[0], word, options=options, source=(edit,), name=optimizer, **settings
    )
    state, frozen = run.birth(jax.random.key(0))
    leaves = flatten(state.params)
    assert set(factors) <= set(leaves)
    params = jax.tree.map(lambda x: x, state.params)
    for path, value in factors.items():
        node = params
        for part in path.split("/")[:-1]:
            node = node[part]
        node[path.rsplit("/", 1)[-1]] = jax.device_put(value, leaves[path].sharding)
    state = state.replace(params=params)
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=run.shardings.batch)  # noqa: E731
    step = run.step.lower(*run.abstract, jax.tree.map(place, data[0])).compile(QUICK)
    losses = []
    for number in range(STEPS):
        state, metrics = step(state, frozen, put_batch(data[number % BATCHES], one_device()))
        losses.append(float(metrics["loss"]))
    return losses


def adapt(base, name):
    """Let PEFT graft what our defaults graft; return the model and its factors in our names."""
    import peft

    targets = {
        "ViT": ["q_proj", "v_proj"],
        "Bert": ["query", "value"],
        "ResNet": r".*layers.*layer\.\d\.convolution",
    }[name]
    settings = {"r": 3, "lora_alpha": 6, "target_modules": targets}
    head = ["classifier.1"] if name == "ResNet" else ["classifier"]
    model = peft.get_peft_model(base, peft.LoraConfig(**settings, modules_to_save=head))
    factors = {}
    for path, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "scaling"):
            own = ours(path.removeprefix("base_model.model."))
            a, b = (getattr(module, x)["default"].weight for x in ("lora_A", "lora_B"))
            a, b = a.detach().numpy(), b.detach().numpy()
            a = a.transpose(2, 3, 1, 0) if a.ndim == 4 else a.T
            b = b[:, :, 0, 0].T if b.ndim == 4 else b.T
            factors |= {f"{own}/lora/a": a.copy(), f"{own}/lora/b": b.copy()}
    return model, factors


@pytest.mark.parametrize(
    ("name", "method", "optimizer"),
    [pytest.param(*c, marks=() if c in FAST else pytest.mark.slow) for c in CASES],
)
@pytest.mark.few(5)
def test_the_losses_are_torchs(name, method, optimizer, tmp_path, request):
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    theirs = make_base(name, tmp_path, **(no_dropout if name == "Bert" else {}))
    factors = {}
    if method == "lora":
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        request.getfixturevalue("peft")
        theirs, factors = adapt(theirs, name)
    depth = sum(FIELDS[name]["depths"]) if name == "ResNet" else 2
    expected = torch_losses(theirs, name, method, optimizer, depth)
    found = our_losses(open_weights(str(tmp_path)), name, method, optimizer, factors)
    assert expected[-1] < expected[0] - 0.01  # it learns
    np.testing.assert_allclose(found, expected, rtol=CLOSE, atol=0)
