"""Damaged weights, three families of each of four formats: nothing of it loads in silence."""

import json
import shutil
from time import perf_counter

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_exporter import IN_TRANSFORMERS, LABELS, grafted
from test_pretrained import made

import tljax
from tljax.exporter import export
from tljax.pretrained import FIXTURE, NOTE, assemble
from tljax.types import BadInput
from tljax.weights.npz import write_npz

SECONDS = 1.0
BIG_VISION = {"eps": 1e-6, "activation": "gelu_tanh", "prefix_positions": False}
MAP = {"pool": "map", "map_head": True, "class_token": False}
GROUPS = {"norm": "group", "bottleneck": True, "stages": (1, 1)}
CASES = {
    "hf, vit": IN_TRANSFORMERS["vit"],
    "hf, bert": IN_TRANSFORMERS["bert"],
    "hf, resnet": IN_TRANSFORMERS["resnet"],
    "timm, vit": ("vit", {"eps": 1e-6}),
    "timm, deit": ("vit", {"eps": 1e-6, "distilled": True, "distilled_head": True}),
    "timm, resnet": ("resnet", {"stages": (1, 1, 1, 1), "stem": "deep"}),
    "npz, vit": ("vit", BIG_VISION),
    "npz, vit with MAP": ("vit", BIG_VISION | MAP),
    "npz, bit": ("resnet", GROUPS),
    "peft, vit": IN_TRANSFORMERS["vit"],
    "peft, bert": IN_TRANSFORMERS["bert"],
    "peft, distilbert": IN_TRANSFORMERS["distilbert"],
}
FILES = {"npz": "model.npz", "peft": "adapter_model.safetensors"}
"""Format -> its weights file, where that is not model.safetensors."""
LORA = [f"params/blocks/0/attention/{name}" for name in ("query", "key")]


def file_in(folder, name):
    return folder / FILES.get(name.split(",")[0], "model.safetensors")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Give a case's folder as tljax.export makes it from random weights."""
    top, done = tmp_path_factory.mktemp("exported"), {}

    def give(name):
        if name not in done:
            to, family = name.split(", ")
            arch, fields = CASES[name]
            small = {} if arch == "resnet" else {"width": 16, "depth": 1, "mlp": 24}
            source = made(arch, LABELS, **small | fields)
            base = None
            if to == "peft":
                base = str(export(assemble(source, ""), top / f"base of {family}"))
                source = grafted(source, *LORA)
            done[name] = export(assemble(source, ""), top / name, to=to, base=base)
        return done[name]

    return give


@pytest.fixture
def folder(exported, tmp_path):
    """Copy a case's folder, without what verifies its values: as a stranger's would be."""

    def copy(name, verified=False):
        place = shutil.copytree(exported(name), tmp_path / "copy")
        for known in () if verified else (NOTE, FIXTURE):
            (place / known).unlink()
        return place

    return copy


def read(path):
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return dict(arrays)
    return load_file(path)


def write(path, tensors):
    if path.suffix == ".npz":
        write_npz(path, tensors)
    else:
        save_file(tensors, path, {"format": "pt"})


def load_file_of(path):
    return tljax.load(path if path.suffix == ".npz" else path.parent)


def refused(path, *words):
    """Load; it must be refused at once, naming the file, and one of the words."""
    began = perf_counter()
    with pytest.raises(BadInput) as caught:
        load_file_of(path)
    seconds, said = perf_counter() - began, str(caught.value)
    print(f"{seconds:.3f} {said}")
    assert seconds < SECONDS, said
    assert str(path) in said and len(said) < 2000
    assert not words or any(word in said for word in words), (words, said)


# Structure


def short(array):
    return array[:-1].copy()


def with_nan(array):
    array = array.copy()
    array.flat[-1] = np.nan
    return array


CHANGES = {
    "misshapen": short,
    "wrong dtype": lambda array: array.astype(np.int32),
    "NaN": with_nan,
}


def structural(state, name):
    """List what can be wrong with one tensor: what -> the damaged tensors."""
    without = {n: x for n, x in state.items() if n != name}
    yield "missing", without
    yield "renamed", without | {f"{name}s": state[name]}
    for what, change in CHANGES.items():
        yield what, without | {name: change(state[name])}


@pytest.mark.parametrize("name", CASES)
def test_damage_of_one_tensor_is_refused_with_its_name(folder, name):
    path = file_in(folder(name), name)
    pre, state = load_file_of(path), read(path)
    assert pre.verified == "values unverified"
    for tensor in state.keys() - pre.source.ignored.keys():
        for what, damaged in structural(state, tensor):
            print(name, tensor, what, end=" ")
            write(path, damaged)
            try:
                refused(path, tensor)
            except BaseException as e:
                print("FAIL", repr(e)[:300])
