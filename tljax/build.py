"""From a config to an experiment: the only reader of configs, every name in a literal table."""

import ast
import inspect
import json
import os
import runpy
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import UnionType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from pydantic import ConfigDict, TypeAdapter, ValidationError

from tljax import features, objectives, sharding
from tljax.assembly import Assembled, assemble, init_model
from tljax.config import Config, parse
from tljax.data.pipeline import Pipeline, open_pipeline
from tljax.edits.load import Report, load
from tljax.fisher import read_fisher
from tljax.layers import choose, pair
from tljax.models import MODELS, ViT
from tljax.source import merged, open_source, require_same_body
from tljax.state import Roles
from tljax.storage import STORE, in_store, place
from tljax.strategies import STRATEGIES
from tljax.strategies.strategy import Start
from tljax.tree import flatten, nearest, split
from tljax.types import BadInput, Edit, Rules, Tree
from tljax.weights import Source

DECIDED = {"parent", "name", "dtype", "remat", "num_classes", "mlm", "tokens"}
DECIDED |= {"tree", "last_read", "source"}
"""Arguments that the data, the task, the run or the build decide: no option of a config."""
CHANCES = {"dropout", "drop_path"}
CLASSES = ("head", "head_dist")
POOLING = ("mlm", "pooler", "map", "projection")
"""Parts above the body: those that know the classes, and those that a file may lack."""
MAY_BE_ZERO = {"registers", "types", "pad", "eot"}
"""Counts that may be none, and token ids."""


def check_options(function: Callable[..., Any], options: Mapping[str, Any], where: str) -> None:
    """Check option names and types against a signature; raises BadInput for what does not fit."""
    hints = typing.get_type_hints(function, include_extras=True)
    known = [name for name in inspect.signature(function).parameters if name not in DECIDED]
    strict = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    for name, value in options.items():
        if name not in known:
            hint = f"did you mean {nearest(name, known)}?" if known else "it takes no options"
            raise BadInput(f"{where} has no {name!r}; {hint}")
        try:
            TypeAdapter(hints.get(name, Any), config=strict).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise BadInput(f"{where}.{name}: {reason} (given {value!r})") from None
        check_range(name, value, hints.get(name), where)


def check_range(name: str, value: Any, hint: Any, where: str) -> None:
    """Refuse negative numbers, a size of zero, and a chance of one or more; raises BadInput."""
    numbers = [x for x in np.atleast_1d(value) if isinstance(x, int | float | np.number)]
    given = set(typing.get_args(hint)) - {type(None)} if isinstance(hint, UnionType) else {hint}
    counts = given <= {int, tuple[int, ...], tuple[int, int]} and name not in MAY_BE_ZERO
    if any(number < counts for number in numbers):
        bound = "be at least 1" if counts else "not be negative"
        raise BadInput(f"{where}.{name} must {bound} (given {value!r})")
    if name in CHANCES and value >= 1:
        raise BadInput(f"{where}.{name} is a probability below 1 (given {value!r})")


def read_config(given: str, overrides: Mapping[str, str]) -> Config:
    """Run a config file's `get_config(WORD)`, apply dotted overrides, and check the result.

    given: "configs/x.py", "configs/x.py:WORD", or a run's "run.json", which is read and executes
    nothing.  An override is a Python literal, else a string.
    Raises: BadInput for a missing file, a file without get_config, or anything the schema refuses.
    """
    path, _, word = (given, "", "") if given.startswith(STORE) else given.partition(":")
    if not (file := place(path)).is_file():
        there = (str(other) for end in ("*.py", "*.json") for other in file.parent.glob(end))
        near = nearest(path, there)
        hint = f"nearest: {near}" if near != "nothing" else f"no .py or .json in {file.parent}"
        raise BadInput(f"no config file {path}; {hint}")
    if in_store(file) and file.suffix != ".json":
        raise BadInput(f"{path}: of an object store only a run's run.json is read as a config")
    words = (word,) if word else ()
    values = replayed(path, words) if path.endswith(".json") else run_config(os.fspath(file), words)
    for dotted, text in overrides.items():
        *parents, name = dotted.split(".")
        section = values
        for parent in parents:
            if (
                isinstance(section, list | tuple)
                and parent.isdigit()
                and int(parent) < len(section)
            ):
                section = section[int(parent)]
            elif isinstance(section, dict):
                section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise BadInput(f"config key {dotted}: {parents[-1]} is a value, not a section")
        section[name] = literal(text)
    return parse(values)


def replayed(path: str, words: tuple[str, ...]) -> dict[str, Any]:
    """Read the config that a run was trained with from its run.json."""
    if words:
        raise BadInput(f"{path} takes no word, but {words[0]!r} is given: it is one run's config")
    try:
        return dict(json.loads(place(path).read_text())["config"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadInput(f"{path} is no record of a run: expected a run's run.json") from None


def run_config(path: str, words: tuple[str, ...]) -> dict[str, Any]:
    """Run a config file and return what its `get_config` gives, as plain values.

    Raises: BadInput for a file that fails, or whose get_config is missing or takes no such word.
    """
    with blame(path):
        function = runpy.run_path(path).get("get_config")
    if function is None:
        raise BadInput(f"{path} has no get_config(); a config file defines one")
    if words and not inspect.signature(function).parameters:
        raise BadInput(f"{path}: its get_config() takes no word, but {words[0]!r} is given")
    with blame(path):
        values = function(*words)
    if not hasattr(values, "to_dict"):
        raise BadInput(
            f"{path}: get_config must return a ConfigDict, not a {type(values).__name__}"
        )
    return dict(values.to_dict())


@contextmanager
def blame(path: str) -> Iterator[None]:
    """Turn whatever a user's own program raises into BadInput that names its line."""
    try:
        yield
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1].lineno
        raise BadInput(f"{path}, line {line}: {type(error).__name__}: {error}"[:400]) from error


def literal(text: str) -> Any:
    """Read a Python literal; any other text is itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def precision(config: Config) -> Any:
    """Return the context in which a run's matmuls have the precision its config asks for."""
    return jax.default_matmul_precision(config.precision.matmul)


@dataclass(frozen=True)
class Experiment(Assembled):
    """Everything a run needs, decided and checked; nothing is compiled yet."""

    config: Config
    facts: dict[str, Any]
    data: Pipeline
    mesh: sharding.Mesh
    predict: Callable[[Tree, Any], dict[str, jax.Array]]
    report: Report | None
    digest: str
    model: nn.Module
    cut: features.Cut | None
    features: str
    batch: Any
    put: Callable[[Any], Any]


def derived_fields(name: str, config: Config, pipeline: Pipeline) -> dict[str, Any]:
    """Return the fields of a new model that its data decide."""
    if name == "vit":
        size, patch = config.data.image_size, config.model.get("patch", ViT.patch)
        return {"grid": tuple(size // side for side in pair(patch))}
    if name == "bert":
        return {"vocab": pipeline.tokenizer.vocab_size, "pooler": False}
    return {}


def make_model(
    config: Config, source: Source | None, pipeline: Pipeline
) -> tuple[nn.Module, dict[str, Any]]:
    """Build the model and the facts that describe it: the source's fields, then the config's."""
    overrides = {name: value for name, value in config.model.items() if name != "name"}
    name = source.arch if source else config.model["name"]
    if config.model.get("name", name) != name:
        raise BadInput(f"weights {config.weights!r} are a {name}, not a {config.model['name']}")
    kind = choose(MODELS, name, "model.name")
    check_options(kind, overrides, "model")
    if name == "clip_text" or (pipeline.tokenizer is None) == (name == "bert"):
        raise BadInput(f"a {name} cannot read data {config.data.name!r}: text goes with bert")
    fields = dict(source.fields) if source else derived_fields(name, config, pipeline)
    fields = {name: value for name, value in fields.items() if name not in DECIDED} | overrides
    is_mlm = pipeline.task == "mlm"
    fields["num_classes"] = None if is_mlm else pipeline.splits.info.num_outputs
    if name == "bert":
        fields |= {"mlm": is_mlm, "tokens": pipeline.task == "tag"}
        rows, size = fields["vocab"], pipeline.tokenizer.vocab_size
        if size > rows:
            raise BadInput(f"the tokenizer has {size} tokens, the model's table {rows} rows")
    facts = {"name": name, "fields": fields, "task": pipeline.task, "labels": pipeline.labels}
    run = {"dtype": jnp.dtype(config.precision.compute), "remat": config.run.remat}
    model = kind(**fields, **run)
    return model, facts | {"preprocess": pipeline.preprocess}


def load_edit(
    source: Source, abstract: Tree, labels: Any, adapted: Rules
) -> tuple[tuple[Edit, ...], Report]:
    """Match a source to the model's tree; heads for other labels start fresh."""
    same_task = labels is not None and source.labels == labels
    have, want = flatten(source.tree), flatten(abstract)
    tops = {path: path.split("/")[1] for path in {**have, **want}}
    heads = [path for path, top in tops.items() if top in POOLING or top in CLASSES]
    reset = [path for path in heads if path in want and tops[path] in CLASSES and not same_task]
    fresh = [(path, "not in the source") for path in heads if path not in have]
    fresh += [(path, "head of a new task") for path in reset if path in have]
    ignored = [(path, "the model has no such head") for path in heads if path not in want]
    ignored += [(path, "head of another task") for path in reset if path in have]
    edit, report = load(source.tree, abstract, fresh=fresh, adapted=adapted, ignored=ignored)
    return (edit,), report


def adaptations(model: nn.Module, image_size: int) -> Rules:
    """Name the leaves that a model changes as it reads them, and how."""
    if not isinstance(model, ViT):
        return ()
    cells, how = model.cells(image_size, image_size), model.resample
    if cells == tuple(model.grid):
        return ()
    return (("params/embed/pos", f"resampled in the call, {model.grid} -> {cells}, {how}"),)


def open_parts(config: Config) -> tuple[Source | None, Pipeline]:
    """Open the weights and the data of a config, which several experiments may share."""
    source = merged(open_source(config.weights)) if config.weights else None
    if source and source.arch == "bert" and source.tokenizer is None:
        raise BadInput(f"{config.weights} has no tokenizer.json, so its token ids are unknown")
    if source and source.arch != "bert" and source.preprocess is None:
        print(f"{config.weights} has no preprocessor_config.json: ImageNet's mean and std assumed")
    pipeline = open_pipeline(
        config.data,
        config.task,
        preprocess=source.preprocess if source else None,
        tokenizer=source.tokenizer if source else None,
        batch=config.run.batch,
        threads=config.run.threads,
        seed=config.seed,
    )
    return source, pipeline


def build(
    config: Config,
    parts: tuple[Source | None, Pipeline] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Experiment:
    """Decide and check everything a run needs; raises BadInput before anything is compiled.

    devices: those of the mesh, also such as are only compiled for; all there are.
    """
    mesh = sharding.make_mesh(**config.mesh.model_dump(), devices=devices)
    sharding.check_batch(config.run.batch, mesh, config.run.microbatches)
    check_strategies(config)
    source, pipeline = parts or open_parts(config)
    model, facts = make_model(config, source, pipeline)
    batch = pipeline.example_batch
    source_edits: tuple[Edit, ...] = ()
    report = start = None
    if source:
        own = jax.eval_shape(partial(init_model, model, batch), jax.random.key(config.seed))
        adapted = adaptations(model, config.data.image_size)
        source_edits, report = load_edit(source, own, pipeline.labels, adapted)
        start = start_of(source, report, facts["fields"])
    made = assemble(
        model,
        batch,
        [(part.name, part.options()) for part in config.strategy],
        mesh=mesh,
        optimizer=config.optim.model_dump() | {"steps": config.run.steps},
        task=pipeline.task,
        source=source_edits,
        start=start,
        user=config.roles,
        specs=config.specs,
        ema=config.run.ema,
        microbatches=config.run.microbatches,
        dtype=jnp.dtype(config.precision.compute),
        seed=config.seed,
    )
    loads = bool(source) and made.strategy.loads
    if loads:
        require_no_random_freeze(report, made.roles)
    predict = sharding.under(mesh, objectives.make_predict(pipeline.task, model))
    cut, how = find_features(config, pipeline, mesh, model, made, predict)
    return Experiment(
        **vars(made),
        config=config,
        facts=facts,
        data=pipeline,
        mesh=mesh,
        predict=jax.jit(features.filled(predict, batch), out_shardings=made.shardings.scalar),
        report=report if loads else None,
        digest=source.digest() if source else "",
        model=model,
        cut=cut,
        features=how,
        batch=cut.batch if cut else batch,
        put=lambda batch: sharding.put_batch(batch, mesh),
    )


def find_features(
    config: Config,
    pipeline: Pipeline,
    mesh: sharding.Mesh,
    model: nn.Module,
    made: Assembled,
    predict: Any,
) -> tuple[features.Cut | None, str]:
    """Decide whether a frozen part of the model runs once, and say why."""
    parts, batch = split(made.tree, made.roles.tree), pipeline.example_batch
    key, run = jax.random.key(config.seed), config.run
    evaluations = 1 + ((run.steps - 1) // run.eval_every if run.eval_every else 0)
    seen = run.steps * run.batch + evaluations * len(pipeline.splits.validation)
    find = lambda: features.find_cut(model, made.objective, predict, parts, batch, key)  # noqa: E731
    return features.decide(run.features, pipeline, mesh, seen, find)


def start_of(source: Source, report: Report, fields: Mapping[str, Any]) -> Start:
    """Say what of a source a model of these fields starts from, for strategies that keep of it."""
    loaded = frozenset(row.path for row in report.rows if row.status in ("loaded", "adapted"))
    heads = {name: source.tree["params"].get(name) for name in CLASSES}
    reads_all = heads["head_dist"] is None and not source.fields.get("tokens")
    other = reads_all and heads["head"] and "params/head/kernel" not in loaded

    def head() -> Mapping[str, Any] | None:
        if source.format == "run" and source.config["model"]["task"] == "multilabel":
            raise BadInput(
                f"lwf distils one softmax over classes; several of {source.origin}'s may hold at "
                "once: take l2_sp or ewc"
            )
        if not other or heads["head"]["kernel"].shape[-1] == 1:
            return None
        pooled = {k: value for k, value in fields.items() if k != "tokens"}  # as old/head reads
        require_same_body(source.arch, pooled, source.fields, source.origin)
        return dict(heads["head"])

    return Start(source.origin, loaded, head, partial(read_fisher, source))


def require_no_random_freeze(report: Report, roles: Roles) -> None:
    """Raise BadInput if a leaf that is read is neither loaded nor trained."""
    role_of = flatten(roles.tree)
    for row in report.rows:
        if row.status == "fresh" and role_of[row.path] == "freeze" and row.path not in roles.unread:
            raise BadInput(f"{row.path} is {row.detail} and would stay random: train it by a role")


def check_strategies(config: Config) -> None:
    """Check the names of strategies, and their options against their functions."""
    for part in config.strategy:
        function = choose(STRATEGIES, part.name, "strategy.name")
        check_options(function, part.options(), f"strategy {part.name}")
