"""Statistics of a run: scores per task, intervals, and where they are written."""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import make_dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from clu.metrics import Average
from jaxtyping import Int, Num, Shaped
from scipy import special, stats
from sklearn.metrics import f1_score
from tqdm import tqdm

from tljax import storage
from tljax.storage import Name
from tljax.tree import flatten
from tljax.types import Tree

Rows = Mapping[str, np.ndarray]
"""What was collected, one row per example: label and logits; for tag label and prediction; for
mlm the sums over an example's masked tokens loss (nats), correct and count."""


@jax.jit
def accumulate(
    running: dict[str, Average] | None, values: Mapping[str, jax.Array], good: jax.Array
) -> dict[str, Average]:
    """Add one step's scalars, if it was good, to running averages; the device is not waited for."""
    new = {name: Average(jnp.where(good, x, 0), good * 1) for name, x in values.items()}
    return {name: running[name].merge(new[name]) for name in new} if running else new


def averages(running: dict[str, Average]) -> dict[str, float]:
    """Fetch running averages from the device; nan where no step was good."""
    found = jax.device_get(running).items()
    return {name: float(one.compute()) if one.count else math.nan for name, one in found}


METRICS, EVENTS = "metrics.jsonl", "events"
LESS = ("nll", "mse", "perplexity")
"""Metrics of which less is better."""


def worth(name: str, value: float) -> float:
    """Return a metric so that more of it is better; an undefined one is worth the least."""
    signed = -value if name in LESS else value
    return signed if math.isfinite(signed) else -math.inf


def score(task: str, rows: Rows, names: Sequence[str] = ()) -> dict[str, float]:
    """Compute the metrics of a task, in float64; undefined ones (a constant's rank) are nan.

    The first one that the data allow is the primary one: of classify accuracy, macro_f1, nll, top5;
    of multilabel mAP, micro_f1, macro_f1; of regress spearman, pearson, mse; of tag entity_f1,
    token_accuracy; of mlm nll, accuracy, perplexity.
    `names` are the label names: a tag task whose names are BIO tags gets entity F1.
    """
    if task == "tag":
        entity = {"entity_f1": ratio(entity_counts(rows, names))} if is_bio(names) else {}
        return entity | {"token_accuracy": ratio(token_counts(rows))}
    by_task = {"classify": _classify, "multilabel": _multilabel, "regress": _regress, "mlm": _mlm}
    return by_task[task](rows)


def _classify(rows: Rows) -> dict[str, float]:
    logits, label = rows["logits"].astype(np.float64), rows["label"]
    guess = logits.argmax(-1)
    log_probs = special.log_softmax(logits, axis=-1)
    found = {
        "accuracy": float(np.mean(guess == label)),
        "macro_f1": float(f1_score(label, guess, average="macro")),
        "nll": float(-np.mean(np.take_along_axis(log_probs, label[:, None], -1))),
    }
    if logits.shape[-1] > 5:
        best = np.argsort(-logits, axis=-1, kind="stable")[:, :5]
        found["top5"] = float(np.mean((best == label[:, None]).any(-1)))
    return found


def mean_average_precision(logits: Num[np.ndarray, "n c"], label: Num[np.ndarray, "n c"]) -> float:
    """Average over the classes that have a positive example: the others have no precision.

    A class's is the mean, over its positives, of the precision down to their score, ties included.
    """
    order = np.argsort(-logits, axis=0)
    ranked, hit = (np.take_along_axis(x, order, 0) for x in (logits, label > 0))
    place = np.arange(len(logits))[:, None]
    ends = np.r_[ranked[1:] != ranked[:-1], np.ones((1, logits.shape[1]), bool)]
    end = np.minimum.accumulate(np.where(ends, place, len(logits))[::-1])[::-1]
    precision = np.take_along_axis(hit.cumsum(0) / (place + 1), end, 0)
    positives = hit.sum(0)
    each = (precision * hit).sum(0)[positives > 0] / positives[positives > 0]
    return float(np.mean(each)) if len(each) else math.nan


def _multilabel(rows: Rows) -> dict[str, float]:
    # A label is predicted where its probability is over one half: where its logit is positive.
    guess, label = rows["logits"] > 0, rows["label"] > 0
    found = {"mAP": mean_average_precision(rows["logits"].astype(np.float64), rows["label"])}
    for kind in ("micro", "macro"):
        found[f"{kind}_f1"] = float(f1_score(label, guess, average=kind, zero_division=0))
    return found


def spearman(one: Num[np.ndarray, " n"], other: Num[np.ndarray, " n"]) -> float:
    """Correlate ranks; nan if either side is constant."""
    ranks = stats.rankdata([one, other], axis=1)
    return float(np.corrcoef(ranks)[0, 1]) if np.ptp(ranks, axis=1).min() > 0 else math.nan


def _regress(rows: Rows) -> dict[str, float]:
    guess, label = rows["logits"].astype(np.float64), rows["label"].astype(np.float64)
    rank = spearman(guess, label)
    pearson = math.nan if math.isnan(rank) else float(stats.pearsonr(guess, label).statistic)
    return {"spearman": rank, "pearson": pearson, "mse": float(np.mean((guess - label) ** 2))}


def _mlm(rows: Rows) -> dict[str, float]:
    nll, accuracy = (ratio(np.stack([rows[k], rows["count"]], -1)) for k in ("loss", "correct"))
    # exp overflows past 709: a diverged model has an infinite perplexity, not an error.
    perplexity = math.exp(nll) if nll < 709 else math.inf
    return {"nll": nll, "accuracy": accuracy, "perplexity": perplexity}


def is_bio(names: Sequence[str]) -> bool:
    """Tell whether label names are BIO tags of entities."""
    return bool(names) and all(name == "O" or name[:2] in ("B-", "I-") for name in names)


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Read BIO tags as (type, first, last) spans; an I- that continues nothing opens one.

    Source: conlleval, the script of CoNLL-2000 and 2003.
    """
    spans, kind, first = set(), "", 0
    for position, tag in enumerate([*tags, "O"]):
        prefix, _, own = tag.partition("-")
        if kind and (prefix != "I" or own != kind):
            spans.add((kind, first, position - 1))
            kind = ""
        if own and not kind:
            kind, first = own, position
    return spans


def entity_counts(rows: Rows, names: Sequence[str]) -> Int[np.ndarray, "n 2"]:
    """Count per sentence twice the right entities, and those predicted plus those true.

    The ratio of the sums is F1.
    """
    counts = []
    for guess, label in zip(rows["prediction"], rows["label"], strict=True):
        kept = label >= 0  # later pieces of a word, and padding, carry -1
        mine, true = (entities([names[i] for i in ids[kept]]) for ids in (guess, label))
        counts.append((2 * len(mine & true), len(mine) + len(true)))
    return np.array(counts)


def token_counts(rows: Rows, names: Sequence[str] = ()) -> Int[np.ndarray, "n 2"]:
    """Count per sentence the tokens that are right and all that have a label."""
    kept = rows["label"] >= 0
    return np.stack([(kept & (rows["prediction"] == rows["label"])).sum(-1), kept.sum(-1)], -1)


def ratio(counts: Num[np.ndarray, "n 2"]) -> float:
    """Divide summed columns, in float64."""
    part, whole = counts.sum(0, dtype=np.float64)
    return float(part / max(whole, 1))


def wilson(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Bound a proportion.  Source: Wilson 1927, the score interval."""
    low, high = stats.binomtest(successes, trials).proportion_ci(level, method="wilson")
    return float(low), float(high)


def bootstrap(
    arrays: Sequence[Shaped[np.ndarray, "n ..."]],
    statistic: Callable[..., float],
    seed: int = 0,
    n: int = 2000,
) -> tuple[float, float]:
    """Bound a statistic by the middle 95 % of n resamples of the rows; undefined ones drop out."""
    numbers, size = np.random.default_rng(seed), len(arrays[0])
    picks = (numbers.integers(size, size=size) for _ in range(n))
    found = np.array([statistic(*(array[pick] for array in arrays)) for pick in picks])
    found = found[np.isfinite(found)]
    low, high = np.quantile(found, [0.025, 0.975]) if len(found) else (math.nan, math.nan)
    return float(low), float(high)


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Bound the mean over seeds by Student's t; one seed bounds nothing (nan)."""
    size, mean = len(values), float(np.mean(values))
    half = stats.t.ppf((1 + level) / 2, size - 1) * stats.sem(values) if size > 1 else math.nan
    return float(mean - half), float(mean + half)


class Logger:
    """Scalars to metrics.jsonl, event files, and stdout: a bar (terminal) or plain lines.

    `resumed` is the restored step: what was logged after it is dropped, so that every step is
    there once; with `again` so are the evaluations at it.  None starts empty.  Only the first
    process writes.  For an object store they are kept on this disk, until `flush`.
    """

    def __init__(self, workdir: Name, total: int, resumed: int | None = None, again: bool = False):
        # Not at the top: it imports torch where torch is installed, which takes seconds.
        from tensorboardX import SummaryWriter

        self._active = jax.process_index() == 0
        self._total, self._start = total, (resumed or 0, time.monotonic())
        if self._active:
            self._folder = storage.place(workdir)
            storage.make_folder(self._folder)
            self._local = storage.fetched(self._folder, METRICS)
            last = -1 if resumed is None else resumed
            self._repeated = {total, last} if again else {total}
            self._file = open(self._local / METRICS, "a+")  # noqa: SIM115
            self._file.seek(0)
            # Steps only grow, so what is kept is a prefix; a line that a kill cut off goes too.
            whole = [line for line in self._file if line.endswith("\n")]
            kept = [x for x in whole if json.loads(x)["step"] <= last and not self._ends(x)]
            self._file.truncate(sum(map(len, kept)))
            self._events = SummaryWriter(str(self._local / EVENTS), purge_step=last + 1)
            plain, first = not sys.stdout.isatty(), self._start[0]
            self._bar = tqdm(total=total, initial=first, file=sys.stdout, disable=plain)

    def _ends(self, line: str) -> bool:
        """Tell whether a line is of an evaluation that a resumed run repeats: that at the end."""
        row = json.loads(line)
        return row["step"] in self._repeated and any("/" in name for name in row)

    def advance(self, step: int) -> None:
        """Move the bar; costs nothing elsewhere."""
        if self._active:
            self._bar.update(step - self._bar.n)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Record scalars of one step; values that are not finite are null in the JSON."""
        if not self._active:
            return
        scalars = {name: float(value) for name, value in values.items()}
        finite = {name: x if math.isfinite(x) else None for name, x in scalars.items()}
        print(json.dumps({"step": step, "time": round(time.time(), 3)} | finite), file=self._file)
        self._file.flush()
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)
        text = "  ".join(f"{name} {value:.5g}" for name, value in scalars.items())
        self.advance(step)
        self._bar.set_postfix_str(text)
        if self._bar.disable:
            first, began = self._start
            left = (time.monotonic() - began) / max(step - first, 1) * (self._bar.total - step)
            eta = tqdm.format_interval(left)
            print(f"step {step}/{self._bar.total}  {text}  eta {eta}", flush=True)

    def flush(self) -> None:
        """Bring all that was written to where the run is kept."""
        if self._active and storage.in_store(self._folder):
            storage.upload(self._local, self._folder, METRICS, EVENTS)

    def close(self) -> None:
        """Close what is on this disk, and flush if a store lets it; safe to call twice."""
        if self._active:
            self._events.close()
            with suppress(*storage.refusals()):
                self.flush()
            self._active = False
            self._file.close()
            self._bar.close()


_Row = make_dataclass("_Row", ["path", "shape", "dtype", "role", "spec"])


def parameter_table(
    tree: Tree, roles: Tree, specs: Tree | None = None, unread: Sequence[str] = ()
) -> str:
    """Render every leaf with its role and sharding spec, and totals per role.

    Paths in `unread` have the role "unread": nothing reads them, so they stay frozen.
    """
    leaves, role_of = flatten(tree), flatten(roles) | dict.fromkeys(unread, "unread")
    axes = {path: ", ".join(map(str, spec)) for path, spec in flatten(specs or {}).items()}
    rows = [
        _Row(path, str(leaf.shape), str(leaf.dtype), role_of[path], axes.get(path, ""))
        for path, leaf in leaves.items()
    ]
    return f"{parameter_overview.make_table(rows)}\n{role_counts(tree, roles, unread)}"


def role_counts(tree: Tree, roles: Tree, unread: Sequence[str] = ()) -> str:
    """Count parameters, bytes and leaves of each role that there is, one role a line."""
    leaves, role_of = flatten(tree), flatten(roles) | dict.fromkeys(unread, "unread")
    lines = []
    for role in ("train", "track", "freeze", "unread"):
        mine = [leaf for path, leaf in leaves.items() if role_of[path] == role]
        size = sum(leaf.size for leaf in mine)
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in mine)
        text = f"{role}: {size:,} parameters, {held:,} bytes, {len(mine)} leaves"
        lines += [text] if mine else []
    return "\n".join([*lines, *batch_norm_policy(tree, role_of)])


def batch_norm_policy(tree: Tree, role_of: Mapping[str, str]) -> list[str]:
    """Say what BatchNorm does; nothing for a model without it."""
    kept = "fixed_stats" if "fixed_stats" in tree else "batch_stats"
    norms = {path.rpartition("/")[0] for path in flatten(tree.get(kept, {}))}
    if not norms:
        return []
    learned = sum(role_of.get(f"params/{path}/scale") == "train" for path in norms)
    statistics = "frozen" if kept == "fixed_stats" else "tracked"
    return [f"BatchNorm: statistics {statistics}, {learned} of {len(norms)} norms trained"]
