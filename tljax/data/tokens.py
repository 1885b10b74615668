"""Texts to token ids: a source's own tokenizer or a new WordPiece; masking and packing for MLM."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

import numpy as np
import tokenizers
from jaxtyping import Int32
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from tljax.data.sources import Labels, Source
from tljax.types import BadInput
from tljax.weights.tokenizer_files import LONGEST, read_tokenizer, refusing

Ids = Int32[np.ndarray, " n"]
IdRows = Sequence[Ids] | Int32[np.ndarray, "n l"]
_CHUNK = 10_000  # texts handed to the tokenizer at once: bounds its memory, keeps its threads busy
NAMES = {
    "pad": ("[PAD]", "<pad>", "<|endoftext|>"),
    "unk": ("[UNK]", "<unk>", "<|endoftext|>"),
    "cls": ("[CLS]", "<s>", "<|startoftext|>"),
    "sep": ("[SEP]", "</s>", "<|endoftext|>"),
    "mask": ("[MASK]", "<mask>"),
}
"""What BERT, RoBERTa and CLIP call the tokens that a file has but does not name."""


class Tokenizer:
    """A tokenizer that truncates to `max_length` ids, the longest text of a pair first.

    roles: pad, unk, cls, sep and mask -> id, as far as there are such.  special: the ids that stand
    for no text.  inner: never pads.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        max_length: int | None = None,
        names: Mapping[str, str] = MappingProxyType({}),
    ):
        """Take over a tokenizer; the padding and truncation that its file had are forgotten.

        names: role -> token, where files beside the tokenizer's own say so.
        """
        pad = (inner.padding or {}).get("pad_token")
        inner.no_padding()
        inner.no_truncation()
        self.inner, self.max_length = inner, max_length
        self.vocab_size = max(inner.get_vocab().values(), default=-1) + 1
        self.roles = self._find_roles(names, pad)
        added = inner.get_added_tokens_decoder().items()
        self.special = sorted({*self.roles.values(), *(i for i, t in added if t.special)})
        self._truncate(max_length)

    def _find_roles(self, names: Mapping[str, str], pad: str | None) -> dict[str, int]:
        """Give the id of each role: as encoding shows it, else as the files name it."""
        # Tried once here, because some damage only shows when a text is read.
        single, pair = self.inner.encode("a"), self.inner.encode("a", "a")
        outside = {*single.ids, *pair.ids} - {*self.inner.get_vocab().values()}
        if outside:
            raise BadInput(f"the tokenizer puts the id {min(outside)} around texts, but lacks it")
        named = ({"pad": pad} if pad else {}) | dict(names)
        roles = {}
        for role, usual in NAMES.items():
            ids = [self.inner.token_to_id(name) for name in (named.get(role, usual[0]), *usual)]
            if known := [i for i in ids if i is not None]:
                roles[role] = known[0]
        around = [i for i, ours in zip(single.ids, single.special_tokens_mask, strict=True) if ours]
        if single.special_tokens_mask[:1] == [1]:
            roles["cls"] = around[0]
        if single.special_tokens_mask[-1:] == [1]:
            roles["sep"] = around[-1]
        return roles

    @classmethod
    def from_file(cls, path: str | Path, max_length: int | None = None) -> Self:
        """Read a tokenizer.json and what stands beside it, or a folder of vocabulary files.

        max_length: None for the model_max_length of tokenizer_config.json, if that says anything.
        Raises: BadInput for files that are not there, too large, damaged or of an unknown kind.
        """
        found = read_tokenizer(Path(path))
        with refusing(f"{path} cannot be read as a tokenizer"):
            return cls(found.inner, max_length or found.max_length, found.names)

    def save(self, path: str | Path) -> None:
        """Write a tokenizer.json, and beside it the tokenizer_config.json that names its tokens.

        transformers opens the two as PreTrainedTokenizerFast.
        """
        self.inner.save(str(path))
        named = {f"{role}_token": self.inner.id_to_token(i) for role, i in self.roles.items()}
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
        pair = self.inner.encode("a", "b")
        names = ["input_ids", "token_type_ids", "attention_mask"]  # types where pairs have two
        config["model_input_names"] = names if max(pair.type_ids) else [names[0], names[2]]
        if self.max_length:
            config["model_max_length"] = self.max_length
        Path(path).with_name("tokenizer_config.json").write_text(
            json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8"
        )

    def id_of(self, role: str) -> int:
        """Return the id of pad, unk, cls, sep or mask.

        Raises: BadInput if the tokenizer has no such token.
        """
        if role not in self.roles:
            raise BadInput(
                f"the tokenizer has no {role} token, which this needs; it has"
                f" {', '.join(sorted(self.roles)) or 'none'} of {', '.join(NAMES)}"
            )
        return self.roles[role]

    @property
    def pad(self) -> int:
        """Return the id that fills rows."""
        return self.id_of("pad")

    @property
    def cls(self) -> int:
        """Return the id that begins a text."""
        return self.id_of("cls")

    @property
    def sep(self) -> int:
        """Return the id that ends a text."""
        return self.id_of("sep")

    @property
    def mask(self) -> int:
        """Return the id that hides a token."""
        return self.id_of("mask")

    def __call__(
        self,
        texts: str | Sequence[str],
        pairs: str | Sequence[str] | None = None,
        max_length: int | None = None,
        padding: Literal["longest", "max_length"] = "longest",
    ) -> dict[str, Int32[np.ndarray, "b l"]]:
        """Encode one text or several, with their seconds or without, as rows of one length.

        Gives {input_ids, attention_mask, token_type_ids} as transformers does of the same files.
        max_length: None for the tokenizer's own.
        Raises: BadInput for what is no text, or a length without room for the special tokens.
        """
        rows = [texts] if isinstance(texts, str) else list(texts)
        seconds = [pairs] if isinstance(pairs, str) else pairs
        if not rows or (seconds is not None and len(seconds) != len(rows)):
            counts = f"{len(rows)} texts" + ("" if seconds is None else f", {len(seconds)} seconds")
            raise BadInput(f"{counts}: expected one or more, and as many seconds as texts")
        limit = self.max_length if max_length is None else max_length
        inputs = rows if seconds is None else list(zip(rows, seconds, strict=True))
        found = self.encode_batch(inputs, limit)
        width = limit if padding == "max_length" else max(len(one.ids) for one in found)
        if width is None:
            raise BadInput("padding to max_length, but neither the call nor the tokenizer has one")
        fill = self.pad if any(len(one.ids) < width for one in found) else 0
        ids, mask, types = np.zeros((3, len(rows), width), np.int32)
        ids[:] = fill
        for i, one in enumerate(found):
            inside = slice(len(one.ids))
            ids[i, inside], mask[i, inside], types[i, inside] = one.ids, 1, one.type_ids
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}

    def encode_batch(
        self, inputs: Sequence[Any], max_length: int | None, **options: bool
    ) -> list[tokenizers.Encoding]:
        """Encode texts or (first, second) pairs of them, truncated but not padded.

        Raises: BadInput for what is no text, or a length without room for the special tokens.
        """
        pair = bool(inputs) and isinstance(inputs[0], tuple)
        least = self.inner.num_special_tokens_to_add(pair)
        if max_length is not None and max_length < max(least, 1):
            raise BadInput(f"max_length is {max_length}, and special tokens alone take {least}")
        self._truncate(max_length)
        try:
            with refusing("these texts cannot be encoded"):
                return self.inner.encode_batch(inputs, **options)
        finally:
            self._truncate(self.max_length)

    def for_words(self) -> "Tokenizer":
        """Give the tokenizer for words one by one: byte-level ones expect the space before them."""
        if not isinstance(self.inner.pre_tokenizer, pre_tokenizers.ByteLevel):
            return self
        inner = tokenizers.Tokenizer.from_str(self.inner.to_str())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        return Tokenizer(inner, self.max_length)

    def _truncate(self, max_length: int | None) -> None:
        if max_length is None:
            self.inner.no_truncation()
        else:
            self.inner.enable_truncation(max_length)


def train_wordpiece(texts: Sequence[str], vocab_size: int, max_length: int = 128) -> Tokenizer:
    """Learn a lower-case WordPiece vocabulary, the same in every process for the same texts."""
    normalise, cut = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    learner = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer, learner.pre_tokenizer = normalise, cut
    special = [usual[0] for usual in NAMES.values()]
    letters = {letter for text in texts for letter in normalise.normalize_str(text)}
    # Else the trainer numbers them in the order of a hash map, which differs between processes.
    inside = sorted(f"##{letter}" for letter in letters if not letter.isspace())
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*special, *inside], show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    inner = tokenizers.Tokenizer(models.WordPiece(learner.get_vocab(), unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalise, cut
    inner.add_special_tokens(special)
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
    reader = tokenizer.for_words() if tagged else tokenizer
    for rows in _chunks(source):
        texts = [row["text"].split() if tagged else _pair(row) for row in rows]
        encodings = reader.encode_batch(texts, tokenizer.max_length, is_pretokenized=tagged)
        for encoding, row in zip(encodings, rows, strict=True):
            columns["input_ids"].append(np.asarray(encoding.ids, np.int32))
            columns["token_type_ids"].append(np.asarray(encoding.type_ids, np.int32))
            if tagged:
                columns["label"].append(_on_first_piece(encoding.word_ids, row["label"]))
    longest = max(map(len, columns["input_ids"]))
    length = min(-(-longest // 8) * 8, tokenizer.max_length or LONGEST)
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

    def __post_init__(self):
        """Refuse a tokenizer that has nothing to mask with, before any batch is made."""
        self.tokenizer.id_of("mask")

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
