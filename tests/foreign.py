"""What tests of foreign weights share: open, run, differentiate, compare."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.edits.load import load
from tljax.models import MODELS
from tljax.tree import flatten
from tljax.weights.table import Source

# Correct independent float32 code agrees to about 1e-6 of the largest value (gradients 2e-6); a
# tanh GELU in the place of the exact one differs by 1e-4.
CLOSE, CLOSE_GRADIENT = 2e-5, 2e-4


def assert_close(given: Any, expected: Any, tolerance: float = CLOSE) -> None:
    given, expected = np.asarray(given), np.asarray(expected)
    assert given.shape == expected.shape
    assert np.abs(given - expected).max() <= tolerance * np.abs(expected).max()


def prepare(source: Source, *inputs: np.ndarray, **fields: Any) -> tuple[Any, Any]:
    """Build the source's model, with its head, and its variables; every leaf is used."""
    head = source.tree["params"].get("head")
    classes = {"num_classes": head["bias"].shape[0]} if head else {}
    model = MODELS[source.arch](**(dict(source.fields) | classes | fields))
    abstract = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    edit, report = load(source.tree, abstract)
    assert report.share == 1
    return model, edit(abstract, jax.random.key(0))


def call(function: Any, *arguments: Any) -> Any:
    """Compile quickly and call: compiling is most of what these tests take."""
    arguments = jax.tree.map(jnp.asarray, arguments)
    with jax.default_matmul_precision("highest"):
        lowered = jax.jit(function).lower(*arguments)
    return lowered.compile({"xla_backend_optimization_level": 0})(*arguments)


def run(source: Source, *inputs: np.ndarray, **fields: Any) -> Any:
    model, variables = prepare(source, *inputs, **fields)
    return call(model.apply, variables, *inputs)


def gradients(source: Source, weights: np.ndarray, *inputs: np.ndarray) -> Any:
    """Differentiate sum(weights * logits) by every parameter."""
    model, variables = prepare(source, *inputs)
    rest = {name: leaf for name, leaf in variables.items() if name != "params"}

    def loss(params: Any, *inputs: Any) -> Any:
        return jnp.sum(weights * model.apply({"params": params, **rest}, *inputs).logits)

    return {"params": call(jax.grad(loss), variables["params"], *inputs)}


def assert_gradients_close(given: Any, expected: Any) -> None:
    """Compare leaf by leaf; those near zero by analysis (key biases) against the largest of all."""
    given, expected = flatten(given), {k: np.asarray(v) for k, v in flatten(expected).items()}
    assert given.keys() == expected.keys()
    largest = max(np.abs(leaf).max() for leaf in expected.values())
    for path, leaf in expected.items():
        scale = max(np.abs(leaf).max(), 1e-3 * largest)
        assert np.abs(np.asarray(given[path]) - leaf).max() <= CLOSE_GRADIENT * scale, path


def draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draw values under which no exchanged or unread leaf stays hidden."""
    near = 1.0 if name.rsplit("/", 1)[-1] in ("scale", "gamma", "var") else 0.0
    return (near + rng.normal(0, 0.2, shape)).astype(np.float32)


def images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def same_bits(given: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert given.keys() == expected.keys()
    for name, array in expected.items():
        assert (given[name].dtype, given[name].shape) == (array.dtype, array.shape), name
        assert given[name].tobytes() == np.ascontiguousarray(array).tobytes(), name
