"""What stands in a tokenizer's files: tokenizer.json, or the vocabulary files of BERT and the like.

These files are a stranger's: their size is capped, and whatever the Rust library makes of them is
a BadInput.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors

from tljax.types import BadInput
from tljax.weights.files import read_json

LARGEST = 64 << 20  # bytes of a file; the largest vocabularies of this kind take a quarter of it
LONGEST = 1 << 20  # tokens; a larger model_max_length is how transformers says that there is none
ROLES = ("pad", "unk", "cls", "sep", "mask")


class Files(NamedTuple):
    """A tokenizer, the tokens that its files name (role -> token), and the ids its model takes."""

    inner: tokenizers.Tokenizer
    names: Mapping[str, str]
    max_length: int | None


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn whatever the tokenizers library raises into a BadInput that says what it was about."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        raise BadInput(f"{what}: {str(error) or type(error).__name__}") from error


def read_tokenizer(path: Path) -> Files:
    """Read a tokenizer.json, or a folder with one or with vocab.txt or vocab.json and merges.txt.

    Raises: BadInput for files that are not there, too large or damaged, or of another kind.
    """
    folder, file = (path, path / "tokenizer.json") if path.is_dir() else (path.parent, path)
    config = read_json(folder / "tokenizer_config.json")
    config |= read_json(folder / "special_tokens_map.json")
    for side in ("padding_side", "truncation_side"):
        if config.get(side, "right") != "right":
            raise BadInput(f"{folder}: {side} is {config[side]!r}, tljax has 'right' only")
    if file.is_file():
        text = _read_text(file)
        with refusing(f"{file} cannot be read as a tokenizer"):
            inner = tokenizers.Tokenizer.from_str(text)
        _check_template(inner, file)
    elif path.is_dir():
        inner, config = _build(folder, config)
    else:
        raise BadInput(f"no tokenizer at {path}: expected a tokenizer.json")
    named = {role: _token(config.get(f"{role}_token"), folder) for role in ROLES}
    tokens = {role: token for role, token in named.items() if token is not None}
    with refusing(f"{folder}: its special tokens"):
        added = {token.content for token in inner.get_added_tokens_decoder().values()}
        for name, token in {t.content: t for t in tokens.values()}.items():
            # One that no vocabulary holds would be a row that the model's table lacks.
            if name not in added and inner.token_to_id(name) is not None:
                inner.add_special_tokens([token])
        inner.encode_special_tokens = config.get("split_special_tokens") is True
    longest = config.get("model_max_length")
    sensible = isinstance(longest, int) and 0 < longest <= LONGEST
    names = {role: token.content for role, token in tokens.items()}
    return Files(inner, names, longest if sensible else None)


def _check_template(inner: tokenizers.Tokenizer, file: Path) -> None:
    """Raise BadInput for a template of unknown tokens: the library would panic, and print so."""
    post = json.loads(inner.post_processor.__getstate__()) if inner.post_processor else {}
    for step in post.get("processors", [post]):
        items = [item for part in ("single", "pair") for item in step.get(part) or ()]
        used = {item["SpecialToken"]["id"] for item in items if "SpecialToken" in item}
        if lacking := sorted(used - {*(step.get("special_tokens") or ())}):
            why = f"its template has {lacking[0]!r}, its special_tokens have not"
            raise BadInput(f"{file} cannot be read as a tokenizer: {why}")


def _read_text(path: Path) -> str:
    if (size := path.stat().st_size) > LARGEST:
        raise BadInput(f"{path} has {size} bytes, expected at most {LARGEST}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not text in UTF-8: {error}") from None


def _token(entry: Any, origin: Path) -> AddedToken | None:
    """Read a special token: its text, or its text with the spaces it takes along."""
    if entry is None:
        return None
    fields = entry if isinstance(entry, dict) else {"content": entry}
    if not isinstance(fields.get("content"), str):
        raise BadInput(f"{origin}: {entry!r} is no token, expected a text or its 'content'")
    flags = {key: fields.get(key) is True for key in ("lstrip", "rstrip", "single_word")}
    with refusing(f"{origin}: the token {fields['content']!r}"):
        return AddedToken(fields["content"], normalized=False, special=True, **flags)


class Kind(NamedTuple):
    """A family whose tokenizer is made of vocabulary files."""

    files: tuple[str, ...]
    classes: tuple[str, ...]  # tokenizer_class, without Fast
    tokens: Mapping[str, str]  # as the keys of tokenizer_config.json; the first two end a text


KINDS = {
    "bert": Kind(
        ("vocab.txt",),
        ("BertTokenizer", "DistilBertTokenizer"),
        {
            "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]",
            "unk_token": "[UNK]", "mask_token": "[MASK]",
        },
    ),
    "roberta": Kind(
        ("vocab.json", "merges.txt"),
        ("RobertaTokenizer",),
        {
            "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>",
            "mask_token": "<mask>",
        },
    ),
    "clip": Kind(
        ("vocab.json", "merges.txt"),
        ("CLIPTokenizer",),
        {
            "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
        },
    ),
}  # fmt: skip


def _build(folder: Path, config: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Make a tokenizer of vocabulary files; also complete the configuration by its family's."""
    name, kind = _kind(folder, str(config.get("tokenizer_class") or "").removesuffix("Fast"))
    given = {key: value for key, value in config.items() if value is not None}
    config = dict(kind.tokens) | given
    tokens = {key: _token(config[key], folder) for key in kind.tokens}
    names = {key: token.content for key, token in tokens.items()}
    paths = [str(folder / file) for file in kind.files]
    with refusing(f"{' and '.join(paths)} cannot be read as a vocabulary"):
        inner = _MAKERS[name](paths, config, names["unk_token"])
        _add_tokens(inner, config, folder)
        there = [t for t in tokens.values() if inner.token_to_id(t.content) is not None]
        inner.add_special_tokens(there)
    start, end = ((names[key], inner.token_to_id(names[key])) for key in list(kind.tokens)[:2])
    if None in start + end:
        raise BadInput(f"{paths[0]} lacks {start[0]!r} or {end[0]!r}, which begin and end a text")
    process = processors.BertProcessing if name == "bert" else processors.RobertaProcessing
    inner.post_processor = process(end, start)
    return inner, config


def _kind(folder: Path, wanted: str) -> tuple[str, Kind]:
    """Choose a family by tokenizer_class, else by the token that starts a text."""
    found = {
        name: kind
        for name, kind in KINDS.items()
        if all((folder / file).is_file() for file in kind.files)
    }
    if not found:
        raise BadInput(
            f"no tokenizer in {folder}: expected tokenizer.json, vocab.txt, or vocab.json and"
            " merges.txt"
        )
    for name, kind in found.items():
        texts = [_read_text(folder / file) for file in kind.files]  # each judged by its size
        if wanted in kind.classes or (not wanted and next(iter(kind.tokens.values())) in texts[0]):
            return name, kind
    classes = ", ".join(name for kind in found.values() for name in kind.classes)
    raise BadInput(f"{folder}: tokenizer_class is {wanted!r}, expected one of {classes}")


def _bert(paths: list[str], config: Mapping[str, Any], unknown: str) -> tokenizers.Tokenizer:
    vocabulary = models.WordPiece.read_file(*paths)
    inner = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    inner.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return inner


def _roberta(paths: list[str], config: Mapping[str, Any], unknown: str) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE(*models.BPE.read_file(*paths)))
    spaced = config.get("add_prefix_space", False)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    return inner


def _clip(paths: list[str], config: Mapping[str, Any], unknown: str) -> tokenizers.Tokenizer:
    vocabulary, merges = models.BPE.read_file(*paths)
    inner = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, end_of_word_suffix="</w>")
    )
    space = normalizers.Replace(Regex(r"\s+"), " ")
    inner.normalizer = normalizers.Sequence([normalizers.NFC(), space, normalizers.Lowercase()])
    # Radford et al. 2021 (CLIP): their two tokens, contractions, words, single digits, other signs.
    ends = r"<\|startoftext\|>|<\|endoftext\|>"
    words = Regex(ends + r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    split = pre_tokenizers.Split(words, behavior="removed", invert=True)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    return inner


_MAKERS = {"bert": _bert, "roberta": _roberta, "clip": _clip}


def _add_tokens(inner: tokenizers.Tokenizer, config: Mapping[str, Any], folder: Path) -> None:
    """Add the tokens that tokenizer_config.json lists beside the vocabulary.

    Raises: BadInput where one would get another id than it has there.
    """
    listed = config.get("added_tokens_decoder") or {}
    old = read_json(folder / "added_tokens.json")
    for number, entry in sorted(listed.items(), key=lambda item: int(item[0])):
        token = _token(entry, folder)
        if entry.get("special") is True:
            inner.add_special_tokens([token])
        else:
            normalised = entry.get("normalized", True) is True
            inner.add_tokens([AddedToken(token.content, normalized=normalised)])
        old |= {token.content: int(number)}
    for name, number in old.items():
        if inner.token_to_id(name) != number:
            found = inner.token_to_id(name)
            raise BadInput(f"{folder}: the token {name!r} should have the id {number}, not {found}")
