"""Learned tokens, keys and values as tree edits: visual prompts, soft prompts, prefixes."""

import math

import jax
import jax.numpy as jnp
from flax import struct

from tljax.edits.targets import graft
from tljax.tree import subtrees
from tljax.types import BadInput, Key, Tree


@struct.dataclass
class VisualPrompts:
    """Add learned tokens to what each of these blocks reads: VPT, shallow if it is the first alone.

    `{attention, mlp}  ->  {attention, mlp, prompt: [n, d]}`

    Source: Jia et al. 2022, arXiv 2203.12119, eq. 4 to 8; the start is its code's, uniform within
    sqrt(6 / (3 * patch size + d)).
    """

    blocks: tuple[str, ...] = struct.field(pytree_node=False)
    count: int = struct.field(pytree_node=False)

    def __call__(self, tree: Tree, key: Key) -> Tree:
        """Return the tree with the prompts grafted."""
        *patch, d = tree["params"]["embed"]["patch"]["kernel"].shape
        bound = math.sqrt(6 / (math.prod(patch) + d))
        keys = jax.random.split(key, len(self.blocks))
        draw = [jax.random.uniform(k, (self.count, d), minval=-bound, maxval=bound) for k in keys]
        new = {block: {"prompt": x} for block, x in zip(self.blocks, draw, strict=True)}
        return graft(tree, new)


@struct.dataclass
class SoftPrompt:
    """Add learned tokens before the words of a text, which start as words of the vocabulary.

    `{word, position}  ->  {word, position, prompt: [n, d]}`

    Source: Lester et al. 2021, arXiv 2104.08691, sections 2 and 3.2 (sampled vocabulary).
    """

    count: int = struct.field(pytree_node=False)

    def __call__(self, tree: Tree, key: Key) -> Tree:
        """Return the tree with the prompt grafted.

        Raises: BadInput for more tokens than there are words.
        """
        words = tree["params"]["embed"]["word"]["embedding"]
        if self.count > len(words):
            raise BadInput(f"{self.count} soft prompts start as words, and there are {len(words)}")
        rows = jax.random.choice(key, len(words), (self.count,), replace=False)
        return graft(tree, {"params/embed": {"prompt": words[rows]}})


@struct.dataclass
class Prefix:
    """Add learned keys and values to every attention, which take the first positions of a text.

    `{query, key, value}  ->  {query, key, value, prefix: {key: [n, d], value: [n, d]}}`

    They start normal with deviation 0.02.  Without the paper's reparametrisation, as in P-tuning v2
    and in PEFT's default.
    Source: Li and Liang 2021, arXiv 2101.00190, section 4.2; Liu et al. 2021, arXiv 2110.07602.
    """

    attentions: tuple[str, ...] = struct.field(pytree_node=False)
    count: int = struct.field(pytree_node=False)

    def __call__(self, tree: Tree, key: Key) -> Tree:
        """Return the tree with the prefixes grafted."""
        nodes = subtrees(tree)
        new: Tree = {}
        for path, own in zip(
            self.attentions, jax.random.split(key, len(self.attentions)), strict=True
        ):
            (d,) = nodes[f"{path}/out/bias"].shape
            pair = 0.02 * jax.random.normal(own, (2, self.count, d))
            new[path] = {"prefix": {"key": pair[0], "value": pair[1]}}
        if "word" in tree["params"]["embed"]:
            new["params/embed"] = {"skipped": jnp.arange(self.count)}
        return graft(tree, new)
