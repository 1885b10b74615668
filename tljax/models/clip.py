"""CLIP's text tower: causal pre-norm blocks on tokens, read at the end of the text.

Its vision tower is a ViT: patch_bias=False, embed_norm=True, eps=1e-5, activation="quick_gelu",
projection=...
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from tljax import layers
from tljax.types import Output

Ids = Int[Array, "b l"]


class TokenEmbed(nn.Module):
    """Sum the word and position vectors."""

    vocab: int
    positions: int
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, input_ids: Ids) -> Float[Array, "b l d"]:
        """Return the embedded tokens.

        Raises: BadInput for a text longer than the position table.
        """
        length = input_ids.shape[1]
        layers.require_room(length, self.positions)
        positions = layers.Embed(self.positions, self.width, self.dtype, name="position")
        words = layers.Embed(self.vocab, self.width, self.dtype, name="word")
        return words(input_ids) + positions(jnp.arange(length)[None])


class ClipText(nn.Module):
    """CLIP's text tower; the defaults are ViT-B/32's.

    eot: the id that ends a text; pooled is the token at its first occurrence, or without it the
    token of the largest id (transformers' rule where eos_token_id is 2).  projection: width of a
    last Dense on it, without bias.  token_type_ids are taken, as every text has them, and not read.
    Source: Radford et al. 2021, arXiv 2103.00020, section 2.4.
    """

    vocab: int = 49408
    width: int = 512
    depth: int = 12
    heads: int = 8
    mlp: int = 2048
    positions: int = 77
    eps: float = 1e-5
    activation: str = "quick_gelu"
    projection: int | None = 512
    eot: int | None = 49407
    read: str | None = None
    dropout: float = 0.0
    drop_path: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, input_ids: Ids, attention_mask: Ids | None = None, token_type_ids: Ids | None = None
    ) -> Output:
        shape = self.heads, self.mlp, self.eps, self.activation
        options = {"causal": True, "dropout": self.dropout, "dtype": self.dtype}

        def make(index: int) -> nn.Module:
            drop_path = self.drop_path * index / max(self.depth - 1, 1)
            return layers.PreNormBlock(*shape, **options, drop_path=drop_path, name=str(index))

        embed = TokenEmbed(self.vocab, self.positions, self.width, self.dtype, name="embed")
        mask = None if attention_mask is None else attention_mask.astype(bool)
        x = layers.Dropout(self.dropout)(embed(input_ids))
        x = layers.Blocks(make, self.depth, self.read, self.remat, name="blocks")(x, mask)
        tokens = layers.LayerNorm(self.eps, self.dtype, name="norm")(x)
        end = jnp.argmax(input_ids if self.eot is None else input_ids == self.eot, axis=1)
        pooled = jnp.take_along_axis(tokens, end[:, None, None], axis=1)[:, 0]
        if self.projection is not None:
            pooled = layers.Dense(self.projection, False, self.dtype, name="projection")(pooled)
        return Output(tokens, pooled)
