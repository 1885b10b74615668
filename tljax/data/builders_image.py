"""Image data sets as TFDS builders: array_record files of PNG bytes, no TensorFlow."""

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image
from sklearn.datasets import load_digits

from tljax.data.assets import find_asset
from tljax.data.split import hold_out

Examples = Iterator[tuple[str, dict]]


class Local(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A builder whose raw material is an installed package: nothing is downloaded."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, **kwargs):
        """Write array_record, the format that reads at random without TensorFlow."""
        super().__init__(file_format="array_record", **kwargs)

    def describe(self, about: str, /, **features) -> tfds.core.DatasetInfo:
        """Give the info of a builder from its features."""
        features = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, description=about, features=features)


def png(pixels: UInt8[np.ndarray, "h w *c"]) -> bytes:
    """Encode an image as PNG."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="png", compress_level=1)
    return stream.getvalue()


def read_idx(path: Path) -> UInt8[np.ndarray, "..."]:
    """Read a gzipped IDX file of bytes.

    Source: the MNIST file format (magic: two zeros, type, rank; big-endian sizes).
    """
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


class Fashion(Local, skip_registration=True):
    """Fashion-MNIST with its official split."""

    NAMES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")

    def _info(self) -> tfds.core.DatasetInfo:
        return self.describe(
            "Fashion-MNIST: 60,000 + 10,000 grey images of clothes, 28x28 (Xiao et al. 2017).",
            image=tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
            label=tfds.features.ClassLabel(names=self.NAMES),
        )

    def _split_generators(self, _) -> dict[str, Examples]:
        return {"train": self._generate_examples("train"), "test": self._generate_examples("t10k")}

    def _generate_examples(self, part: str) -> Examples:
        root = find_asset("fashion")
        images = read_idx(root / f"{part}-images-idx3-ubyte.gz")
        labels = read_idx(root / f"{part}-labels-idx1-ubyte.gz")
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield f"{i:06d}", {"image": png(image), "label": int(label)}


class Digits(Local, skip_registration=True):
    """The 8x8 digits that come with scikit-learn, 4 in 5 for training."""

    def _info(self) -> tfds.core.DatasetInfo:
        return self.describe(
            "1,797 handwritten digits of 8x8, grey levels scaled to 0..255.",
            image=tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
            label=tfds.features.ClassLabel(names=[str(i) for i in range(10)]),
        )

    def _split_generators(self, _) -> dict[str, Examples]:
        held = hold_out(range(1797), load_digits().target.tolist(), 0.2)
        return {
            "train": self._generate_examples(set(range(1797)) - held),
            "test": self._generate_examples(held),
        }

    def _generate_examples(self, members: set[int]) -> Examples:
        digits = load_digits()
        pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
        for i in sorted(members):
            yield f"{i:06d}", {"image": png(pixels[i]), "label": int(digits.target[i])}


class Emoji(Local, skip_registration=True):
    """The same emoji drawn by two vendors: a domain shift with equal labels and equal splits."""

    VENDORS = ("google", "twitter")
    BUILDER_CONFIGS = [  # noqa: RUF012  (TFDS wants a list)
        tfds.core.BuilderConfig(name="google", version="1.0.0", description="Noto"),
        tfds.core.BuilderConfig(name="twitter", version="1.0.0", description="Twemoji"),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        names = sorted({category for _, category in self._drawn_by_both()})
        return self.describe(
            "Emoji of 9 categories, 64x64 on white.  `key` names the emoji in either vendor's set.",
            image=tfds.features.Image(shape=(64, 64, 3), encoding_format="png"),
            label=tfds.features.ClassLabel(names=names),
            key=tfds.features.Text(),
        )

    def _drawn_by_both(self) -> list[tuple[str, str]]:
        listed = json.loads((find_asset("emoji") / "google/package/emoji.json").read_text())
        return [
            (emoji["image"], emoji["category"])
            for emoji in listed
            if emoji["category"] != "Component"
            and all(self._file(vendor, emoji["image"]).exists() for vendor in self.VENDORS)
        ]

    def _file(self, vendor: str, image: str) -> Path:
        return find_asset("emoji") / vendor / "package/img" / vendor / "64" / image

    def _split_generators(self, _) -> dict[str, Examples]:
        rows = self._drawn_by_both()
        names = sorted({category for _, category in rows})
        # The keys alone decide, so that no emoji is in one vendor's train and the other's test.
        held = hold_out([key for key, _ in rows], [names.index(c) for _, c in rows], 0.2)
        return {
            "train": self._generate_examples([row for row in rows if row[0] not in held]),
            "test": self._generate_examples([row for row in rows if row[0] in held]),
        }

    def _generate_examples(self, rows: list[tuple[str, str]]) -> Examples:
        for key, category in rows:
            drawing = Image.open(self._file(self.builder_config.name, key)).convert("RGBA")
            page = Image.new("RGBA", (64, 64), "white")
            page.alpha_composite(drawing.resize((64, 64), Image.Resampling.BICUBIC))
            pixels = np.asarray(page.convert("RGB"))
            yield key, {"image": png(pixels), "label": category, "key": Path(key).stem}
