"""Texts to token ids: WordPiece from Hugging Face's `tokenizers`, masking and packing for MLM."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import tokenizers
from jaxtyping import Int32
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from tljax.data.sources import Labels, Source
from tljax.types import BadInput

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
Ids = Int32[np.ndarray, " n"]
IdRows = Sequence[Ids] | Int32[np.ndarray, "n l"]
_CHUNK = 10_000  # texts handed to the tokenizer at once: bounds its memory, keeps its threads busy


class Tokenizer:
    """A BERT tokenizer that never pads and truncates to `max_length` ids, longest text first."""

    def __init__(self, inner: tokenizers.Tokenizer, max_length: int = 128):
        """Take over a tokenizer; the padding and truncation that its file had are forgotten."""
        self.special: list[int] = [inner.token_to_id(token) for token in SPECIAL]
        if missing := [t for t, i in zip(SPECIAL, self.special, strict=True) if i is None]:
            raise BadInput(f"the tokenizer lacks {missing}: expected BERT's tokens {SPECIAL}")
        inner.no_padding()
        inner.enable_truncation(max_length)
        self.inner, self.vocab_size, self.max_length = inner, inner.get_vocab_size(), max_length
        self.pad, _, self.cls, self.sep, self.mask = self.special

    @classmethod
    def from_file(cls, path: str | Path, max_length: int = 128) -> Self:
        """Read a tokenizer.json."""
        if not Path(path).is_file():
            raise BadInput(f"no tokenizer at {path}: expected a tokenizer.json")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)), max_length)
        except Exception as error:  # the library raises no narrower one
            raise BadInput(f"{path} cannot be read as a tokenizer: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write a tokenizer.json."""
        self.inner.save(str(path))


def train_wordpiece(texts: Sequence[str], vocab_size: int, max_length: int = 128) -> Tokenizer:
    """Learn a lower-case WordPiece vocabulary, the same in every process for the same texts."""
    normalise, cut = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    learner = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer, learner.pre_tokenizer = normalise, cut
    letters = {letter for text in texts for letter in normalise.normalize_str(text)}
    # Else the trainer numbers them in the order of a hash map, which differs between processes.
    inside = sorted(f"##{letter}" for letter in letters if not letter.isspace())
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*SPECIAL, *inside], show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    inner = tokenizers.Tokenizer(models.WordPiece(learner.get_vocab(), unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalise, cut
    inner.add_special_tokens(list(SPECIAL))
    ends = ((token, inner.token_to_id(token)) for token in ("[SEP]", "[CLS]"))
    inner.post_processor = processors.BertProcessing(*ends)
    return Tokenizer(inner, max_length)


@dataclass(frozen=True)
class Encoded(Source):
    """A source of token ids; examples come out padded to `length`.

    columns: input_ids, token_type_ids, and label where it is one a token; not padded.
    """

    columns: Mapping[str, IdRows]
    length: int
    pad: int
    labels: Labels | None = None

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """Give {input_ids, attention_mask, token_type_ids} of `length`, and the label if any."""
        known = len(self.columns["input_ids"][i])
        fillers = {"input_ids": self.pad, "token_type_ids": 0, "label": -1}
        example = {
            name: np.pad(rows[i], (0, self.length - known), constant_values=fillers[name])
            for name, rows in self.columns.items()
        }
        example["attention_mask"] = (np.arange(self.length) < known).astype(np.int32)
        return example if self.labels is None else example | {"label": self.labels[i]}


def encode(source: Source, tokenizer: Tokenizer) -> Encoded:
    """Encode a source of texts once; length = the longest text, up to a multiple of 8.

    Tags stand on the first piece of their word, -1 on other pieces and special tokens.
    """
    tagged = source.labels is None and "label" in source[0]
    columns: dict[str, list[Ids]] = defaultdict(list)
    for rows in _chunks(source):
        texts = [row["text"].split() if tagged else _pair(row) for row in rows]
        encodings = tokenizer.inner.encode_batch(texts, is_pretokenized=tagged)
        for encoding, row in zip(encodings, rows, strict=True):
            columns["input_ids"].append(np.asarray(encoding.ids, np.int32))
            columns["token_type_ids"].append(np.asarray(encoding.type_ids, np.int32))
            if tagged:
                columns["label"].append(_on_first_piece(encoding.word_ids, row["label"]))
    longest = max(map(len, columns["input_ids"]))
    length = min(-(-longest // 8) * 8, tokenizer.max_length)
    return Encoded(columns, length, tokenizer.pad, source.labels)


def encode_alike(sources: Sequence[Source], tokenizer: Tokenizer) -> list[Encoded]:
    """Encode the parts of a data set to one common length, so that each step compiles once."""
    parts = [encode(source, tokenizer) for source in sources]
    length = max(part.length for part in parts)
    return [replace(part, length=length) for part in parts]


def _chunks(source: Source) -> Iterator[list[dict]]:
    for start in range(0, len(source), _CHUNK):
        yield source.__getitems__(range(len(source))[start : start + _CHUNK])


def _pair(row: dict) -> str | tuple[str, str]:
    return (row["text"], row["text_b"]) if "text_b" in row else row["text"]


def _on_first_piece(word_ids: Sequence[int | None], tags: Sequence[int]) -> Ids:
    words = zip(word_ids, [None, *word_ids[:-1]], strict=True)
    return np.asarray([-1 if w is None or w == last else tags[w] for w, last in words], np.int32)


def pack(source: Source, tokenizer: Tokenizer, length: int) -> Encoded:
    """Join texts, [SEP] after each, and cut rows [CLS] ... [SEP] of exactly `length` ids.

    The tail that fills no row is dropped.
    Source: Liu et al. 2019 (RoBERTa), FULL-SENTENCES.
    """
    whole = tokenizers.Tokenizer.from_str(tokenizer.inner.to_str())
    whole.no_truncation()
    stream = [
        np.asarray([*encoding.ids, tokenizer.sep], np.int32)
        for rows in _chunks(source)
        for encoding in whole.encode_batch([r["text"] for r in rows], add_special_tokens=False)
    ]
    joined = np.concatenate(stream)
    count = len(joined) // (length - 2)
    if count == 0:
        raise BadInput(f"{len(joined)} tokens in all do not fill one row of {length}")
    table = np.full((count, length), tokenizer.sep, np.int32)
    table[:, 0] = tokenizer.cls
    table[:, 1:-1] = joined[: count * (length - 2)].reshape(count, length - 2)
    columns = {"input_ids": table, "token_type_ids": np.zeros_like(table)}
    return Encoded(columns, length, tokenizer.pad)


@dataclass(frozen=True)
class MaskTokens:
    """The MLM transform: choose tokens; 80 % become [MASK], 10 % any token, 10 % stay.

    label = the token that was there, -1 where none was chosen.  Special tokens are never chosen;
    each other token is, independently, with chance `rate`.
    Source: Devlin et al. 2019, section 3.1.
    """

    tokenizer: Tokenizer
    rate: float = 0.15

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        """Replace the input_ids of an example and give it a label."""
        ids = example["input_ids"]
        chosen = (rng.random(ids.shape) < self.rate) & ~np.isin(ids, self.tokenizer.special)
        fate = rng.random(ids.shape)
        anything = rng.integers(self.tokenizer.vocab_size, size=ids.shape, dtype=np.int32)
        shown = np.where(
            fate < 0.8, np.int32(self.tokenizer.mask), np.where(fate < 0.9, anything, ids)
        )
        label = np.where(chosen, ids, np.int32(-1))
        return {**example, "input_ids": np.where(chosen, shown, ids), "label": label}
