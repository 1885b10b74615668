"""Hugging Face's families against transformers: outputs, gradients, names, and the way back."""

import json
import logging
import warnings
from dataclasses import fields as fields_of
from dataclasses import replace
from itertools import product
from time import perf_counter
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tljax.edits.load import load, match
from tljax.models import MODELS
from tljax.tree import flatten, unflatten
from tljax.types import BadInput
from tljax.weights import open_weights
from tljax.weights.files import Tensor, held
from tljax.weights.hf import ARCHS, HF, HF5, PREFIXES, file_of, fillers, prefix_in, read_tree
from tljax.weights.hf_config import kind_of, read_fields, to_config
from tljax.weights.table import to_foreign, to_tljax

pytestmark = pytest.mark.torch

# Correct independent float32 code agrees to about 1e-6 of the largest value; a tanh GELU in the
# place of the exact one differs by 1e-4.  Gradients sum over more products.
CLOSE, CLOSE_GRADIENT = 2e-5, 2e-4
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
VIT = TINY | {"intermediate_size": 48, "image_size": 32, "patch_size": 8}
DINO = TINY | {"mlp_ratio": 3, "image_size": 32, "patch_size": 8}
BERT = TINY | {"intermediate_size": 48, "vocab_size": 60, "max_position_embeddings": 24}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 60}
DISTIL |= {"max_position_embeddings": 24}
RESNET = {"embedding_size": 8, "depths": [2, 1, 2], "hidden_sizes": [32, 64, 128]}
TEXT = BERT | {"eos_token_id": 59, "bos_token_id": 58, "projection_dim": 20}
IMAGE = VIT | {"projection_dim": 20}
CLIP = {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 20}
NORMS = {"layer_norm_eps": 1e-3}
WIDE = {"image_size": [32, 48], "patch_size": [8, 16]}
CASES = {
    "ViTModel": VIT,
    "ViTModel, another pooler": VIT | {"pooler_output_size": 20},
    "ViTForImageClassification": VIT | {"num_labels": 3},
    "ViTForImageClassification, no biases": VIT | NORMS | {"qkv_bias": False, "num_labels": 3},
    "ViTForImageClassification, oblong": VIT | WIDE | {"hidden_act": "gelu_new", "num_labels": 3},
    "ViTForImageClassification, relu": VIT | {"hidden_act": "relu", "num_labels": 3},
    "DeiTModel": VIT,
    "DeiTForImageClassification": VIT | {"num_labels": 3},
    "DeiTForImageClassificationWithTeacher": VIT | {"num_labels": 3},
    "Dinov2Model": DINO,
    "Dinov2ForImageClassification": DINO | {"num_labels": 3},
    "Dinov2ForImageClassification, no biases": DINO | NORMS | {"qkv_bias": False, "num_labels": 3},
    "Dinov2WithRegistersModel": DINO | {"num_register_tokens": 3},
    "Dinov2WithRegistersForImageClassification": DINO | {"num_labels": 3},
    "BertModel": BERT,
    "BertForMaskedLM": BERT | {"hidden_act": "relu"},
    "BertForPreTraining": BERT,
    "BertForSequenceClassification": BERT | {"num_labels": 3, "hidden_act": "gelu_new"},
    "BertForTokenClassification": BERT | {"num_labels": 3},
    "RobertaModel": BERT,
    "RobertaForMaskedLM": BERT | NORMS,
    "RobertaForSequenceClassification": BERT | {"num_labels": 3, "pad_token_id": 4},
    "RobertaForTokenClassification": BERT | {"num_labels": 3, "type_vocab_size": 1},
    "DistilBertModel": DISTIL,
    "DistilBertForMaskedLM": DISTIL,
    "DistilBertForSequenceClassification": DISTIL | {"num_labels": 3, "activation": "relu"},
    "DistilBertForTokenClassification": DISTIL | {"num_labels": 3},
    "ResNetModel": RESNET | {"hidden_sizes": [8, 16, 32], "layer_type": "basic"},
    "ResNetForImageClassification": RESNET | {"num_labels": 3},
    "ResNetForImageClassification, strides first": RESNET
    | {"num_labels": 3, "downsample_in_bottleneck": True, "downsample_in_first_stage": True},
    "ResNetForImageClassification, odd sizes": RESNET | {"num_labels": 3}
    | {"embedding_size": 6, "hidden_sizes": [20, 36, 44]},
    "CLIPVisionModel": IMAGE,
    "CLIPVisionModelWithProjection": IMAGE | {"hidden_act": "gelu"},
    "CLIPTextModel": TEXT,
    "CLIPTextModel, the largest id": TEXT | {"eos_token_id": 2},
    "CLIPTextModelWithProjection": TEXT | NORMS,
    "CLIPModel, vision": CLIP,
    "CLIPModel, text": CLIP,
}  # fmt: skip


def assert_close(given, expected, tolerance=CLOSE, scale=None):
    given, expected = np.asarray(given), np.asarray(expected)
    assert given.shape == expected.shape
    largest = np.abs(expected).max() if scale is None else scale
    assert np.abs(given - expected).max() <= tolerance * largest


def make_torch(name, seed=0):
    """Build a transformers model with every parameter and statistic drawn anew."""
    import torch
    import transformers

    torch.manual_seed(seed)
    kinds = {case: getattr(transformers, case.partition(",")[0]) for case in CASES}
    model = kinds[name](kinds[name].config_class(**CASES[name])).eval()
    # transformers starts biases at zero and norms at one, which would hide exchanged leaves.
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                around_one = tensor.ndim == 1 and bool((tensor == 1).all())
                tensor.copy_(torch.rand_like(tensor) + 0.5 if around_one else tensor)
                tensor.add_(torch.randn_like(tensor) * (0 if around_one else 0.1))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder, models = tmp_path_factory.mktemp("hf"), {}

    def save(name):
        if name not in models:
            models[name] = make_torch(name)
            models[name].save_pretrained(folder / name)
        return models[name], folder / name

    return save


def opened(name, folder):
    tower = name.partition(", ")[2] if name.startswith("CLIPModel") else None
    return open_weights(folder, tower)


def build(source):
    """Return the model of a source, heads included, and its parameters."""
    params = source.tree["params"]
    fields = dict(source.fields) | ({"mlm": True} if "mlm" in params else {})
    if "head" in params:
        fields["num_classes"] = params["head"]["bias"].shape[0]
    return MODELS[source.arch](**fields)


def inputs_of(source, seed=0):
    """Draw inputs; only what is masked holds the padding id, whose rows torch does not train."""
    rng = np.random.default_rng(seed)
    if source.arch in ("vit", "resnet"):
        patch = source.fields.get("patch", 8)
        patch = (patch, patch) if isinstance(patch, int) else patch
        sides = np.multiply(source.fields.get("grid", (4, 4)), patch)
        return (rng.normal(size=(2, *sides, 3)).astype(np.float32),)
    mask = (np.arange(11) < np.array([[11], [7], [4]])).astype(np.int32)
    pad = source.config.get("pad_token_id") or 0
    ids = np.where(mask, rng.integers(5, 58, (3, 11)), pad).astype(np.int32)
    if source.arch == "clip_text":
        ids[np.arange(3), [9, 6, 2]] = 59
        return ids, mask
    types = rng.integers(0, max(source.fields["types"], 1), (3, 11)).astype(np.int32)
    return (ids, mask, types) if source.fields["types"] else (ids, mask)


def forward(model, name, inputs):
    """Return what torch gives."""
    import torch

    tensors = [torch.from_numpy(np.asarray(x)) for x in inputs]
    if tensors[0].ndim == 4:
        tensors = [tensors[0].permute(0, 3, 1, 2)]
    else:
        names = ("input_ids", "attention_mask", "token_type_ids")
        tensors = dict(zip(names, (x.long() for x in tensors), strict=False))
    if name.startswith("CLIPModel"):
        part = model.get_image_features if "vision" in name else model.get_text_features
        return part(**tensors) if isinstance(tensors, dict) else part(*tensors)
    return model(**tensors) if isinstance(tensors, dict) else model(*tensors)


def results(theirs):
    """Return what tljax calls tokens, pooled and logits."""

    def first(*names):
        return next((theirs[n] for n in names if theirs.get(n) is not None), None)

    tokens, pooled = (
        first("last_hidden_state"),
        first("image_embeds", "text_embeds", "pooler_output"),
    )
    if tokens is not None and tokens.ndim == 4:
        tokens, pooled = tokens.flatten(2).mT, pooled[:, :, 0, 0]
    return {"tokens": tokens, "pooled": pooled, "logits": first("logits", "prediction_logits")}


def apply(model, variables, inputs):
    with jax.default_matmul_precision("highest"):
        return jax.jit(model.apply)(variables, *inputs)


def variables_of(source, model, inputs):
    """Load the source into the model; nothing is left over."""
    abstract = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    edit, report = load(source.tree, abstract)
    assert report.share == 1
    return edit(abstract, jax.random.key(0))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.few(6)
def test_outputs_equal_torch(saved, name):
    import torch

    torch_model, folder = saved(name)
    source = opened(name, folder)
    inputs, model = inputs_of(source), build(source)
    variables = variables_of(source, model, inputs)
    if "pooler" in variables["params"]:
        model = model.clone(pool="pooler")
    ours = apply(model, variables, inputs)
    with torch.no_grad():
        theirs = results(forward(torch_model, name, inputs))
    assert any(value is not None for value in theirs.values())
    real = inputs[1].astype(bool) if len(inputs) > 1 else slice(None)
    for part, value in theirs.items():
        if value is not None:
            pair = getattr(ours, part), value.numpy()
            assert_close(*(x[real] if x.ndim == 3 else x for x in pair))


OTHER_SIZES = [
    "ViTModel",
    "DeiTModel",
    "Dinov2Model",
    "Dinov2WithRegistersModel",
    "CLIPVisionModel",
]


@pytest.mark.parametrize("size", [(48, 64), (16, 24)])
@pytest.mark.parametrize("name", OTHER_SIZES)
def test_other_image_sizes_resample_positions_as_torch_does(saved, name, size):
    import torch

    torch_model, folder = saved(name)
    source = open_weights(folder)
    images = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    model = build(source)
    ours = apply(model, variables_of(source, model, (images,)), (images,))
    options = {} if "Dino" in name else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        theirs = torch_model(torch.from_numpy(images).permute(0, 3, 1, 2), **options)
    assert_close(ours.tokens, theirs.last_hidden_state)


def whole_fields(model):
    """Return all fields of a model, as an exporter has them."""
    names = {field.name for field in fields_of(model)} - {"parent", "name"}
    return {name: getattr(model, name) for name in names}


def exported(source, form=HF):
    """Return configuration and tensors as an exporter makes them, and the leaves left out."""
    fields = whole_fields(build(source))
    config = to_config(source.arch, fields, source.labels, source.kind)
    file = file_of(source.kind, fields, form)
    leaves = flatten(source.tree)
    known = {leaf.ours for leaf in file.leaves}
    tree = unflatten({path: leaf for path, leaf in leaves.items() if path in known})
    state = to_foreign(tree, file.leaves, fields)
    return (
        config,
        state | fillers(source.kind, state, fields["width"]),
        sorted(leaves.keys() - known),
    )


@pytest.mark.parametrize("name", CASES)
def test_the_table_reads_back_what_it_wrote_bit_by_bit(saved, name):
    _, folder = saved(name)
    source, state = opened(name, folder), load_file(folder / "model.safetensors")
    table = HF.spell(source.kind, source.fields, prefix_in(source.kind, state))
    back = to_foreign(source.tree, table, source.fields)
    assert back.keys() | source.ignored.keys() == state.keys()
    assert not back.keys() & source.ignored.keys()
    for foreign, tensor in back.items():
        np.testing.assert_array_equal(tensor, state[foreign])
    again, ignored = to_tljax({name: held(x) for name, x in back.items()}, table, HF)
    assert not ignored
    jax.tree.map(np.testing.assert_array_equal, again, source.tree)


class Complaints(logging.Handler):
    def emit(self, record):
        raise AssertionError(record.getMessage())


@pytest.fixture
def strict():
    """Make every word of transformers' loading an error."""
    import transformers

    complaints, logger = Complaints(logging.WARNING), logging.getLogger("transformers")
    transformers.utils.logging.disable_progress_bar()
    logger.addHandler(complaints)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    logger.removeHandler(complaints)


def reopen(config, state, folder):
    """Save, and let transformers open it, without a word."""
    import transformers

    classes = {name.partition(",")[0] for name in CASES}
    classes = {name: getattr(transformers, name) for name in classes}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    kind = classes[config["architectures"][0]]
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_transformers_opens_what_is_written(saved, name, tmp_path, strict):
    import torch

    torch_model, folder = saved(name)
    source = opened(name, folder)
    config, state, left = exported(source)
    assert left == (["params/pooler/bias", "params/pooler/kernel"] if "PreT" in name else [])
    again = reopen(config, state, tmp_path / "out")
    assert type(again).__name__ == config["architectures"][0]
    inputs = inputs_of(source)
    with torch.no_grad():
        before = results(forward(torch_model, name, inputs))
        after = results(forward(again, config["architectures"][0], inputs))
    for part, value in before.items():
        if value is not None:
            assert_close(after[part], value)
    original, prefix = load_file(folder / "model.safetensors"), PREFIXES[source.kind]
    for tensor, value in state.items():
        found = original.get(tensor, original.get(tensor.removeprefix(prefix)))
        is_filled = tensor.endswith((".mask_token", ".num_batches_tracked"))
        assert is_filled or value.tobytes() == found.tobytes(), tensor


@pytest.mark.parametrize("name", CASES)
def test_a_configuration_is_read_back_as_it_was_written(saved, name):
    source = opened(name, saved(name)[1])
    fields = whole_fields(build(source))
    assert kind_of(source.arch, fields, source.tree["params"].keys()) == source.kind
    config = to_config(source.arch, fields, source.labels)
    assert json.loads(json.dumps(config)) == config
    again = read_fields(config, "config")
    for field in again.keys() & source.fields.keys():
        # The width of what the file may lack stands in the configuration all the same.
        may_lack = field in ("projection", "pooler") and source.fields[field] is None
        assert may_lack or again[field] == source.fields[field], field


# Gradients


GRADED = [
    "ViTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "Dinov2ForImageClassification",
    "Dinov2WithRegistersForImageClassification",
    "BertForSequenceClassification",
    "RobertaForSequenceClassification",
    "DistilBertForMaskedLM",
    "ResNetForImageClassification",
    "CLIPVisionModelWithProjection",
    "CLIPTextModelWithProjection",
]


@pytest.mark.parametrize("name", GRADED)
@pytest.mark.few(3)
def test_gradients_equal_torch_by_name(saved, name):
    import torch

    torch_model, folder = saved(name)
    source = opened(name, folder)
    inputs, model = inputs_of(source), build(source)
    variables = variables_of(source, model, inputs)
    part = "pooled" if source.fields.get("projection") else "logits"
    theirs = results(forward(torch_model, name, inputs))[part]
    rng = np.random.default_rng(1)
    weights = rng.normal(size=theirs.shape).astype(np.float32)
    weights *= inputs[1][:, :, None] if weights.ndim == 3 else 1  # padding counts for nothing

    def loss(params, inputs):
        output = model.apply({**variables, "params": params}, *inputs)
        return (getattr(output, part) * weights).sum()

    with jax.default_matmul_precision("highest"):
        grads = {"params": jax.jit(jax.grad(loss))(variables["params"], inputs)}
    statistics = jax.tree.map(np.zeros_like, {k: v for k, v in variables.items() if k != "params"})
    leaves = file_of(source.kind, whole_fields(model), HF5).leaves
    ours = to_foreign(grads | statistics, leaves, source.fields)
    torch_model.zero_grad()
    (theirs * torch.from_numpy(weights)).sum().backward()
    expected = {n: p.grad.numpy() for n, p in torch_model.named_parameters() if p.grad is not None}
    assert {n for n in ours if "running_" not in n} == expected.keys()
    # The gradient of a key's bias is zero but for rounding: judged by the largest of all tensors.
    largest = max(np.abs(grad).max() for grad in expected.values())
    for tensor, grad in expected.items():
        is_key = tensor.endswith((".key.bias", ".k_proj.bias", ".k_lin.bias"))
        assert_close(ours[tensor], grad, CLOSE_GRADIENT, largest if is_key else None)


# Names and shapes of real sizes, without values

REAL = {
    "ViTForImageClassification": ({}, 12 * 16 + 8),
    "DeiTForImageClassificationWithTeacher": ({}, 12 * 16 + 11),
    "Dinov2ForImageClassification": ({"image_size": 518}, 12 * 18 + 8),
    "Dinov2WithRegistersForImageClassification": ({"patch_size": 14}, 12 * 18 + 9),
    "BertForMaskedLM": ({}, 12 * 16 + 10),
    "RobertaForSequenceClassification": ({"max_position_embeddings": 514}, 12 * 16 + 9),
    "DistilBertForSequenceClassification": ({}, 6 * 16 + 8),
    "ResNetForImageClassification": ({}, 53 * 5 + 2),
    "CLIPVisionModelWithProjection": ({}, 12 * 16 + 8),
    "CLIPTextModelWithProjection": ({}, 12 * 16 + 5),
}


@pytest.mark.parametrize("name", REAL)
def test_names_and_shapes_of_real_sizes_equal_torch(name):
    import torch
    import transformers

    options, count = REAL[name]
    kind = {case: getattr(transformers, case) for case in REAL}[name]
    with torch.device("meta"):
        torch_model = kind(kind.config_class(**options))
    tied = {n for n in torch_model.state_dict() if ".decoder." in n}
    shapes = {n: x.shape for n, x in torch_model.state_dict().items() if n not in tied}
    state = {n: Tensor(tuple(x), np.dtype(np.float32), None) for n, x in shapes.items()}
    config = {"model_type": torch_model.config.model_type, **options}
    fields = read_fields(config, "transformers' own defaults")
    tree, fields, ignored = read_tree(state, config, fields, "transformers")
    assert len(state) - len(ignored) == count
    assert all(n.endswith((".mask_token", ".num_batches_tracked")) for n in ignored)
    model = build(SimpleNamespace(arch=ARCHS[config["model_type"]], fields=fields, tree=tree))
    sides = np.multiply(fields.get("grid", (7, 7)), fields.get("patch", 32))
    image, text = np.zeros((1, *sides, 3), np.float32), np.zeros((1, 4), np.int32)
    inputs = text if "vocab" in fields else image
    _, report = match(tree, jax.eval_shape(model.init, jax.random.key(0), inputs))
    assert report.share == 1


# Names, options and sizes that differ


@pytest.mark.parametrize("name", ["ViTModel", "Dinov2ForImageClassification"])
def test_the_names_that_transformers_5_has_in_memory_are_read(saved, name, tmp_path):
    model, folder = saved(name)
    state = {n: x.numpy().copy() for n, x in model.state_dict().items()}
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(state, tmp_path / "model.safetensors")
    assert state.keys() != load_file(folder / "model.safetensors").keys()
    old, new = open_weights(folder), open_weights(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, new.tree, old.tree)
    assert new.fields == old.fields


def test_left_over_poolers_are_named(saved, tmp_path):
    _, folder = saved("RobertaForSequenceClassification")
    state = load_file(folder / "model.safetensors")
    extra = "roberta.pooler.dense.weight"
    save_file(state | {extra: np.zeros((32, 32), np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    source = open_weights(tmp_path)
    assert "left over" in source.ignored[extra]
    jax.tree.map(np.testing.assert_array_equal, source.tree, open_weights(folder).tree)


def test_an_untied_decoder_is_read_if_it_is_the_table(saved, tmp_path):
    _, folder = saved("RobertaForMaskedLM")
    state = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    decoder = {"lm_head.decoder.bias": state["lm_head.bias"]}
    save_file(state | decoder, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match="has no decoder"):
        open_weights(tmp_path)
    decoder["lm_head.decoder.weight"] = state["roberta.embeddings.word_embeddings.weight"]
    save_file(state | decoder, tmp_path / "model.safetensors")
    assert "tied to" in open_weights(tmp_path).ignored["lm_head.decoder.weight"]
    decoder["lm_head.decoder.weight"] = decoder["lm_head.decoder.weight"] * 2
    save_file(state | decoder, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match="ties the two"):
        open_weights(tmp_path)


def test_clip_wants_a_tower(saved):
    _, folder = saved("CLIPModel, text")
    for tower in (None, "audio"):
        with pytest.raises(BadInput, match="'vision' or tower='text'"):
            open_weights(folder, tower)
    with pytest.raises(BadInput, match="no tower 'text'"):
        open_weights(saved("ViTModel")[1], "text")
    source = open_weights(folder, "text")
    assert source.ignored["vision_model.post_layernorm.bias"] == "of the other tower"
    assert "logit_scale" in source.ignored


MUTATED = ["ViTForImageClassification", "RobertaForMaskedLM", "ResNetForImageClassification"]


def mutations(state):
    """List the ways to damage the structure of a file: what -> the damaged tensors."""
    kernel = next(n for n in sorted(state) if state[n].ndim >= 2 and ".layer" in n)
    vector = next(n for n in sorted(state) if state[n].ndim == 1 and ".layer" in n)
    without = {n: x for n, x in state.items() if n != kernel}
    nan = state[kernel].copy()
    nan.flat[-1] = np.nan
    return {
        "missing": without,
        "missing bias": {n: x for n, x in state.items() if n != vector},
        "extra": state | {"stranger": np.zeros(3, np.float32)},
        "renamed": without | {f"{kernel}s": state[kernel]},
        "another rank": state | {kernel: state[kernel].ravel()},
        "shorter": state | {kernel: state[kernel][:-1].copy()},
        "wider": state | {kernel: np.concatenate([state[kernel]] * 2, axis=-1)},
        "a longer vector": state | {vector: np.concatenate([state[vector]] * 2)},
        "whole numbers": state | {kernel: state[kernel].astype(np.int32)},
        "not a number": state | {kernel: nan},
        "infinite": state | {vector: np.full_like(state[vector], np.inf)},
    }


@pytest.mark.parametrize("name", MUTATED)
def test_no_damage_of_the_structure_is_silent(saved, name, tmp_path):
    _, folder = saved(name)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    state = load_file(folder / "model.safetensors")
    abstract = None
    for damage, tensors in mutations(state).items():
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(BadInput) as caught:
            source = open_weights(tmp_path)
            inputs = inputs_of(source)
            abstract = abstract or jax.eval_shape(build(source).init, jax.random.key(0), *inputs)
            load(source.tree, abstract)
        assert len(str(caught.value).splitlines()) <= 5, damage


# What the configuration may not say, and what it cannot


def test_no_size_of_a_stranger_costs_time_or_memory(saved):
    sizes = [-1, 0, 10**12, 10**40, "8", None, [8], [[8]], {"a": 1}, True, 1.5, float("nan")]
    sizes = [*sizes, float("inf"), [10**9] * 2, [1] * 1000, [-1, -1], "[" * 50]
    for name in ("ViTModel", "ResNetModel", "CLIPTextModel", "DistilBertModel", "Dinov2Model"):
        config = json.loads((saved(name)[1] / "config.json").read_text())
        good = read_fields(config, "c")
        for key, size in product(config, sizes):
            start = perf_counter()
            try:
                fields = read_fields(config | {key: size}, "config.json")
            except BadInput as error:
                assert "config.json" in str(error) and len(str(error)) < 400
            else:
                assert fields.keys() == good.keys()
            assert perf_counter() - start < 0.2


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("ViTModel", {"pooler_act": "relu"}, "pooler_act"),
        ("ViTModel", {"hidden_act": "silu"}, "silu"),
        ("ViTModel", {"head_dim": 4}, "head_dim"),
        ("ViTModel", {"num_attention_heads": 5}, "num_attention_heads=5"),
        ("ViTModel", {"patch_size": 64}, "patch_size=64"),
        ("Dinov2Model", {"use_swiglu_ffn": True}, "use_swiglu_ffn"),
        ("BertModel", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("BertModel", {"is_decoder": True}, "is_decoder"),
        ("RobertaModel", {"add_cross_attention": True}, "add_cross_attention"),
        ("RobertaModel", {"pad_token_id": None}, "pad_token_id"),
        ("CLIPTextModel", {"eos_token_id": [1, 2]}, "eos_token_id"),
        ("ResNetModel", {"hidden_act": "gelu"}, "hidden_act"),
        ("ResNetModel", {"depths": [1, 2]}, "depths"),
        ("ResNetModel", {"layer_type": "wide"}, "layer_type"),
        ("ViTModel", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ("ViTModel", {"model_type": ["vit"]}, "model_type"),
        ("BertForSequenceClassification", {"id2label": {"0": "a"}}, "id2label"),
        ("BertForSequenceClassification", {"id2label": ["a", "b", "c"]}, "id2label"),
        ("BertForSequenceClassification", {"id2label": {"0": "a", "2": "b", "1": 3}}, "id2label"),
        ("BertForMaskedLM", {"tie_word_embeddings": False}, "tie_word_embeddings"),
    ],
)
def test_an_option_that_tljax_lacks_is_named(saved, name, options, word, tmp_path):
    _, folder = saved(name)
    config = json.loads((folder / "config.json").read_text()) | options
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(BadInput, match=word) as caught:
        open_weights(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "fields", "word"),
    [
        ("ViTModel", {"qk_norm": 1e-6}, "qk_norm"),
        ("ViTModel", {"class_token": False}, "class_token"),
        ("ViTModel", {"pool": "map"}, "pool"),
        ("ViTModel", {"read": "blocks/0"}, "read"),
        ("ViTModel", {"a field of tomorrow": 1}, "a field of tomorrow"),
        ("ViTForImageClassification", {"pool": "mean"}, "pool='mean'"),
        ("ViTForImageClassification", {"registers": 2}, "registers"),
        ("DeiTModel", {"layer_scale": 1.0}, "layer_scale"),
        ("Dinov2Model", {"mlp": 50}, "mlp=50"),
        ("Dinov2ForImageClassification", {"pool": "cls"}, "pool='cls'"),
        ("BertModel", {"pooler": False}, "pooler"),
        ("BertModel", {"pad": 1}, "pad"),
        ("BertForSequenceClassification", {"pool": "mean"}, "pool='mean'"),
        ("BertForSequenceClassification", {"pooler_activation": "relu"}, "pooler_activation"),
        ("DistilBertModel", {"eps": 1e-6}, "eps"),
        ("ResNetModel", {"norm": "group"}, "norm"),
        ("ResNetModel", {"stem": "small"}, "stem"),
        ("CLIPVisionModelWithProjection", {"num_classes": 3}, "num_classes"),
    ],
)
def test_a_field_that_transformers_lacks_is_named(saved, name, fields, word):
    source = open_weights(saved(name)[1])
    given = whole_fields(build(source)) | fields
    with pytest.raises(BadInput, match=word):
        to_config(source.arch, given, None, source.kind)
    with pytest.raises(BadInput, match="no vit of type 'bert'"):
        to_config("vit", given, None, "bert")


def test_a_vit_without_a_pooler_goes_out_as_a_classifier_without_a_head(saved, tmp_path, strict):
    import torch

    torch_model, folder = saved("ViTForImageClassification")
    source = open_weights(folder)
    params = {name: x for name, x in source.tree["params"].items() if name != "head"}
    body = replace(source, tree={"params": params}, labels=None)
    config, state, left = exported(body)
    again = reopen(config, state, tmp_path / "out")
    assert (left, config["id2label"]) == ([], {})
    images = inputs_of(source)
    with torch.no_grad():
        cls = torch_model.vit(torch.from_numpy(images[0]).permute(0, 3, 1, 2))[0][:, 0]
        assert_close(forward(again, "", images).logits, cls)
    assert open_weights(tmp_path / "out").labels is None
