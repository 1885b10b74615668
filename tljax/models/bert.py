"""BERT, RoBERTa, DistilBERT: post-norm blocks on tokens, with pooler and masked-language head."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from tljax import layers
from tljax.ports import in_front, port
from tljax.types import Output

Tokens = Float[Array, "b l d"]
Ids = Int[Array, "b l"]
dense = partial(layers.Dense, kernel_init=layers.small_normal)


class TokenEmbed(nn.Module):
    """Sum the word, position and type vectors (without types: the first two), and normalise.

    pad: without it positions count from 0.  With it they count from pad + 1 over the tokens that
    are not `pad`, which all have position pad, as fairseq does.
    """

    vocab: int
    positions: int
    types: int
    pad: int | None
    width: int
    eps: float
    dtype: Any

    def setup(self) -> None:
        """Create the tables."""
        self.word = layers.Embed(self.vocab, self.width, self.dtype)
        self.position = layers.Embed(self.positions, self.width, self.dtype)
        if self.types:
            self.type = layers.Embed(self.types, self.width, self.dtype)
        self.norm = layers.LayerNorm(self.eps, self.dtype)
        self.prompt, self.skipped = port(self, "prompt"), port(self, "skipped")

    def __call__(self, input_ids: Ids, token_type_ids: Ids) -> Float[Array, "b m d"]:
        """Return the embedded tokens, a learned prompt before them.

        As PEFT has it, the prompt is of type 0 and takes the first positions.
        Raises: BadInput for a text longer than the position table.
        """
        x, types = self.word(input_ids), token_type_ids
        if len(self.prompt):
            x = in_front(self.prompt, x)
            types = in_front(jnp.zeros(len(self.prompt), types.dtype), types)
        unused = len(self.skipped) + (0 if self.pad is None else self.pad + 1)
        layers.require_room(x.shape[1], self.positions - unused)
        x += self.position(self.places(input_ids))
        return self.norm(x + self.type(types) if self.types else x)

    def places(self, input_ids: Ids) -> Int[Array, "_ m"]:
        """Return the row of the position table for every token, of one text if all are alike."""
        first, length = len(self.skipped), len(self.prompt) + input_ids.shape[1]
        if self.pad is None:
            return first + jnp.arange(length)[None]
        if len(self.prompt):  # embedded, they cannot be told from padding: nor does transformers
            return self.pad + 1 + jnp.arange(length)[None]
        kept = (input_ids != self.pad).astype(jnp.int32)
        return (first + jnp.cumsum(kept, axis=1)) * kept + self.pad


class Block(nn.Module):
    """x = norm(x + attention(x)); x = norm(x + mlp(x)).

    Source: Devlin et al. 2018, arXiv 1810.04805.
    """

    heads: int
    mlp: int
    eps: float
    activation: str
    dropout: float
    drop_path: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Tokens, mask: Bool[Array, "b l"] | None) -> Tokens:
        y = layers.Attention(self.heads, self.dtype, layers.small_normal, name="attention")(x, mask)
        y = layers.DropPath(self.drop_path)(layers.Dropout(self.dropout)(y))
        x = layers.LayerNorm(self.eps, self.dtype, name="norm1")(x + y)
        y = layers.Mlp(self.mlp, self.activation, self.dtype, layers.small_normal, name="mlp")(x)
        y = layers.DropPath(self.drop_path)(layers.Dropout(self.dropout)(y))
        return layers.LayerNorm(self.eps, self.dtype, name="norm2")(x + y)


class MaskedLanguageHead(nn.Module):
    """Transform the tokens; the words' own table decodes them (tied)."""

    vocab: int
    eps: float
    activation: str
    dtype: Any

    @nn.compact
    def __call__(self, tokens: Tokens, embed: TokenEmbed) -> Float[Array, "b l v"]:
        act = layers.choose(layers.ACTIVATIONS, self.activation, "activation")
        x = act(dense(tokens.shape[-1], dtype=self.dtype, name="dense")(tokens))
        scores = embed.word.attend(layers.LayerNorm(self.eps, self.dtype, name="norm")(x))
        bias = self.param("bias", nn.initializers.zeros, (self.vocab,), jnp.float32)
        return scores.astype(jnp.float32) + layers.along_last(bias, scores).astype(jnp.float32)


class Bert(nn.Module):
    """BERT; the defaults are MiniLM-L6's sizes.

    types: rows of the type table, 0 for none (DistilBERT).  pad: the id of padding where positions
    are counted as in RoBERTa, whose first pad + 1 positions no token has.

    pool: "mean" over the attention mask, "cls", or "pooler" (an activation of a Dense of cls:
    DistilBERT's pre_classifier with "relu", RoBERTa's classifier.dense).  pooler: the file has
    pooler weights, so create their place.  mlm: logits over the vocabulary.  tokens: the head reads
    every token, not the pooled vector.
    """

    vocab: int = 30522
    width: int = 384
    depth: int = 6
    heads: int = 12
    mlp: int = 1536
    positions: int = 512
    types: int = 2
    pad: int | None = None
    eps: float = 1e-12
    activation: str = "gelu"
    pool: str = "mean"
    pooler: bool = True
    pooler_activation: str = "tanh"
    read: str | None = None
    num_classes: int | None = None
    mlm: bool = False
    tokens: bool = False
    dropout: float = 0.0
    drop_path: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, input_ids: Ids, attention_mask: Ids | None = None, token_type_ids: Ids | None = None
    ) -> Output:

        def make(index: int) -> nn.Module:
            drop_path = self.drop_path * index / max(self.depth - 1, 1)
            shape = self.heads, self.mlp, self.eps, self.activation
            return Block(*shape, self.dropout, drop_path, self.dtype, name=str(index))

        tables = self.vocab, self.positions, self.types, self.pad
        embed = TokenEmbed(*tables, self.width, self.eps, self.dtype, name="embed")
        types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        mask = None if attention_mask is None else attention_mask.astype(bool)
        x = layers.Dropout(self.dropout)(embed(input_ids, types))
        prompt = x.shape[1] - input_ids.shape[1]
        if prompt:
            mask = jnp.ones(input_ids.shape, bool) if mask is None else mask
            mask = in_front(jnp.ones(prompt, bool), mask)
        x = layers.Blocks(make, self.depth, self.read, self.remat, name="blocks")(x, mask)
        first, x = x[:, 0], x[:, prompt:]
        pooled = self.pooled(first, x, mask if mask is None else mask[:, prompt:])
        if self.mlm:
            head = MaskedLanguageHead(self.vocab, self.eps, self.activation, self.dtype, name="mlm")
            return Output(x, pooled, head(x, embed))
        features = layers.Dropout(self.dropout)(x if self.tokens else pooled)
        return Output(x, pooled, layers.zero_head(self, self.num_classes, features))

    def pooled(
        self, first: Float[Array, "b d"], x: Tokens, mask: Bool[Array, "b l"] | None
    ) -> Float[Array, "b d"]:
        """Pool the tokens; the first is a learned prompt's if there is one, as in PEFT."""
        pools = {"cls": first, "mean": masked_mean(x, mask), "pooler": first}
        if self.pool == "pooler" or (self.pooler and self.is_initializing()):
            pooler = dense(self.width, dtype=self.dtype, name="pooler")
            functions = {"tanh": jnp.tanh, "relu": jax.nn.relu}
            act = layers.choose(functions, self.pooler_activation, "pooler_activation")
            pools["pooler"] = act(pooler(first))
        return layers.choose(pools, self.pool, "pool")


def masked_mean(x: Tokens, mask: Bool[Array, "b l"] | None) -> Float[Array, "b d"]:
    """Average the tokens that the mask keeps, in float32; nothing kept gives zeros."""
    mask = jnp.ones(x.shape[:2]) if mask is None else mask
    weights = mask[:, :, None].astype(jnp.float32)
    total = (x.astype(jnp.float32) * weights).sum(1)
    return (total / jnp.maximum(weights.sum(1), 1)).astype(x.dtype)
