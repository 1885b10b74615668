"""Where examples come from: prepared TFDS data, folders of images, files of rows."""

import csv
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int, Num
from PIL import Image
from tensorflow_datasets.core.features import ClassLabel, Text

from tljax.data import builders_image, builders_text
from tljax.data.builders_image import find_asset, stratified_order
from tljax.data.transforms import to_array
from tljax.tree import nearest
from tljax.types import BadInput

__all__ = ["BUILDERS", "Info", "Rows", "Source", "Splits", "find_asset", "open_data", "subset"]

Task = Literal["classify", "multilabel", "regress", "tag"]
Labels = Num[np.ndarray, "n *c"]

BUILDERS: dict[str, type[builders_image.Local]] = {
    "digits": builders_image.Digits,
    "fashion": builders_image.Fashion,
    **dict.fromkeys(("emoji/google", "emoji/twitter"), builders_image.Emoji),
    **{
        f"sentiment/{c.name}": builders_text.Sentiment
        for c in builders_text.Sentiment.BUILDER_CONFIGS
    },
    "spam": builders_text.Spam,
    "wordnet": builders_text.Wordnet,
    "pos": builders_text.Pos,
    "plaintext": builders_text.Plaintext,
}
TABLES = (".csv", ".tsv", ".jsonl")
PICTURES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Info:
    """What a data set holds; task and names are None without labels, names also for numbers."""

    kind: Literal["image", "text"]
    task: Task | None = None
    names: tuple[str, ...] | None = None

    @property
    def num_outputs(self) -> int | None:
        """Count a model's outputs: one a class, one for a number, None without labels."""
        return 1 if self.task == "regress" else len(self.names) if self.names else None


class Source:
    """Examples by index: {"image": uint8 [h, w, 1 or 3]} or {"text", "text_b"?}, and "label".

    labels holds one row an example, read without decoding images: int32 [n] classes, float32 [n]
    numbers, float32 [n, c] multi-hot; None when there are none, or one a word.
    """

    labels: Labels | None = None

    def __len__(self) -> int:
        """Count the examples."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read one example."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Read several examples, which some files do much faster than one by one."""
        return [self[int(i)] for i in indices]


class Splits(NamedTuple):
    """Three disjoint parts of a data set."""

    train: Source
    validation: Source
    test: Source
    info: Info


class Subset(Source):
    """Some examples of another source."""

    def __init__(self, parent: Source, indices: Int[np.ndarray, " n"]):
        """Look at the parent's examples at the indices, in the parent's order."""
        self.parent, self.indices = parent, np.sort(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return self.parent.__getitems__([int(self.indices[i]) for i in indices])

    @cached_property
    def labels(self) -> Labels | None:  # type: ignore[override]
        """Pick the parent's labels."""
        return None if self.parent.labels is None else self.parent.labels[self.indices]


class Prepared(Source):
    """One split of prepared TFDS data (array_record); `keys` maps our names to its features."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, keys: dict, info: Info):
        """Open the split; images are decoded here and not by TFDS, to name a corrupt one."""
        self._keys, self._info = keys, info
        self._name = f"{builder.info.full_name} split {split!r}"
        skip = {keys["image"]: tfds.decode.SkipDecoding()} if "image" in keys else None
        try:
            self._data = builder.as_data_source(split=split, decoders=skip)
        except (NotImplementedError, ValueError) as error:
            raise BadInput(
                f"{self._name} cannot be read: it has {sorted(builder.info.splits)}, stored as "
                f"{builder.info.file_format.value}; expected one, not empty, as array_record"
            ) from error

    def __len__(self) -> int:
        return len(self._data)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        records = self._data.__getitems__([int(i) for i in indices])
        return [self._example(i, record) for i, record in zip(indices, records, strict=True)]

    def _example(self, index: int, record: Mapping[str, Any]) -> dict[str, Any]:
        values = {ours: record[theirs] for ours, theirs in self._keys.items()}
        for ours in values.keys() & {"text", "text_b"}:
            values[ours] = values[ours].decode("utf8")
        if "image" in values:
            values["image"] = decode(values["image"], f"image {index} of {self._name}")
        if "label" in values:
            values["label"] = label_row(values["label"], self._info)
        return values

    @cached_property
    def labels(self) -> Labels | None:  # type: ignore[override]
        """Read all labels once."""
        if self._info.task in (None, "tag"):
            return None
        values, key = [], self._keys["label"]
        for start in range(0, len(self), 1000):
            part = range(start, min(start + 1000, len(self)))
            values += [record[key] for record in self._data.__getitems__(list(part))]
        labels = np.asarray([label_row(value, self._info) for value in values])
        if self._info.task == "classify" and (labels.min() < 0):
            raise BadInput(
                f"{self._name}: example {labels.argmin()} has label {labels.min()}, outside its "
                f"{len(self._info.names)} classes (an unlabelled test part?); choose another split"
            )
        return labels


def label_row(value: Any, info: Info) -> np.ndarray | np.generic:
    """Bring a label to its dtype: int32 class(es), float32 number, float32 multi-hot row."""
    if info.task == "multilabel":
        return np.isin(np.arange(len(info.names)), value).astype(np.float32)
    return np.asarray(value, np.float32 if info.task == "regress" else np.int32)[()]


def decode(data: bytes | Path, name: str) -> np.ndarray:
    """Decode a picture to uint8 [h, w, 1 or 3], transparency on white.

    Raises: BadInput that names a corrupt one.
    """
    with _opened(data, name) as picture:
        if picture.has_transparency_data:
            page = Image.new("RGBA", picture.size, "white")
            page.alpha_composite(picture.convert("RGBA"))
            return to_array(page.convert("RGB"))
        return to_array(picture.convert("L" if picture.mode in ("1", "L") else "RGB"))


@contextmanager
def _opened(data: bytes | Path, name: str) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as picture:
            yield picture
    # Pillow raises SyntaxError on broken PNG chunks, and ValueError on some broken compression.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(f"{name} cannot be decoded: {error}\nReplace or remove it.") from error


class Rows(Source):
    """Rows in memory of {"image": path, decoded when asked for} or {"text", "text_b"?}."""

    def __init__(self, rows: Sequence[dict[str, Any]], labels: Labels | None):
        """Hold rows and a label for each."""
        self._rows, self.labels = rows, labels

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = dict(self._rows[index])
        if "image" in example:
            example["image"] = decode(example["image"], f"image {example['image']}")
        return example if self.labels is None else example | {"label": self.labels[index]}


def open_data(
    name: str,
    *,
    validation: float | int = 0.1,
    test: str = "test",
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
) -> Splits:
    """Open a data set as three disjoint parts.

    name: one of `BUILDERS`, "tfds:NAME" (prepared data), or the path of a folder
    (train/<class>/*.png, <class>/*.png, train.csv) or of a .csv, .tsv or .jsonl file.
    validation: a share or a number of training examples, carved out stratified by `seed`.
    Where no test part exists, a fifth is carved out that does not depend on `seed`, so
    that runs of different seeds share it.  columns: our names (text, text_b, label, image) ->
    theirs.  CSV labels with "|" are lists.
    Raises: BadInput.
    """
    if strange := sorted(set(columns or {}) - {"text", "text_b", "label", "image"}):
        raise BadInput(f"columns has no {strange[0]!r}: expected text, text_b, label or image")
    asked = {"train": "train", "test": test}
    if name in BUILDERS or name.startswith("tfds:"):
        parts, info = _open_tfds(name, asked, dict(columns or {}))
    elif Path(name).exists():
        parts, info = _open_path(Path(name), asked, dict(columns or {}))
    else:
        raise BadInput(
            f"unknown data {name!r}: nearest are {nearest(name, BUILDERS, 4)}.\n"
            "Expected one of these, tfds:NAME, or the path of a folder or a file."
        )
    if "test" not in parts:
        parts["train"], parts["test"] = _carve(parts["train"], 0.2, seed=0)
    parts["train"], parts["validation"] = _carve(parts["train"], validation, seed)
    for part, source in parts.items():
        if len(source) == 0:
            raise BadInput(f"the {part} part of {name!r} is empty: give it at least one example")
    return Splits(**parts, info=info)


def subset(source: Source, size: int, seed: int) -> Subset:
    """Choose a label budget, stratified; a smaller budget of the same seed lies in a larger one."""
    if not 0 < size <= len(source):
        raise BadInput(f"a budget of {size} examples: expected 1 to the {len(source)} there are")
    return Subset(source, _order(source, seed)[:size])


def _order(source: Source, seed: int) -> Int[np.ndarray, " n"]:
    labels = source.labels
    strata = labels if labels is not None and labels.dtype == np.int32 else None
    return stratified_order(strata, seed, len(source))


def _carve(source: Source, amount: float | int, seed: int) -> tuple[Subset, Subset]:
    count = round(amount * len(source)) if isinstance(amount, float) else amount
    order = _order(source, seed)
    return Subset(source, order[count:]), Subset(source, order[:count])


def _open_tfds(
    name: str, asked: dict[str, str], columns: dict[str, str]
) -> tuple[dict[str, Source], Info]:
    cls = BUILDERS.get(name)
    wanted = f"{name}:{cls.VERSION}" if cls else name.removeprefix("tfds:")
    chosen = os.environ.get("TFDS_DATA_DIR") or os.environ.get("TLJAX_DATA")
    folder = Path(chosen) if chosen else Path.home() / ".cache" / "tljax" / "tfds"
    try:
        builder = tfds.core.read_only_builder.builder_from_files(wanted, data_dir=folder)
    except tfds.core.DatasetNotFoundError as error:
        if cls is None:
            raise BadInput(
                f"no prepared TFDS data {wanted!r} under {folder}.\n"
                "Prepare it there in the array_record format, or set $TFDS_DATA_DIR."
            ) from error
        builder = cls(data_dir=folder, config=name.partition("/")[2] or None)
        if not sys.stderr.isatty():
            tfds.disable_progress_bar()
        builder.download_and_prepare()
    features = builder.info.features
    keys = _guess_keys(features) | columns
    _refuse_missing(name, keys, features)
    info = Info("image" if "image" in keys else "text", *_read_task(features, keys))
    return {part: Prepared(builder, split, keys, info) for part, split in asked.items()}, info


def _guess_keys(features: Mapping[str, Any]) -> dict[str, str]:
    """Name the image, else up to two texts, and the label among the features of a builder."""
    images = [key for key, value in features.items() if isinstance(value, tfds.features.Image)]
    texts = [key for key, value in features.items() if isinstance(value, Text)]
    keys = {"image": images[0]} if images else dict(zip(("text", "text_b"), texts, strict=False))
    classes = [key for key, value in features.items() if isinstance(value, ClassLabel)]
    labels = ["label"] if "label" in features else classes
    return keys | dict(zip(("label",), labels, strict=False))


def _read_task(
    features: Mapping[str, Any], keys: dict[str, str]
) -> tuple[Task | None, tuple[str, ...] | None]:
    feature = features[keys["label"]] if "label" in keys else None
    if isinstance(feature, ClassLabel):
        return "classify", tuple(feature.names)
    if isinstance(feature, tfds.features.Sequence):
        return "multilabel" if "image" in keys else "tag", tuple(feature.feature.names)
    return "regress" if feature else None, None


def _refuse_missing(name: str, keys: dict[str, str], present: Mapping[str, Any]) -> None:
    for key in keys.values():
        if key not in present:
            raise BadInput(
                f"{name} has no column {key!r}: it has {', '.join(present)}.\n"
                'Say which to use, for example columns={"text": "...", "label": "..."}.'
            )


def _open_path(
    path: Path, asked: dict[str, str], columns: dict[str, str]
) -> tuple[dict[str, Source], Info]:
    """Open the files of each part; a test part that is not there is left out, for carving."""
    places = {"train": path}
    if path.is_dir():
        found = {
            part: place
            for end in ("", *TABLES)
            for part, split in asked.items()
            if (place := path / f"{split}{end}").exists()
        }
        places = found or places
    may_lack = {"test"} if asked["test"] == "test" else set()  # else a slip would go unnoticed
    for part in asked.keys() - may_lack - places.keys():
        raise BadInput(f"{path} lacks its {part} part {asked[part]!r}, or names it otherwise")
    tables = {
        part: read_table(place, columns) if place.is_file() else _read_folder(place)
        for part, place in places.items()
    }
    info = _read_info(*tables["train"])
    return {
        part: Rows(rows, _to_labels(values, info, places[part]))
        for part, (rows, values) in tables.items()
    }, info


def _read_folder(path: Path) -> tuple[list[dict], list[str]]:
    files = sorted(file for file in path.glob("*/*") if file.suffix.lower() in PICTURES)
    if not files:
        raise BadInput(
            f"no images in {path}: expected <class>/*{{{','.join(PICTURES)}}}, "
            "with or without train/ and test/ above the classes"
        )
    for file in files:  # the header alone, which is cheap: what is no picture is named at once
        with _opened(file, f"image {file}"):
            pass
    return [{"image": file} for file in files], [file.parent.name for file in files]


def _parse_table(path: Path) -> list[dict]:
    with path.open(encoding="utf8", newline="") as stream:
        if path.suffix != ".jsonl":
            return list(csv.DictReader(stream, delimiter="\t" if path.suffix == ".tsv" else ","))
        rows = [json.loads(line) for line in stream if line.strip()]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise BadInput(f"{path}, row {number} is {row!r}: expected an object of columns")
    return rows


def read_table(path: Path, columns: Mapping[str, str]) -> tuple[list[dict], list | None]:
    """Read rows of {"text", "text_b"?} and the values of the label column, None without one."""
    try:
        table = _parse_table(path)
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise BadInput(f"{path} is no {path.suffix} table in UTF-8: {error}") from None
    if not table:
        raise BadInput(f"{path} has no rows")
    keys = {key: key for key in ("text", "text_b", "label") if key == "text" or key in table[0]}
    keys |= columns
    for number, row in enumerate(table, 1):
        _refuse_missing(str(path), keys, row)
        for our, key in keys.items():
            if row[key] is None or (our != "label" and not isinstance(row[key], str)):
                raise BadInput(f"{path}, row {number}: column {key!r} holds {row[key]!r}, no {our}")
    values = [row[keys["label"]] for row in table] if "label" in keys else None
    if values and any(isinstance(value, str) and "|" in value for value in values):
        values = [[part for part in value.split("|") if part] for value in values]
    return [{our: row[key] for our, key in keys.items() if our != "label"} for row in table], values


def _read_info(rows: list[dict], values: list | None) -> Info:
    """Infer the task from the training labels: lists, numbers with fractions, or classes."""
    kind: Literal["image", "text"] = "image" if "image" in rows[0] else "text"
    if values is None:
        return Info(kind)
    if any(isinstance(value, list) for value in values):
        return Info(kind, "multilabel", tuple(sorted({str(v) for value in values for v in value})))
    names = sorted({str(value) for value in values})
    try:
        names.sort(key=float)
    except ValueError:  # not all are numbers
        return Info(kind, "classify", tuple(names))
    fractions = kind == "text" and not all(name.lstrip("+-").isdigit() for name in names)
    return Info(kind, "regress") if fractions else Info(kind, "classify", tuple(names))


def _to_number(value: Any, place: Path, index: int) -> np.float32:
    with suppress(TypeError, ValueError):
        if np.isfinite(number := np.float32(value)):
            return number
    raise BadInput(f"{place}, example {index}: label {value!r} is not a finite number")


def _to_labels(values: list | None, info: Info, place: Path) -> Labels | None:
    if values is None or info.task is None:
        return None
    if info.task == "regress":
        return np.asarray([_to_number(value, place, i) for i, value in enumerate(values)])
    index = {name: i for i, name in enumerate(info.names)}
    rows = []
    for i, value in enumerate(values):
        listed = [str(v) for v in value] if isinstance(value, list) else [str(value)]
        for label in listed:
            if label not in index:
                raise BadInput(
                    f"{place}, example {i}: label {label!r} is outside the classes of the "
                    f"training part: {', '.join(info.names[:12])}"
                )
        found = [index[label] for label in listed]
        rows.append(label_row(found if info.task == "multilabel" else found[0], info))
    return np.asarray(rows)
