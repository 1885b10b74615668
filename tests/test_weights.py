"""Foreign weights: real files against recorded outputs, written files against torch, bad files."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tljax.edits.load import load
from tljax.models.bert import Bert
from tljax.models.resnet import ResNet
from tljax.models.vit import ViT
from tljax.tree import flatten
from tljax.types import BadInput
from tljax.weights import NAMES, open_weights
from tljax.weights.files import held
from tljax.weights.hf import HF
from tljax.weights.table import to_foreign, to_tljax

MODELS = {"vit": ViT, "bert": Bert, "resnet": ResNet}
DATA = Path(__file__).parent / "data"
# Correct independent float32 code agrees to about 1e-6 of the largest value; a tanh GELU in the
# place of the exact one differs by 1e-4.
CLOSE = 2e-5


def assert_close(given, expected, tolerance=CLOSE):
    given, expected = np.asarray(given), np.asarray(expected)
    assert given.shape == expected.shape
    assert np.abs(given - expected).max() <= tolerance * np.abs(expected).max()


def run(source, *inputs, mutable=(), **fields):
    """Return what the source's model gives; with `mutable`, every module's output as well."""
    model = MODELS[source.arch](**(dict(source.fields) | fields))
    abstract = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    edit, report = load(source.tree, abstract)
    assert report.share == 1
    variables = edit(abstract, jax.random.key(0))
    with jax.default_matmul_precision("highest"):
        apply = jax.jit(model.apply, static_argnames=("mutable", "capture_intermediates"))
        if not mutable:
            return apply(variables, *inputs)
        return apply(variables, *inputs, mutable=mutable, capture_intermediates=True)


# Real weights against recorded outputs


@pytest.fixture(scope="module")
def dinov2():
    source = open_weights("dinov2-vits14")
    reference = dict(np.load(DATA / "dinov2_vits14.npz"))
    mean, std = (np.asarray(source.preprocess[name], np.float32) for name in ("mean", "std"))
    return source, reference, (reference["images_u8"].astype(np.float32) / 255 - mean) / std


@pytest.mark.assets("vit")
def test_dinov2_features_equal_the_recorded_ones(dinov2):
    source, reference, images = dinov2
    output, seen = run(source, images, mutable=("intermediates",), pool="cls+mean")
    assert_close(output.tokens[0], reference["tokens"])
    assert_close(output.pooled, np.concatenate([reference["cls"], reference["patch_mean"]], -1))
    layers = seen["intermediates"]
    assert_close(layers["embed"]["__call__"][0][0], reference["block0_input"])
    for depth in range(12):
        hidden = layers["blocks"][str(depth)]["__call__"][0]
        assert_close(hidden[:, 0], reference["cls_per_layer"][:, depth + 1])


@pytest.mark.assets("vit")
def test_dinov2_accounts_for_every_tensor(dinov2):
    source, _, _ = dinov2
    assert len(flatten(source.tree)) == 222
    assert sum(leaf.size for leaf in flatten(source.tree).values()) == 22_056_192
    assert len(source.ignored) == 20
    assert all(name.startswith("decoder.") for name in source.ignored)
    assert source.fields["grid"] == (37, 37)


@pytest.mark.assets("minilm")
def test_minilm_embeddings_equal_the_recorded_ones():
    source = open_weights("minilm-l6")
    reference = np.load(DATA / "minilm_l6.npz")
    ids, mask = reference["input_ids"], reference["attention_mask"]
    output = run(source, ids, mask, pool="pooler")
    real = mask.astype(bool)
    assert_close(output.tokens[real], reference["last_hidden_state"][real])
    assert_close(output.pooled, reference["pooler"])
    mean = np.asarray(run(source, ids, mask, pool="mean").pooled)
    assert_close(mean / np.linalg.norm(mean, axis=1, keepdims=True), reference["embedding"])
    assert source.ignored.keys() == {"embeddings.position_ids"}
    assert source.tokenizer.name == "tokenizer.json"
    # The sum that the publisher lists for the file.
    assert source.digest().startswith("53aa51172d142c89d9012cce15ae4d6c")


# Written files against torch

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY_VIT = TINY | {"intermediate_size": 48, "image_size": 32, "patch_size": 8}
TINY_BERT = TINY | {"intermediate_size": 48, "vocab_size": 60, "max_position_embeddings": 24}
TINY_RESNET = {"embedding_size": 8, "depths": [2, 1, 2]}
CASES = {
    "ViTModel": TINY_VIT,
    "ViTForImageClassification": TINY_VIT | {"num_labels": 3},
    "Dinov2Model": TINY | {"mlp_ratio": 3, "image_size": 32, "patch_size": 8},
    "Dinov2ForImageClassification": TINY | {"image_size": 32, "patch_size": 8, "num_labels": 3},
    "BertModel": TINY_BERT,
    "BertForMaskedLM": TINY_BERT,
    "BertForPreTraining": TINY_BERT,
    "BertForSequenceClassification": TINY_BERT | {"num_labels": 3, "hidden_act": "gelu_new"},
    "BertForTokenClassification": TINY_BERT | {"num_labels": 3},
    "ResNetModel": TINY_RESNET | {"hidden_sizes": [8, 16, 32], "layer_type": "basic"},
    "ResNetForImageClassification": TINY_RESNET
    | {"hidden_sizes": [32, 64, 128], "layer_type": "bottleneck", "num_labels": 3},
}


def make_torch(name, seed=0):
    """Build a transformers model with every parameter and statistic drawn anew."""
    import torch
    import transformers

    torch.manual_seed(seed)
    kind = {
        case: (getattr(transformers, case), getattr(transformers, config))
        for case in CASES
        for config in [case[: case.index("For") if "For" in case else -len("Model")] + "Config"]
    }[name]
    model = kind[0](kind[1](**CASES[name])).eval()
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


def inputs_of(name, seed=0):
    rng = np.random.default_rng(seed)
    if not name.startswith("Bert"):
        return (rng.normal(size=(2, 32, 32, 3)).astype(np.float32),)
    ids = rng.integers(0, 60, (3, 11)).astype(np.int32)
    mask = (np.arange(11) < np.array([[11], [7], [4]])).astype(np.int32)
    return ids, mask, rng.integers(0, 2, (3, 11)).astype(np.int32)


def forward(model, *inputs):
    import torch

    tensors = [torch.from_numpy(np.asarray(x)) for x in inputs]
    with torch.no_grad():
        if len(tensors) == 1:
            return model(tensors[0].permute(0, 3, 1, 2))
        return model(*(x.long() for x in tensors))


@pytest.mark.torch
@pytest.mark.parametrize("name", CASES)
def test_folder_equals_torch(saved, name):
    model, folder = saved(name)
    source, inputs = open_weights(folder), inputs_of(name)
    theirs = forward(model, *inputs)
    head = source.tree["params"].get("head")
    fields = {"num_classes": head["bias"].shape[0]} if head else {}
    fields |= {"mlm": True} if "mlm" in source.tree["params"] else {}
    fields |= {"tokens": True} if "Token" in name else {}
    output = run(source, *inputs, **fields)
    real = inputs[1].astype(bool) if len(inputs) > 1 else ...
    if "For" not in name:
        tokens = theirs.last_hidden_state.numpy()
        if tokens.ndim == 4:
            tokens = tokens.transpose(0, 2, 3, 1).reshape(2, -1, tokens.shape[1])
            assert_close(output.pooled, theirs.pooler_output.numpy()[:, :, 0, 0])
        if name == "BertModel":
            pooled = run(source, *inputs, pool="pooler").pooled
            assert_close(pooled, theirs.pooler_output.numpy())
        assert_close(output.tokens[real], tokens[real])
        return
    logits = theirs.prediction_logits if "PreTraining" in name else theirs.logits
    both = (np.asarray(output.logits), logits.numpy())
    assert_close(*(x[real] if x.ndim == 3 else x for x in both))


@pytest.mark.torch
@pytest.mark.parametrize("name", CASES)
def test_table_round_trip_is_bitwise(saved, name):
    _, folder = saved(name)
    source, state = open_weights(folder), load_file(folder / "model.safetensors")
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    prefix = f"{kind}." if "For" in name else ""
    table = HF.spell(kind, source.fields, prefix)
    back = to_foreign(source.tree, table, source.fields)
    assert back.keys() | source.ignored.keys() == state.keys()
    assert not back.keys() & source.ignored.keys()
    for foreign, tensor in back.items():
        np.testing.assert_array_equal(tensor, state[foreign])
    again, ignored = to_tljax({name: held(x) for name, x in back.items()}, table, HF)
    assert not ignored
    jax.tree.map(np.testing.assert_array_equal, again, source.tree)


# Written without torch: types, decoders, damage


def write_folder(folder, change=lambda state: None, config=None, **fields):
    """Write a random BERT as Hugging Face would."""
    sizes = {"width": 8, "depth": 2, "mlp": 12, "vocab": 11, "positions": 6, "types": 2} | fields
    rng = np.random.default_rng(0)
    model = Bert(**sizes, heads=2, mlm=True, pooler=False)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 3), np.int32))
    tree = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    state = to_foreign(tree, HF.spell("bert", sizes, "bert."), sizes)
    change(state)
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors")
    names = {"hidden_size": "width", "num_hidden_layers": "depth", "intermediate_size": "mlp"}
    names |= {"vocab_size": "vocab", "max_position_embeddings": "positions"}
    full = {theirs: sizes[ours] for theirs, ours in names.items()}
    full |= {"model_type": "bert", "type_vocab_size": 2, "num_attention_heads": 2}
    full |= {"layer_norm_eps": 1e-12, "hidden_act": "gelu"}
    (folder / "config.json").write_text(json.dumps(full | (config or {})))
    return folder


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64])
def test_other_floating_types_become_float32_exactly(tmp_path, dtype):
    def cast(state):
        state.update({name: tensor.astype(dtype) for name, tensor in state.items()})

    wide = flatten(open_weights(write_folder(tmp_path / "wide")).tree)
    for path, tensor in flatten(open_weights(write_folder(tmp_path / "cast", cast)).tree).items():
        leaf = np.asarray(tensor)
        assert (tensor.dtype, leaf.dtype) == (dtype, np.float32)
        np.testing.assert_array_equal(leaf, np.asarray(wide[path]).astype(dtype).astype(np.float32))


def test_old_names_of_layer_norm_are_read(tmp_path):
    def rename(state):
        for name in [name for name in state if ".LayerNorm." in name]:
            old = name.replace(".weight", ".gamma").replace(".bias", ".beta")
            state[old] = state.pop(name)

    new = open_weights(write_folder(tmp_path / "new"))
    old = open_weights(write_folder(tmp_path / "old", rename))
    jax.tree.map(np.testing.assert_array_equal, old.tree, new.tree)


def test_a_tied_decoder_is_ignored_and_an_untied_one_is_refused(tmp_path):
    decoder, word = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"
    tied = write_folder(tmp_path / "tied", lambda state: state.update({decoder: state[word]}))
    assert word in open_weights(tied).ignored[decoder]
    other = write_folder(tmp_path / "other", lambda state: state.update({decoder: state[word] + 1}))
    with pytest.raises(BadInput, match="ties the two"):
        open_weights(other)


UP = "bert.encoder.layer.1.intermediate.dense.weight"


def swap_nan(state):
    state[UP][3, 4] = np.nan


DAMAGE = {
    "missing": (lambda state: state.pop(UP), "missing"),
    "extra": (lambda state: state.update(stranger=np.zeros(2, np.float32)), "stranger"),
    "renamed": (lambda state: state.update({f"{UP}s": state.pop(UP)}), "nearest"),
    "flat": (lambda state: state.update({UP: state[UP].ravel()}), r"shape \(96,\)"),
    "integer": (lambda state: state.update({UP: state[UP].astype(np.int32)}), "int32"),
    "nan": (swap_nan, "NaN"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_tensor_is_named_with_its_file(tmp_path, damage):
    change, expected = DAMAGE[damage]
    folder = write_folder(tmp_path / "bert", change)
    with pytest.raises(BadInput, match=expected) as caught:
        jax.tree.map(np.asarray, open_weights(folder).tree)
    message = str(caught.value)
    assert str(folder / "model.safetensors") in message
    assert ("stranger" if damage == "extra" else UP) in message
    assert len(message.splitlines()) <= 5


def test_a_shape_that_the_configuration_does_not_give_is_refused(tmp_path):
    def cut(state):
        state[UP] = state[UP][:5].copy()

    ids = np.zeros((1, 3), np.int32)
    source = open_weights(write_folder(tmp_path / "cut", cut))
    with pytest.raises(BadInput, match=r"blocks/1/mlp/up/kernel: .* \(8, 5\), .* \(8, 12\)"):
        run(source, ids, mlm=True)
    source = open_weights(write_folder(tmp_path / "wide", config={"hidden_size": 16}))
    with pytest.raises(BadInput, match=r"gives shape \(8,\), the model expects \(16,\)"):
        run(source, ids, mlm=True)


@pytest.mark.parametrize("kept", [0, 7, 200, 4000, -1])
def test_a_truncated_file_is_refused(tmp_path, kept):
    path = write_folder(tmp_path / "bert") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(BadInput, match="damaged") as caught:
        open_weights(path.parent)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named_with_what_is_there(tmp_path, name):
    folder = write_folder(tmp_path / "bert")
    (folder / name).unlink()
    with pytest.raises(BadInput, match=f"no {name}") as caught:
        open_weights(folder)
    assert ("model.safetensors" if name == "config.json" else "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "gpt2"}, "vit, dinov2, bert, resnet"),
        ({"model_type": None}, "vit, dinov2, bert, resnet"),
        ({"position_embedding_type": "relative_key"}, "absolute"),
        ({"hidden_act": "silu"}, "silu"),
        ({"hidden_size": "8"}, "width"),
        ({"num_hidden_layers": 3}, "missing: bert.encoder.layer.2"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path, config, expected):
    with pytest.raises(BadInput, match=expected):
        open_weights(write_folder(tmp_path / "bert", config=config))


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff"])
def test_a_configuration_that_is_no_json_object_is_refused(tmp_path, text):
    folder = write_folder(tmp_path / "bert")
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BadInput, match="JSON"):
        open_weights(folder)


def test_an_asset_that_is_not_here_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TLJAX_ASSETS", str(tmp_path))
    for name, (asset, _) in NAMES.items():
        with pytest.raises(BadInput, match=f"make assets NAMES={asset}"):
            open_weights(name)


def test_an_unknown_name_lists_the_names(tmp_path):
    with pytest.raises(BadInput, match="dinov2-vits14") as caught:
        open_weights("dinov2-vits")
    assert all(name in str(caught.value) for name in NAMES)


def test_a_truncated_onnx_file_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    asset, inside = NAMES["dinov2-vits14"]
    path = tmp_path / asset / inside
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x08\x0a\x12\x07pytorch\x3a\xff")
    monkeypatch.setenv("TLJAX_ASSETS", str(tmp_path))
    with pytest.raises(BadInput, match="ONNX") as caught:
        open_weights("dinov2-vits14")
    assert str(path) in str(caught.value)


def test_preprocessing_is_read(tmp_path):
    folder = write_folder(tmp_path / "bert")
    full = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": 224, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(full))
    assert open_weights(folder).preprocess == {"mean": (0.5,) * 3, "std": (0.25,) * 3}


@pytest.mark.parametrize("lacking", ["image_mean", "image_std"])
def test_incomplete_preprocessing_is_refused(tmp_path, lacking):
    folder = write_folder(tmp_path / "bert")
    full = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": 8}
    del full[lacking]
    (folder / "preprocessor_config.json").write_text(json.dumps(full))
    with pytest.raises(BadInput, match=lacking):
        open_weights(folder)


def test_labels_are_in_the_order_of_their_numbers(tmp_path):
    names = {str(number): f"name {number}" for number in (10, 2, 1, 0, *range(3, 10))}
    folder = write_folder(tmp_path / "bert", config={"id2label": names})
    assert open_weights(folder).labels == tuple(f"name {number}" for number in range(11))
