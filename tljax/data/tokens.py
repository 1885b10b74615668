"""Texts to token ids: WordPiece from Hugging Face's `tokenizers`, masking and packing for MLM."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import tokenizers
from jaxtyping import Int32
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from tljax.data.sources import Info, Source, Splits
from tljax.types import BadInput

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
Ids = Int32[np.ndarray, " n"]
_CHUNK = 10_000  # texts handed to the tokenizer at once: bounds its memory, keeps its threads busy


class Tokenizer:
    """A BERT tokenizer without padding and with one truncation: `max_length` ids, longest first."""

    def __init__(self, inner: tokenizers.Tokenizer, max_length: int = 128):
        """Take over a tokenizer; what padding and truncation its file had is forgotten."""
        inner.no_padding()
        inner.enable_truncation(max_length)
        missing = [token for token in SPECIAL if inner.token_to_id(token) is None]
        if missing:
            raise BadInput(f"the tokenizer lacks {missing}: expected BERT's tokens {SPECIAL}")
        self.inner = inner
        self.max_length = max_length
        self.vocab_size = inner.get_vocab_size()
        self.pad, self.unknown, self.cls, self.sep, self.mask = map(inner.token_to_id, SPECIAL)

    @classmethod
    def from_file(cls, path: str | Path, max_length: int = 128) -> Self:
        """Read a tokenizer.json, or a vocab.txt (cased when it holds capitals outside brackets)."""
        path = Path(path)
        if not path.is_file():
            raise BadInput(f"no tokenizer at {path}: expected a tokenizer.json or a vocab.txt")
        if path.suffix == ".json":
            return cls(tokenizers.Tokenizer.from_file(str(path)), max_length)
        tokens = path.read_text("utf8").splitlines()
        lower = all(token == token.lower() or token.startswith("[") for token in tokens)
        return cls(_bert({token: i for i, token in enumerate(tokens)}, lower), max_length)

    def save(self, path: str | Path) -> None:
        """Write a tokenizer.json, with neither padding nor truncation in it."""
        self.inner.no_truncation()
        self.inner.save(str(path))
        self.inner.enable_truncation(self.max_length)

    def encode(self, text: str, text_b: str | None = None) -> dict[str, Ids]:
        """Encode one text or one pair, special tokens included."""
        encoding = self.inner.encode(text, text_b)
        return {
            "input_ids": np.asarray(encoding.ids, np.int32),
            "token_type_ids": np.asarray(encoding.type_ids, np.int32),
        }


def _bert(vocab: dict[str, int], lowercase: bool) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    inner.add_special_tokens([token for token in SPECIAL if token in vocab])
    if "[CLS]" in vocab and "[SEP]" in vocab:
        ends = ("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"])
        inner.post_processor = processors.BertProcessing(*ends)
    return inner


def train_wordpiece(texts: Iterable[str], vocab_size: int, max_length: int = 128) -> Tokenizer:
    """Learn a lower-case WordPiece vocabulary; special tokens get the first ids."""
    learner = _bert({}, lowercase=True)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    return Tokenizer(_bert(learner.get_vocab(), lowercase=True), max_length)


@dataclass(frozen=True)
class Encoded:
    """A source of token ids, kept flat in memory; examples come out padded to `length`."""

    ids: Ids
    types: Ids
    tags: Ids | None
    starts: np.ndarray
    labels: np.ndarray | None
    length: int
    pad: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """Give {input_ids, attention_mask, token_type_ids, label}, int32 of `length` each."""
        part = slice(self.starts[i], self.starts[i + 1])
        example = {
            "input_ids": self._padded(self.ids[part], self.pad),
            "attention_mask": self._padded(np.ones_like(self.ids[part]), 0),
            "token_type_ids": self._padded(self.types[part], 0),
        }
        if self.tags is not None:
            example["label"] = self._padded(self.tags[part], -1)
        elif self.labels is not None:
            example["label"] = self.labels[i]
        return example

    def _padded(self, values: Ids, filler: int) -> Ids:
        row = np.full(self.length, filler, np.int32)
        row[: len(values)] = values
        return row


def encode(source: Source, tokenizer: Tokenizer, info: Info) -> Encoded:
    """Encode a source of texts once; length = the longest text, up to a multiple of 8.

    Tags stand on the first piece of their word, -1 on other pieces and special tokens.
    """
    ids, types, tags, sizes = [], [], [], []
    for start in range(0, len(source), _CHUNK):
        rows = [source[i] for i in range(start, min(start + _CHUNK, len(source)))]
        tagged = info.task == "tag"
        texts = [row["text"].split(" ") if tagged else _pair(row) for row in rows]
        encodings = tokenizer.inner.encode_batch(texts, is_pretokenized=tagged)
        ids += [np.asarray(encoding.ids, np.int32) for encoding in encodings]
        types += [np.asarray(encoding.type_ids, np.int32) for encoding in encodings]
        sizes += [len(encoding.ids) for encoding in encodings]
        if tagged:
            tags += [_on_first_piece(e.word_ids, r["label"]) for e, r in zip(encodings, rows)]
    return Encoded(
        ids=np.concatenate(ids),
        types=np.concatenate(types),
        tags=np.concatenate(tags) if tags else None,
        starts=np.concatenate([[0], np.cumsum(sizes)]),
        labels=source.labels,
        length=-(-max(sizes) // 8) * 8,
        pad=tokenizer.pad,
    )


def encode_splits(splits: Splits, tokenizer: Tokenizer) -> Splits:
    """Encode all parts of a text data set to one common length, so that each step compiles once."""
    parts = [encode(part, tokenizer, splits.info) for part in splits[:3]]
    length = max(part.length for part in parts)
    return Splits(*(replace(part, length=length) for part in parts), splits.info)


def _pair(row: dict) -> str | tuple[str, str]:
    return (row["text"], row["text_b"]) if row.get("text_b") is not None else row["text"]


def _on_first_piece(word_ids: Sequence[int | None], tags: Sequence[int]) -> Ids:
    before = [None, *word_ids[:-1]]
    return np.asarray(
        [-1 if w is None or w == b else tags[w] for w, b in zip(word_ids, before, strict=True)],
        np.int32,
    )


def pack(source: Source, tokenizer: Tokenizer, length: int) -> Encoded:
    """Join texts, [SEP] between them, and cut rows [CLS] ... [SEP] of exactly `length` ids.

    The tail that fills no row is dropped.
    Source: Liu et al. 2019 (RoBERTa), FULL-SENTENCES.
    """
    bare = tokenizers.Tokenizer.from_str(tokenizer.inner.to_str())
    bare.no_truncation()
    stream = []
    for start in range(0, len(source), _CHUNK):
        texts = [source[i]["text"] for i in range(start, min(start + _CHUNK, len(source)))]
        for encoding in bare.encode_batch(texts, add_special_tokens=False):
            stream.append(np.asarray([*encoding.ids, tokenizer.sep], np.int32))
    joined = np.concatenate(stream)
    rows = len(joined) // (length - 2)
    if rows == 0:
        raise BadInput(f"{len(joined)} tokens in all do not fill one row of {length}")
    table = np.full((rows, length), tokenizer.sep, np.int32)
    table[:, 0] = tokenizer.cls
    table[:, 1:-1] = joined[: rows * (length - 2)].reshape(rows, length - 2)
    starts = np.arange(rows + 1) * length
    flat = table.reshape(-1)
    return Encoded(flat, np.zeros_like(flat), None, starts, None, length, tokenizer.pad)


@dataclass(frozen=True)
class MaskTokens:
    """The MLM transform: choose tokens; 80 % become [MASK], 10 % any token, 10 % stay.

    label = the token that was there, -1 where none was chosen.  Special tokens are never chosen;
    each other token is, independently, with chance `rate`.
    Source: Devlin et al. 2019, section 3.1.
    """

    special: tuple[int, ...]
    mask: int
    vocab_size: int
    rate: float = 0.15

    @classmethod
    def of(cls, tokenizer: Tokenizer, rate: float = 0.15) -> Self:
        """Read the special tokens off a tokenizer."""
        special = (tokenizer.pad, tokenizer.unknown, tokenizer.cls, tokenizer.sep, tokenizer.mask)
        return cls(special, tokenizer.mask, tokenizer.vocab_size, rate)

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        """Replace the input_ids of an example and give it a label."""
        ids = example["input_ids"]
        chosen = (rng.random(ids.shape) < self.rate) & ~np.isin(ids, self.special)
        fate = rng.random(ids.shape)
        anything = rng.integers(self.vocab_size, size=ids.shape, dtype=np.int32)
        shown = np.where(fate < 0.8, np.int32(self.mask), np.where(fate < 0.9, anything, ids))
        masked = np.where(chosen, shown, ids).astype(np.int32)
        return {**example, "input_ids": masked, "label": np.where(chosen, ids, np.int32(-1))}
