"""Averages of weights: soups of runs, and WiSE-FT between a start and what became of it."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tljax import sharding
from tljax.build import precision
from tljax.checkpoint import Checkpoints, digest_of
from tljax.data.pipeline import open_pipeline
from tljax.evaluate import evaluate
from tljax.exporter import require_new, whole
from tljax.inference import Finished, open_finished
from tljax.metrics import worth
from tljax.source import RECORD, RESULT, merged, open_source
from tljax.storage import Name, Place, place, run_folder, write_json
from tljax.tree import flatten, nearest, unflatten
from tljax.types import BadInput, Tree
from tljax.weights import Source

SOUP, PICTURE = "soup.json", "soup.png"
Score = Callable[[Tree, str], dict[str, float]]


def weighted(trees: Sequence[Tree], weights: Sequence[float]) -> Tree:
    """Average trees of equal structure leaf by leaf, in float32.

    Raises: BadInput naming the first leaf that one of them lacks or has in another shape.
    """
    first, *others = leaves = [flatten(tree) for tree in trees]
    for number, other in enumerate(others, 2):
        for path in sorted(first.keys() ^ other.keys()):
            lacking, having = (number, 1) if path in first else (1, number)
            near = nearest(path, leaves[lacking - 1])
            raise BadInput(f"{path} is in tree {having}, not in {lacking} (nearest there: {near})")
        for path, leaf in first.items():
            if leaf.shape != other[path].shape:
                shapes = f"{leaf.shape} in tree 1, {other[path].shape} in tree {number}"
                raise BadInput(f"{path} is {shapes}: expected trees of equal structure")
    shares = [(np.float32(w), one) for w, one in zip(weights, leaves, strict=True) if w]
    mean = lambda path: sum(w * np.asarray(one[path], np.float32) for w, one in shares)  # noqa: E731
    return unflatten({path: mean(path) for path in first})


def greedy_soup(trees: Sequence[Tree], better: Callable[[Tree], float]) -> list[float]:
    """Add trees from the best one on, each only if `better` does not drop; returns the weights.

    Source: Wortsman et al. 2022, arXiv 2203.05482, recipe 1.
    """
    mean = lambda chosen: weighted([trees[n] for n in chosen], [1 / len(chosen)] * len(chosen))  # noqa: E731
    alone = [better(tree) for tree in trees]
    best, *rest = sorted(range(len(trees)), key=lambda number: -alone[number])
    members, reached = [best], alone[best]
    for number in rest:
        if (found := better(mean([*members, number]))) >= reached:
            members, reached = [*members, number], found
    return [(number in members) / len(members) for number in range(len(trees))]


def soup(
    out: Name,
    runs: Sequence[Name],
    weights: Sequence[float] | None = None,
    greedy: bool = False,
    alphas: Sequence[float] | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Average finished runs into a new run's folder, evaluated on the data of the first one.

    Grafted leaves are folded first.  weights: that add up to 1; equal ones by default.  greedy:
    add runs by their validation, as `greedy_soup` does.  alphas: of two, the start and the run,
    take (1 - alpha) x start + alpha x run with the alpha that is best on validation (WiSE-FT,
    Wortsman et al. 2021, arXiv 2109.01903, eq. 2).  BatchNorm's statistics are averaged, too.
    Raises: BadInput for runs of other labels or another structure.
    """
    require_new(out := run_folder(out))
    check_choice(runs, weights, greedy, alphas)
    sources = [merged(open_source(str(run))) for run in runs]
    first = first_run(sources)
    trees = [source.tree for source in sources]
    weighted(trees, [1 / len(trees)] * len(trees))  # before any data are opened
    run = open_finished(first)
    score = make_score(run)
    name = next(iter(json.loads((first / RESULT).read_text())["validation"]))
    value = lambda scores: worth(name, scores[name])  # noqa: E731
    ways = [list(weights or [1 / len(trees)] * len(trees))]
    if alphas:
        ways = [[1 - alpha, alpha] for alpha in alphas]
    elif greedy:
        ways = [greedy_soup(trees, lambda tree: value(score(tree, "validation")))]
    averages = (weighted(trees, way) for way in ways)
    results = [{split: score(a, split) for split in ("validation", "test")} for a in averages]
    best = max(range(len(ways)), key=lambda number: value(results[number]["validation"]))
    curve = [
        {"alpha": alpha} | {split: scores[name] for split, scores in result.items()}
        for alpha, result in zip(alphas or (), results, strict=bool(alphas))
    ]
    tree, result = weighted(trees, ways[best]), results[best]
    facts = {"runs": [str(run) for run in runs], "weights": ways[best]}
    facts |= {"metric": name, "curve": curve}
    with whole(out) as local:
        write_run(local, first, tree, result, facts, command)
        if curve:
            plot(curve, name, local / PICTURE)
    return facts | result


def check_choice(
    runs: Sequence[Name], weights: Sequence[float] | None, greedy: bool, alphas: Any
) -> None:
    """Raise BadInput unless one way of averaging is chosen, and fits the number of runs."""
    if sum(map(bool, (weights, greedy, alphas))) > 1:
        raise BadInput("choose one of --weights, --greedy and --alphas")
    if len(runs) < 2 or (alphas and len(runs) > 2):
        raise BadInput(f"{len(runs)} runs: expected two" + " or more" * (not alphas))
    if weights and (len(weights) != len(runs) or not np.isclose(sum(weights), 1, atol=1e-6)):
        raise BadInput(f"weights {list(weights)}: expected {len(runs)} that add up to 1")
    if alphas and not np.isfinite(alphas).all():
        raise BadInput(f"alphas {list(alphas)}: expected numbers, usually from 0 to 1")


def first_run(sources: Sequence[Source]) -> Place:
    """Return the folder of the first run; raises BadInput if there is none, or labels differ."""
    found = [source for source in sources if source.format == "run"]
    if not found:
        raise BadInput(f"{sources[0].origin} is no finished run: expected one to evaluate with")
    for other in found[1:]:
        if other.labels != found[0].labels or other.arch != found[0].arch:
            raise BadInput(
                f"{other.origin} is a {other.arch} with the labels {other.labels}, "
                f"{found[0].origin} a {found[0].arch} with {found[0].labels}: expected the same"
            )
    return place(found[0].origin)


def make_score(run: Finished) -> Score:
    """Return the exact evaluation of any tree of a run's structure on the run's data."""
    task, names = run.facts["task"], run.facts["labels"]
    data = open_pipeline(run.config.data, task, seed=run.config.seed, **run.reads)

    def score(tree: Tree, split: str) -> dict[str, float]:
        with precision(run.config):
            here = jax.device_put(tree, sharding.on(run.mesh, sharding.specs(tree, run.mesh)))
            put = (sharding.put_batch(batch, run.mesh) for batch in data.eval_batches(split))
            return evaluate(run.predict, (here,), put, task, names)

    return score


def write_run(
    folder: Path, first: Place, tree: Tree, result: Mapping[str, Any], facts: Any, command: str
) -> None:
    """Write the folder of a finished run: the record of the first one, with other weights."""
    record = json.loads((first / RECORD).read_text())
    if tokenizer := record["model"]["tokenizer"]:
        (folder / tokenizer).write_bytes((first / tokenizer).read_bytes())
    with closing(Checkpoints(folder / "checkpoints", keep=1)) as checkpoints:
        checkpoints.save_frozen({})
        checkpoints.save(record["config"]["run"]["steps"], {"params": tree, "track": {}})
    # Its own digest: to train the first run's config in this folder is refused, as another run.
    write_json(folder / RECORD, record | {"digest": digest_of(tree), "command": command})
    write_json(folder / SOUP, facts)
    write_json(folder / RESULT, result)


def plot(curve: Sequence[Mapping[str, float]], name: str, path: Path) -> None:
    """Draw the metric along the line from the start to the run."""
    # Imported late, as in the demo.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    panel = figure.subplots()
    for split in ("validation", "test"):
        panel.plot([p["alpha"] for p in curve], [p[split] for p in curve], "o-", label=split)
    panel.set(xlabel="alpha: 0 is the start, 1 the run", ylabel=name)
    panel.legend()
    panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
