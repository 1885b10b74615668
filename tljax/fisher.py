"""The diagonal Fisher information of a finished run: what every one of its numbers is worth."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import linen as nn
from jaxtyping import Array, Float

from tljax.checkpoint import digest_of
from tljax.config import parse
from tljax.data.pipeline import open_pipeline
from tljax.data.sources import subset
from tljax.models import MODELS
from tljax.objectives import cross_entropy, infer
from tljax.source import merged, open_run
from tljax.storage import Name, Place, fetched, place, write_bytes
from tljax.tree import flatten, nearest
from tljax.types import BadInput, Batch, Key, Tree
from tljax.weights import Source

FISHER = "fisher.safetensors"
Labels = Literal["sampled", "true", "expected"]
TASKS = ("classify", "tag", "mlm")
MEMORY = 1 << 28  # bytes of gradients, of so many examples at once


def fisher_run(workdir: Name, examples: int | None = None, labels: str = "sampled") -> str:
    """Estimate a finished run's information on its training data; returns what was written.

    examples: so many of them, at random; None means all.  labels: see `squares`.  What is grafted
    is folded first, as it is for a run that starts from this one.
    Raises: BadInput for a task without classes, or more examples than there are.
    """
    if labels not in get_args(Labels):
        raise BadInput(f"labels={labels!r}: expected one of {', '.join(get_args(Labels))}")
    source = merged(open_run(workdir))
    config, task = parse(source.config["config"]), source.config["model"]["task"]
    if task not in TASKS or (labels == "expected" and task != "classify"):
        able = "classify" if labels == "expected" else ", ".join(TASKS)
        raise BadInput(f"{workdir}: task {task}; with labels={labels} it must be {able}")
    pipeline = open_pipeline(
        config.data,
        task,
        preprocess=source.preprocess,
        tokenizer=source.tokenizer,
        batch=config.run.batch,
        threads=config.run.threads,
        seed=config.seed,
    )
    train = pipeline.splits.train
    chosen = train if examples is None else subset(train, examples, config.seed)
    model = MODELS[source.arch](**source.fields)  # float32, whatever the run computed in
    batches = pipeline.loader.evaluate(chosen, pipeline.eval_transform)
    with jax.default_matmul_precision(config.precision.matmul):
        found = estimate(model, source.tree, batches, labels, jax.random.key(config.seed))
    path = place(workdir) / FISHER
    write_fisher(path, found, source, len(chosen), labels)
    trace = sum(float(leaf.sum()) for leaf in found.values())
    return f"{path}: {len(chosen)} examples, {labels} labels, trace {trace:.4g}"


def estimate(
    model: nn.Module, tree: Tree, batches: Iterable[Batch], labels: str, key: Key
) -> dict[str, np.ndarray]:
    """Average squared gradients of single examples over all valid rows, by path of parameter."""
    tree = jax.tree.map(jnp.asarray, tree)
    total = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), tree["params"])
    size = sum(leaf.size * 4 for leaf in jax.tree.leaves(total))
    add = jax.jit(partial(add_squares, model, labels, size), donate_argnums=0)
    count = 0
    for number, batch in enumerate(batches):
        total = add(total, tree, dict(batch), jax.random.fold_in(key, number))
        count += int(np.sum(batch["valid"]))
    return flatten({"params": jax.tree.map(lambda leaf: np.asarray(leaf) / count, total)})


def add_squares(
    model: nn.Module, labels: str, size: int, total: Tree, tree: Tree, batch: Batch, key: Key
) -> Tree:
    """Add a batch's squares to `total`, as many examples at once as MEMORY holds."""
    rows = len(batch["valid"])
    at_once = max(n for n in range(1, rows + 1) if rows % n == 0 and (n * size <= MEMORY or n == 1))
    keys = jax.random.split(key, rows)
    parts = jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), (dict(batch), keys))

    def accumulate(total: Tree, part: Any) -> tuple[Tree, None]:
        found = jax.vmap(partial(squares, model, tree, labels))(*part)
        return jax.tree.map(lambda sum_, each: sum_ + each.sum(0), total, found), None

    return jax.lax.scan(accumulate, total, parts)[0]


def squares(model: nn.Module, tree: Tree, labels: str, example: Batch, key: Key) -> Tree:
    """Square the gradient of one example's log-likelihood: zero for a row that is not valid.

    labels: "sampled" draws them from the model (the Fisher), "expected" weighs all classes by
    their probability (the same without noise, a backward pass a class), "true" takes the data's
    (the empirical Fisher).  An example of several tokens has the sum of their log-likelihoods.
    Source: Kunstner et al. 2019, arXiv 1905.12558, eq. 3 and 5.
    """
    one = {name: value[None] for name, value in example.items()}
    given = one["label"]

    def logits(params: Tree) -> Float[Array, "1 *l c"]:
        return infer(model, dict(tree) | {"params": params}, one).logits.astype(jnp.float32)

    def likelihood(params: Tree, chosen: Array) -> Float[Array, ""]:
        return -jnp.sum(cross_entropy(logits(params), chosen) * (given >= 0))

    now = logits(tree["params"])
    alternatives, odds = given[None], jnp.ones(1)
    if labels == "sampled":
        alternatives = jax.random.categorical(key, now)[None]
    if labels == "expected":
        alternatives, odds = jnp.arange(now.shape[-1])[:, None], jax.nn.softmax(now[0])

    def accumulate(total: Tree, alternative: tuple[Array, Array]) -> tuple[Tree, None]:
        grads = jax.grad(likelihood)(tree["params"], alternative[0])
        add = lambda sum_, grad: sum_ + alternative[1] * jnp.square(grad)  # noqa: E731
        return jax.tree.map(add, total, grads), None

    zeros = jax.tree.map(jnp.zeros_like, tree["params"])
    return jax.lax.scan(accumulate, zeros, (alternatives, odds * example["valid"]))[0]


def write_fisher(
    path: Place, found: Mapping[str, np.ndarray], source: Source, examples: int, labels: str
) -> None:
    """Write it with the digest of the weights that it belongs to, whole or not at all."""
    facts = {"weights": source.digest(), "content": digest_of(found)}
    facts |= {"examples": str(examples), "labels": labels}
    write_bytes(path, safetensors.numpy.save(dict(found), facts))


def read_fisher(source: Source, given: str | None = None) -> dict[str, np.ndarray]:
    """Read the information of a source: from a file, from a folder, or from its own.

    Raises: BadInput for a file that is missing, damaged, or of other weights.
    """
    path = place(given or source.origin)
    path = path / FISHER if path.is_dir() or not given else path
    again = f"make it by: tljax fisher {source.origin}"
    if source.format != "run":
        raise BadInput(f"the Fisher information is a finished run's; {source.origin} is no run")
    if not path.is_file():
        raise BadInput(f"there is no Fisher information in {path}; {again}")
    local = fetched(path.parent, path.name) / path.name
    try:
        with safetensors.safe_open(local, "numpy") as file:
            facts = file.metadata() or {}
        found = safetensors.numpy.load_file(local)
    except (safetensors.SafetensorError, OSError) as error:
        raise BadInput(f"{path} is damaged: {error}; {again}") from None
    if facts.get("content") != digest_of(found):
        raise BadInput(f"{path} is damaged: its content is not what was written; {again}")
    if facts.get("weights") != source.digest():
        raise BadInput(f"{path} is of other weights than {source.origin}; {again}")
    if lacking := sorted(flatten({"params": source.tree["params"]}).keys() - found.keys()):
        raise BadInput(f"{path} lacks {lacking[0]}; it has {nearest(lacking[0], found)}; {again}")
    return found
