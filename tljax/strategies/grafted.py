"""Strategies that graft new leaves onto frozen layers, or store those in fewer bits."""

from collections.abc import Mapping
from typing import Any, Literal

from tljax.config import Above, Positive
from tljax.edits import lora as low_rank
from tljax.edits.adapter import LAST, Adapters
from tljax.edits.prompt import Prefix, SoftPrompt, VisualPrompts
from tljax.edits.quantize import Form, Quantize
from tljax.edits.rescale import Rescale, ScaleAndShift
from tljax.edits.targets import kernel_of, kinds_of, modules_of, targets_of
from tljax.optim import Group
from tljax.quantized import BLOCK
from tljax.strategies.strategy import Globs, Strategy, blocks_read, chosen, in_blocks, with_head
from tljax.tree import flatten, matches, require_live, subtrees
from tljax.types import BadInput, Tree


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
) -> Strategy:
    """Train low-rank updates of the target kernels, and the head.

    Targets are dense, conv and embed layers: by default query and value, as in the paper, and in
    a ResNet the blocks' convolutions; every dense kernel is the stronger choice.  Heads, and blocks
    above the last one read, are not grafted.  rank_pattern, alpha_pattern: glob -> another value.
    use_rslora: scale by alpha / sqrt(rank).  use_dora: learn the columns' lengths apart.  b_rate:
    b's multiple of the learning rate (LoRA+, whose paper has 16).  bias: which biases train too.

    Source: Hu et al. 2021, arXiv 2106.09685; Kalajdzievski 2023, arXiv 2312.03732 (rsLoRA); Liu et
    al. 2024, arXiv 2402.09353 (DoRA); Hayou et al. 2024, arXiv 2402.12354 (LoRA+).
    Raises: BadInput for targets it cannot serve, a dead pattern, or a rank above a kernel's side.
    """
    paths = factors(tree, last_read, targets, "LoRA")
    ranks, alphas = rank_pattern or {}, alpha_pattern or {}
    require_live(tuple(ranks.items()), paths, "rank_pattern")
    require_live(tuple(alphas.items()), paths, "alpha_pattern")

    def target(path: str) -> low_rank.Target:
        own, top = by_pattern(path, ranks, rank), by_pattern(path, alphas, alpha)
        return low_rank.Target(path, own, top / (own**0.5 if use_rslora else own))

    edit = low_rank.Graft(tuple(map(target, paths)), dropout, init, use_dora)
    learned = ("a", "b", *["magnitude"] * use_dora)
    trained = [f"{path}/lora/{name}" for path in paths for name in learned]
    biased = {"none": [], "all": ["params"], "lora_only": paths}[bias]
    below = tuple(f"{path}/" for path in biased)
    trained += [p for p in flatten(tree) if p.endswith("/bias") and p.startswith(below)]
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
    return with_head(tree, trained, [edit], constants, groups)


def vera(
    tree: Tree,
    last_read: str | None,
    rank: int = 256,
    dropout: float = 0.0,
    targets: Globs | None = None,
    start: float = 0.1,
) -> Strategy:
    """Train two vectors around random low-rank factors that all targets share, and the head.

    start: of the vector between the factors.
    Source: Kopiczko et al. 2023, arXiv 2310.11454.
    """
    usual = ("params/**/query", "params/**/value")
    paths = chosen(tree, last_read, targets or usual, "VeRA", ("dense",))
    made = tuple(low_rank.Target(path, rank, 1.0) for path in paths)
    edit = low_rank.GraftVectors(made, dropout, start)
    trained = [f"{path}/lora/{name}" for path in paths for name in ("inner", "outer")]
    still = ("a", "b", *low_rank.constants(1.0, dropout))
    constants = [f"{path}/lora/{name}" for path in paths for name in still]
    return with_head(tree, trained, [edit], constants)


def ia3(
    tree: Tree,
    last_read: str | None,
    targets: Globs = ("params/**/key", "params/**/value"),
    feedforward: Globs = ("params/**/down",),
) -> Strategy:
    """Train vectors that rescale keys, values and the inner activations of the MLPs, and the head.

    targets: layers whose outputs are rescaled; feedforward: those whose inputs are.
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
    return with_head(tree, trained, [Rescale(inputs, outputs)])


def ssf(tree: Tree, last_read: str | None, targets: Globs | None = None) -> Strategy:
    """Train a scale and a shift after every layer that has a bias to fold it into, and the head.


    Source: Lian et al. 2022, arXiv 2210.08823.
    """
    nodes, serves = subtrees(tree), ("dense", "conv", "norm")
    found = chosen(tree, last_read, targets or ("params/**",), "SSF", serves)
    paths = [path for path in found if targets or "bias" in nodes[path]]
    trained = [f"{path}/rescale/*" for path in paths]
    return with_head(tree, trained, [ScaleAndShift(tuple(paths))])


def adapter(
    tree: Tree,
    last_read: str | None,
    targets: tuple[Literal["attention", "mlp"], ...] = ("attention", "mlp"),
    place: Literal["serial", "parallel"] = "serial",
    width: int | None = None,
    activation: Literal["relu", "swish"] = "swish",
    scale: float = 1.0,
) -> Strategy:
    """Train bottlenecks behind or beside attention and MLP, and the head.

    The default is Houlsby's, whose norms train too if norm is composed with it.  Pfeiffer's place
    and activation are targets=("mlp",) and relu; his reads the normed sum with the residual, this
    one what the MLP gives.  AdaptFormer's has targets=("mlp",), place="parallel", width=64, relu
    and scale=0.1.  width: of the bottleneck; None is the model's / 16.
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
    return with_head(tree, trained, [edit], [f"{path}/scale" for path in grafted])


def vpt(tree: Tree, last_read: str | None, count: int = 10, deep: bool = True) -> Strategy:
    """Train tokens that a ViT reads beside its own, and the head.

    deep: new ones for every block, else for the first.
    Source: Jia et al. 2022, arXiv 2203.12119.
    """
    require(tree, "patch", "vpt is for a ViT (for texts: prompt, prefix)")
    blocks = tuple(blocks_read(tree, last_read)[: None if deep else 1])
    return with_head(tree, [f"{b}/prompt" for b in blocks], [VisualPrompts(blocks, count)])


def prompt(tree: Tree, last_read: str | None, count: int = 10) -> Strategy:
    """Train tokens in front of every text, and the head.

    count: of tokens.
    Source: Lester et al. 2021, arXiv 2104.08691.
    """
    require(tree, "word", "prompt is for a BERT (for images: vpt)")
    return with_head(tree, ["params/embed/prompt"], [SoftPrompt(count)])


def prefix(tree: Tree, last_read: str | None, count: int = 30) -> Strategy:
    """Train keys and values that every attention reads before its own, and the head.

    count: of pairs in each.
    Source: Li and Liang 2021, arXiv 2101.00190.
    """
    found = modules_of(tree, ("attention",), "prefix", ("key", "value", "out"))
    paths = in_blocks(tree, last_read, found)
    trained = [f"{path}/prefix/{name}" for path in paths for name in ("key", "value")]
    skipped = ["params/embed/skipped"] * ("word" in tree["params"]["embed"])
    return with_head(tree, trained, [Prefix(tuple(paths), count)], skipped)


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
