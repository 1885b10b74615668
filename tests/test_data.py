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

from tljax.config import Data
from tljax.data import sources
from tljax.data.builders_image import Local, Material, find_asset, stratified_order
from tljax.data.loader import Cached, Loader, prefetch_to_device
from tljax.data.pipeline import open_pipeline, unlabelled
from tljax.data.sources import Info, Rows, Source, Splits, subset
from tljax.data.tokens import MaskTokens, Tokenizer, encode, pack, train_wordpiece
from tljax.types import BadInput

pytestmark = pytest.mark.once

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


def open_data(name: str, task: str | None = None, **options) -> Splits:
    return sources.open_data(Data(name=name, **options), task)


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
        from tljax.config import Augment, Data
        from tljax.data.augment import TransformImage
        from tljax.data.loader import Loader
        from tljax.data.sources import open_data
        splits = open_data(Data(name="digits"))
        next(Loader(4).train(splits.train, TransformImage(8, Augment()), seed=0))
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


TAGGED = [
    ("Ada  Lovelace visited London", ["B-PER", "I-PER", "O", "B-LOC"]),
    ("nothing here", ["O", "O"]),
] * 10


def tagged_file(path: Path, rows=TAGGED) -> str:
    lines = [json.dumps({"text": text, "label": tags}) for text, tags in rows]
    path.write_text("\n".join(lines))
    return str(path)


def test_lists_of_labels_are_tags_where_the_task_says_so(tmp_path):
    name = tagged_file(tmp_path / "t.jsonl")
    names = ("B-LOC", "B-PER", "I-PER", "O")
    assert open_data(name).info == Info("text", "multilabel", names)  # also with one a word
    splits = open_data(name, "tag")
    assert splits.info == Info("text", "tag", names) and splits.train.labels is None
    for source in splits[:3]:
        for i in range(len(source)):
            expected = dict(TAGGED)[source[i]["text"]]
            assert [names[tag] for tag in source[i]["label"]] == expected


def open_texts(name: str, task: str | None, **options):
    data, batch = Data(name=name, length=16, vocab=60, **options), {"batch": 4, "threads": 0}
    return open_pipeline(data, task, preprocess=None, tokenizer=None, seed=0, **batch)


def test_tags_of_a_file_reach_batches_and_predictions_one_a_word(tmp_path):
    pipeline = open_texts(tagged_file(tmp_path / "t.jsonl"), "tag")
    assert pipeline.task == "tag" and pipeline.labels == ("B-LOC", "B-PER", "I-PER", "O")
    batch = next(pipeline.train_batches())
    for label in batch["label"]:
        assert label[label >= 0].tolist() in ([1, 2, 3, 0], [3, 3])
    (batch,) = unlabelled(pipeline, [{"text": text} for text, _ in TAGGED[:2]])
    assert (batch["label"] == 0)[batch["valid"]].sum(axis=1).tolist() == [4, 2]


def test_tags_that_do_not_fit_their_words_name_the_row_and_both_counts(tmp_path):
    path = tmp_path / "t.jsonl"
    name = tagged_file(path, [*TAGGED, ("three words here", ["O", "O"])])
    with pytest.raises(BadInput, match=f"{path}, row 21 has 3 words but 2 tags"):
        open_data(name, "tag")
    assert open_data(name).info.task == "multilabel"
    (tmp_path / "parts").mkdir()
    tagged_file(tmp_path / "parts/train.jsonl")
    test = tmp_path / "parts/test.jsonl"
    tagged_file(test, [("one", "O"), ("two words", ["O", "O", "O"])])
    with pytest.raises(BadInput, match=f"{test}, row 2 has 2 words but 3 tags"):
        open_data(str(tmp_path / "parts"), "tag")


def test_whole_numbers_are_classes_or_numbers_as_the_task_says(tmp_path):
    path = tmp_path / "stars.csv"
    path.write_text("text,label\n" + "".join(f"text {i},{i % 5}\n" for i in range(20)))
    assert open_data(str(path)).info == Info("text", "classify", tuple("01234"))
    splits = open_data(str(path), "regress")
    assert splits.info == Info("text", "regress") and splits.train.labels.dtype == np.float32
    for source in splits[:3]:
        expected = [int(text.split()[1]) % 5 for text in texts(source)]
        assert source.labels.tolist() == expected
    assert open_data(str(path), "classify").info == open_data(str(path)).info


def test_a_task_that_the_labels_cannot_serve_names_those_they_can(tmp_path):
    files = {
        "words.csv": ("text,label\n" + "x,good\ny,bad\n" * 9, ["regress", "tag", "multilabel"]),
        "halves.csv": ("text,label\n" + "x,0.5\ny,1\n" * 9, ["classify", "tag", "multilabel"]),
        "plain.csv": ("text\n" + "x\n" * 9, ["classify", "regress", "tag", "multilabel"]),
    }
    for name, (content, tasks) in files.items():
        (tmp_path / name).write_text(content)
        for task in tasks:
            with pytest.raises(BadInput, match=rf"task '{task}' does not fit .*{name}.*'mlm'\]"):
                open_data(str(tmp_path / name), task)
    with pytest.raises(BadInput, match=r"it can serve \['multilabel', 'tag', 'mlm'\]"):
        open_data(tagged_file(tmp_path / "t.jsonl"), "classify")


def test_a_part_without_labels_is_refused_unless_the_task_needs_none(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\n" + "the cat,1\na dog,0\n" * 40)
    (tmp_path / "test.csv").write_text("text\n" + "the cat sat\n" * 40)
    with pytest.raises(BadInput, match=r"the test part of .* has no labels"):
        open_data(str(tmp_path))
    assert open_texts(str(tmp_path), "mlm").labels is None


@pytest.mark.parametrize("bad", ["train", "test"])
def test_prepared_data_with_a_label_of_minus_one_name_the_part(tmp_path, monkeypatch, bad):
    """As TFDS marks what nobody labelled; pictures' labels are else first read in training."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    page = Image.new("L", (4, 4))
    rows = [
        (part, 0, {"image": page, "label": -1 if part == bad and i == 3 else i % 2})
        for part in ("train", "test")
        for i in range(20)
    ]
    features = {
        "image": sources.tfds.features.Image(shape=(4, 4, 1), encoding_format="png"),
        "label": sources.ClassLabel(num_classes=2),
    }
    Local("blank", Material(features, rows, held={"test"}), tmp_path).download_and_prepare()
    with pytest.raises(BadInput, match=f"the {bad} part .* label -1, outside its 2 classes"):
        open_data("tfds:blank", validation=1)


def prepare(folder: Path, name: str, features: dict, records: list[dict], held=0.2) -> str:
    """Prepare records as TFDS does elsewhere; the group of a record is its number."""
    rows = [(i, 0, record) for i, record in enumerate(records)]
    Local(name, Material(features, rows, held), folder).download_and_prepare()
    return f"tfds:{name}"


def test_prepared_data_of_other_features_are_read_or_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    text, tags = sources.Text(), sources.ClassLabel(names=["O", "B-x"])
    records = [{"text": f"word{i} two", "label": ["O", "B-x"]} for i in range(20)]
    features = {"text": text, "label": sources.tfds.features.Sequence(tags)}
    name = prepare(tmp_path, "both", features, records)
    assert open_data(name).info.task == "tag"
    assert open_data(name, "multilabel").train.labels.shape[1] == 2
    records[7]["label"] = ["O"]
    with pytest.raises(BadInput, match=r"example .* has 2 words but 1 tags"):
        texts(open_data(prepare(tmp_path, "uneven", features, records)).train)
    named = [{"text": "a", "label": "good"}] * 20
    with pytest.raises(BadInput, match="expected classes, lists of them, numbers"):
        open_data(prepare(tmp_path, "named", {"text": text, "label": text}, named))
    number = sources.tfds.features.Scalar(np.float32)
    halves = [{"text": "a", "label": np.nan if i == 3 else i / 2} for i in range(20)]
    with pytest.raises(BadInput, match="has no finite label"):
        open_data(prepare(tmp_path, "halves", {"text": text, "label": number}, halves))


def test_prepared_data_without_a_test_part_have_one_carved_out(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(
        Local,
        "_split_generators",
        lambda self, _: {"train": self._generate_examples(set(range(20)))},
    )
    features = {"text": sources.Text(), "label": sources.ClassLabel(num_classes=2)}
    records = [{"text": f"text {i}", "label": i % 2} for i in range(20)]
    splits = open_data(prepare(tmp_path, "alone", features, records), validation=4)
    parts = [set(texts(part)) for part in splits[:3]]
    assert [len(part) for part in parts] == [12, 4, 4] and len(set.union(*parts)) == 20
    with pytest.raises(BadInput, match="would test on what is trained on"):
        open_data("tfds:alone", test="train[50%:]")


@pytest.mark.parametrize("label", ["", None, {"a": 1}])
def test_a_label_that_is_none_names_its_row_unless_nothing_reads_it(tmp_path, label):
    path = tmp_path / "t.jsonl"
    rows = [{"text": f"text {i}", "label": label if i == 11 else i % 2} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(BadInput, match=f"{path}, row 12: the label is"):
        open_data(str(path))
    assert open_data(str(path), "mlm").info == Info("text")


def test_lists_of_labels_may_be_mixed_with_other_forms_but_not_all_empty(tmp_path):
    path = tmp_path / "t.jsonl"
    mixed = ["a|b", ["a"], "", 3] * 10
    path.write_text("".join(json.dumps({"text": "x", "label": one}) + "\n" for one in mixed))
    splits = open_data(str(path))
    assert splits.info == Info("text", "multilabel", ("3", "a", "b"))
    assert sum(part.labels.sum() for part in splits[:3]) == 40
    path.write_text(json.dumps({"text": "x", "label": []}) + "\n")
    with pytest.raises(BadInput, match="all of them are empty"):
        open_data(str(path))


def test_a_table_saved_with_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("text,label\n" + "x,1\ny,0\n" * 9, encoding="utf-8-sig")
    assert open_data(str(path)).info.names == ("0", "1")


def test_pictures_of_more_than_8_bits_are_refused(tmp_path):
    folder(tmp_path, ("train", "test"))
    path = tmp_path / "train/a/3.png"
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(path)
    with pytest.raises(BadInput, match=r"a/3\.png .*I;16, expected 8 bits"):
        texts_of = open_data(str(tmp_path)).train
        [texts_of[i] for i in range(len(texts_of))]


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
        list(Loader(4).evaluate(open_data(str(tmp_path)).test, None))


# -- the loader ---------------------------------------------------------------------------------


def ids(batches) -> list[int]:
    return np.concatenate([batch["label"] for batch in batches]).tolist()


def test_each_epoch_sees_every_example_once_in_another_order():
    flat = ids(take(Loader(6).train(Numbers(23), None, seed=0), 23))  # 6 epochs
    epochs = [flat[23 * e : 23 * (e + 1)] for e in range(6)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    # Neighbouring seeds share no epoch either (grain's own seeds would).
    other = ids(take(Loader(6).train(Numbers(23), None, seed=1), 23))
    assert not {tuple(other[23 * e : 23 * (e + 1)]) for e in range(6)} & set(map(tuple, epochs))


def noise(example: dict, rng: np.random.Generator) -> dict:
    return {**example, "noise": rng.random(2)}


def batch_noise(batch: dict, rng: np.random.Generator) -> dict:
    return {**batch, "batch_noise": rng.random()}


@pytest.mark.parametrize("threads", [0, 3])
def test_batches_are_a_function_of_seed_and_step_wherever_one_starts(threads):
    def batches(seed: int, start: int = 0, threads: int = 4) -> list[dict]:
        loader = Loader(8, threads)
        return take(loader.train(Numbers(50), noise, seed, batch_noise, start), 9 - start)

    whole, again = batches(5), batches(5, start=4, threads=threads)
    for ours, theirs in zip(whole[4:], again, strict=True):
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key])
    assert not np.array_equal(whole[0]["noise"], batches(6)[0]["noise"])
    assert len({float(batch["batch_noise"]) for batch in whole}) == 9


def test_starting_late_costs_nothing():
    late = next(Loader(3).train(Numbers(7), None, seed=0, start=10**9))
    assert late["label"].shape == (3,)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_global_batch_does_not_depend_on_the_number_of_processes(count):
    whole = take(Loader(8).train(Numbers(30), noise, seed=2), 6)
    loaders = [Loader(8, process=p, processes=count) for p in range(count)]
    parts = [take(loader.train(Numbers(30), noise, seed=2), 6) for loader in loaders]
    for step, batch in enumerate(whole):
        for key in batch:
            joined = np.concatenate([part[step][key] for part in parts])
            np.testing.assert_array_equal(batch[key], joined)
    with pytest.raises(BadInput, match="does not divide over 3"):
        Loader(8, processes=3)


@pytest.mark.parametrize("count", [1, 2])
def test_evaluation_counts_every_example_once(count):
    loaders = [Loader(8, process=p, processes=count) for p in range(count)]
    parts = [list(loader.evaluate(Numbers(21), noise)) for loader in loaders]
    assert {len(part) for part in parts} == {3}
    seen = [int(i) for part in parts for b in part for i in b["label"][b["valid"]]]
    assert sorted(seen) == list(range(21))
    again = list(Loader(8).evaluate(Numbers(21), noise))
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
    stream = prefetch_to_device(range(5), lambda x: put.append(x) or x)
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
    encoded = encode(sentences(), tokenizer)
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
    row = encode(pairs, tokenizer)[0]
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
    row = encode(source, tokenizer)[0]
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
    mask = MaskTokens(tokenizer)
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
