"""Where examples come from: prepared TFDS data, folders of images, files of rows."""

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int, Num
from tensorflow_datasets.core.features import ClassLabel, Text

from tljax.config import Data
from tljax.data import builders_image, builders_text
from tljax.data.builders_image import Local, Material, stratified_order
from tljax.data.corrupt import Allowance
from tljax.data.tables import (
    TABLES,
    first_few,
    listed,
    read_labels,
    read_table,
    refuse_missing,
    short,
)
from tljax.data.transforms import decode, opened
from tljax.tree import nearest
from tljax.types import BadInput

Kind = Literal["image", "text"]
Task = Literal["classify", "multilabel", "regress", "tag"]
Labels = Num[np.ndarray, "n *c"]

BUILDERS: dict[str, Callable[[], Material]] = {
    "digits": builders_image.digits,
    "fashion": builders_image.fashion,
    **{f"emoji/{name}": partial(builders_image.emoji, name) for name in builders_image.VENDORS},
    **{f"sentiment/{n}": partial(builders_text.sentiment, n) for n in builders_text.DOMAINS},
    "spam": builders_text.spam,
    "wordnet": builders_text.wordnet,
    "pos": builders_text.pos,
    "plaintext": builders_text.plaintext,
}
PICTURES = (".png", ".jpg", ".jpeg")
WHOLE = 5000  # a folder of up to so many pictures is decoded once to find a damaged one


@dataclass(frozen=True)
class Info:
    """What a data set holds; task and names are None without labels, names also for numbers."""

    kind: Kind
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

    def stack(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Read several examples as one batch."""
        return stacked(self.__getitems__(indices))


def stacked(rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Make one batch of examples."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


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


@dataclass(frozen=True)
class Renamed(Source):
    """A source of classes whose label i is our label `to[i]`."""

    parent: Source
    to: Int[np.ndarray, " c"]

    def __len__(self) -> int:
        return len(self.parent)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        rows = self.parent.__getitems__(indices)
        return [row | {"label": self.to[row["label"]]} for row in rows]


@dataclass(frozen=True)
class Joined(Source):
    """The examples of one source, then those of another."""

    first: Source
    second: Source

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, index: int) -> dict[str, Any]:
        own = len(self.first)
        return self.first[index] if index < own else self.second[index - own]


def thousands(indices: np.ndarray) -> list[np.ndarray]:
    """Cut indices into parts that are read at once."""
    return [indices[start : start + 1000] for start in range(0, len(indices), 1000)]


class Prepared(Source):
    """One split of prepared TFDS data (array_record); `keys` maps our names to its features."""

    def __init__(
        self, builder: tfds.core.DatasetBuilder, split: str, keys: dict, info: Info, most: int = 0
    ):
        """Open the split; images are decoded here and not by TFDS, to name a corrupt one.

        most: records that may be corrupt; all are read at once then, to leave those out.
        """
        self._keys, self._info = keys, info
        self._name = f"{builder.info.full_name} split {split!r}"
        self._builder, self._split = builder, split
        skip = {keys["image"]: tfds.decode.SkipDecoding()} if "image" in keys else None
        try:
            self._data = builder.as_data_source(split=split, decoders=skip)
        except (NotImplementedError, ValueError) as error:
            raise BadInput(
                f"{self._name} cannot be read: it has {sorted(builder.info.splits)}, stored as "
                f"{builder.info.file_format.value}; expected one, not empty, as array_record"
            ) from error
        self._at = np.arange(len(self._data))
        if most:
            parts, allowance = thousands(self._at), Allowance(most)
            kept = [place for part in parts for place in self._readable(part, allowance)]
            self._at = np.asarray(kept, int)

    def __len__(self) -> int:
        return len(self._at)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        at = self._at[np.asarray(indices, int)]
        return [self._example(i, x) for i, x in zip(at.tolist(), self._records(at), strict=True)]

    def _records(self, at: np.ndarray) -> list[Mapping[str, Any]]:
        """Read what is stored; raises BadInput that names a record that cannot be read."""
        try:
            return self._data.__getitems__(at.tolist())
        except (MemoryError, PermissionError):
            raise
        except Exception as error:  # TFDS and array_record raise many kinds
            if len(at) > 1:
                return [record for i in range(len(at)) for record in self._records(at[i : i + 1])]
            raise BadInput(self._unreadable(int(at[0]), error)) from error

    def _unreadable(self, index: int, error: Exception) -> str:
        """Say which record of which file it is."""
        place = index
        for shard in self._builder.info.splits[self._split].file_instructions:
            if place < shard.take:
                break
            place -= shard.take
        return (
            f"example {index} of {self._name}, record {shard.skip + place} of {shard.filename}, "
            f"cannot be read: {str(error).partition(chr(10))[0][:200] or type(error).__name__}\n"
            f"Remove {self._builder.data_path} to have it prepared again."
        )

    def _example(self, index: int, record: Mapping[str, Any]) -> dict[str, Any]:
        values = {ours: record[theirs] for ours, theirs in self._keys.items()}
        for ours in values.keys() & {"text", "text_b"}:
            try:
                values[ours] = values[ours].decode("utf8")
            except UnicodeDecodeError as error:
                raise BadInput(self._unreadable(index, error)) from error
        if "image" in values:
            values["image"] = decode(values["image"], f"image {index} of {self._name}")
        if "label" in values:
            values["label"] = label_row(values["label"], self._info)
        if self._info.task == "tag":
            _refuse_uneven(values["text"], values["label"], f"{self._name}, example {index}")
        return values

    def _readable(self, part: np.ndarray, allowance: Allowance) -> list[int]:
        """Choose the records that can be read, if some may be corrupt; pictures stay packed."""
        try:
            self._records(part)
        except BadInput as error:
            if len(part) > 1:
                return [
                    place for at in part for place in self._readable(np.asarray([at]), allowance)
                ]
            allowance.leave_out((self._split, int(part[0])), error)
            return []
        return part.tolist()

    @cached_property
    def labels(self) -> Labels | None:  # type: ignore[override]
        """Read all labels once."""
        if self._info.task in (None, "tag"):
            return None
        values, key = [], self._keys["label"]
        for part in thousands(self._at):
            values += [record[key] for record in self._records(part)]
        return np.asarray([label_row(value, self._info) for value in values])


def label_row(value: Any, info: Info) -> np.ndarray | np.generic:
    """Bring a label to its dtype: int32 class or classes, float32 number, float32 multi-hot row."""
    if info.task == "multilabel":
        return np.isin(np.arange(len(info.names)), value).astype(np.float32)
    return np.asarray(value, np.float32 if info.task == "regress" else np.int32)[()]


class Rows(Source):
    """Rows in memory of {"image": path, decoded when asked for} or {"text", "text_b"?}."""

    def __init__(self, rows: Sequence[dict[str, Any]], labels: Labels | None = None):
        """Hold rows and a label for each; labels that are one a word stand in the rows."""
        self._rows, self.labels = rows, labels

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = dict(self._rows[index])
        if "image" in example:
            example["image"] = decode(example["image"], f"image {example['image']}")
        return example if self.labels is None else example | {"label": self.labels[index]}


def cache_folder() -> Path:
    """Return the folder of what is computed from data and kept."""
    return Path(os.environ.get("TLJAX_DATA") or Path.home() / ".cache" / "tljax")


def prepared_folder() -> Path:
    """Return the folder of prepared TFDS data."""
    chosen = os.environ.get("TFDS_DATA_DIR") or os.environ.get("TLJAX_DATA")
    return Path(chosen) if chosen else cache_folder() / "tfds"


def identity(data: Data) -> dict[str, Any]:
    """Describe what is read: the config, and a hash of every file's name, size and time."""
    own, plain = data.name.replace("/", "_"), data.name.removeprefix("tfds:").partition(":")[0]
    prepared = prepared_folder() / (own if data.name in BUILDERS else plain)
    place = Path(data.name) if Path(data.name).exists() else prepared
    files = sorted(path for path in (place, *place.rglob("*")) if path.is_file())
    stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    stamped = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
    return {"config": data.model_dump(mode="json"), "files": stamped}


def open_data(data: Data, task: str | None = None) -> Splits:
    """Open a data set as three disjoint parts, for a task or for the one that its labels imply.

    data.name: one of `BUILDERS`, "tfds:NAME" (prepared data), or the path of a folder
    (train/<class>/*.png, <class>/*.png, train.csv) or of a .csv, .tsv or .jsonl file.
    data.validation: a share or a number of training examples, carved out stratified by `seed`.
    Where no test part exists, a fifth is carved out that does not depend on `seed`, so
    that runs of different seeds share it.  data.columns: our names (text, text_b, label, image) ->
    theirs.  CSV labels with "|" are lists.
    Lists are for multilabel, or for tag, with one label a blank-separated word, if `task` says so.
    Whole numbers are classes, or numbers if `task` is regress.
    Raises: BadInput, also where a part lacks labels that the task needs.
    """
    if strange := sorted(set(data.columns) - {"text", "text_b", "label", "image"}):
        raise BadInput(f"columns has no {strange[0]!r}: expected text, text_b, label or image")
    if data.test.partition("[")[0] == "train":
        raise BadInput(f"test={data.test!r} would test on what is trained on; name another part")
    if data.name in BUILDERS or data.name.startswith("tfds:"):
        parts, info = _open_tfds(data, task)
    elif Path(data.name).exists():
        parts, info = _open_path(data, task)
    else:
        raise BadInput(
            f"unknown data {data.name!r}: nearest are {nearest(data.name, BUILDERS, 4)}.\n"
            "Expected one of these, tfds:NAME, or the path of a folder or a file."
        )
    for part, source in parts.items():
        if info.task and len(source):
            _refuse_unlabelled(source, info, f"the {part} part of {data.name!r}")
    if data.classes:
        parts = {part: of_classes(source, data.classes, info) for part, source in parts.items()}
    if "test" not in parts:
        parts["train"], parts["test"] = _carve(parts["train"], 0.2, seed=0)
    parts["train"], parts["validation"] = _carve(parts["train"], data.validation, data.seed)
    if empty := [part for part, source in parts.items() if len(source) == 0]:
        raise BadInput(f"the {empty[0]} part of {data.name!r} is empty: give it an example")
    if data.labels:
        parts["train"] = subset(parts["train"], data.labels, data.seed)
    return Splits(**parts, info=info)


def of_classes(source: Source, classes: Sequence[str], info: Info) -> Subset:
    """Look at the examples of some classes; the label names stay as they are."""
    if info.task != "classify":
        raise BadInput(f"classes={classes} are for classify, not for {info.task or 'no labels'}")
    if unknown := sorted(set(classes) - set(info.names)):
        raise BadInput(f"no class {unknown[0]!r}; nearest: {nearest(unknown[0], info.names)}")
    wanted = [info.names.index(name) for name in classes]
    return Subset(source, np.flatnonzero(np.isin(source.labels, wanted)))


def open_replay(data: Data, splits: Splits) -> tuple[Source, Info]:
    """Open the training part of data.replay; the names are the data's, then its others.

    Raises: BadInput if the two are not both classes of pictures, or of texts.
    """
    own = {"name": data.replay.name, "labels": data.replay.labels, "classes": data.replay.classes}
    older = open_data(data.model_copy(update=own | {"replay": None, "test": "test"}))
    ours, theirs = splits.info, older.info
    if (ours.kind, ours.task, theirs.task) != (theirs.kind, "classify", "classify"):
        raise BadInput(
            f"replay of {data.replay.name} ({theirs.kind}, {theirs.task}) beside {data.name} "
            f"({ours.kind}, {ours.task}): expected classes of the same kind of input"
        )
    names = tuple(dict.fromkeys((*ours.names, *theirs.names)))
    to = np.asarray([names.index(name) for name in theirs.names], np.int32)
    return Renamed(older.train, to), replace(ours, names=names)


def _refuse_unlabelled(source: Source, info: Info, where: str) -> None:
    if "label" not in source[0]:
        raise BadInput(f"{where} has no labels, which task {info.task!r} needs")
    labels = source.labels
    if labels is None:
        return
    if info.task == "classify" and (least := labels.min()) < 0:
        raise BadInput(
            f"{where}: example {labels.argmin()} has label {least}, outside its "
            f"{len(info.names)} classes (is the part unlabelled?); choose another split"
        )
    if not np.isfinite(labels).all():
        raise BadInput(f"{where}: example {np.isfinite(labels).argmin()} has no finite label")


def _choose(infos: Sequence[Info], task: str | None, name: str) -> Info:
    """Take the first, which the labels imply, unless another is asked for that they can serve."""
    able: list[str] = [info.task for info in infos if info.task]
    if infos[0].kind == "text":
        able.append("mlm")
    if (task or next(iter(able), None)) not in able:
        raise BadInput(f"task {task!r} does not fit data {name!r}; it can serve {able}")
    if task == "mlm":
        return Info("text")
    return next((info for info in infos if info.task == task), infos[0])


def subset(source: Source, size: int, seed: int) -> Subset:
    """Choose a label budget, stratified; a smaller budget of the same seed lies in a larger one."""
    if not 0 < size <= len(source):
        raise BadInput(f"a budget of {size} examples: expected 1 to the {len(source)} there are")
    return _carve(source, size, seed)[1]


def _carve(source: Source, amount: float | int, seed: int) -> tuple[Subset, Subset]:
    """Split into the rest and an amount, stratified by class."""
    count = round(amount * len(source)) if isinstance(amount, float) else amount
    labels = source.labels
    strata = labels if labels is not None and labels.dtype == np.int32 else None
    order = stratified_order(strata, seed, len(source))
    return Subset(source, order[count:]), Subset(source, order[:count])


def _open_tfds(data: Data, task: str | None) -> tuple[dict[str, Source], Info]:
    make, plain = BUILDERS.get(data.name), data.name.replace("/", "_")  # tfds wants a plain name
    wanted = f"{plain}:{Local.VERSION}" if make else data.name.removeprefix("tfds:")
    folder = prepared_folder()
    read = partial(tfds.core.read_only_builder.builder_from_files, wanted, data_dir=folder)
    try:
        builder = read()
    except tfds.core.DatasetNotFoundError as error:
        if make is None:
            raise BadInput(
                f"no prepared TFDS data {wanted!r} under {folder}.\n"
                "Prepare it there in the array_record format, or set $TFDS_DATA_DIR."
            ) from error
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f".{plain}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process prepares; its end is the lock's
            try:
                builder = read()
            except tfds.core.DatasetNotFoundError:
                builder = _prepare(Local(plain, make(), folder))
    features = builder.info.features
    keys = _guess_keys(features) | data.columns
    refuse_missing(data.name, keys, features)
    info = _choose(_read_features(features, keys), task, data.name)
    if info.task is None:
        keys.pop("label", None)
    asked = {"train": "train", "test": data.test}
    if data.test == "test" and "test" not in builder.info.splits:
        del asked["test"]
    most = {"train": data.max_corrupt}
    return {
        part: Prepared(builder, split, keys, info, most.get(part, 0))
        for part, split in asked.items()
    }, info


def _prepare(builder: Local) -> Local:
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    builder.download_and_prepare()
    return builder


def _guess_keys(features: Mapping[str, Any]) -> dict[str, str]:
    """Name the image, else up to two texts, and the label among the features of a builder."""
    images = [key for key, value in features.items() if isinstance(value, tfds.features.Image)]
    texts = [key for key, value in features.items() if isinstance(value, Text)]
    keys = {"image": images[0]} if images else dict(zip(("text", "text_b"), texts, strict=False))
    classes = [key for key, value in features.items() if isinstance(value, ClassLabel)]
    labels = ["label"] if "label" in features else classes
    return keys | dict(zip(("label",), labels, strict=False))


def _read_features(features: Mapping[str, Any], keys: dict[str, str]) -> list[Info]:
    """List what the label's feature can serve, the likeliest first."""
    kind: Kind = "image" if "image" in keys else "text"
    feature = features[keys["label"]] if "label" in keys else None
    if feature is None:
        return [Info(kind)]
    if isinstance(feature, ClassLabel):
        return [Info(kind, "classify", tuple(feature.names))]
    inner = getattr(feature, "feature", None)
    if isinstance(inner, ClassLabel):
        several: list[Task] = ["multilabel"] if kind == "image" else ["tag", "multilabel"]
        return [Info(kind, one, tuple(inner.names)) for one in several]
    if feature.shape == () and np.issubdtype(feature.np_dtype, np.number):
        return [Info(kind, "regress")]
    raise BadInput(
        f"label {keys['label']!r} is {feature}: expected classes, lists of them, numbers"
    )


def _open_path(data: Data, task: str | None) -> tuple[dict[str, Source], Info]:
    """Open the files of each part; a test part that is not there is left out, for carving."""
    path, asked = Path(data.name), {"train": "train", "test": data.test}
    found = {
        part: place
        for end in ("", *TABLES)
        for part, split in asked.items()
        if (place := path / f"{split}{end}").exists()
    }
    places = found or {"train": path}
    may_lack = {"test"} if data.test == "test" else set()  # else a slip would go unnoticed
    for part in asked.keys() - may_lack - places.keys():
        raise BadInput(f"{path} lacks its {part} part {asked[part]!r}, or names it otherwise")
    allowances = {"train": Allowance(data.max_corrupt), "test": Allowance(0)}
    tables = {
        part: read_table(place, data.columns)
        if place.is_file()
        else _read_folder(place, allowances[part])
        for part, place in places.items()
    }
    for part, (rows, values) in tables.items():
        read = values is not None and task != "mlm"
        tables[part] = rows, read_labels(values, places[part]) if read else None
    info = _choose(_read_infos(*tables["train"]), task, data.name)
    return {
        part: _to_rows(rows, values, info, places[part]) for part, (rows, values) in tables.items()
    }, info


def _read_folder(path: Path, allowance: Allowance) -> tuple[list[dict], list[str]]:
    files = sorted(file for file in path.glob("*/*") if file.suffix.lower() in PICTURES)
    if not files:
        raise BadInput(
            f"no images in {path}: expected <class>/*{{{','.join(PICTURES)}}}, "
            "with or without train/ and test/ above the classes"
        )
    kept = [file for file in files if _is_picture(file, len(files) <= WHOLE, allowance)]
    return [{"image": file} for file in kept], [file.parent.name for file in kept]


def _is_picture(file: Path, whole: bool, allowance: Allowance) -> bool:
    """Look at a picture's header, or at all of it, so that a corrupt one is named at once."""
    try:
        with opened(file, f"image {file}") as picture:
            if whole:
                picture.load()
    except BadInput as error:
        allowance.leave_out(file, error)
        return False
    return True


def _read_infos(rows: list[dict], values: list | None) -> list[Info]:
    """List what the training labels can serve, the likeliest first."""
    kind: Kind = "image" if "image" in rows[0] else "text"
    if values is None:
        return [Info(kind)]
    names = sorted({str(label) for value in values for label in listed(value)})
    if not names:
        raise BadInput("the training part has lists of labels, and all of them are empty")
    if any(isinstance(value, list) for value in values):
        tasks: list[Task] = ["multilabel", "tag"] if kind == "text" else ["multilabel"]
        return [Info(kind, one, tuple(names)) for one in tasks]
    try:
        names.sort(key=float)
    except ValueError:  # not all are numbers
        return [Info(kind, "classify", tuple(names))]
    classes, number = Info(kind, "classify", tuple(names)), Info(kind, "regress")
    fractions = kind == "text" and not all(name.lstrip("+-").isdigit() for name in names)
    return [number] if fractions else [classes, number]


def _refuse_uneven(text: str, tags: Sequence[int], where: str | Path) -> None:
    if len(tags) != (words := len(text.split())):
        raise BadInput(f"{where} has {words} words but {len(tags)} tags: give one a word")


def _to_rows(rows: list[dict], values: list | None, info: Info, place: Path) -> Rows:
    if values is None or info.task is None:
        return Rows(rows)
    index, labels = {name: i for i, name in enumerate(info.names or ())}, []
    for number, (row, value) in enumerate(zip(rows, values, strict=True), 1):
        where = row.get("image", f"{place}, row {number}")
        label = _to_label(value, info, index, where)
        if info.task == "tag":
            _refuse_uneven(row["text"], label, where)
        labels.append(label)
    if info.task == "tag":
        return Rows([row | {"label": tags} for row, tags in zip(rows, labels, strict=True)])
    return Rows(rows, np.asarray(labels))


def _to_label(value: Any, info: Info, index: dict[str, int], where: str | Path) -> Any:
    if info.task == "regress":
        with suppress(TypeError, ValueError):
            if np.isfinite(number := label_row(value, info)):
                return number
        raise BadInput(f"{where}: label {short(value)} is not a finite number")
    values = [value] if info.task == "classify" else listed(value)
    for label in map(str, values):
        if label not in index:
            raise BadInput(
                f"{where}: label {short(label)} is outside the classes of the "
                f"training part: {first_few(info.names)}"
            )
    found = [index[str(label)] for label in values]
    return label_row(found[0] if info.task == "classify" else found, info)
