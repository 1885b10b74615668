"""Sources, splits, tokens and the loader: what is read, in which order, and what is refused."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tljax.data.builders_image import find_asset, stratified_order
from tljax.data.loader import Cached, eval_batches, prefetch_to_device, train_batches
from tljax.data.sources import Info, Rows, Source, open_data, subset
from tljax.data.tokens import MaskTokens, Tokenizer, encode, pack, train_wordpiece
from tljax.types import BadInput

SENTENCES = [
    "the cat sat on the mat",
    "a dog barked at the cat all night long",
    "unbelievable results were found in the data",
    "he reads books and writes letters",
    "transfer of knowledge is found where tasks are related",
]


class Numbers(Source):
    """Example i holds i: what comes out of a loader tells the order."""

    def __init__(self, size: int):
        self.labels = np.arange(size, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"image": np.full((2, 2, 1), index, np.uint8), "label": self.labels[index]}


def take(iterator, count: int) -> list:
    return list(itertools.islice(iterator, count))


def picture(path: Path, colour: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (colour, 0, 255 - colour)).save(path)


def folder(root: Path, parts: tuple[str, ...], classes: str = "ab", each: int = 10) -> Path:
    for part, label, i in itertools.product(parts, classes, range(each)):
        picture(root / part / label / f"{i}.png", 10 * i)
    return root


def texts(source) -> list[str]:
    return [source[i]["text"] for i in range(len(source))]


# -- built-in data ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TLJAX_DATA", str(tmp_path_factory.mktemp("tfds")))
        patch.delenv("TFDS_DATA_DIR", raising=False)
        yield open_data("digits", seed=3)


def test_digits_hold_every_image_of_scikit_learn_exactly_once(digits):
    parts = digits[:3]
    found = [(p[i]["image"].tobytes(), int(p[i]["label"])) for p in parts for i in range(len(p))]
    reference = load_digits()
    pixels = np.round(reference.images * 255 / 16).astype(np.uint8)
    expected = [(x.tobytes(), int(y)) for x, y in zip(pixels, reference.target, strict=True)]
    assert sorted(found) == sorted(expected)
    assert digits.info == Info("image", "classify", tuple("0123456789"))


def test_labels_agree_with_the_examples_and_parts_keep_the_class_shares(digits):
    shares = np.bincount(load_digits().target) / 1797
    for part in digits[:3]:
        assert part.labels.tolist() == [part[i]["label"] for i in range(len(part))]
        # Each carving rounds a class by at most one example, and there are two of them.
        assert np.abs(np.bincount(part.labels) - shares * len(part)).max() <= 2


def test_data_need_no_tensorflow(tmp_path):
    code = """if True:
        import sys
        from tljax.data.loader import train_batches
        from tljax.data.sources import open_data
        from tljax.data.transforms import FitImage, Normalise
        splits = open_data("digits")
        next(train_batches(splits.train, Normalise(), 4, seed=0))
        sys.exit("tensorflow" in sys.modules)
    """
    environment = {"TLJAX_DATA": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert b"prepared" in done.stdout and not done.stderr  # plain lines where there is no terminal


@pytest.mark.assets("emoji")
def test_vendors_share_labels_keys_and_split_so_that_a_shift_never_leaks():
    google, twitter = (open_data(f"emoji/{vendor}", seed=0) for vendor in ("google", "twitter"))
    assert google.info == twitter.info
    for ours, theirs in zip(google[:3], twitter[:3], strict=True):
        # Equal indices are equal emoji: same order, same labels, other drawings.
        assert ours.labels.tolist() == theirs.labels.tolist()
        keys = [_keys(source) for source in (ours, theirs)]
        assert keys[0] == keys[1]
    trained, tested = set(_keys(google.train)), set(_keys(twitter.test))
    assert not trained & tested
    assert google.train[0]["image"].shape == (64, 64, 3)


def _keys(source) -> list[str]:
    parent = source.parent if hasattr(source, "parent") else source
    while hasattr(parent, "parent"):
        parent = parent.parent
    keys = [record["key"].decode() for record in parent._data]
    if not hasattr(source, "parent"):
        return keys
    indices = source.indices
    inner = source.parent
    while hasattr(inner, "parent"):
        indices, inner = inner.indices[indices], inner.parent
    return [keys[i] for i in indices]


@pytest.mark.assets("vader")
@pytest.mark.parametrize("domain", ["movies", "amazon", "nyt", "tweets"])
def test_copies_of_a_text_never_straddle_the_test_split(domain):
    splits = open_data(f"sentiment/{domain}")
    known, held = (
        {" ".join(text.lower().split()) for part in parts for text in texts(part)}
        for parts in (splits[:2], splits[2:3])
    )
    assert known and held and not known & held
    assert splits.info.names == ("negative", "positive")


@pytest.mark.assets("wordnet")
def test_wordnet_definitions_are_those_of_its_45_files():
    splits = open_data("wordnet")
    assert sum(map(len, splits[:3])) == 117_659
    assert splits.info.num_outputs == 45
    assert len(np.unique(splits.test.labels)) == 45


@pytest.mark.assets("fashion")
def test_fashion_has_its_official_parts():
    splits = open_data("fashion", validation=5000)
    assert [len(part) for part in splits[:3]] == [55_000, 5_000, 10_000]
    assert np.bincount(splits.test.labels).tolist() == [1000] * 10
    assert np.bincount(splits.validation.labels).tolist() == [500] * 10


@pytest.mark.slow
@pytest.mark.assets("brown")
def test_every_word_of_brown_has_a_tag():
    splits = open_data("pos")
    assert splits.info.task == "tag" and "nn" in splits.info.names
    for i in range(100):
        example = splits.test[i]
        assert len(example["text"].split(" ")) == len(example["label"])


# -- splits and budgets -------------------------------------------------------------------------


def test_every_prefix_of_the_order_is_stratified_to_within_one_example():
    labels = np.random.default_rng(0).choice(4, size=301, p=[0.6, 0.25, 0.1, 0.05])
    order = stratified_order(labels, seed=7, size=301)
    assert sorted(order) == list(range(301))
    shares = np.bincount(labels) / 301
    for size in range(1, 302):
        found = np.bincount(labels[order[:size]], minlength=4)
        assert np.abs(found - shares * size).max() <= 1.5  # rounding of 4 classes to a whole sum


def test_budgets_are_nested_seeded_and_balanced():
    source = Numbers(200)
    source.labels = np.repeat(np.arange(10, dtype=np.int32), 20)
    small, large, other = (subset(source, n, s).indices for n, s in ((30, 0), (110, 0), (30, 1)))
    assert set(small) < set(large)
    assert small.tolist() == subset(source, 30, 0).indices.tolist() != other.tolist()
    assert np.bincount(source.labels[small]).tolist() == [3] * 10
    with pytest.raises(BadInput, match="budget of 201 examples: expected 1 to the 200"):
        subset(source, 201, 0)


def test_seed_moves_validation_but_never_the_test_part(tmp_path):
    folder(tmp_path, ("",))
    first, second = (open_data(str(tmp_path), seed=seed) for seed in (0, 1))
    names = [
        [s.parent.parent._rows[i]["image"] for i in s.parent.indices] for s in (first[0], second[0])
    ]
    assert names[0] == names[1]  # what the test part leaves is the same
    assert first.test.indices.tolist() == second.test.indices.tolist()
    assert any(
        open_data(str(tmp_path), seed=s).validation.indices.tolist()
        != first.validation.indices.tolist()
        for s in range(1, 6)
    )
    everything = np.concatenate([first.train.parent.indices, first.test.indices])
    assert sorted(everything) == list(range(20))


# -- folders and files --------------------------------------------------------------------------


def test_folder_with_parts_reads_each_image_and_names_its_class(tmp_path):
    splits = open_data(str(folder(tmp_path, ("train", "test"), "cba")), validation=3)
    assert splits.info == Info("image", "classify", ("a", "b", "c"))
    assert [len(part) for part in splits[:3]] == [27, 3, 30]
    assert splits.test.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    # PNG keeps every bit: what was drawn is what is read.
    assert splits.test[4]["image"][0, 0].tolist() == [40, 0, 215]


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA"])
def test_pictures_of_any_mode_have_one_or_three_channels(tmp_path, mode):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode).save(tmp_path / "x.png")
    image = Rows([{"image": tmp_path / "x.png"}], None)[0]["image"]
    assert image.dtype == np.uint8 and image.shape[2] in (1, 3)
    if mode in ("RGBA", "LA"):
        assert image.min() == 255  # transparent black lies on white


def test_table_infers_its_task_from_its_labels(tmp_path):
    cases = {
        "a.csv": ("text,label\nx,10\ny,9\nz,10\nu,9\nv,9", Info("text", "classify", ("9", "10"))),
        "b.tsv": ("text\tlabel\nx\t0.5\ny\t1\nz\t-2\nu\t3\nv\t1", Info("text", "regress")),
        "c.csv": ("text,label\nx,p|q\ny,q\nz,\nu,r\nv,p", None),
        "d.csv": ("text\nx\ny\nz\nu\nv", Info("text")),
    }
    for name, (content, info) in cases.items():
        (tmp_path / name).write_text(content)
        splits = open_data(str(tmp_path / name), validation=1)
        assert splits.info == (info or Info("text", "multilabel", ("p", "q", "r")))
    rows = [{"s": f"text {i}", "t": "b", "y": ["u"] if i % 2 else ["u", "w"]} for i in range(10)]
    path = tmp_path / "e.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    splits = open_data(str(path), columns={"text": "s", "text_b": "t", "label": "y"})
    assert splits.train[0]["text_b"] == "b"
    for part in splits[:3]:
        for i, text in enumerate(texts(part)):
            expected = [1, 0] if int(text[5:]) % 2 else [1, 1]
            assert part.labels[i].tolist() == expected and part.labels.dtype == np.float32


def test_folder_of_tables_keeps_its_own_parts(tmp_path):
    for part, count in (("train", 8), ("test", 4)):
        lines = [f"{part} {i},{'yn'[i % 2]}" for i in range(count)]
        (tmp_path / f"{part}.csv").write_text("\n".join(["text,label", *lines]))
    splits = open_data(str(tmp_path), validation=2)
    assert [len(part) for part in splits[:3]] == [6, 2, 4]
    assert texts(splits.test) == ["test 0", "test 1", "test 2", "test 3"]


def test_wrong_inputs_say_what_was_expected(tmp_path, monkeypatch):
    def refuse(message: str, name: str, **options) -> None:
        with pytest.raises(BadInput, match=message):
            open_data(name, **options)

    refuse("nearest are .*emoji/google", "emoji/gogle")
    refuse("no prepared TFDS data 'cifar10'", "tfds:cifar10")
    (tmp_path / "t.csv").write_text("sentence,label\nx,1\n")
    refuse("no column 'text': it has sentence, label", str(tmp_path / "t.csv"))
    refuse("no images in", str(tmp_path))
    folder(tmp_path / "f", ("train",), "ab")
    folder(tmp_path / "f", ("test",), "abc")
    refuse("label 'c' is outside the classes of the training part: a, b", str(tmp_path / "f"))
    refuse("train part of .* is empty", str(folder(tmp_path / "g", ("",))), validation=16)
    monkeypatch.setenv("TLJAX_ASSETS", str(tmp_path))
    with pytest.raises(BadInput, match="make assets NAMES=spam"):
        find_asset("spam")


def test_split_that_is_not_there_lists_those_that_are(digits, monkeypatch, tmp_path):
    monkeypatch.setenv("TLJAX_DATA", str(tmp_path))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    with pytest.raises(BadInput, match=r"it has \['test', 'train'\]"):
        open_data("digits", test="tset")


@pytest.mark.parametrize("kept", [0, 10, 40, 1000])
def test_corrupt_image_is_named_and_reaches_the_training_loop(tmp_path, kept):
    folder(tmp_path, ("train", "test"))
    path = tmp_path / "test/a/3.png"
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(BadInput, match=r"test/a/3\.png cannot be decoded"):
        list(eval_batches(open_data(str(tmp_path)).test, None, 4))


# -- the loader ---------------------------------------------------------------------------------


def ids(batches) -> list[int]:
    return np.concatenate([batch["label"] for batch in batches]).tolist()


def test_each_epoch_sees_every_example_once_in_another_order():
    flat = ids(take(train_batches(Numbers(23), None, 6, seed=0), 23))  # 6 epochs
    epochs = [flat[23 * e : 23 * (e + 1)] for e in range(6)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    # Neighbouring seeds share no epoch either (grain's own seeds would).
    other = ids(take(train_batches(Numbers(23), None, 6, seed=1), 23))
    assert not {tuple(other[23 * e : 23 * (e + 1)]) for e in range(6)} & set(map(tuple, epochs))


def noise(example: dict, rng: np.random.Generator) -> dict:
    return {**example, "noise": rng.random(2)}


def batch_noise(batch: dict, rng: np.random.Generator) -> dict:
    return {**batch, "batch_noise": rng.random()}


@pytest.mark.parametrize("threads", [0, 3])
def test_batches_are_a_function_of_seed_and_step_wherever_one_starts(threads):
    def batches(seed: int, **options) -> list[dict]:
        made = train_batches(Numbers(50), noise, 8, seed, mix=batch_noise, **options)
        return take(made, 9 - options.get("start_step", 0))

    whole, again = batches(5), batches(5, start_step=4, threads=threads)
    for ours, theirs in zip(whole[4:], again, strict=True):
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key])
    assert not np.array_equal(whole[0]["noise"], batches(6)[0]["noise"])
    assert len({float(batch["batch_noise"]) for batch in whole}) == 9


def test_starting_late_costs_nothing():
    late = next(train_batches(Numbers(7), None, 3, seed=0, start_step=10**9))
    assert late["label"].shape == (3,)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_global_batch_does_not_depend_on_the_number_of_processes(count):
    whole = take(train_batches(Numbers(30), noise, 8, seed=2), 6)
    parts = [
        take(train_batches(Numbers(30), noise, 8, seed=2, process_index=p, process_count=count), 6)
        for p in range(count)
    ]
    for step, batch in enumerate(whole):
        for key in batch:
            joined = np.concatenate([part[step][key] for part in parts])
            np.testing.assert_array_equal(batch[key], joined)
    with pytest.raises(BadInput, match="does not divide over 3"):
        train_batches(Numbers(30), None, 8, seed=0, process_count=3)


@pytest.mark.parametrize("count", [1, 2])
def test_evaluation_counts_every_example_once(count):
    parts = [
        list(eval_batches(Numbers(21), noise, 8, process_index=p, process_count=count))
        for p in range(count)
    ]
    assert {len(part) for part in parts} == {3}
    seen = [int(i) for part in parts for b in part for i in b["label"][b["valid"]]]
    assert sorted(seen) == list(range(21))
    again = list(eval_batches(Numbers(21), noise, 8))
    joined = np.concatenate([parts[p][0]["noise"] for p in range(count)])
    np.testing.assert_array_equal(again[0]["noise"], joined)


@pytest.mark.parametrize(("limit", "reads", "prepares"), [(80, 20, 20), (20, 20, 40), (0, 40, 40)])
def test_cache_keeps_prepared_then_raw_then_nothing(limit, reads, prepares):
    counts = {"reads": 0, "prepares": 0}

    class Counting(Numbers):
        def __getitem__(self, index):
            counts["reads"] += 1
            return {"image": np.full(1, index, np.uint8), "label": int(index)}

    def prepare(example: dict) -> dict:
        counts["prepares"] += 1
        return {**example, "image": np.repeat(example["image"], 4)}

    source = Cached(Counting(20), prepare, limit)
    counts.update(reads=0, prepares=0)
    for _ in range(2):
        rows = source.__getitems__(range(20))
        assert [row["image"].tolist() for row in rows] == [[i] * 4 for i in range(20)]
    assert counts == {"reads": reads, "prepares": prepares}


def test_prefetch_keeps_the_order_and_stays_ahead():
    put: list[int] = []
    stream = prefetch_to_device(range(5), lambda x: put.append(x) or x, depth=2)
    assert next(stream) == 0
    assert put == [0, 1]
    assert list(stream) == [1, 2, 3, 4]


# -- tokens -------------------------------------------------------------------------------------


def sentences(labels=None) -> Rows:
    return Rows([{"text": text} for text in SENTENCES], labels)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_wordpiece(SENTENCES, vocab_size=90, max_length=20)


def test_a_learnt_vocabulary_is_the_same_in_every_process():
    """Else a run that is killed would go on with another meaning of its embedding rows."""
    code = """if True:
        from tljax.data.tokens import train_wordpiece
        words = [f"{a}{b}{c} word{a}ing" for a in "abcdefgh" for b in "ijklm" for c in "nopqr"]
        vocab = train_wordpiece(words * 2, vocab_size=60).inner.get_vocab()
        print(sorted(vocab.items(), key=lambda item: item[1]))
    """
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True) for _ in range(3)]
    assert runs[0].stdout and len({run.stdout for run in runs}) == 1


def test_encoding_pads_to_a_multiple_of_eight_and_masks_the_padding(tokenizer):
    encoded = encode(sentences(), tokenizer, Info("text"))
    longest = max(len(tokenizer.inner.encode(text).ids) for text in SENTENCES)
    assert encoded.length == min(-(-longest // 8) * 8, tokenizer.max_length)
    for i, text in enumerate(SENTENCES):
        row = encoded[i]
        ids = tokenizer.inner.encode(text).ids
        assert row["input_ids"].tolist() == ids + [tokenizer.pad] * (encoded.length - len(ids))
        assert row["attention_mask"].sum() == len(ids)
        assert ids[0] == tokenizer.cls and ids[-1] == tokenizer.sep and len(ids) <= 20
        assert all(row[key].dtype == np.int32 for key in row)


def test_pairs_are_told_apart_by_their_types(tokenizer):
    pairs = Rows([{"text": "the cat", "text_b": "a dog"}], None)
    row = encode(pairs, tokenizer, Info("text"))[0]
    first = len(tokenizer.inner.encode("the cat").ids)
    second = len(tokenizer.inner.encode("a dog").ids) - 1
    assert row["token_type_ids"].tolist()[: first + second] == [0] * first + [1] * second


def test_tokenizer_forgets_padding_and_truncation_and_survives_its_file(tokenizer, tmp_path):
    tokenizer.inner.enable_padding(length=64)
    tokenizer.save(tmp_path / "tokenizer.json")
    tokenizer.inner.no_padding()
    again = Tokenizer.from_file(tmp_path / "tokenizer.json", max_length=50)
    long = " ".join(SENTENCES)
    assert len(again.inner.encode(long).ids) == 50
    assert again.inner.encode("the cat").ids == tokenizer.inner.encode("the cat").ids
    with pytest.raises(BadInput, match=r"expected a tokenizer\.json"):
        Tokenizer.from_file(tmp_path / "nothing.txt")


@pytest.mark.torch
@pytest.mark.assets("minilm")
def test_tokenizer_equals_transformers_on_its_own_files():
    from transformers import BertTokenizerFast

    model = next(find_asset("minilm").rglob("vocab.txt")).parent
    reference = BertTokenizerFast.from_pretrained(model)
    hard = [*SENTENCES, "Ünïcödé, 1,234.5 — don't [MASK] 漢字 🙂", "x" * 300, ""]
    expected = reference(hard, hard[::-1], truncation=True, max_length=48)
    ours = Tokenizer.from_file(model / "tokenizer.json", max_length=48)
    found = ours.inner.encode_batch(list(zip(hard, hard[::-1], strict=True)))
    assert [encoding.ids for encoding in found] == expected["input_ids"]
    assert [encoding.type_ids for encoding in found] == expected["token_type_ids"]


def test_a_tag_stands_on_the_first_piece_of_its_word_only(tokenizer):
    words = ["the", "unbelievable", "cat"]
    source = Rows([{"text": " ".join(words), "label": np.array([7, 8, 9], np.int32)}], None)
    row = encode(source, tokenizer, Info("text", "tag", tuple("0123456789")))[0]
    pieces = [len(tokenizer.inner.encode(word, add_special_tokens=False).ids) for word in words]
    assert pieces[1] > 1
    expected = [-1]
    for tag, count in zip((7, 8, 9), pieces, strict=True):
        expected += [tag] + [-1] * (count - 1)
    assert row["label"].tolist() == expected + [-1] * (len(row["label"]) - len(expected))


def test_packing_loses_no_token_but_the_tail(tokenizer):
    packed = pack(sentences(), tokenizer, length=10)
    stream = []
    for text in SENTENCES:  # word by word, because the tokenizer would cut a sentence at 20
        for word in text.split():
            stream += tokenizer.inner.encode(word, add_special_tokens=False).ids
        stream.append(tokenizer.sep)
    rows = [packed[i]["input_ids"].tolist() for i in range(len(packed))]
    assert all(row[0] == tokenizer.cls and row[-1] == tokenizer.sep for row in rows)
    joined = [i for row in rows for i in row[1:-1]]
    assert joined == stream[: len(joined)] and 0 <= len(stream) - len(joined) < 8
    assert all(packed[i]["attention_mask"].all() for i in range(len(packed)))
    with pytest.raises(BadInput, match="do not fill one row of 1000"):
        pack(sentences(), tokenizer, length=1000)


def test_masking_follows_bert(tokenizer):
    mask = MaskTokens.of(tokenizer)
    rng = np.random.default_rng(0)
    ids = rng.integers(5, tokenizer.vocab_size, size=200_000, dtype=np.int32)
    ids[::10] = rng.integers(0, 5, size=20_000)
    out = mask({"input_ids": ids}, np.random.default_rng(1))
    special, chosen = ids < 5, out["label"] >= 0
    assert not (chosen & special).any()
    np.testing.assert_array_equal(out["label"][chosen], ids[chosen])
    np.testing.assert_array_equal(out["input_ids"][~chosen], ids[~chosen])
    shown = out["input_ids"][chosen]
    kept = shown == ids[chosen]
    masked = shown == tokenizer.mask
    # Five standard errors of a share of 180,000 (then of about 27,000) tokens.
    assert abs(chosen[~special].mean() - 0.15) < 5 * (0.15 * 0.85 / 180_000) ** 0.5
    error = 5 * (0.8 * 0.2 / chosen.sum()) ** 0.5
    chance = 0.1 / tokenizer.vocab_size  # a random token may be [MASK], or the token itself
    assert abs(masked.mean() - 0.8 - chance) < error
    assert abs(kept.mean() - 0.1 - chance) < error
    again = mask({"input_ids": ids}, np.random.default_rng(1))
    np.testing.assert_array_equal(out["input_ids"], again["input_ids"])
