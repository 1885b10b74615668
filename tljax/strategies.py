"""What transfer is made of: a strategy is edits that build the tree and roles for its leaves.

Every strategy is a function of the (abstract) tree it will be applied to, so its own rules are
never dead; several are composed into one.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from flax import struct

from tljax.config import Above, Positive
from tljax.edits import lora as low_rank
from tljax.edits.adapter import LAST, Adapters
from tljax.edits.anchor import Anchor, Teach
from tljax.edits.prompt import Prefix, SoftPrompt, VisualPrompts
from tljax.edits.quantize import Form, Quantize
from tljax.edits.rescale import Rescale, ScaleAndShift
from tljax.edits.targets import kernel_of, kinds_of, modules_of, targets_of
from tljax.objectives import distill, quadratic
from tljax.optim import Group
from tljax.quantized import BLOCK
from tljax.tree import flatten, matches, nearest, require_live, subtrees, unflatten
from tljax.types import BadInput, Edit, Key, Objective, Reading, Rules, Tree

HEADS = ("params/head", "params/head_dist", "params/mlm")
Globs = tuple[str, ...]
Statistics = Literal["frozen", "tracked"]


class Start(NamedTuple):
    """What a run starts from, for the strategies that keep some of it.

    loaded: the paths of its leaves that the model has.  head: returns its own one where the model
    has another, else None.  fisher: reads its Fisher information, by path, from a file or from
    beside it.
    """

    origin: str
    loaded: frozenset[str]
    head: Callable[[], Mapping[str, Any] | None]
    fisher: Callable[[str | None], Mapping[str, Any]]


@dataclass(frozen=True)
class Strategy:
    """Edits in order, roles by rule, optimizer groups by rule, and loss terms to add.

    copies: edits that copy what was loaded, and so come before all others.  readings: terms that
    read the model's own forward pass.  anchor: makes an edit of the paths that are trained; what it
    adds is frozen.  statistics: whether BatchNorm goes on learning them; None leaves it to those it
    is composed with.  policy: whether it comes before the others, wherever it is listed.  loads:
    whether it starts from the pretrained weights.
    """

    edits: tuple[Edit, ...] = ()
    copies: tuple[Edit, ...] = ()
    roles: Rules = ()
    groups: Rules = ()
    terms: tuple[Objective, ...] = ()
    readings: tuple[Reading, ...] = ()
    anchor: Callable[[Sequence[str]], Edit] | None = None
    statistics: Statistics | None = None
    policy: bool = False
    loads: bool = True


@struct.dataclass
class FixStatistics:
    """Stop BatchNorm from learning statistics: `{batch_stats}  ->  {fixed_stats}`."""

    def __call__(self, tree: Tree, key: Key) -> Tree:
        """Return the tree with its statistics in the collection that norms only read."""
        return {("fixed_stats" if k == "batch_stats" else k): leaf for k, leaf in tree.items()}


@struct.dataclass
class Average:
    """Start an exponential moving average of the trained leaves: `{a, b}  ->  {a, b, ema: {a}}`."""

    paths: tuple[str, ...] = struct.field(pytree_node=False)

    def __call__(self, tree: Tree, key: Key) -> Tree:
        """Return the tree with a copy of the leaves at `paths` below `ema`."""
        leaves = flatten(tree)
        return tree | {"ema": unflatten({path: leaves[path] for path in self.paths})}


def compose(tree: Tree, parts: Sequence[Strategy]) -> Strategy:
    """Make one strategy of several, in order: of their rules the first that matches decides.

    Rules that freeze come first: they are for leaves that are no parameters, or that someone asked
    for.  BatchNorm's statistics are frozen unless a strategy says otherwise, the first that does.

    Raises: BadInput if two of them anchor the weights.
    """
    usual: Statistics = "frozen"
    parts = sorted(parts, key=lambda part: not part.policy)
    statistics = next((part.statistics for part in parts if part.statistics), usual)
    edits = [edit for part in parts for edit in part.copies]
    edits += [edit for part in parts for edit in part.edits]
    roles = [rule for part in parts for rule in part.roles]
    if len(anchors := [part.anchor for part in parts if part.anchor]) > 1:
        raise BadInput("two strategies anchor the weights: choose one of l2_sp and ewc")
    if "batch_stats" in tree:
        edits += [FixStatistics()] if statistics == "frozen" else []
        roles += [("batch_stats/**", "track")] if statistics == "tracked" else []
    return Strategy(
        edits=tuple(edits),
        roles=tuple(sorted(roles, key=lambda rule: rule[1] != "freeze")),
        groups=tuple(rule for part in parts for rule in part.groups),
        terms=tuple(term for part in parts for term in part.terms),
        readings=tuple(reading for part in parts for reading in part.readings),
        anchor=anchors[0] if anchors else None,
        statistics=statistics if "batch_stats" in tree else None,
        loads=all(part.loads for part in parts),
    )


def make(
    tree: Tree,
    last_read: str | None,
    chosen: Sequence[tuple[str, Mapping[str, Any]]],
    start: Start | None = None,
) -> Strategy:
    """Apply named strategies with their options to a tree, and compose them.

    Raises: BadInput if one keeps what a run starts from, and it starts from nothing.
    """
    parts, keeping = [], []
    for name, options in chosen:
        keeps = "source" in inspect.signature(STRATEGIES[name]).parameters
        if keeps and start is None:
            raise BadInput(f"{name} keeps what a run starts from: give it weights")
        keeping += [name] * keeps
        given = dict(options) | ({"source": start} if keeps else {})
        parts.append(STRATEGIES[name](tree, last_read, **given))
    composed = compose(tree, parts)
    if keeping and not composed.loads:
        raise BadInput(f"{keeping[0]} keeps what a run starts from, and scratch loads nothing")
    return composed


def rules(paths: Sequence[str], role: str = "train") -> Rules:
    """Give every path, or all below a path that ends in /**, a role."""
    return tuple((path, role) for path in paths)


def head(tree: Tree) -> Rules:
    """Train the heads there are."""
    paths = subtrees(tree)
    return rules([f"{path}/**" for path in HEADS if path in paths])


def faster(tree: Tree, factor: float) -> Rules:
    """Give a new head a multiple of the learning rate, since it starts from nothing.

    Source: Howard and Ruder 2018, arXiv 1801.06146, section 3.2 (discriminative fine-tuning).
    """
    return tuple((glob, Group(lr=factor)) for glob, _ in head(tree)) if factor != 1.0 else ()


def with_head(
    tree: Tree,
    head_rate: float,
    trained: Sequence[str],
    edits: Sequence[Edit] = (),
    constants: Sequence[str] = (),
    groups: Rules = (),
) -> Strategy:
    """Train these leaves and the head; what the edits add as `constants` stays."""
    roles = (*rules(constants, "freeze"), *rules(trained), *head(tree))
    return Strategy(tuple(edits), roles=roles, groups=(*groups, *faster(tree, head_rate)))


def scratch(tree: Tree, last_read: str | None) -> Strategy:
    """Train everything from random initialisation: pretraining, and the baseline of transfer."""
    return Strategy(roles=rules(["params/**"]), statistics="tracked", loads=False)


def full(
    tree: Tree, last_read: str | None, head_rate: float = 1.0, layer_decay: float = 1.0
) -> Strategy:
    """Fine-tune everything from the pretrained weights; BatchNorm statistics are tracked.

    head_rate: the head's multiple of the learning rate.  layer_decay: what a block's rate is
    multiplied by from each block to the one below; head and final norm keep the whole rate.
    Source: Bao et al. 2021, arXiv 2106.08254, appendix (layer_decay; as MAE counts layers).
    """
    decay = layered(tree, last_read, layer_decay)
    groups = (*faster(tree, head_rate), *decay)
    return Strategy(roles=rules(["params/**"]), groups=groups, statistics="tracked")


def layered(tree: Tree, last_read: str | None, decay: float) -> Rules:
    """Give block i of L the rate decay^(L - i), and what lies below the blocks decay^(L + 1)."""
    if decay == 1.0:
        return ()
    blocks = blocks_read(tree, last_read)
    below = [f"params/{name}/**" for name in ("embed", "stem") if name in tree["params"]]
    groups = [(glob, Group(lr=decay ** (len(blocks) + 1))) for glob in below]
    numbered = enumerate(blocks)
    groups += [(f"{path}/**", Group(lr=decay ** (len(blocks) - i))) for i, path in numbered]
    return tuple(groups)


def probe(tree: Tree, last_read: str | None) -> Strategy:
    """Train a linear head on frozen features."""
    return Strategy(roles=head(tree))


def attentive(tree: Tree, last_read: str | None) -> Strategy:
    """Train a head and the attention that pools for it, on frozen features.

    Source: Zhai et al. 2021, arXiv 2106.04560, section 3.2 (the MAP head that pools); trained as a
    probe by Bardes et al. 2024, arXiv 2404.08471, section 5, whose own pooling differs from it.
    Raises: BadInput if the model does not pool by attention.
    """
    if "map" not in tree["params"]:
        raise BadInput('attentive trains the attention that pools: set model.pool to "map"')
    return Strategy(roles=(*rules(["params/map/**"]), *head(tree)))


def bitfit(tree: Tree, last_read: str | None, head_rate: float = 1.0) -> Strategy:
    """Train biases and the head.  Source: Ben Zaken et al. 2021, arXiv 2106.10199.

    head_rate: the head's multiple of the learning rate.
    """
    biases = [path for path in flatten(tree) if path.endswith("/bias")]
    return with_head(tree, head_rate, biases)


def norm(tree: Tree, last_read: str | None, head_rate: float = 1.0) -> Strategy:
    """Train the scales and biases of norms, and the head.

    head_rate: the head's multiple of the learning rate.
    Source: Frankle et al. 2020, arXiv 2003.00152 (BatchNorm); Qi et al. 2022, arXiv 2211.08682.
    """
    norms = [f"{path}/**" for path, kind in kinds_of(tree).items() if kind == "norm"]
    return with_head(tree, head_rate, norms)


def surgical(
    tree: Tree, last_read: str | None, leaves: Globs = ("params/**",), head_rate: float = 1.0
) -> Strategy:
    """Train the leaves that these globs name, and the head.

    head_rate: the head's multiple of the learning rate.
    Source: Lee et al. 2022, arXiv 2210.11466.
    Raises: BadInput for a glob that names no leaf.
    """
    require_live(rules(leaves), flatten(tree))
    return with_head(tree, head_rate, leaves)


def batch_norm(
    tree: Tree, last_read: str | None, policy: Literal["frozen", "tracked", "trained"] = "frozen"
) -> Strategy:
    """Say what BatchNorm does, whatever the strategies beside it say.

    frozen: statistics, scales and biases stay.  tracked: statistics follow the batches.  trained:
    scales and biases are trained as well.
    Raises: BadInput for a model without BatchNorm.
    """
    if "batch_stats" not in tree:
        raise BadInput("batch_norm is for models with BatchNorm: this one has no batch_stats")
    norms = dict.fromkeys(path.rpartition("/")[0] for path in flatten(tree["batch_stats"]))
    mine = [f"params/{path}/*" for path in norms]
    roles = {"frozen": rules(mine, "freeze"), "tracked": (), "trained": rules(mine)}[policy]
    statistics: Statistics = "frozen" if policy == "frozen" else "tracked"
    return Strategy(roles=roles, statistics=statistics, policy=True)


def blocks_read(tree: Tree, last_read: str | None) -> list[str]:
    """List the addresses of the blocks up to and including `read`, in order."""
    numbers = sorted(int(name) for name in tree["params"]["blocks"])
    if last_read is not None:
        numbers = numbers[: numbers.index(int(last_read.rsplit("/", 1)[-1])) + 1]
    return [f"params/blocks/{number}" for number in numbers]


def is_read(path: str, tree: Tree, last_read: str | None) -> bool:
    """Tell whether a module is no head and lies in no block above `read`."""
    below = tuple(f"{block}/" for block in blocks_read(tree, last_read))
    return path.startswith(below) or not path.startswith(("params/blocks/", *HEADS))


def in_blocks(tree: Tree, last_read: str | None, found: Sequence[str]) -> list[str]:
    """Keep the modules of the blocks that are read."""
    below = tuple(f"{block}/" for block in blocks_read(tree, last_read))
    return [path for path in found if path.startswith(below)]


def chosen(
    tree: Tree, last_read: str | None, globs: Globs, method: str, serves: Sequence[str]
) -> list[str]:
    """List the targets that are read.

    Raises: BadInput for a glob that names nothing the method serves, or if none is read.
    """
    found = targets_of(tree, globs, method, serves)
    if all(path.startswith(HEADS) for path in found):
        raise BadInput(f"{method} target {globs} names heads alone, which are trained whole")
    if not (mine := [path for path in found if is_read(path, tree, last_read)]):
        raise BadInput(f"no {method} target of {globs} lies at or below read={last_read!r}")
    return mine


def last_k(tree: Tree, last_read: str | None, k: int = 2, head_rate: float = 1.0) -> Strategy:
    """Train the last k blocks that are read, the final norm and the head.

    head_rate: the head's multiple of the learning rate.
    Raises: BadInput if k is more than the blocks there are.
    """
    blocks = blocks_read(tree, last_read)
    if k > len(blocks):
        raise BadInput(f"last_k: k={k} exceeds the {len(blocks)} blocks that are read")
    top = [f"{block}/**" for block in blocks[len(blocks) - k :]]
    return with_head(tree, head_rate, [*top, *["params/norm/**"] * ("norm" in tree["params"])])


def factors(tree: Tree, last_read: str | None, globs: Globs | None, method: str) -> list[str]:
    """List where low-rank factors go: by default to query and value, or else to every conv."""
    if globs is None:
        attends = any(path.endswith("/query") for path in subtrees(tree))
        usual = ("params/**/query", "params/**/value") if attends else ("params/blocks/*/conv*",)
        return chosen(tree, last_read, usual, method, low_rank.SERVES)
    return chosen(tree, last_read, globs, method, low_rank.SERVES)


def by_pattern(path: str, pattern: Mapping[str, Any], usual: Any) -> Any:
    """Return the value of the first glob that matches a path."""
    return next((value for glob, value in pattern.items() if matches(glob, path)), usual)


def lora(
    tree: Tree,
    last_read: str | None,
    rank: int = 8,
    alpha: Above = 16.0,
    dropout: float = 0.0,
    targets: Globs | None = None,
    rank_pattern: dict[str, Positive] | None = None,
    alpha_pattern: dict[str, Above] | None = None,
    init: low_rank.Init = "zero",
    use_rslora: bool = False,
    use_dora: bool = False,
    b_rate: float = 1.0,
    bias: Literal["none", "all", "lora_only"] = "none",
    head_rate: float = 1.0,
) -> Strategy:
    """Train low-rank updates of the target kernels, and the head.

    Targets are dense, conv and embed layers: by default query and value, as in the paper, and in
    a ResNet the blocks' convolutions; every dense kernel is the stronger choice.  Heads, and blocks
    above the last one read, are not grafted.  rank_pattern, alpha_pattern: glob -> another value.
    use_rslora: scale by alpha / sqrt(rank).  use_dora: learn the columns' lengths apart.  b_rate:
    b's multiple of the learning rate (LoRA+, whose paper has 16).  bias: which biases train too.
    head_rate: the head's multiple of the learning rate.
    Source: Hu et al. 2021, arXiv 2106.09685; Kalajdzievski 2023, arXiv 2312.03732 (rsLoRA); Liu et
    al. 2024, arXiv 2402.09353 (DoRA); Hayou et al. 2024, arXiv 2402.12354 (LoRA+).
    Raises: BadInput for targets it cannot serve, a dead pattern, or a rank above a kernel's side.
    """
    paths = factors(tree, last_read, targets, "LoRA")
    ranks, alphas = rank_pattern or {}, alpha_pattern or {}
    for name, pattern in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        for glob in pattern:
            if not any(matches(glob, path) for path in paths):
                raise BadInput(
                    f"{name} {glob!r} matches no target; nearest: {nearest(glob, paths)}"
                )

    def target(path: str) -> low_rank.Target:
        own, top = by_pattern(path, ranks, rank), by_pattern(path, alphas, alpha)
        return low_rank.Target(path, own, top / (own**0.5 if use_rslora else own))

    edit = low_rank.Graft(tuple(map(target, paths)), dropout, init, use_dora)
    learned = ("a", "b", *["magnitude"] * use_dora)
    trained = [f"{path}/lora/{name}" for path in paths for name in learned]
    biased = {"none": [], "all": ["params"], "lora_only": paths}[bias]
    present = [path for path in flatten(tree) if path.endswith("/bias")]
    below = tuple(f"{path}/" for path in biased)
    trained += [path for path in present if path.startswith(below)] if below else []
    kinds = kinds_of(tree)
    standardised = [path for path in paths if kinds[path] == "standardised conv"]
    if standardised and (use_dora or dropout):
        raise BadInput(
            f"{standardised[0]} is a standardised conv layer, whose factors fold into the kernel "
            "before that: it takes LoRA without use_dora and dropout"
        )
    # Of an embedding's factors it is a that starts at zero; as in PEFT neither is faster.
    faster_b = [path for path in paths if b_rate != 1.0 and kinds[path] != "embed"]
    groups = [(f"{path}/lora/b", Group(lr=b_rate)) for path in faster_b]
    still = low_rank.constants(1.0, dropout)
    constants = [f"{path}/lora/{name}" for path in paths for name in still]
    return with_head(tree, head_rate, trained, [edit], constants, groups)


def vera(
    tree: Tree,
    last_read: str | None,
    rank: int = 256,
    dropout: float = 0.0,
    targets: Globs | None = None,
    start: float = 0.1,
    head_rate: float = 1.0,
) -> Strategy:
    """Train two vectors around random low-rank factors that all targets share, and the head.

    start: of the vector between the factors.  head_rate: the head's multiple of the learning rate.
    Source: Kopiczko et al. 2023, arXiv 2310.11454.
    """
    usual = ("params/**/query", "params/**/value")
    paths = chosen(tree, last_read, targets or usual, "VeRA", ("dense",))
    made = tuple(low_rank.Target(path, rank, 1.0) for path in paths)
    edit = low_rank.GraftVectors(made, dropout, start)
    trained = [f"{path}/lora/{name}" for path in paths for name in ("inner", "outer")]
    still = ("a", "b", *low_rank.constants(1.0, dropout))
    constants = [f"{path}/lora/{name}" for path in paths for name in still]
    return with_head(tree, head_rate, trained, [edit], constants)


def ia3(
    tree: Tree,
    last_read: str | None,
    targets: Globs = ("params/**/key", "params/**/value"),
    feedforward: Globs = ("params/**/down",),
    head_rate: float = 1.0,
) -> Strategy:
    """Train vectors that rescale keys, values and the inner activations of the MLPs, and the head.

    targets: layers whose outputs are rescaled; feedforward: those whose inputs are.  head_rate: the
    head's multiple of the learning rate.
    Source: Liu et al. 2022, arXiv 2205.05638, section 3.3.
    """
    serves = ("dense", "conv")
    inputs, outputs = (
        tuple(chosen(tree, last_read, globs, "(IA)3", serves)) if globs else ()
        for globs in (feedforward, targets)
    )
    if not (inputs or outputs):
        raise BadInput("(IA)3 has no targets: name some by targets or by feedforward")
    if both := sorted(set(inputs) & set(outputs)):
        raise BadInput(f"(IA)3: {both[0]} is named by targets and by feedforward: choose one")
    trained = [f"{path}/rescale/*" for path in (*inputs, *outputs)]
    return with_head(tree, head_rate, trained, [Rescale(inputs, outputs)])


def ssf(
    tree: Tree, last_read: str | None, targets: Globs | None = None, head_rate: float = 1.0
) -> Strategy:
    """Train a scale and a shift after every layer that has a bias to fold it into, and the head.

    head_rate: the head's multiple of the learning rate.
    Source: Lian et al. 2022, arXiv 2210.08823.
    """
    serves = ("dense", "conv", "norm")
    nodes = subtrees(tree)
    paths = chosen(tree, last_read, targets or ("params/**",), "SSF", serves)
    paths = [path for path in paths if targets or "bias" in nodes[path]]
    trained = [f"{path}/rescale/*" for path in paths]
    return with_head(tree, head_rate, trained, [ScaleAndShift(tuple(paths))])


def adapter(
    tree: Tree,
    last_read: str | None,
    targets: tuple[Literal["attention", "mlp"], ...] = ("attention", "mlp"),
    place: Literal["serial", "parallel"] = "serial",
    width: int | None = None,
    activation: Literal["relu", "swish"] = "swish",
    scale: float = 1.0,
    head_rate: float = 1.0,
) -> Strategy:
    """Train bottlenecks behind or beside attention and MLP, and the head.

    The default is Houlsby's, whose norms train too if norm is composed with it.  Pfeiffer's place
    and activation are targets=("mlp",) and relu; his reads the normed sum with the residual, this
    one what the MLP gives.  AdaptFormer's has targets=("mlp",), place="parallel", width=64, relu
    and scale=0.1.  width: of the bottleneck; None is the model's / 16.  head_rate: the head's
    multiple of the learning rate.
    Source: Houlsby et al. 2019, arXiv 1902.00751; Pfeiffer et al. 2020, arXiv 2005.00247; He et al.
    2021, arXiv 2110.04366; Chen et al. 2022, arXiv 2205.13535.
    """
    ends = {name: [LAST[name]] for name in targets}
    found = [p for name in targets for p in modules_of(tree, (name,), "adapter", ends[name])]
    paths = tuple(in_blocks(tree, last_read, found))
    if not paths:
        raise BadInput("adapter has no targets: name attention, mlp or both")
    if width is None:
        width = max(subtrees(tree)[paths[0]][LAST[targets[0]]]["bias"].shape[0] // 16, 1)
    edit = Adapters(paths, width, place, activation, scale)
    grafted = [f"{path}/{place}/{activation}" for path in paths]
    trained = [f"{path}/{name}/*" for path in grafted for name in ("down", "up")]
    return with_head(tree, head_rate, trained, [edit], [f"{path}/scale" for path in grafted])


def vpt(
    tree: Tree, last_read: str | None, count: int = 10, deep: bool = True, head_rate: float = 1.0
) -> Strategy:
    """Train tokens that a ViT reads beside its own, and the head.

    deep: new ones for every block, else for the first.  head_rate: the head's multiple of the
    learning rate.
    Source: Jia et al. 2022, arXiv 2203.12119.
    """
    require(tree, "patch", "vpt is for a ViT (for texts: prompt, prefix)")
    blocks = tuple(blocks_read(tree, last_read)[: None if deep else 1])
    return with_head(
        tree, head_rate, [f"{b}/prompt" for b in blocks], [VisualPrompts(blocks, count)]
    )


def prompt(tree: Tree, last_read: str | None, count: int = 10, head_rate: float = 1.0) -> Strategy:
    """Train tokens in front of every text, and the head.

    count: of tokens.  head_rate: the head's multiple of the learning rate.
    Source: Lester et al. 2021, arXiv 2104.08691.
    """
    require(tree, "word", "prompt is for a BERT (for images: vpt)")
    return with_head(tree, head_rate, ["params/embed/prompt"], [SoftPrompt(count)])


def prefix(tree: Tree, last_read: str | None, count: int = 30, head_rate: float = 1.0) -> Strategy:
    """Train keys and values that every attention reads before its own, and the head.

    count: of pairs in each.  head_rate: the head's multiple of the learning rate.
    Source: Li and Liang 2021, arXiv 2101.00190.
    """
    found = modules_of(tree, ("attention",), "prefix", ("key", "value", "out"))
    paths = in_blocks(tree, last_read, found)
    trained = [f"{path}/prefix/{name}" for path in paths for name in ("key", "value")]
    skipped = ["params/embed/skipped"] * ("word" in tree["params"]["embed"])
    return with_head(tree, head_rate, trained, [Prefix(tuple(paths), count)], skipped)


def require(tree: Tree, name: str, what: str) -> None:
    """Raise BadInput if the model embeds no such thing."""
    if name not in tree["params"].get("embed", {}):
        raise BadInput(f"{what}: this model has no params/embed/{name}")


def quantize(
    tree: Tree, last_read: str | None, form: Form = "nf4", targets: Globs = ("params/blocks/**",)
) -> Strategy:
    """Store the frozen dense kernels of the blocks in 8 or 4 bits: with lora before it, QLoRA.

    Source: Dettmers et al. 2023, arXiv 2305.14314; int8 by column: arXiv 2208.07339.
    Raises: BadInput for a kernel whose input does not divide into nf4's blocks of 64.
    """
    paths, nodes = targets_of(tree, targets, "quantize", ("dense",)), subtrees(tree)
    rows = {path: kernel_of(nodes, path).shape[0] for path in paths}
    if odd := [path for path in paths if form == "nf4" and rows[path] % BLOCK]:
        raise BadInput(
            f"quantize: {odd[0]} has {rows[odd[0]]} inputs, no multiple of nf4's {BLOCK}: "
            'leave it out of targets, or take form="int8"'
        )
    return Strategy((Quantize(tuple(paths), form),))


def l2_sp(
    tree: Tree, last_read: str | None, source: Start, alpha: float = 0.1, beta: float = 0.01
) -> Strategy:
    """Add alpha / 2 x squared distance from the start, and beta / 2 x that of new leaves.

    A new head is pulled to zero, what is grafted to where it begins.  Both are over the leaves that
    the strategies beside it train; in place of weight decay.
    Source: Li et al. 2018, arXiv 1802.01483, eq. 4, with the rates of its section 4.
    """

    def anchor(trained: Sequence[str]) -> Edit:
        rates = {path: alpha if path in source.loaded else beta for path in trained}
        heads = [p for p in trained if p not in source.loaded and p.startswith(HEADS)]
        return Anchor(rates, tuple(heads))

    return Strategy(terms=(quadratic,), anchor=anchor)


def ewc(
    tree: Tree, last_read: str | None, source: Start, strength: float = 1.0,
    fisher: str | None = None,
) -> Strategy:  # fmt: skip
    """Add strength / 2 x squared distance from the start, each number by its Fisher information.

    strength: the paper's lambda.  fisher: a run's folder or a file; by default the start's own.
    Source: Kirkpatrick et al. 2017, arXiv 1612.00796, eq. 3.
    Raises: BadInput if there is no such file, or none of the trained leaves was loaded.
    """
    information = source.fisher(fisher)

    def anchor(trained: Sequence[str]) -> Edit:
        if not (kept := [path for path in trained if path in source.loaded]):
            raise BadInput("ewc holds trained leaves at their start, and all of them are new")
        return Anchor({path: strength * information[path] for path in kept})

    return Strategy(terms=(quadratic,), anchor=anchor)


def lwf(
    tree: Tree, last_read: str | None, source: Start, weight: float = 1.0, temperature: Above = 2.0
) -> Strategy:
    """Keep what the start's own head says of the new data, by distillation from a frozen copy.

    The old head is trained too, as `old/head`; where the labels are the start's, it is the model's.
    Source: Li and Hoiem 2016, arXiv 1606.09282.
    Raises: BadInput if the start has no head, or one of other features than the model's.
    """
    below, own = tuple(f"{path}/" for path in HEADS), source.head()
    if own is None and not any(path.startswith(below) for path in source.loaded):
        raise BadInput(
            f"lwf keeps what the start's head says of an input, and {source.origin} has no such "
            "head: start from a run with labels, or take l2_sp"
        )
    roles = rules(["old/**"]) if own else ()
    reads = (distill(weight, temperature),)
    return Strategy(copies=(Teach(own),), roles=roles, readings=reads)


STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "scratch": scratch,
    "probe": probe,
    "attentive": attentive,
    "bitfit": bitfit,
    "norm": norm,
    "last_k": last_k,
    "surgical": surgical,
    "lora": lora,
    "vera": vera,
    "ia3": ia3,
    "ssf": ssf,
    "adapter": adapter,
    "vpt": vpt,
    "prompt": prompt,
    "prefix": prefix,
    "full": full,
    "batch_norm": batch_norm,
    "quantize": quantize,
    "l2_sp": l2_sp,
    "ewc": ewc,
    "lwf": lwf,
}
