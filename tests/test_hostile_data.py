"""Data files from strangers: whatever is in them, one clear error or examples, in little memory."""

import io
import json
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from forked import hang_in, run
from PIL import Image
from sklearn.datasets import load_digits
from test_resume import DIGITS, ROOT, VIT, write_config

from tljax.config import Data
from tljax.data import loader, sources
from tljax.data.corrupt import Allowance
from tljax.data.pipeline import open_pipeline
from tljax.types import BadInput

pytestmark = pytest.mark.once

SECONDS, MEGABYTES = (
    2.0,
    400,
)  # of this process alone; a picture of the most pixels that Pillow allows takes 270 MB
COUNT = 30


def picture(kind: str, side: int = 24) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


ROWS = [{"text": f"the {i}-th “text”, of some", "label": "ab"[i % 2]} for i in range(COUNT)]
TABLES = {
    "csv": "text,label\n" + "".join(f'"{row["text"]}",{row["label"]}\n' for row in ROWS),
    "tsv": "text\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in ROWS),
    "jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
}
KINDS = {
    "png": picture("PNG"),
    "jpeg": picture("JPEG"),
    **{kind: text.encode() for kind, text in TABLES.items()},
}


def place(folder: Path, kind: str, content: bytes) -> Path:
    """Write a file among good ones; returns what to open."""
    if kind in TABLES:
        path = folder / f"rows.{kind}"
        path.write_bytes(content)
        return path
    for i in range(COUNT):
        path = folder / "pictures" / "ab"[i % 2] / f"{i}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if i == 7 else KINDS[kind])
    return folder / "pictures"


def read(path: Path) -> list[dict]:
    """Open data and read every example."""
    splits = sources.open_data(Data(name=str(path)))
    return [part[i] for part in splits[:3] for i in range(len(part))]


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    raw = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        at, length = int(rng.integers(0, max(len(raw), 1))), int(rng.integers(1, 40))
        match rng.integers(0, 5):
            case 0:
                raw[at : at + 1] = bytes([int(rng.integers(0, 256))])
            case 1:
                del raw[at : at + length]
            case 2:
                raw[at:at] = rng.bytes(length)
            case 3:
                raw[at:at] = raw[:at][-length:] * int(rng.integers(1, 50))
            case 4:
                del raw[at:]
    return bytes(raw)


@contextmanager
def in_little_memory() -> Iterator[None]:
    """Hold what stands within to MEGABYTES more than there are before, at any moment, on Linux."""
    if sys.platform != "linux":
        yield
        return
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = held("VmRSS")
    try:
        yield
    finally:
        assert held("VmHWM") - before < MEGABYTES


def held(name: str) -> float:
    """Read one of this process's memory counts, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1e3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [8, pytest.param(60, marks=pytest.mark.slow)])
def test_mutated_files_are_named_or_are_examples(tmp_path, kind, count):
    """Of 60 files of each of five kinds: 300."""
    rng = np.random.default_rng(count)
    for _ in range(count):
        path = place(tmp_path, kind, mutated(KINDS[kind], rng))
        began = time.process_time()
        try:
            with in_little_memory():
                for example in read(path):
                    assert isinstance(example.get("text", ""), str)
                    assert example.get("image", np.empty(0, np.uint8)).dtype == np.uint8
        except BadInput as error:
            assert str(tmp_path) in str(error) or "training part" in str(error), error
            assert len(str(error).splitlines()) <= 5
        assert time.process_time() - began < SECONDS


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IEND", b"")]
    packed = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


BOMB = zlib.compress(bytes(300_000_000), 9)
CRAFTED = {
    "empty picture": ("png", b""),
    "a picture of 2^31 pixels a side": ("png", png(2**31 - 1, 2**31 - 1)),
    "no pixels": ("png", png(0, 0)),
    "pixels that are not there": ("png", png(5000, 5000)),
    "900 million pixels of nothing": ("png", png(30_000, 30_000, (b"IDAT", BOMB))),
    "a text that unpacks to 300 MB": ("png", png(8, 8, (b"zTXt", b"a\0\0" + BOMB))),
    "a profile that unpacks to 300 MB": ("png", png(8, 8, (b"iCCP", b"a\0\0" + BOMB))),
    "another kind of picture": ("png", b"GIF89a" + bytes(40)),
    "half a JPEG": ("jpeg", KINDS["jpeg"][: len(KINDS["jpeg"]) // 2]),
    "a pickle": ("jpeg", b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00."),
    "empty table": ("csv", b""),
    "a header alone": ("csv", b"text,label\n"),
    "a field of 50 MB": ("csv", b"text,label\n" + b"a" * 50_000_000 + b",a\n"),
    "an open quote": ("csv", b'text,label\n"' + b"a\n" * 200_000),
    "zeros": ("csv", bytes(1000)),
    "UTF-16": ("csv", TABLES["csv"].encode("utf-16")),
    "a column twice": ("csv", b"text,text,label\n" + b"a,b,c\n" * 30),
    "a header of many lines": ("csv", b'"a\n\n\n\n\n\n\n\nb",label\n' + b"a,b\n" * 30),
    "a value of 30 MB": ("jsonl", b'{"text": [' + b"1," * 15_000_000 + b'1], "label": "a"}\n'),
    "a label of half a character": ("jsonl", b'{"text": "a", "label": "\\udcff"}\n' * 30),
    "rows that are too long": ("csv", b"text,label\n" + b"a,b,c,d\n" * 30),
    "rows that are too short": ("csv", b"text,label\n" + b"a\n" * 30),
    "another separator": ("csv", TABLES["tsv"].encode()),
    "a list of 100,000 brackets": ("jsonl", b"[" * 100_000 + b"\n"),
    "a text in 100,000 brackets": (
        "jsonl",
        b'{"text": "a", "label": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    ),
    "half a character": ("jsonl", b'{"text": "\\ud800", "label": "a"}\n' * 30),
    "an endless number": ("jsonl", b'{"text": "a", "label": 1e999}\n' * 30),
    "not a number": ("jsonl", b'{"text": "a", "label": NaN}\n' * 30),
    "a number of 10,000 digits": (
        "jsonl",
        b'{"text": "a", "label": ' + b"7" * 10_000 + b"}\n" * 1,
    ),
    "nothing but null": ("jsonl", b"null\n" * 30),
    "objects in objects": ("jsonl", b'{"text": {"text": "a"}, "label": "a"}\n'),
    "labels that are objects": ("jsonl", b'{"text": "a", "label": {"a": 1}}\n' * 30),
    "a folder's name": ("tsv", b"../../etc/passwd"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_file_is_refused_at_once(tmp_path, name):
    path, began = place(tmp_path, *CRAFTED[name]), time.process_time()
    with in_little_memory(), pytest.raises(BadInput) as caught:
        read(path)
    assert time.process_time() - began < SECONDS
    assert len(str(caught.value)) < 2000 and len(str(caught.value).splitlines()) <= 5


# -- a few corrupt examples ---------------------------------------------------------------------


class Torn(sources.Source):
    """Example i holds i; some cannot be read."""

    def __init__(self, size: int, corrupt: set[int]):
        self.size, self.corrupt = size, corrupt

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        if index in self.corrupt:
            raise BadInput(f"example {index} is corrupt")
        return {"image": np.full((2, 2, 1), index, np.uint8)}


def ids(source: sources.Source, indices: range) -> list[int]:
    return [int(row["image"][0, 0, 0]) for row in source.__getitems__(indices)]


def test_the_next_example_stands_in_for_a_corrupt_one_up_to_a_number(capsys):
    source = loader.Sparing(Torn(6, {2, 5}), Allowance(2))
    assert ids(source, range(6)) == [0, 1, 3, 3, 4, 0]
    assert ids(source, range(6)) == [0, 1, 3, 3, 4, 0]
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "left out, 1 of data.max_corrupt=2: example 2 is corrupt",
        "left out, 2 of data.max_corrupt=2: example 5 is corrupt",
    ]
    with pytest.raises(BadInput, match=r"2 examples are corrupt, more than data.max_corrupt=1"):
        ids(loader.Sparing(Torn(6, {2, 5}), Allowance(1)), range(6))


def test_corrupt_pictures_of_a_folder_are_left_out(tmp_path, capsys):
    path = place(tmp_path, "png", b"no picture")
    with pytest.raises(BadInput, match=r"7\.png"):
        read(path)
    splits = sources.open_data(Data(name=str(path), max_corrupt=1))
    assert sum(len(part) for part in splits[:3]) == COUNT - 1
    assert "7.png cannot be decoded" in capsys.readouterr().err


def prepared(tmp_path: Path, monkeypatch) -> Path:
    """Prepare the digits in a folder of their own; returns the shard of their training part."""
    monkeypatch.setenv("TLJAX_DATA", str(tmp_path))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    sources.open_data(Data(name="digits"))
    [shard] = tmp_path.rglob("*train*array_record*")
    return shard


def test_damaged_records_are_named_by_set_file_and_number(tmp_path, monkeypatch):
    shard = prepared(tmp_path, monkeypatch)
    content = bytearray(shard.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    shard.write_bytes(content)
    with pytest.raises(BadInput) as caught:
        read(Path("digits"))
    for part in ("digits", "example ", "record ", shard.name, "cannot be read"):
        assert part in str(caught.value)
    pipeline = open_pipeline(
        Data(name="digits", image_size=8, max_corrupt=200), None,
        preprocess=None, tokenizer=None, batch=8, threads=1, seed=0,
    )  # fmt: skip
    assert sum(map(len, pipeline.splits[:3])) == len(load_digits().target) - 1
    train = pipeline.splits.train
    assert all(row["image"].shape == (8, 8, 1) for row in train.__getitems__(range(len(train))))


@pytest.mark.parametrize("damage", ["halved", "emptied", "deleted"])
def test_a_damaged_shard_is_named(tmp_path, monkeypatch, damage):
    shard = prepared(tmp_path, monkeypatch)
    content = shard.read_bytes()
    shard.unlink()
    if damage != "deleted":
        shard.write_bytes(content[: len(content) // 2] if damage == "halved" else b"")
    with pytest.raises(BadInput) as caught:
        read(Path("digits"))
    assert shard.name in str(caught.value) and len(str(caught.value).splitlines()) <= 5


def test_a_worker_that_hangs_is_said_and_ends_the_run():
    code = """if True:
        import threading
        from tljax import preemption
        preemption.PATIENCE, preemption.LIMIT = 0.2, 0.6
        with preemption.patience("the batch of step 3"):
            threading.Event().wait()
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "the batch of step 3 took 0.2 s so far" in done.stderr
    assert done.stderr.endswith("given up: the batch of step 3 hangs\n")


@pytest.mark.parametrize(
    "what", [pytest.param("training", marks=pytest.mark.slow), "an evaluation"]
)
def test_a_run_whose_data_hang_says_so_and_ends(what, tmp_path):
    values = {"data": DIGITS, "model": VIT, "strategy": {"name": "scratch"}}
    values["run"] = {"steps": 4, "batch": 16, "eval_every": 2, "save_every": 1}
    config = write_config(tmp_path / "config.py", values)
    words, log = ["train", f"--config={config}", f"--workdir={tmp_path / 'run'}"], tmp_path / "log"
    assert run(words, log, (hang_in, (what,))) == 1
    assert f"batch 0 of {what} took 0.5 s so far" in log.read_text()
    assert log.read_text().endswith(f"given up: batch 0 of {what} hangs\n")
    assert run(words, log) == 0, log.read_text()  # what was saved is whole
