"""Damaged weights, three families of each of four formats: nothing of it loads in silence."""

import shutil
from time import process_time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_exporter import IN_TRANSFORMERS, LABELS, grafted
from test_pretrained import made

import tljax
from tljax.exporter import export
from tljax.pretrained import assemble
from tljax.proof import FIXTURE, NOTE
from tljax.types import BadInput
from tljax.weights.npz import write_npz

pytestmark = pytest.mark.once

SECONDS = 1.0  # of this process: what else the machine does is not counted
BIG_VISION = {"eps": 1e-6, "activation": "gelu_tanh", "prefix_positions": False}
MAP = {"pool": "map", "map_head": True, "class_token": False}
CASES = {
    "hf, vit": IN_TRANSFORMERS["vit"],
    "hf, bert": IN_TRANSFORMERS["bert"],
    "hf, resnet": IN_TRANSFORMERS["resnet"],
    "timm, vit": ("vit", {"eps": 1e-6}),
    "timm, deit": ("vit", {"eps": 1e-6, "distilled": True, "distilled_head": True}),
    "timm, resnet": ("resnet", {"stages": (1, 1, 1, 1), "stem": "deep"}),
    "npz, vit": ("vit", BIG_VISION),
    "npz, vit with MAP": ("vit", BIG_VISION | MAP),
    "npz, bit": ("resnet", {"norm": "group", "bottleneck": True, "stages": (1, 1)}),
    "peft, vit": IN_TRANSFORMERS["vit"],
    "peft, bert": IN_TRANSFORMERS["bert"],
    "peft, distilbert": IN_TRANSFORMERS["distilbert"],
}
FILES = {"npz": "model.npz", "peft": "adapter_model.safetensors"}
"""Format -> its weights file, where that is not model.safetensors."""
LORA = [f"params/blocks/0/attention/{name}" for name in ("query", "key")]


def make(name, top):
    """Export random weights; what is adapted by LoRA lies beside, as its base."""
    (to, family), (arch, fields) = name.split(", "), CASES[name]
    small = {} if arch == "resnet" else {"width": 16, "depth": 1, "mlp": 24}
    source, base = made(arch, LABELS, **small | fields), None
    if to == "peft":
        base = str(export(assemble(source, ""), top / f"base of {family}"))
        source = grafted(source, *LORA, rank=16)  # square factors
    return export(assemble(source, ""), top / name, to=to, base=base)


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Keep every compiled program: a damaged file's is that of the whole one."""
    setting = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, setting)
    jax.config.update(setting, 0)
    yield
    jax.config.update(setting, before)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a function that gives a case's folder, made at its first call."""
    top, folders = tmp_path_factory.mktemp("exported"), {}
    return lambda name: folders.get(name) or folders.setdefault(name, make(name, top))


@pytest.fixture
def weights(exported, tmp_path):
    """Return a function that copies a case's folder, without the files named, for its weights."""

    def copy(name, *lacking):
        folder = shutil.copytree(exported(name), tmp_path / "copy", dirs_exist_ok=True)
        for known in lacking:
            (folder / known).unlink()
        return folder / FILES.get(name.split(",")[0], "model.safetensors")

    return copy


def read(path):
    if path.suffix != ".npz":
        return load_file(path)
    with np.load(path) as arrays:
        return dict(arrays)


def write(path, tensors):
    if path.suffix == ".npz":
        write_npz(path, tensors)
    else:
        save_file({n: np.ascontiguousarray(x) for n, x in tensors.items()}, path)


def load(path):
    return tljax.load(path if path.suffix == ".npz" else path.parent)


def refused(path, *words, seconds=SECONDS):
    """Load; it must be refused at once, naming the file (or the one it contradicts) and a word."""
    for last in (False, True):  # the better of two: a busy machine counts more of its time to us
        began = process_time()
        with pytest.raises(BadInput) as caught:
            load(path)
        if (took := process_time() - began) < seconds:
            break
        assert not last, (took, str(caught.value))
    said = str(caught.value)
    assert str(path) in said or str(path.with_name("config.json")) in said
    assert not words or any(word in said for word in words), (words, said)
    assert len(said) < 2000 and len(said.splitlines()) <= 5


# Structure

TOLD = {
    "cls_token": "pos_embed has",
    "dist_token": "pos_embed has",
    "attn.qkv.bias": "model_args.qkv_bias",
    "patch_embed.proj.weight": "model_args.embed_dim",
    "patch_embed.proj.bias": "params/embed/patch/bias",
    "classifier.weight": "classes, the head has",
    "classifier.1.weight": "classes, the head has",
    "base_model.model.classifier.weight": "params/head/bias",
    "fc.weight": "fc.bias",
    "conv1.0.weight": "conv1.weight",
    "conv1.6.weight": "conv1.0 is narrower",
    "layer4.0.conv2.weight": "layer4.0.",
    "conv_proj/kernel": "/shortcut/conv/kernel",
    "embedding/kernel": "its patches have",
    "query/kernel": "a query kernel has shape",
    "lora_B.weight": "/lora/b would have",
    "pre_classifier.weight": "params/pooler/kernel",
    "pre_classifier.bias": "params/pooler/bias",
    "classifier.bias": "params/head/bias",
    "head.weight": "head.bias",
    "head_dist.weight": "head_dist.bias",
}
"""End of a tensor's name -> what an error may name instead: what its shape or lack contradicts."""
SIZES = ("misshapen", "NaN")  # a model is built before they show, in a tenth of a second


def with_nan(array):
    array = array.copy()
    array.flat[-1] = np.nan
    return array


def changes(state, name):
    """List what can be wrong with one tensor: what -> the damaged tensors."""
    array, without = state[name], {n: x for n, x in state.items() if n != name}
    return {
        "missing": without,
        "renamed": without | {f"{name}s": array},
        "misshapen": state | {name: array[:-1]},
        "wrong dtype": state | {name: array.astype(np.int32)},
        "NaN": state | {name: with_nan(array)},
    }


def one_of_each(names, kind):
    """Choose the last of those names that are of one kind."""
    return {kind(name): name for name in sorted(names)}.values()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.few(3)
def test_damage_of_one_tensor_is_refused_with_its_name(weights, name):
    path = weights(name, NOTE, FIXTURE)
    pre, state = load(path), read(path)
    assert pre.verified == "values unverified"
    known = state.keys() - pre.source.ignored.keys()
    shapes = one_of_each(known, lambda tensor: state[tensor].shape)
    for tensor in one_of_each(known, lambda name: "".join(c for c in name if not c.isdigit())):
        also = [word for end, word in TOLD.items() if tensor.endswith(end)]
        for what, damaged in changes(state, tensor).items():
            silent = (name, tensor, what) == ("npz, vit", "cls", "missing")  # the next test
            if not silent and (what not in SIZES or tensor in shapes):
                print(what, tensor)  # shown where it fails
                write(path, damaged)
                refused(path, tensor, *also)
    write(path, state | {"stranger": np.zeros(3, np.float32)})
    refused(path, "unknown: stranger")


def test_arrays_without_a_class_token_are_another_model_and_it_is_said(weights):
    """Of an .npz there are arrays only: those of a model that averages its patches."""
    path = weights("npz, vit", NOTE, FIXTURE)
    write(path, {n: x for n, x in read(path).items() if n != "cls"})
    assert "pool='mean': no class token" in load(path).record["assumed"]


HEADERS = {
    ".safetensors": [
        (b"{", b"["), (b'"', b"'"), (b"F32", b"F64"), (b"F32", b"F3"), (b'"shape":[', b'"shape":{'),
        (b'"data_offsets":[', b'"data_offsets":[9'), (b'"data_offsets"', b'"data_offset5"'),
    ],
    ".npz": [
        (b"PK\3\4", b"PK\3\5"), (b"PK\1\2", b"PK\1\3"), (b"PK\5\6", b"PK\5\7"), (b"<f4", b"|O4"),
        (b"NUMPY", b"NUMPX"), (b"<f4", b"<f8"), (b"<f4", b"<i4"), (b"'shape': (", b"'shape': ["),
        (b"False", b"True "),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.few(4)
def test_a_truncated_file_and_a_damaged_header_are_refused(weights, name):
    path = weights(name, NOTE, FIXTURE)
    content = path.read_bytes()
    damaged = [content[:kept] for kept in (0, 7, 8, 100, len(content) // 2, -1)]
    for old, new in HEADERS[path.suffix]:
        assert old in content
        damaged.append(content.replace(old, new, 1))
    if path.suffix == ".safetensors":
        length = int.from_bytes(content[:8], "little")
        for wrong in (0, length - 1, length + 1, 2 * length, 2**60):
            damaged.append(wrong.to_bytes(8, "little") + content[8:])
    for data in damaged:
        path.write_bytes(data)
        refused(path)


# Values: of the right form, finite, and other ones


def transposed(path, state):
    """Transpose the first kernel that is square."""
    one, other = (-2, -1) if path.suffix == ".npz" else (0, 1)
    for name, array in sorted(state.items()):
        joined = array.reshape(-1, array.shape[-1]) if name.endswith("out/kernel") else array
        if joined.ndim > 1 and joined.shape[one] == joined.shape[other] > 1:
            return {name: joined.swapaxes(one, other).reshape(array.shape)}
    raise AssertionError("no kernel is square")


def exchanged(path, state):
    """Exchange query and key; in a ResNet, two kernels of the same shape."""
    pairs = ("query", "key"), ("q_lin", "k_lin"), ("q_proj", "k_proj")
    found = {}
    for one, other in pairs:
        for name in (name for name in state if one in name):
            partner = name.replace(one, other)
            found |= {name: state[partner], partner: state[name]}
    for name in (name for name in state if ".qkv." in name):
        query, key, value = np.split(state[name], 3)
        found[name] = np.concatenate([key, query, value])
    if found:
        return found
    kernels = {}
    for name in sorted(name for name, array in state.items() if array.ndim == 4):
        partner = kernels.setdefault(state[name].shape, name)
        if partner != name:
            return {name: state[partner], partner: state[name]}
    raise AssertionError("no two kernels are alike")


def flipped(state, rng, *, bits=32):
    """Flip one of the lowest bits of one number, which stays finite."""
    names = sorted(name for name, array in state.items() if array.dtype == np.float32)
    while True:
        name, bit = names[rng.integers(len(names))], rng.integers(bits)
        array = state[name].copy()
        array.reshape(-1).view(np.uint32)[rng.integers(array.size)] ^= np.uint32(1 << bit)
        if np.isfinite(array).all():
            return {name: array}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.few(2)
def test_other_values_are_noticed(weights, name):
    path = weights(name)
    state = read(path)
    assert load(path).verified == "values verified: the digest of the export"
    for change in (transposed, exchanged):
        found = change(path, state)
        assert any((found[tensor] != state[tensor]).any() for tensor in found)
        write(path, state | found)
        refused(path, "changed since its export", seconds=60)  # the model is compiled and run
    (path.parent / NOTE).unlink()
    assert load(path).verified == "values unverified"


@pytest.mark.parametrize("name", CASES)
def test_any_flipped_bit_is_noticed(weights, name):
    path, rng = weights(name), np.random.default_rng(0)
    state = read(path)
    write(path, state | flipped(state, rng, bits=1))
    # It may be in what the recorded outputs do not depend on: then they alone are known.
    with pytest.warns(UserWarning, match="has changed since its export"):
        assert "by their outputs only" in load(path).verified
    (path.parent / FIXTURE).unlink()
    for _ in range(20):
        write(path, state | flipped(state, rng))
        refused(path, "export it again")
