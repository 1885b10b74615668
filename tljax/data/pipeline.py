"""A data set made ready for one model: opened, split, budgeted, encoded, batched."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from tljax.config import Data
from tljax.data.augment import AugmentImage, MixImages
from tljax.data.loader import Cached, Transform, eval_batches, train_batches
from tljax.data.sources import Info, Rows, Source, Splits, open_data, subset
from tljax.data.tokens import MaskTokens, Tokenizer, encode, encode_splits, pack, train_wordpiece
from tljax.data.transforms import IMAGENET_MEAN, IMAGENET_STD, FitImage, Normalise
from tljax.types import BadInput, Batch

VOCABULARY_TEXTS = 50_000  # texts that a new WordPiece vocabulary is learnt from


@dataclass(frozen=True)
class Pipeline:
    """Batches of each part of a data set, and what a model must know about them."""

    splits: Splits
    task: str
    batch: int
    seed: int
    threads: int
    preprocess: dict[str, Any]
    train_transform: Transform | None
    eval_transform: Transform | None
    prepare: Callable[[dict], dict] | None = None
    mix: Transform | None = None
    tokenizer: Tokenizer | None = None

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Name the classes."""
        return self.splits.info.names

    @cached_property
    def _train(self) -> Source:
        crops = getattr(self.train_transform, "crop", None)  # a random crop wants the whole image
        return Cached(self.splits.train, None if crops else self.prepare)

    def train_batches(self, start: int = 0) -> Iterator[Batch]:
        """Yield this process's training batches without end, from any step at once."""
        return train_batches(
            self._train,
            self.train_transform,
            self.batch,
            self.seed,
            mix=self.mix,
            start_step=start,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            threads=self.threads,
        )

    @cached_property
    def _held_out(self) -> dict[str, Source]:
        parts = {"validation": self.splits.validation, "test": self.splits.test}
        return {split: Cached(part, self.prepare) for split, part in parts.items()}

    def eval_batches(self, split: str) -> Iterator[Batch]:
        """Yield every example of the validation or test part once, padded at the end."""
        return self._evaluation(self._held_out[split])

    def batches_of(self, source: Source) -> Iterator[Batch]:
        """Yield every example of any source once, prepared as in evaluation."""
        return self._evaluation(Cached(source, self.prepare))

    def _evaluation(self, source: Source) -> Iterator[Batch]:
        return eval_batches(
            source,
            self.eval_transform,
            self.batch,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            threads=self.threads,
        )

    @cached_property
    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Describe the global batch by shapes."""
        rows, local = jax.process_count(), next(self.train_batches())
        shapes = {name: (leaf.shape[0] * rows, *leaf.shape[1:]) for name, leaf in local.items()}
        return {k: jax.ShapeDtypeStruct(shapes[k], leaf.dtype) for k, leaf in local.items()}

    def save_tokenizer(self, folder: Path) -> str | None:
        """Write the tokenizer into a run's folder, so that the run needs nothing else."""
        if self.tokenizer is None:
            return None
        self.tokenizer.save(folder / "tokenizer.json")
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
    chosen: dict[str, Any] = {
        "validation": data.validation,
        "test": data.test,
        "columns": data.columns,
    }
    splits = open_data(data.name, seed=data.seed, **chosen)
    found = choose_task(task, splits.info, data.name)
    if data.labels:
        splits = splits._replace(train=subset(splits.train, data.labels, data.seed))
    common = {"task": found, "batch": batch, "seed": seed, "threads": threads}
    if splits.info.kind == "image":
        return _images(data, splits, dict(preprocess or {}), common)
    return _texts(data, splits, tokenizer, common)


def choose_task(task: str | None, info: Info, name: str) -> str:
    """Take the task the labels imply, unless another is asked for that they can serve."""
    able = [one for one in (info.task, "mlm" if info.kind == "text" else None) if one]
    task = task or next(iter(able), None)
    if task not in able:
        raise BadInput(f"task {task!r} does not fit data {name!r}; it can serve {able}")
    return task


def _images(data: Data, splits: Splits, preprocess: dict[str, Any], common: Any) -> Pipeline:
    size, augment = data.image_size, data.augment
    mean = tuple(preprocess.get("mean", IMAGENET_MEAN))
    std = tuple(preprocess.get("std", IMAGENET_STD))
    train = AugmentImage(
        size=size,
        mean=mean,
        std=std,
        crop=augment.crop_scale,
        flip=0.5 * augment.flip,
        rand_augment=augment.randaugment,
        erase=augment.erase,
    )
    softens = augment.mixup or augment.cutmix or augment.smoothing
    if softens and common["task"] != "classify":
        raise BadInput(f"mixup, cutmix and smoothing are for classify, not {common['task']}")
    mixing = {"mixup": augment.mixup, "cutmix": augment.cutmix, "smoothing": augment.smoothing}
    return Pipeline(
        splits=splits,
        prepare=FitImage(size, size),
        train_transform=train,
        eval_transform=Normalise(mean, std),
        mix=MixImages(len(splits.info.names), **mixing) if softens else None,
        preprocess={"mean": mean, "std": std},
        **common,
    )


def _texts(data: Data, splits: Splits, vocabulary: Path | None, common: Any) -> Pipeline:
    if vocabulary is not None:
        tokenizer = Tokenizer.from_file(vocabulary, data.length)
    else:
        rows = splits.train.__getitems__(range(min(len(splits.train), VOCABULARY_TEXTS)))
        texts = (row[name] for row in rows for name in ("text", "text_b") if name in row)
        tokenizer = train_wordpiece(texts, data.vocab, data.length)
    if common["task"] == "mlm":
        train, validation, test = (pack(part, tokenizer, data.length) for part in splits[:3])
        splits = Splits(train, validation, test, Info("text"))
        transform = MaskTokens.of(tokenizer)
    else:
        splits, transform = encode_splits(splits, tokenizer), None
    return Pipeline(
        splits=splits,
        train_transform=transform,
        eval_transform=transform,
        preprocess={},
        tokenizer=tokenizer,
        **common,
    )


def unlabelled(pipeline: Pipeline, rows: Sequence[dict[str, Any]]) -> Iterator[Batch]:
    """Yield batches of pictures ({"image": path}) or texts ({"text"}) without labels.

    For tag, the label is 0 where a word begins, so that its prediction can be read there.
    """
    is_tag = pipeline.task == "tag"
    if is_tag:
        rows = [row | {"label": [0] * len(row["text"].split(" "))} for row in rows]
    source: Any = Rows(rows, None)
    if pipeline.tokenizer is not None:
        source = encode(source, pipeline.tokenizer, Info("text", "tag" if is_tag else None))
    return pipeline.batches_of(source)
