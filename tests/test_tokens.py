"""Tokenizers of other sources: what transformers gives of the same files, to the last id."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from tljax.data.builders_image import find_asset
from tljax.data.sources import Rows
from tljax.data.tokens import MaskTokens, Tokenizer, encode, pack, train_wordpiece
from tljax.types import BadInput
from tljax.weights import files, tokenizer_files

pytestmark = pytest.mark.once

CORPUS = [
    "the cat sat on the mat, and the cats' mats were sat on",
    "a dog barked at 1,234.5 cats all night long; it's unbelievable!",
    "café naïve Ünïcödé 漢字 emoji 🙂🙂 tabs\tand\nlines",
] * 3
HARD = [
    "The cat sat", "", " ", "  two  spaces ", "tabs\tand\nnew\r\nlines\u00a0\u200bzero",
    "CAFÉ cafe\u0301",
    "漢字かな 한국어", "🙂👩‍👩‍👧 emoji", "1,234.5%", "don't we'll", "x" * 300, "the cat " * 60,
    "[CLS] a [MASK] b[SEP] [PAD]", "<s> a <mask> b</s> <pad><unk>", "a  <mask>  b", "\x00nul\x07",
    "<|startoftext|> a <|endoftext|>b", "[cls] <S> <|ENDOFTEXT|>", "ẞ ß İ \u0131 ﬁ",
    "a\u0300\u0301\u0302",
]  # fmt: skip


def byte_level(suffix: str = "") -> tuple[dict, list]:
    """Learn a byte-level BPE of the corpus; give its vocabulary and merges."""
    ending = {"end_of_word_suffix": suffix} if suffix else {}
    learner = tokenizers.Tokenizer(models.BPE(**ending))
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>"] if suffix else ["<s>", "<pad>", "</s>", "<unk>"]
    # CLIP's vocabulary holds each byte alone and at the end of a word.
    ends = [letter + suffix for letter in letters] if suffix else ["<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=620, special_tokens=[*tokens, *ends], initial_alphabet=letters,
        show_progress=False, **ending,
    )  # fmt: skip
    texts = [text.lower() for text in CORPUS] if suffix else CORPUS
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def wordpiece() -> dict[str, int]:
    return train_wordpiece(CORPUS, 160).inner.get_vocab()


def write_vocabulary(folder: Path, family: str) -> None:
    """Write a family's vocabulary as its authors did, before there was a tokenizer.json."""
    if family in ("bert", "cased", "distilbert"):
        vocabulary = wordpiece()
        lines = sorted(vocabulary, key=vocabulary.get)
        (folder / "vocab.txt").write_text("".join(f"{line}\n" for line in lines))
        return
    vocabulary, merges = byte_level("</w>" if family == "clip" else "")
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("".join(f"{line}\n" for line in lines))


CONFIGS = {
    "bert": {"tokenizer_class": "BertTokenizer", "model_max_length": 40},
    "cased": {"tokenizer_class": "BertTokenizerFast", "do_lower_case": False,
              "strip_accents": False, "tokenize_chinese_chars": False},
    "distilbert": {"tokenizer_class": "DistilBertTokenizer", "model_max_length": 10**30},
    "roberta": {"tokenizer_class": "RobertaTokenizer", "model_max_length": 512},
    "roberta-spaced": {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": True},
    "roberta-strips": {
        "tokenizer_class": "RobertaTokenizer",
        "mask_token": {"__type": "AddedToken", "content": "<mask>", "lstrip": True,
                       "rstrip": False, "normalized": False, "single_word": False},
    },
    "clip": {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77},
}  # fmt: skip


def reference_class(family: str):
    import transformers

    return {
        "bert": transformers.BertTokenizerFast,
        "cased": transformers.BertTokenizerFast,
        "distilbert": transformers.DistilBertTokenizerFast,
        "roberta": transformers.RobertaTokenizerFast,
        "clip": transformers.CLIPTokenizerFast,
    }[family.split("-")[0]]


@pytest.fixture(scope="module", params=CONFIGS)
def vocabulary(request, tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    write_vocabulary(folder, request.param)
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIGS[request.param]))
    return request.param, folder


def assert_alike(ours: Tokenizer, reference, texts: list[str] = HARD) -> None:
    """Compare ids, masks and types: texts alone, pairs, cut, filled to a length."""
    options = {"return_token_type_ids": True, "return_tensors": "np", "truncation": True}
    pairs = texts[::-1]
    limit = ours.max_length
    for seconds in (None, pairs):
        for length in (limit, 24, 7):
            given = (texts,) if seconds is None else (texts, seconds)
            expected = reference(*given, padding=True, max_length=length, **options)
            assert_equal(ours(*given, max_length=length), expected)
            if length is not None:
                expected = reference(*given, padding="max_length", max_length=length, **options)
                assert_equal(ours(*given, length, "max_length") if seconds is not None
                             else ours(texts, None, length, "max_length"), expected)  # fmt: skip
    for text in texts:
        expected = reference(text, truncation=True, return_token_type_ids=True)
        found = ours(text)
        assert found["input_ids"].tolist() == [expected["input_ids"]]
    special = {getattr(reference, f"{role}_token_id") for role in ("pad", "cls", "sep", "mask")}
    assert special - {None} <= set(ours.special)


def assert_equal(found: dict, expected) -> None:
    assert found.keys() == {"input_ids", "attention_mask", "token_type_ids"}
    for name, array in found.items():
        assert array.dtype == np.int32
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.torch
def test_vocabulary_files_give_the_ids_of_transformers(vocabulary):
    family, folder = vocabulary
    ours = Tokenizer.from_file(folder)
    assert ours.max_length == {"bert": 40, "roberta": 512, "clip": 77}.get(family)
    assert_alike(ours, reference_class(family).from_pretrained(folder))


@pytest.mark.torch
def test_what_transformers_saves_gives_its_ids(vocabulary, tmp_path):
    family, folder = vocabulary
    reference = reference_class(family).from_pretrained(folder)
    reference.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert_alike(Tokenizer.from_file(path), reference)


@pytest.mark.torch
def test_what_is_saved_opens_in_transformers_with_the_same_ids(vocabulary, tmp_path, capfd):
    from transformers import AutoTokenizer

    _, folder = vocabulary
    ours = Tokenizer.from_file(folder, max_length=30)
    ours.save(tmp_path / "tokenizer.json")
    capfd.readouterr()
    reference = AutoTokenizer.from_pretrained(tmp_path)
    assert not capfd.readouterr().err and reference.model_max_length == 30
    assert_alike(ours, reference)
    again = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert again.roles == ours.roles and again.special == ours.special
    assert_alike(again, reference)


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["WordLevel", "Unigram"])
def test_any_tokenizer_that_the_library_reads_is_taken(kind, tmp_path):
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<pad>", "<go>", "<end>", *sorted({w for t in CORPUS for w in t.split()})]
    if kind == "WordLevel":
        model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    else:
        model = models.Unigram([(word, -float(i)) for i, word in enumerate(words)], unk_id=0)
    inner = tokenizers.Tokenizer(model)
    inner.normalizer = normalizers.NFKC()
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="<go> $A <end>", pair="<go> $A <end> $B:1 <end>:1",
        special_tokens=[("<go>", 2), ("<end>", 3)],
    )  # fmt: skip
    inner.add_special_tokens(["<go>", "<end>", "<pad>"])
    inner.enable_padding(pad_id=1, pad_token="<pad>", length=9)
    inner.enable_truncation(5)
    inner.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert ours.max_length is None and (ours.cls, ours.sep, ours.pad) == (2, 3, 1)
    reference = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert_alike(ours, reference)
    with pytest.raises(BadInput, match=r"no mask token.*; it has cls, pad, sep, unk"):
        MaskTokens(ours)


@pytest.mark.torch
@pytest.mark.assets("minilm")
@pytest.mark.parametrize("whole", [True, False])
def test_minilm_is_tokenised_as_by_transformers(whole, tmp_path):
    from transformers import AutoTokenizer

    model = next(find_asset("minilm").rglob("vocab.txt")).parent
    ours = Tokenizer.from_file(model)
    if not whole:
        for name in ("vocab.txt", "tokenizer_config.json", "special_tokens_map.json"):
            (tmp_path / name).write_bytes((model / name).read_bytes())
        ours = Tokenizer.from_file(tmp_path)
    assert ours.max_length == 512 and ours.vocab_size == 30_522
    assert ours.roles == {"pad": 0, "unk": 100, "cls": 101, "sep": 102, "mask": 103}
    assert_alike(ours, AutoTokenizer.from_pretrained(model))


def test_special_tokens_are_found_and_never_masked(vocabulary):
    family, folder = vocabulary
    ours = Tokenizer.from_file(folder, max_length=16)
    expected = {
        "roberta": {"pad": "<pad>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"},
        "clip": {
            "pad": "<|endoftext|>", "unk": "<|endoftext|>", "cls": "<|startoftext|>",
            "sep": "<|endoftext|>",
        },
    }  # fmt: skip
    bert = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    found = {role: ours.inner.id_to_token(i) for role, i in ours.roles.items()}
    assert found == expected.get(family.split("-")[0], bert)
    row = pack(Rows([{"text": text} for text in CORPUS]), ours, 12)[0]["input_ids"]
    assert row[0] == ours.cls and row[-1] == ours.sep
    if family == "clip":
        with pytest.raises(BadInput, match="no mask token"):
            MaskTokens(ours)
        return
    masked = MaskTokens(ours, rate=1.0)({"input_ids": row}, np.random.default_rng(0))
    ends = np.isin(row, [ours.cls, ours.sep])
    np.testing.assert_array_equal(masked["label"] == -1, ends)


def test_tags_of_words_follow_a_byte_level_tokenizer(vocabulary):
    """The words of a tagged text are those of the text, with the space before all but the first."""
    family, folder = vocabulary
    if not family.startswith("roberta"):
        return
    ours = Tokenizer.from_file(folder, max_length=32)
    words = ["the", "unbelievable", "cats"]
    row = encode(Rows([{"text": " ".join(words), "label": [4, 5, 6]}], None), ours)[0]
    text = ours(" " + " ".join(words))["input_ids"][0]
    np.testing.assert_array_equal(row["input_ids"][: len(text)], text)
    assert [tag for tag in row["label"] if tag >= 0] == [4, 5, 6]


def test_a_call_leaves_the_tokenizer_as_it_was(tmp_path):
    ours = train_wordpiece(CORPUS, 160, max_length=20)
    before = ours.inner.to_str()
    assert ours(CORPUS[0], max_length=5)["input_ids"].shape == (1, 5)
    assert ours("the", padding="max_length")["attention_mask"].sum() == 3
    for texts, pairs, length, message in [
        ([], None, None, "0 texts: expected one or more"),
        (["a", "b"], ["c"], None, "2 texts, 1 seconds"),
        (["a"], ["b"], 2, "max_length is 2, and special tokens alone take 3"),
        ("a", None, 0, "max_length is 0"),
        ([3], None, None, "these texts cannot be encoded"),
        (["\ud800"], None, None, "these texts cannot be encoded"),
    ]:
        with pytest.raises(BadInput, match=message):
            ours(texts, pairs, length)
    assert ours.inner.to_str() == before
    with pytest.raises(BadInput, match="neither the call nor the tokenizer has one"):
        Tokenizer(ours.inner)("the", padding="max_length")


# -- damaged and hostile files --------------------------------------------------------------------


def mutations() -> dict[str, str]:
    whole = json.loads(train_wordpiece(CORPUS, 120).inner.to_str())
    charsmap = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    pattern = {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Removed", "invert": False}
    piece = [{"SpecialToken": {"id": "[X]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": piece, "pair": piece, "special_tokens": {}}
    outside = {"type": "BertProcessing", "sep": ["[SEP]", 9999], "cls": ["[CLS]", 2]}
    changes = {
        "panic on reading": {"normalizer": charsmap},
        "a template of unknown tokens": {"post_processor": template},
        "an id that is not there": {"post_processor": outside},
        "a broken pattern": {"pre_tokenizer": pattern},
        "another model": {"model": {"type": "Magic", "vocab": {}}},
        "a merge of nothing": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}},
        "a negative id": {"model": {**whole["model"], "vocab": {"a": -1}}},
        "a huge id": {"model": {**whole["model"], "vocab": {"a": 1 << 40}}},
        "no vocabulary": {"model": {"type": "WordPiece"}},
        "another version": {"version": "9.9"},
    }
    text = json.dumps(whole)
    files = {name: json.dumps(whole | change) for name, change in changes.items()}
    files |= {"cut": text[: len(text) // 2], "empty": "", "a list": "[]", "deep": "[" * 200_000}
    return files


@pytest.mark.parametrize("name", mutations())
def test_a_damaged_tokenizer_is_refused_by_name(name, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(mutations()[name])
    for given in (path, tmp_path):
        with pytest.raises(BadInput, match=rf"(?s){tmp_path}.* cannot be read as a tokenizer: ."):
            Tokenizer.from_file(given)


def test_random_damage_is_refused_or_harmless(tmp_path):
    whole = train_wordpiece(CORPUS, 120).inner.to_str().encode()
    path, rng = tmp_path / "tokenizer.json", np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for place in rng.integers(len(damaged), size=rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            ids = Tokenizer.from_file(path)(HARD[:3])["input_ids"]
            assert ids.min() >= 0
        except BadInput:
            refused += 1
    assert refused > 20  # the others changed a letter of a token


def test_large_files_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_files, "LARGEST", 1000)
    ours = train_wordpiece(CORPUS, 120)
    ours.save(tmp_path / "tokenizer.json")
    with pytest.raises(BadInput, match=r"tokenizer.json has \d+ bytes, expected at most 1000"):
        Tokenizer.from_file(tmp_path)
    monkeypatch.setattr(files, "MAX_JSON", 1000)
    (tmp_path / "tokenizer_config.json").write_text(" " * 1001)
    with pytest.raises(BadInput, match=r"tokenizer_config.json has 1,001 bytes"):
        Tokenizer.from_file(tmp_path)


def test_folders_that_are_no_tokenizer_say_what_is_expected(tmp_path):
    def refuse(message: str, **files: str) -> None:
        for name, content in files.items():
            (tmp_path / name.replace("__", ".")).write_text(content)
        with pytest.raises(BadInput, match=message):
            Tokenizer.from_file(tmp_path)

    refuse(r"no tokenizer in .*tokenizer\.json, vocab\.txt, or vocab\.json")
    refuse(r"tokenizer_class is '', expected one of BertTokenizer", vocab__txt="a\nb\n")
    refuse(
        "tokenizer_class is 'T5Tokenizer', expected one of BertTokenizer, DistilBertTokenizer",
        tokenizer_config__json='{"tokenizer_class": "T5TokenizerFast"}',
    )
    refuse(
        r"lacks '\[CLS\]' or '\[SEP\]'",
        tokenizer_config__json='{"tokenizer_class": "BertTokenizer"}',
    )
    refuse("no JSON object|is not a JSON object", tokenizer_config__json="[3")
    refuse("padding_side is 'left'", tokenizer_config__json='{"padding_side": "left"}')
    wrong = '{"cls_token": 3, "tokenizer_class": "BertTokenizer"}'
    refuse("3 is no token", tokenizer_config__json=wrong)
    words = "".join(f"{word}\n" for word in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a"))
    refuse(
        r"the token '<new>' should have the id 9, not None",
        vocab__txt=words, added_tokens__json='{"<new>": 9}', tokenizer_config__json="{}",
    )  # fmt: skip
    listed = {"5": {"content": "<new>", "special": True}, "7": {"content": "b", "special": False}}
    config = json.dumps({"added_tokens_decoder": listed})
    refuse(
        "'b' should have the id 7, not 6", added_tokens__json="{}", tokenizer_config__json=config
    )
    listed["6"] = listed.pop("7")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    ours = Tokenizer.from_file(tmp_path)
    assert ours("a<new>b")["input_ids"].tolist() == [[2, 4, 5, 6, 3]] and ours.vocab_size == 7
    assert ours.special == [0, 1, 2, 3, 5]  # no [MASK] in this vocabulary
    with pytest.raises(BadInput, match="no mask token"):
        MaskTokens(ours)
