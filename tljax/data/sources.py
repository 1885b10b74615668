"""Where examples come from: prepared TFDS data, folders of images, files of rows."""

import csv
import difflib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int, Num
from PIL import Image

from tljax.data import builders_image, builders_text
from tljax.data.assets import find_asset, prepared_dir
from tljax.data.split import stratified_order
from tljax.data.transforms import to_array, to_rgb
from tljax.types import BadInput

__all__ = ["Info", "Source", "Splits", "Subset", "find_asset", "known_data", "open_data", "subset"]

Task = Literal["classify", "multilabel", "regress", "tag"]

BUILDERS: dict[str, tuple[type[builders_image.Local], str | None]] = {
    "digits": (builders_image.Digits, None),
    "fashion": (builders_image.Fashion, None),
    "emoji/google": (builders_image.Emoji, "google"),
    "emoji/twitter": (builders_image.Emoji, "twitter"),
    "sentiment/movies": (builders_text.Sentiment, "movies"),
    "sentiment/amazon": (builders_text.Sentiment, "amazon"),
    "sentiment/nyt": (builders_text.Sentiment, "nyt"),
    "sentiment/tweets": (builders_text.Sentiment, "tweets"),
    "spam": (builders_text.Spam, None),
    "wordnet": (builders_text.Wordnet, None),
    "pos": (builders_text.Pos, None),
    "plaintext": (builders_text.Plaintext, None),
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

    labels: Num[np.ndarray, "n *c"] | None = None

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
        """Look at the parent's examples at the indices."""
        self.parent, self.indices = parent, np.sort(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return self.parent.__getitems__([int(self.indices[i]) for i in indices])

    @cached_property
    def labels(self) -> Num[np.ndarray, "n *c"] | None:
        """Pick the parent's labels."""
        return None if self.parent.labels is None else self.parent.labels[self.indices]


class Prepared(Source):
    """One split of prepared TFDS data (array_record); `keys` maps our names to its features."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, keys: Mapping[str, str]):
        """Open the split; images are decoded here and not by TFDS, to name a corrupt one."""
        self._keys, self._features = keys, builder.info.features
        self._name = f"{builder.info.full_name} split {split!r}"
        skip = {keys["image"]: tfds.decode.SkipDecoding()} if "image" in keys else None
        try:
            self._data = builder.as_data_source(split=split, decoders=skip)
        except NotImplementedError as error:
            raise BadInput(
                f"{self._name} is stored as {builder.info.file_format}: expected array_record.\n"
                'Prepare it again with `file_format="array_record"`.'
            ) from error
        except ValueError as error:
            raise BadInput(
                f"{builder.info.full_name} has no split {split!r}: it has "
                f"{sorted(builder.info.splits)}"
            ) from error
        if "label" in keys:
            task, names = _task_of(self._features[keys["label"]], "image" in keys)
            self._info = Info("image" if "image" in keys else "text", task, names)

    def __len__(self) -> int:
        return len(self._data)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        records = self._data.__getitems__([int(i) for i in indices])
        return [self._example(i, record) for i, record in zip(indices, records, strict=True)]

    def _example(self, index: int, record: Mapping[str, Any]) -> dict[str, Any]:
        example = {}
        for ours, theirs in self._keys.items():
            value = record[theirs]
            if ours == "image":
                value = decode(value, f"image {index} of {self._name}")
            elif ours != "label":
                value = value.decode("utf8")
            elif self._info.task == "tag":
                value = np.asarray(value, np.int32)
            else:
                value = _label_row(value, self._info)
            example[ours] = value
        return example

    @cached_property
    def labels(self) -> Num[np.ndarray, "n *c"] | None:
        """Read all labels once."""
        if "label" not in self._keys or self._info.task == "tag":
            return None
        rows = []
        for start in range(0, len(self), 1000):
            chunk = self._data.__getitems__(list(range(start, min(start + 1000, len(self)))))
            rows += [_label_row(record[self._keys["label"]], self._info) for record in chunk]
        labels = np.asarray(rows)
        if self._info.task == "classify":
            bad = np.flatnonzero((labels < 0) | (labels >= len(self._info.names)))
            if len(bad):
                raise BadInput(
                    f"{self._name}: example {bad[0]} has label {labels[bad[0]]}, outside its "
                    f"{len(self._info.names)} classes (an unlabelled test part?); choose another"
                )
        return labels


def _task_of(feature: Any, image: bool) -> tuple[Task, tuple[str, ...] | None]:
    if isinstance(feature, tfds.features.Sequence):
        return "multilabel" if image else "tag", tuple(feature.feature.names)
    if isinstance(feature, tfds.features.ClassLabel):
        return "classify", tuple(feature.names)
    return "regress", None


def _label_row(value: Any, info: Info) -> np.ndarray | np.generic:
    """Bring one label to its dtype: int32 class, float32 number, float32 multi-hot row."""
    if info.task == "multilabel":
        row = np.zeros(len(info.names), np.float32)
        row[list(value)] = 1
        return row
    return np.float32(value) if info.task == "regress" else np.int32(value)


def decode(data: bytes | Path, name: str) -> np.ndarray:
    """Decode a picture to uint8 [h, w, 1 or 3].  Raises: BadInput that names a corrupt one."""
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as picture:
            plain = picture.mode in ("L", "RGB")
            if picture.mode == "1":
                picture = picture.convert("L")
            elif not plain:
                picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
            return to_rgb(to_array(picture)) if picture.mode == "RGBA" else to_array(picture)
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError on broken PNG chunks
        raise BadInput(f"{name} cannot be decoded: {error}\nReplace or remove it.") from error


class Rows(Source):
    """Examples in memory: rows of a file, or paths of pictures that are decoded when asked for."""

    def __init__(self, rows: Sequence[dict[str, Any]], labels: Num[np.ndarray, "n *c"] | None):
        """Hold rows of {"image": path} or {"text", "text_b"?} and a label for each."""
        self._rows, self.labels = rows, labels

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = dict(self._rows[index])
        if "image" in example:
            example["image"] = decode(example["image"], f"image {example['image']}")
        if self.labels is not None:
            example["label"] = self.labels[index]
        return example


def known_data() -> list[str]:
    """List the names that `open_data` builds by itself."""
    return sorted(BUILDERS)


def open_data(
    name: str,
    *,
    train: str = "train",
    validation: float | int | str = 0.1,
    test: str = "test",
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
) -> Splits:
    """Open a data set as three disjoint parts.

    name: one of `known_data()`, "tfds:NAME" (prepared data), or the path of a folder
    (train/<class>/*.png, <class>/*.png, train.csv) or of a .csv, .tsv or .jsonl file.
    validation: a share or a number of training examples, carved out stratified by `seed`; or a
    split.  Where no test part exists, a fifth is carved out that does not depend on `seed`, so
    that runs of different seeds share it.  columns: our names (text, text_b, label, image) ->
    theirs.  CSV labels with "|" are lists.
    Raises: BadInput.
    """
    columns = dict(columns or {})
    if name in BUILDERS or name.startswith("tfds:"):
        parts, info = _open_tfds(name, (train, validation, test), columns)
    elif Path(name).exists():
        parts, info = _open_path(Path(name), (train, validation, test), columns)
    else:
        near = difflib.get_close_matches(name, BUILDERS, n=4, cutoff=0.4) or known_data()
        raise BadInput(
            f"unknown data {name!r}: nearest are {', '.join(near)}.\n"
            "Expected one of these, tfds:NAME, or the path of a folder or a file."
        )
    rest = parts["train"]
    if parts["test"] is None:
        rest, parts["test"] = _carve(rest, 0.2, seed=0)
    if parts["validation"] is None:
        rest, parts["validation"] = _carve(rest, validation, seed)
    splits = Splits(rest, parts["validation"], parts["test"], info)
    for part, source in zip(splits._fields, splits[:3], strict=False):
        if len(source) == 0:
            raise BadInput(f"the {part} part of {name!r} is empty: give it at least one example")
    return splits


def subset(source: Source, size: int, seed: int) -> Subset:
    """Choose a label budget, stratified; a smaller budget of the same seed lies in a larger one."""
    if not 0 < size <= len(source):
        raise BadInput(f"a budget of {size} examples: expected 1 to the {len(source)} there are")
    return Subset(source, _order(source, seed)[:size])


def _order(source: Source, seed: int) -> Int[np.ndarray, " n"]:
    classes = source.labels
    if classes is not None and classes.dtype != np.int32:  # only classes make strata
        classes = None
    return stratified_order(classes, seed, len(source))


def _carve(source: Source, amount: float | int, seed: int) -> tuple[Subset, Subset]:
    count = round(amount * len(source)) if isinstance(amount, float) else amount
    order = _order(source, seed)
    return Subset(source, order[count:]), Subset(source, order[:count])


def _open_tfds(
    name: str, parts: tuple, columns: dict[str, str]
) -> tuple[dict[str, Source | None], Info]:
    cls, config = BUILDERS.get(name, (None, None))
    wanted = f"{name}:{cls.VERSION}" if cls else name.removeprefix("tfds:")
    try:
        builder = tfds.core.read_only_builder.builder_from_files(wanted, data_dir=prepared_dir())
    except tfds.core.DatasetNotFoundError as error:
        if cls is None:
            raise BadInput(
                f"no prepared TFDS data {wanted!r} under {prepared_dir()}.\n"
                "Prepare it there in the array_record format, or set $TFDS_DATA_DIR."
            ) from error
        builder = cls(data_dir=prepared_dir(), **({"config": config} if config else {}))
        builder.download_and_prepare()
    features = builder.info.features
    keys = _guess_keys(features) | columns
    _refuse_missing(name, keys.values(), features)
    task = names = None
    if "label" in keys:
        task, names = _task_of(features[keys["label"]], "image" in keys)
    train, validation, test = parts
    opened = {
        "train": Prepared(builder, train, keys),
        "validation": Prepared(builder, validation, keys) if isinstance(validation, str) else None,
        "test": Prepared(builder, test, keys),
    }
    return opened, Info("image" if "image" in keys else "text", task, names)


def _guess_keys(features: Mapping[str, Any]) -> dict[str, str]:
    """Name the image, else up to two texts, and the label among the features of a builder."""
    images = [key for key, value in features.items() if isinstance(value, tfds.features.Image)]
    texts = [key for key, value in features.items() if isinstance(value, tfds.features.Text)]
    keys = {"image": images[0]} if images else dict(zip(("text", "text_b"), texts, strict=False))
    classes = (tfds.features.ClassLabel, tfds.features.Sequence)
    labels = [key for key, value in features.items() if isinstance(value, classes)]
    if "label" in features:
        keys["label"] = "label"
    elif labels:
        keys["label"] = labels[0]
    return keys


def _refuse_missing(name: str, wanted: Sequence[str], present: Sequence[str]) -> None:
    missing = [key for key in wanted if key not in present]
    if missing:
        raise BadInput(
            f"{name} has no column {missing[0]!r}: it has {', '.join(present)}.\n"
            'Say which to use, for example columns={"text": "...", "label": "..."}.'
        )


def _open_path(
    path: Path, parts: tuple, columns: dict[str, str]
) -> tuple[dict[str, Source | None], Info]:
    """Open the files of each part; a part that is not there stays None, for carving."""
    train, validation, test = parts
    wanted = {"train": train, "validation": validation, "test": test}
    if path.is_file():
        places = {"train": path}
    else:
        files = {part: [path / f"{name}{end}" for end in TABLES] for part, name in wanted.items()}
        tables = {p: f for p, found in files.items() for f in found if f.is_file()}
        folders = {p: path / f"{name}" for p, name in wanted.items() if (path / f"{name}").is_dir()}
        places = tables or folders or {"train": path}
    if "train" not in places or ("validation" not in places and isinstance(validation, str)):
        raise BadInput(
            f"{path} lacks one of {wanted}: it has {sorted(p.name for p in path.iterdir())}"
        )
    read = _read_table if places["train"].is_file() else _read_folder
    tables = {part: read(place, columns) for part, place in places.items()}
    info = _read_info(*tables["train"])
    opened: dict[str, Source | None] = dict.fromkeys(wanted)
    for part, (rows, values) in tables.items():
        opened[part] = Rows(rows, _to_labels(values, info, places[part]))
    return opened, info


def _read_folder(path: Path, _: dict[str, str]) -> tuple[list[dict], list[str]]:
    files = sorted(f for f in path.glob("*/*") if f.suffix.lower() in PICTURES)
    if not files:
        raise BadInput(
            f"no images in {path}: expected <class>/*{{{','.join(PICTURES)}}}, "
            "with or without train/ and test/ above the classes"
        )
    return [{"image": file} for file in files], [file.parent.name for file in files]


def _read_table(path: Path, columns: dict[str, str]) -> tuple[list[dict], list | None]:
    """Read rows of {"text", "text_b"?} and the values of the label column, None without one."""
    with path.open(encoding="utf8", newline="") as stream:
        if path.suffix == ".jsonl":
            table = [json.loads(line) for line in stream if line.strip()]
        else:
            table = list(csv.DictReader(stream, delimiter="\t" if path.suffix == ".tsv" else ","))
    if not table:
        raise BadInput(f"{path} has no rows")
    optional = {key: key for key in ("text_b", "label") if key in table[0]}
    keys = {"text": "text"} | optional | columns
    for row in table:
        _refuse_missing(str(path), keys.values(), row)
    values = [row[keys["label"]] for row in table] if "label" in keys else None
    if values and any(isinstance(value, str) and "|" in value for value in values):
        values = [[part for part in value.split("|") if part] for value in values]
    texts = [{ours: row[keys[ours]] for ours in keys if ours != "label"} for row in table]
    return texts, values


def _read_info(rows: list[dict], values: list | None) -> Info:
    """Infer the task from the training labels: lists, numbers with fractions, or classes."""
    kind = "image" if rows and "image" in rows[0] else "text"
    if values is None:
        return Info(kind)
    if any(isinstance(value, list) for value in values):
        return Info(kind, "multilabel", tuple(sorted({str(v) for value in values for v in value})))
    names = sorted({str(value) for value in values})
    try:
        numbers = [float(name) for name in names]
    except ValueError:
        return Info(kind, "classify", tuple(names))
    if kind == "text" and any("." in name or "e" in name for name in names):
        return Info(kind, "regress")
    return Info(kind, "classify", tuple(n for _, n in sorted(zip(numbers, names, strict=True))))


def _to_labels(values: list | None, info: Info, place: Path) -> Num[np.ndarray, "n *c"] | None:
    if values is None or info.task is None:
        return None
    if info.task == "regress":
        return np.asarray(values, np.float32)
    index = {name: i for i, name in enumerate(info.names)}
    listed = [value if isinstance(value, list) else [value] for value in values]
    for row, value in enumerate(listed):
        for name in value:
            if str(name) not in index:
                raise BadInput(
                    f"{place}, example {row}: label {name!r} is outside the classes of the "
                    f"training part: {', '.join(info.names[:12])}"
                )
    rows = [
        _label_row([index[str(v)] for v in value], info)
        if info.task == "multilabel"
        else np.int32(index[str(value[0])])
        for value in listed
    ]
    return np.asarray(rows)
