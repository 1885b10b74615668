"""A data set made ready for one model: opened, split, budgeted, encoded, batched."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tljax.config import Augment, Data
from tljax.data.augment import MixImages, TransformImage
from tljax.data.corrupt import Allowance
from tljax.data.loader import Cached, Loader, Sparing, Transform, Versions
from tljax.data.sources import Info, Rows, Source, Splits, open_data, open_replay
from tljax.data.tokens import MaskTokens, Tokenizer, encode, encode_alike, pack, train_wordpiece
from tljax.data.transforms import Preprocess, fit
from tljax.storage import Place, on_disk
from tljax.types import BadInput, Batch

VOCABULARY_TEXTS = 50_000  # texts that a new WordPiece vocabulary is learnt from


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """How a model's inputs are made, whatever the data."""

    task: str
    loader: Loader
    eval_transform: Transform | None
    preprocess: dict[str, Any]  # fields of Preprocess at the size of this run; none for texts
    tokenizer: Tokenizer | None = None


@dataclass(frozen=True, kw_only=True)
class Pipeline(Inputs):
    """Batches of each part of a data set, and what a model must know about them.

    versions: all that training reads, if its inputs repeat: every view of every example.
    """

    splits: Splits
    seed: int
    train_transform: Transform | None
    mix: Transform | None = None
    versions: Source | None = None
    replay: Source | None = None
    share: float = 0.0  # of every training batch, from the replay

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Name the classes."""
        return self.splits.info.names

    def train_batches(self, start: int = 0) -> Iterator[Batch]:
        """Yield this process's training batches without end, from any step at once."""
        source, transform = self.splits.train, self.train_transform
        older = self.replay, self.share
        if self.versions is None:
            return self.loader.train(source, transform, self.seed, self.mix, start, 1, *older)
        views = len(self.versions) // len(source)
        return self.loader.train(self.versions, None, self.seed, self.mix, start, views)

    def train_ids(self, step: int) -> list[int]:
        """List the examples of a step's whole batch, by their number in the training part.

        Replayed ones follow those of the training part.
        """
        size, train = self.loader.size, len(self.splits.train)
        count, replayed = len(self.versions or self.splits.train), len(self.replay or ())
        chosen = self.loader.order(count, self.seed, count // train, replayed, self.share)
        rows = chosen(np.arange(step * size, (step + 1) * size))
        return (rows if self.versions is None else rows % train).tolist()

    def eval_batches(self, split: str) -> Iterator[Batch]:
        """Yield every example of the validation or test part once, padded at the end."""
        return self.loader.evaluate(getattr(self.splits, split), self.eval_transform)

    @cached_property
    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Describe the global batch by shapes."""
        batch, size = next(self.train_batches()), self.loader.size
        return {k: jax.ShapeDtypeStruct((size, *v.shape[1:]), v.dtype) for k, v in batch.items()}

    def save_tokenizer(self, folder: Place) -> str | None:
        """Write the tokenizer into a run's folder, so that the run needs nothing else."""
        if self.tokenizer is None:
            return None
        with on_disk(folder) as local:
            self.tokenizer.save(local / "tokenizer.json")
        return "tokenizer.json"


def open_pipeline(
    data: Data,
    task: str | None,
    *,
    preprocess: Mapping[str, Any] | None,
    tokenizer: Path | None,
    batch: int,
    threads: int,
    seed: int,
) -> Pipeline:
    """Open data for a model whose source brings `preprocess` or a `tokenizer`, or neither.

    Raises: BadInput for data that are not there, or a task that their labels do not fit.
    """
    splits, older = open_data(data, task), None
    if data.max_corrupt:
        splits = splits._replace(train=Sparing(splits.train, Allowance(data.max_corrupt)))
    if data.replay:
        older, info = open_replay(data, splits)
        splits = splits._replace(info=info)
    loader = Loader(batch, threads, jax.process_index(), jax.process_count())
    common = {"task": task or splits.info.task or "mlm", "seed": seed, "loader": loader}
    common["share"] = data.replay.share if data.replay else 0.0
    if splits.info.kind == "image":
        return _images(data, splits, older, Preprocess.read(preprocess), common)
    return _texts(data, splits, older, tokenizer, common)


def _images(
    data: Data, splits: Splits, older: Source | None, preprocess: Preprocess, common: Any
) -> Pipeline:
    size, augment = data.image_size, data.augment
    softens = augment.mixup or augment.cutmix or augment.smoothing
    if softens and common["task"] != "classify":
        raise BadInput(f"mixup, cutmix and smoothing are for classify, not {common['task']}")
    fitted = partial(fit, size=size, preprocess=preprocess)
    prepare = None if augment.crop_scale else fitted  # a crop wants it whole
    train, older = (source and Cached(source, prepare) for source in (splits.train, older))
    validation, test = Cached(splits.validation, fitted), Cached(splits.test, fitted)
    transform = _transform(size, augment, preprocess)
    drawn = augment.crop_scale or augment.flip or augment.randaugment or augment.erase
    views = augment.views if drawn else 1
    repeats = views is not None and not (augment.mixup or augment.cutmix or older)
    return Pipeline(
        splits=Splits(train, validation, test, splits.info),
        train_transform=transform,
        versions=Versions(train, transform, common["seed"], views) if repeats else None,
        eval_transform=_transform(size, Augment(), preprocess),
        mix=MixImages(len(splits.info.names), augment) if softens else None,
        replay=older,
        preprocess=asdict(preprocess.at(size)),
        **common,
    )


def _transform(size: int, augment: Augment, source: Preprocess) -> TransformImage:
    return TransformImage(size, augment, source.mean, source.std, source.interpolation)


def _texts(
    data: Data, splits: Splits, older: Source | None, vocabulary: Path | None, common: Any
) -> Pipeline:
    if vocabulary is not None:
        tokenizer = Tokenizer.from_file(vocabulary, data.length)
    else:
        rows = splits.train.__getitems__(range(min(len(splits.train), VOCABULARY_TEXTS)))
        texts = [row[name] for row in rows for name in ("text", "text_b") if name in row]
        tokenizer = train_wordpiece(texts, data.vocab, data.length)
    if common["task"] == "mlm":
        train, validation, test = (pack(part, tokenizer, data.length) for part in splits[:3])
        info, transform = Info("text"), MaskTokens(tokenizer)
    else:
        parts = [*splits[:3], *([older] if older else [])]
        train, validation, test, *rest = encode_alike(parts, tokenizer)
        older = Cached(rest[0]) if rest else None
        info, transform = splits.info, None
    cached = Cached(train)
    return Pipeline(
        splits=Splits(cached, Cached(validation), Cached(test), info),
        train_transform=transform,
        eval_transform=transform,
        versions=None if transform or older else Versions(cached, None, common["seed"]),
        replay=older,
        preprocess={},
        tokenizer=tokenizer,
        **common,
    )


def open_inputs(
    data: Data, task: str, *, preprocess: Mapping[str, Any], tokenizer: Path | None, batch: int,
    threads: int,
) -> Inputs:  # fmt: skip
    """Prepare inputs as a run did, without its data: what a prediction needs."""
    loader = Loader(batch, threads, jax.process_index(), jax.process_count())
    if tokenizer is None:
        size, source = data.image_size, Preprocess.read(preprocess)
        transform, own = _transform(size, Augment(), source), asdict(source.at(size))
        return Inputs(task=task, loader=loader, eval_transform=transform, preprocess=own)
    known = Tokenizer.from_file(tokenizer, data.length)
    return Inputs(task=task, loader=loader, eval_transform=None, preprocess={}, tokenizer=known)


def unlabelled(inputs: Inputs, rows: Sequence[dict[str, Any]]) -> Iterator[Batch]:
    """Yield batches of pictures ({"image": path}) or texts ({"text"}) without labels.

    For tag, the label is 0 where a word begins, so that its prediction can be read there.
    """
    if inputs.task == "tag":
        rows = [row | {"label": [0] * len(row["text"].split())} for row in rows]
    source: Source = Rows(rows)
    if inputs.tokenizer is not None:
        source = encode(source, inputs.tokenizer)
    else:
        own = Preprocess.read(inputs.preprocess)
        source = Cached(source, partial(fit, size=own.size[0], preprocess=own), limit=0)
    return inputs.loader.evaluate(source, inputs.eval_transform)
