"""Image data sets as TFDS builders: array_record files of PNG bytes, no TensorFlow."""

import gzip
import io
import json
import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int, UInt8
from PIL import Image
from sklearn.datasets import load_digits
from tensorflow_datasets.core.features import ClassLabel, FeatureConnector, Text

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


class Local(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A builder whose raw material is an installed package: nothing is downloaded."""

    VERSION = tfds.core.Version("1.0.0")
    HELD = 0.2

    def __init__(self, **kwargs):
        """Write array_record, the format that reads at random without TensorFlow."""
        super().__init__(file_format="array_record", **kwargs)

    def _features(self) -> dict[str, FeatureConnector]:
        raise NotImplementedError

    def _rows(self) -> Iterable[Row]:
        raise NotImplementedError

    def _test_groups(self, rows: Sequence[Row]) -> set[Hashable]:
        """Choose groups, stratified, alike on every machine; several strata count as the first."""
        first = {group: stratum for group, stratum, _ in reversed(rows)}
        groups = sorted(first)
        strata = np.unique([first[group] for group in groups], return_inverse=True)[1]
        order = stratified_order(strata, seed=0, size=len(groups))
        return {groups[i] for i in order[: round(self.HELD * len(groups))]}

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(self._features())
        return tfds.core.DatasetInfo(builder=self, description=self.__doc__, features=features)

    def _split_generators(self, _) -> dict[str, Iterator]:
        rows = list(self._rows())
        held = self._test_groups(rows)
        return {
            "train": self._generate_examples(rows, {group for group, _, _ in rows} - held),
            "test": self._generate_examples(rows, held),
        }

    def _generate_examples(self, rows: Sequence[Row], groups: set[Hashable]) -> Iterator:
        return ((f"{i:07d}", row[2]) for i, row in enumerate(rows) if row[0] in groups)


def png(pixels: UInt8[np.ndarray, "h w *c"]) -> bytes:
    """Encode an image as PNG."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="png", compress_level=1)
    return stream.getvalue()


def _picture(side: int, channels: int) -> FeatureConnector:
    return tfds.features.Image(shape=(side, side, channels), encoding_format="png")


class Fashion(Local, skip_registration=True):
    """Fashion-MNIST (Xiao et al. 2017): 60,000 + 10,000 grey images of clothes, official split."""

    NAMES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"

    def _features(self) -> dict[str, FeatureConnector]:
        return {"image": _picture(28, 1), "label": ClassLabel(names=self.NAMES.split(","))}

    def _rows(self) -> Iterator[Row]:
        for part in ("train", "t10k"):
            images, labels = self._idx(f"{part}-images-idx3"), self._idx(f"{part}-labels-idx1")
            for image, label in zip(images, labels, strict=True):
                yield part, int(label), {"image": png(image), "label": int(label)}

    def _test_groups(self, rows: Sequence[Row]) -> set[Hashable]:
        return {"t10k"}

    def _idx(self, file: str) -> UInt8[np.ndarray, "..."]:
        """Read a gzipped IDX file: two zeros, type, rank; big-endian sizes; bytes."""
        raw = gzip.decompress((find_asset("fashion") / f"{file}-ubyte.gz").read_bytes())
        shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


class Digits(Local, skip_registration=True):
    """The 1,797 handwritten digits of 8x8 that come with scikit-learn, scaled to 0..255."""

    def _features(self) -> dict[str, FeatureConnector]:
        return {"image": _picture(8, 1), "label": ClassLabel(num_classes=10)}

    def _rows(self) -> Iterator[Row]:
        digits = load_digits()
        pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
        for i, label in enumerate(digits.target.tolist()):
            yield i, label, {"image": png(pixels[i]), "label": label}


class Emoji(Local, skip_registration=True):
    """The same emoji by two vendors, 64x64 on white: a shift with equal labels and splits."""

    BUILDER_CONFIGS = tuple(
        tfds.core.BuilderConfig(name=vendor, version="1.0.0") for vendor in ("google", "twitter")
    )

    def _features(self) -> dict[str, FeatureConnector]:
        names = sorted({category for _, category in self._drawn_by_both()})
        return {"image": _picture(64, 3), "label": ClassLabel(names=names), "key": Text()}

    def _drawn_by_both(self) -> list[tuple[str, str]]:
        listed = json.loads((find_asset("emoji") / "google/package/emoji.json").read_text())
        pairs = [(emoji["image"], emoji["category"]) for emoji in listed]
        vendors = [config.name for config in self.BUILDER_CONFIGS]
        return [
            (image, category)
            for image, category in pairs
            if category != "Component" and all(self._file(v, image).exists() for v in vendors)
        ]

    def _file(self, vendor: str, image: str) -> Path:
        return find_asset("emoji") / vendor / "package/img" / vendor / "64" / image

    def _rows(self) -> Iterator[Row]:
        # The file name is the group, so that no emoji is in one vendor's train, the other's test.
        for image, category in self._drawn_by_both():
            drawing = Image.open(self._file(self.builder_config.name, image)).convert("RGBA")
            page = Image.new("RGBA", (64, 64), "white")
            page.alpha_composite(drawing.resize((64, 64), Image.Resampling.BICUBIC))
            record = {"image": png(np.asarray(page.convert("RGB"))), "label": category}
            yield image, category, record | {"key": Path(image).stem}
