"""The schema of a run: every key a config file may hold, with its type, range, unit and default.

A config file names only what differs from these defaults.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from tljax.tree import nearest
from tljax.types import BadInput


def _whole_or_share(value: int | float) -> int | float:
    if isinstance(value, float) and value >= 1:
        raise ValueError("Input should be a whole number, or a share below 1")
    return value


Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0)]
Above = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Amount = Annotated[int | float, Field(gt=0), AfterValidator(_whole_or_share)]
Share = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """A part of the schema: unknown keys, wrong types and non-finite numbers are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Named(BaseModel):
    """A name and the options of what it names; the options are checked where they are used."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)
    name: str

    def options(self) -> dict[str, Any]:
        """Return everything but the name."""
        return dict(self.model_extra or {})


class Augment(Section):
    """Random changes of training images; each is off by default."""

    crop_scale: tuple[Share, Share] | None = None  # area range of a random resized crop (fraction)
    flip: bool = False  # horizontal, with probability 1/2
    randaugment: tuple[Count, Annotated[int, Field(ge=0, le=30)]] | None = None
    # (operations, magnitude)
    erase: Fraction = 0.0  # probability of random erasing
    mixup: Rate = 0.0  # alpha of the Beta distribution; labels become soft
    cutmix: Rate = 0.0  # alpha; with both, one of the two is drawn for each batch
    smoothing: Fraction = 0.0  # label smoothing
    views: Positive | None = None  # random versions of an image; None: one an epoch


class Replay(Section):
    """Older data that a fixed share of every training batch comes from; for classes."""

    name: str  # as data.name
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5  # of every batch, in whole rows
    labels: Positive | None = None  # budget: this many of its training examples
    classes: tuple[str, ...] | None = None


class Data(Section):
    """What to learn from.  `name` is a data set, `tfds:NAME`, an image folder or a text file."""

    name: str
    labels: Positive | None = None  # label budget: this many training examples, stratified, nested
    classes: tuple[str, ...] | None = None  # only examples of these; the head has all of them
    replay: Replay | None = None  # adds its label names behind the data's own
    validation: Amount = 0.1  # training examples carved out: a number, or a share below 1
    test: str = "test"
    columns: dict[str, str] = {}  # for text files: {"text": ..., "text_b": ..., "label": ...}
    image_size: Positive = 224  # pixels
    length: Annotated[int, Field(ge=3)] = 128  # tokens, at most, [CLS] and [SEP] among them
    vocab: Positive = 8192  # WordPiece entries, when no pretrained tokenizer is given
    max_corrupt: Count = 0  # training pictures or records that may be corrupt and are left out, a
    # process; one of the test part always is an error
    augment: Augment = Augment()
    seed: Count = 0  # of the validation split and the label budget


class Optim(Section):
    """The optimizer and its schedule."""

    name: Literal["adamw", "sgd", "lion"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3  # peak
    head_rate: Annotated[float, Field(gt=0)] = 1.0  # the heads' multiple of it
    decay: Rate = 0.0  # decoupled weight decay, kernels and embeddings only
    clip: Annotated[float, Field(gt=0)] | None = 1.0  # global norm of the trainable gradients
    warmup: Count = 0  # steps
    fall: Literal["cosine", "linear", "constant"] = "cosine"
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8
    momentum: Fraction = 0.9


class Run(Section):
    """How long, how large, how often."""

    steps: Positive = 1000
    batch: Positive = 64  # examples, over all devices
    microbatches: Positive = 1  # the batch's gradient is accumulated over so many parts
    log_every: Positive = 20  # steps
    eval_every: Positive | None = None  # steps; None: at the end only
    save_every: Positive | None = None  # steps; None: at the end only
    keep: Positive = 2  # newest checkpoints
    keep_best: Count = 0  # checkpoints beside them, of the best validation at a save
    max_skipped: Positive = 20  # steps in a row whose loss or gradient is not finite: it stops,
    # if they are still in a row where the log is written
    spike: Annotated[float, Field(gt=1)] | None = None  # an interval's loss over the median of the
    # five before it: from there on a run goes back to its last good save, and skips the batches
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None  # decay of an average that evaluates
    remat: bool = False  # each block runs again in the backward pass: less memory, 1/3 more FLOPs
    threads: Count = 4  # of the data loader
    features: Literal["auto", "on", "off"] = "auto"  # compute what lies below a cut once
    # (auto: where that is exact and saves passes; on: an error where it is not exact)


class MeshShape(Section):
    """Devices by axis; one may be -1, meaning the rest."""

    data: Annotated[int, Field(ge=-1)] = -1
    fsdp: Annotated[int, Field(ge=-1)] = 1
    tensor: Annotated[int, Field(ge=-1)] = 1


class Precision(Section):
    """Parameters are float32; compute is chosen here; reductions and losses are float32."""

    compute: Literal["float32", "bfloat16"] = "float32"
    matmul: Literal["default", "high", "highest"] = "default"


Strategies = Annotated[
    tuple[Named, ...],
    Field(min_length=1),
    BeforeValidator(lambda value: (value,) if isinstance(value, dict | Named) else value),
]


class Config(Section):
    """A whole run."""

    data: Data
    task: Literal["classify", "multilabel", "regress", "tag", "mlm"] | None = None  # by the data
    weights: str | None = None  # a name, a Hugging Face folder, or a finished run's workdir
    model: dict[str, Any] = {}  # {"name": "vit", ...fields}; with weights: fields to override
    strategy: Strategies = (Named(name="full"),)  # one, or several that are composed
    roles: tuple[tuple[str, Literal["train", "track", "freeze"]], ...] = ()  # before the strategy's
    specs: tuple[tuple[str, tuple[str | None, ...]], ...] = ()  # sharding rules by path
    optim: Optim = Optim()
    run: Run = Run()
    mesh: MeshShape = MeshShape()
    precision: Precision = Precision()
    seed: Count = 0

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        if self.weights is None and "name" not in self.model:
            raise ValueError("give weights, or model.name to start from random initialisation")
        low, high = self.data.augment.crop_scale or (1.0, 1.0)
        if low > high:
            raise ValueError(f"data.augment.crop_scale is (low, high), given ({low}, {high})")
        evaluates, saves = self.run.eval_every, self.run.save_every
        if self.run.keep_best and not (
            evaluates and saves and math.lcm(evaluates, saves) < self.run.steps
        ):
            raise ValueError(
                "run.keep_best keeps saves that are evaluated: give run.eval_every and "
                f"run.save_every a common multiple below run.steps ({self.run.steps}); given "
                f"{evaluates} and {saves}"
            )
        if self.optim.warmup >= self.run.steps and self.optim.warmup > 0:
            raise ValueError(
                f"optim.warmup ({self.optim.warmup} steps) must be shorter than run.steps"
                f" ({self.run.steps})"
            )
        return self


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(child) for key, child in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def parse(values: dict[str, Any]) -> Config:
    """Check plain values against the schema.

    Raises: BadInput naming each wrong key (at most three), what it holds and what fits.
    """
    try:
        return Config.model_validate(_tuples(values))
    except ValidationError as error:
        lines, known = [], [key for part in Section.__subclasses__() for key in part.model_fields]
        for item in error.errors()[:3]:
            place = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                near = nearest(str(item["loc"][-1]), known, 1)
                lines.append(f"unknown key {place}; did you mean {near}?")
            else:
                given = "" if item["type"] == "missing" else f" (given {item['input']!r})"
                where = f"{place}: " if place else ""
                reason = item["msg"].removeprefix("Value error, ")
                lines.append((f"{where}{reason}" + (given if place else ""))[:300])
        raise BadInput("config: " + "\n  ".join(lines)) from None
