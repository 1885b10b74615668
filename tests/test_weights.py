"""Foreign weights: real files against recorded outputs; folders, shards and names, good and bad."""

import json
import socket
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tljax.edits.load import load
from tljax.models import MODELS
from tljax.models.bert import Bert
from tljax.tree import flatten
from tljax.types import BadInput
from tljax.weights import NAMES, open_weights
from tljax.weights import folder as folders
from tljax.weights.hf import HF
from tljax.weights.table import to_foreign

pytestmark = pytest.mark.once

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


# Written files: types, decoders, damage


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
    with pytest.raises(BadInput, match=r"blocks/1/mlp/up/kernel .*: .* \(8, 5\), .* \(8, 12\)"):
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
        ({"model_type": "gpt2"}, "clip, vit, deit, dinov2"),
        ({"model_type": None}, "clip, vit, deit, dinov2"),
        ({"position_embedding_type": "relative_key"}, "absolute"),
        ({"hidden_act": "silu"}, "silu"),
        ({"hidden_size": "8"}, "hidden_size='8'"),
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
    found = open_weights(folder).preprocess
    assert {name: found[name] for name in ("mean", "std", "resize", "interpolation")} == {
        "mean": (0.5,) * 3, "std": (0.25,) * 3, "resize": (224, 224), "interpolation": "bilinear"
    }  # fmt: skip


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


# Shards


def write_shards(folder, change=lambda shards, index: None):
    """Write a BERT as two shards and their index."""
    write_folder(folder)
    whole = folder / "model.safetensors"
    state = load_file(whole)
    whole.unlink()
    names = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    shards = {names[0]: {}, names[1]: {}}
    for number, (name, tensor) in enumerate(sorted(state.items())):
        shards[names[number % 2]][name] = tensor
    index = {name: shard for shard, tensors in shards.items() for name in tensors}
    change(shards, index)
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard)
    told = {"metadata": {"total_size": 1}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(told))
    return folder


def test_shards_are_read_as_one_file(tmp_path):
    one = open_weights(write_folder(tmp_path / "one"))
    two = open_weights(write_shards(tmp_path / "two"))
    jax.tree.map(np.testing.assert_array_equal, two.tree, one.tree)
    assert (two.fields, two.kind, two.format) == (one.fields, one.kind, one.format)
    assert two.digest() != one.digest()


def add_twice(shards, index):
    first, second = shards.values()
    first |= {name: tensor for name, tensor in second.items() if name == UP}
    second |= {name: tensor for name, tensor in first.items() if name == UP}


def lose_shard(shards, index):
    del shards["model-00002-of-00002.safetensors"]


def lose_tensor(shards, index):
    for tensors in shards.values():
        tensors.pop(UP, None)


def forget(shards, index):
    del index[UP]


SHARDS = {
    "a tensor in two": (add_twice, f"{UP} stands in another shard"),
    "a file is missing": (lose_shard, "missing: model-00002-of-00002.safetensors"),
    "a tensor is missing": (lose_tensor, f"has no tensor {UP}"),
    "one that the index lacks": (forget, f"does not know tensor {UP}"),
    "outside": (lambda s, index: index.update({UP: "../model.safetensors"}), "no plain name"),
    "absolute": (lambda s, index: index.update({UP: "/etc/model.safetensors"}), "no plain name"),
    "a pickle": (lambda s, index: index.update({UP: "model.bin"}), "no plain name"),
    "no name": (lambda s, index: index.update({UP: {"a": 1}}), "no plain name"),
    "nothing": (lambda s, index: index.clear(), "expected a file for each tensor"),
}


@pytest.mark.parametrize("damage", SHARDS)
def test_damaged_shards_are_refused(tmp_path, damage):
    change, expected = SHARDS[damage]
    with pytest.raises(BadInput, match=expected) as caught:
        open_weights(write_shards(tmp_path / "bert", change))
    assert str(tmp_path) in str(caught.value)


# Names and paths


def test_a_file_stands_for_its_folder(tmp_path):
    folder = write_folder(tmp_path / "bert")
    file = open_weights(folder / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, file.tree, open_weights(folder).tree)
    assert (file.format, file.kind, file.config["model_type"]) == ("hf", "bert", "bert")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "model.pt", "last.ckpt"])
def test_pickles_are_never_opened(tmp_path, name):
    folder = write_folder(tmp_path / "bert")
    (folder / "model.safetensors").rename(folder / name)
    for given in (folder, folder / name):
        with pytest.raises(BadInput, match=r"never opened\n.*safetensors") as caught:
            open_weights(given)
        assert str(folder / name) in str(caught.value)


def test_an_adapter_is_no_model(tmp_path):
    folder = write_folder(tmp_path / "bert")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(BadInput, match="adapter"):
        open_weights(folder)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Let no network be touched; return the calls to the hub's client."""
    constants = pytest.importorskip("huggingface_hub.constants")
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.chdir(tmp_path)

    def refuse(*_, **__):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked, fetch = [], hub.snapshot_download

    def ask(name, **options):
        asked.append(name)
        assert not any(pattern.endswith(folders.PICKLES) for pattern in options["allow_patterns"])
        return fetch(name, cache_dir=tmp_path / "cache", **options)

    monkeypatch.setattr(hub, "snapshot_download", ask)
    return asked


def test_a_hub_name_without_a_network_says_what_was_tried(hub):
    with pytest.raises(BadInput, match="'google/vit-base-patch16-224'") as caught:
        open_weights("google/vit-base-patch16-224")
    message = str(caught.value)
    assert hub == ["google/vit-base-patch16-224"]
    assert "give the folder" in message
    assert len(message.splitlines()) <= 5 and len(message) < 800


def test_a_repository_in_the_cache_needs_no_network(hub, tmp_path):
    repository = tmp_path / "cache" / "models--some--bert"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    write_folder(repository / "snapshots" / ("0" * 40))
    assert open_weights("some/bert").kind == "bert"
    assert hub == ["some/bert"]


@pytest.mark.parametrize(
    "name",
    ["runs/tset", "./a/b", "/a/b", "~/a", "a/b/c", "../a", "a/", "a", "a/b.safetensors", "a/b.pth",
     "a b/c", "a/\u00e9", "a\\b/c", "", "a/.b"],
)  # fmt: skip
def test_what_looks_like_a_path_is_never_looked_for_in_the_hub(hub, tmp_path, name):
    (tmp_path / "runs").mkdir()
    with pytest.raises(BadInput, match=r"no weights|has no config.json"):
        open_weights(name)
    assert not hub
