"""Weights files from strangers: whatever is in them, one clear error, at once, in little memory."""

import json
import resource
import struct
import sys
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import save

from tljax.models.bert import Bert
from tljax.types import BadInput
from tljax.weights import open_weights
from tljax.weights.hf import HF
from tljax.weights.table import to_foreign

pytestmark = pytest.mark.once

SIZES = {"width": 8, "depth": 2, "mlp": 12, "vocab": 11, "positions": 6, "types": 2}
CONFIG = {
    "model_type": "bert", "hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 12,
    "vocab_size": 11, "max_position_embeddings": 6, "type_vocab_size": 2,
    "num_attention_heads": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
}  # fmt: skip
SECONDS, MEGABYTES = 1.0, 200


def tensors() -> dict[str, np.ndarray]:
    model = Bert(**SIZES, heads=2, pooler=False)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 3), np.int32))
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    return to_foreign(tree, HF.spell("bert", SIZES), SIZES)


@pytest.fixture(scope="module")
def whole() -> bytes:
    return save(tensors())


def parts(content: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def pack(header: dict | list | str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, str | bytes) else json.dumps(header)
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def opened(folder, content: bytes, config: dict | str = CONFIG):
    """Write a folder and read every tensor of it; returns the tree."""
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "config.json").write_text(text)
    return jax.tree.map(np.asarray, open_weights(folder).tree)


def peak() -> float:
    """Return the most memory this process has had, in MB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Change a file at random, mostly where it matters: its header."""
    header = 8 + struct.unpack("<Q", content[:8])[0]
    raw = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        place = int(rng.integers(0, min(header if rng.random() < 0.8 else len(raw), len(raw))))
        kind = rng.integers(0, 6)
        if kind == 0:
            raw[place] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            raw[place] = int(rng.integers(0, 256))
        elif kind == 2:
            del raw[place : place + int(rng.integers(1, 40))]
        elif kind == 3:
            raw[place:place] = rng.bytes(int(rng.integers(1, 40)))
        elif kind == 4:
            raw[place:place] = raw[place : place + int(rng.integers(1, 200))]
        else:
            del raw[max(place, 1) :]
    return bytes(raw)


def test_random_mutations_are_named_or_change_nothing_but_values(tmp_path, whole):
    """A thousand damaged files: BadInput, or a tree of the same paths and shapes."""
    rng = np.random.default_rng(0)
    good = jax.tree.map(np.shape, opened(tmp_path / "bert", whole))
    before, refused, slowest = peak(), 0, 0.0
    for number in range(1000):
        content = mutated(whole, rng)
        began = time.perf_counter()
        try:
            tree = opened(tmp_path / "bert", content)
        except BadInput as error:
            refused += 1
            assert str(tmp_path) in str(error), f"{number}: which file? {error}"
            assert len(str(error).splitlines()) <= 5, f"{number}: {error}"
        else:
            assert jax.tree.map(np.shape, tree) == good, number
        slowest = max(slowest, time.perf_counter() - began)
    assert refused > 800  # most hit the header
    assert slowest < SECONDS
    assert peak() - before < MEGABYTES


def one(shape=(2,), kind="F32", offsets=(0, 8)) -> dict:
    return {"dtype": kind, "shape": list(shape), "data_offsets": list(offsets)}


NAME = "embeddings.word_embeddings.weight"
CRAFTED = {
    "empty": b"",
    "seven bytes": b"1234567",
    "no header": pack(""),
    "header of 2^63 bytes": pack("{}", length=2**63),
    "header of 2^64 - 1 bytes": pack("{}", length=2**64 - 1),
    "header longer than the file": pack("{}", length=3_000_000),
    "header of 100 MB that is there": pack(b" " * 100_000_000),
    "no JSON": pack("{'a': 1}"),
    "a list": pack([1, 2]),
    "a number": pack("17"),
    "null": pack("null"),
    "100,000 brackets": pack("[" * 100_000),
    "100,000 objects": pack('{"a":' * 100_000),
    "not UTF-8": pack(b"\xff\xfe{}"),
    "nothing in it": pack({}),
    "a name twice": pack('{"a":%s,"a":%s}' % ((json.dumps(one()),) * 2), bytes(8)),
    "overlapping": pack({"a": one(), "b": one(offsets=(4, 12))}, bytes(12)),
    "a gap": pack({"a": one(), "b": one(offsets=(12, 20))}, bytes(20)),
    "beyond the end": pack({"a": one(offsets=(0, 8))}, bytes(4)),
    "bytes left over": pack({"a": one()}, bytes(20)),
    "backwards": pack({"a": one(offsets=(8, 0))}, bytes(8)),
    "negative offsets": pack({"a": one(offsets=(-8, 0))}, bytes(8)),
    "negative shape": pack({"a": one((-1, -2))}, bytes(8)),
    "fractions": pack({"a": one((2.0,), offsets=(0.0, 8.0))}, bytes(8)),
    "words": pack({"a": one(("2",), offsets=("0", "8"))}, bytes(8)),
    "2^62 x 2^62": pack({"a": one((2**62, 2**62))}, bytes(8)),
    "2^70": pack({"a": one((2**70,))}, bytes(8)),
    "terabytes of nothing": pack({"a": one((0, 2**50), offsets=(0, 0))}),
    "no type": pack({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "a strange type": pack({"a": one(kind="PICKLE")}, bytes(8)),
    "a small type": pack({NAME: one((4,), "F4", (0, 2))}, bytes(2)),
    "a name that climbs": pack({"../../etc/passwd": one()}, bytes(8)),
    "a name of zeros": pack({"\0" * 100: one()}, bytes(8)),
    "a name of 1 MB": pack({"a" * 1_000_000: one()}, bytes(8)),
    "100,000 tensors": pack({str(i): one((0,), offsets=(0, 0)) for i in range(100_000)}),
    "metadata is a number": pack({"__metadata__": 3, "a": one()}, bytes(8)),
    "a pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94",
    "a zip": b"PK\x03\x04" + bytes(60),
}
CONFIGS = {
    "no JSON": "{",
    "a list": "[]",
    "deep": "[" * 200_000,
    "no type": "{}",
    "a type that is a list": json.dumps(CONFIG | {"model_type": ["bert"]}),
    "a billion layers": json.dumps(CONFIG | {"num_hidden_layers": 10**9}),
    "layers that are words": json.dumps(CONFIG | {"num_hidden_layers": "two"}),
    "negative layers": json.dumps(CONFIG | {"num_hidden_layers": -1}),
    "half a layer": json.dumps(CONFIG | {"num_hidden_layers": 1.5}),
    "an endless width": '{"model_type": "bert", "hidden_size": 1e999}',
    "heads that do not divide": json.dumps(CONFIG | {"num_attention_heads": 3}),
    "no heads": json.dumps(CONFIG | {"num_attention_heads": 0}),
}


def refused_at_once(tmp_path, content, config=CONFIG):
    before, began = peak(), time.perf_counter()
    with pytest.raises(BadInput) as caught:
        opened(tmp_path / "bert", content, config)
    assert time.perf_counter() - began < SECONDS
    assert peak() - before < MEGABYTES
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_file_is_refused_at_once(tmp_path, name):
    refused_at_once(tmp_path, CRAFTED[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_crafted_configuration_is_refused_at_once(tmp_path, whole, name):
    refused_at_once(tmp_path, whole, CONFIGS[name])
