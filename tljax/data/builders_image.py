"""Image data sets as a TFDS builder: array_record files of PNG bytes, no TensorFlow."""

import gzip
import json
import os
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int, UInt8
from PIL import Image
from sklearn.datasets import load_digits
from tensorflow_datasets.core.features import ClassLabel, FeatureConnector, Text

from tljax.data.transforms import decode
from tljax.types import BadInput

Row = tuple[Hashable, int | str, dict]
"""A group that no split divides, the stratum it is counted in, the record."""

_INSIDE = {
    "fashion": "usr/share/datasets/fashion-mnist",
    "vader": "vaderSentiment-3.3.2.tar.gz",
    "spam": "package",
    "brown": "package",
    "wordnet": "usr/share/wordnet",
    "gcide": "usr/share/dictd",
    "fortunes": "usr/share/games/fortunes",
}


def find_asset(name: str) -> Path:
    """Find the files of an unpacked package: under $TLJAX_ASSETS, ./assets, or the system.

    Raises: BadInput naming the command that installs it.
    """
    inside = _INSIDE.get(name, "")
    places = [Path(os.environ.get("TLJAX_ASSETS", "assets")) / name / inside]
    if inside.startswith("usr/"):
        places.append(Path("/") / inside)
    for place in places:
        if place.exists():
            return place
    raise BadInput(
        f"asset {name!r} is not installed: looked at {', '.join(map(str, places))}.\n"
        f"Run `make assets NAMES={name}`, or point $TLJAX_ASSETS at a folder that has it."
    )


def stratified_order(
    labels: Int[np.ndarray, " n"] | None, seed: int, size: int
) -> Int[np.ndarray, " n"]:
    """Order `size` examples so that every prefix holds each class in its share, within one.

    The k-th example (in a seeded order) of a class of N stands at (k + 1/2) / N, ties broken by
    chance: prefixes are nested by construction.  labels=None gives a plain permutation.
    """
    shuffled = np.random.default_rng([0x5711, seed]).permutation(size)
    if labels is None:
        return shuffled
    place = np.empty(size)
    for value in np.unique(labels):
        members = shuffled[labels[shuffled] == value]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return shuffled[np.argsort(place[shuffled], kind="stable")]


class Material(NamedTuple):
    """What a data set is made of; nothing is downloaded.

    held: the test part, as a share of the groups (stratified) or as the groups themselves.
    """

    features: dict[str, FeatureConnector]
    rows: Sequence[Row]
    held: float | set[Hashable] = 0.2


class Local(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Prepares any material as array_record, which reads at random without TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, name: str, material: Material, data_dir: Path):
        """Take the place of a class a data set, which tfds expects."""
        self.name, self._material = name, material
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(self._material.features)
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, _) -> dict[str, Iterator]:
        rows, held = self._material.rows, self._material.held
        test = held if isinstance(held, set) else choose_groups(rows, held)
        train = {group for group, _, _ in rows} - test
        return {"train": self._generate_examples(train), "test": self._generate_examples(test)}

    def _generate_examples(self, groups: set[Hashable]) -> Iterator:
        rows = self._material.rows
        return ((f"{i:07d}", row[2]) for i, row in enumerate(rows) if row[0] in groups)


def choose_groups(rows: Sequence[Row], share: float) -> set[Hashable]:
    """Choose groups, stratified, alike on every machine; several strata count as the first."""
    first = {group: stratum for group, stratum, _ in reversed(rows)}
    groups = sorted(first)
    strata = np.unique([first[group] for group in groups], return_inverse=True)[1]
    order = stratified_order(strata, seed=0, size=len(groups))
    return {groups[i] for i in order[: round(share * len(groups))]}


def _picture(side: int, channels: int) -> FeatureConnector:
    return tfds.features.Image(shape=(side, side, channels), encoding_format="png")


_CLOTHES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"


def fashion() -> Material:
    """Fashion-MNIST (Xiao et al. 2017): 60,000 + 10,000 grey images of clothes, official split."""
    rows: list[Row] = []
    for part in ("train", "t10k"):
        images, labels = _idx(f"{part}-images-idx3"), _idx(f"{part}-labels-idx1").tolist()
        rows += [
            (part, label, {"image": Image.fromarray(image), "label": label})
            for image, label in zip(images, labels, strict=True)
        ]
    names = ClassLabel(names=_CLOTHES.split(","))
    return Material({"image": _picture(28, 1), "label": names}, rows, held={"t10k"})


def _idx(file: str) -> UInt8[np.ndarray, "..."]:
    """Read a gzipped IDX file: two zeros, type, rank; big-endian sizes; bytes."""
    raw = gzip.decompress((find_asset("fashion") / f"{file}-ubyte.gz").read_bytes())
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def digits() -> Material:
    """The 1,797 handwritten digits of 8x8 that come with scikit-learn, scaled to 0..255."""
    bunch = load_digits()
    images = map(Image.fromarray, np.round(bunch.images * (255 / 16)).astype(np.uint8))
    pairs = enumerate(zip(images, bunch.target.tolist(), strict=True))
    rows = [(i, label, {"image": image, "label": label}) for i, (image, label) in pairs]
    return Material({"image": _picture(8, 1), "label": ClassLabel(num_classes=10)}, rows)


VENDORS = ("google", "twitter")


def emoji(vendor: str) -> Material:
    """The same emoji by two vendors, 64x64 on white: a shift with equal labels and splits."""
    root = find_asset("emoji")
    folders = {one: root / one / "package/img" / one / "64" for one in VENDORS}
    rows: list[Row] = []
    for listed in json.loads((root / "google/package/emoji.json").read_text()):
        file, category = listed["image"], listed["category"]
        by_both = all((folder / file).exists() for folder in folders.values())
        if category != "Component" and by_both:
            image = Image.fromarray(decode(folders[vendor] / file, f"emoji {file}"))
            record = {"image": image, "label": category, "key": Path(file).stem}
            # The file is the group, so that no emoji is in one vendor's train, the other's test.
            rows.append((file, category, record))
    names = sorted({category for _, category, _ in rows})
    features = {"image": _picture(64, 3), "label": ClassLabel(names=names), "key": Text()}
    return Material(features, rows)
