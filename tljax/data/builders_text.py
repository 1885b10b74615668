"""Text data sets as TFDS builders: array_record files, no TensorFlow."""

import email
import gzip
import html
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from tljax.data.assets import find_asset
from tljax.data.builders_image import Examples, Local
from tljax.data.split import hold_out

Labelled = list[tuple[str, int]]


class Texts(Local, skip_registration=True):
    """Labelled texts; copies of a text (up to case and blanks) stay on one side of the split."""

    ABOUT = ""
    NAMES: tuple[str, ...] = ()

    def rows(self) -> Labelled:
        """Read the (text, label) pairs."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        label = tfds.features.ClassLabel(names=self.NAMES)
        return self.describe(self.ABOUT, text=tfds.features.Text(), label=label)

    def _split_generators(self, _) -> dict[str, Examples]:
        rows = self.rows()
        keys = [" ".join(text.lower().split()) for text, _ in rows]
        held = hold_out(keys, [label for _, label in rows], 0.2)
        parts: dict[str, list] = {"train": [], "test": []}
        for i, (row, key) in enumerate(zip(rows, keys, strict=True)):
            parts["test" if key in held else "train"].append((i, *row))
        return {name: self._generate_examples(part) for name, part in parts.items()}

    def _generate_examples(self, part: list[tuple[int, str, int]]) -> Examples:
        for i, text, label in part:
            yield f"{i:06d}", {"text": text, "label": label}


class Sentiment(Texts, skip_registration=True):
    """Human polarity of sentences from four domains."""

    ABOUT = "Sentences with a mean human valence in [-4, 4] of at least .5 either way (VADER 2014)."
    NAMES = ("negative", "positive")
    FILES = {  # noqa: RUF012
        "movies": "movieReviewSnippets",
        "amazon": "amazonReviewSnippets",
        "nyt": "nytEditorialSnippets",
        "tweets": "tweets",
    }
    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name=name, version="1.0.0", description=name)
        for name in ("movies", "amazon", "nyt", "tweets")
    ]

    def rows(self) -> Labelled:
        """Read one domain from the archive inside the package's source archive."""
        ending = self.FILES[self.builder_config.name] + "_GroundTruth.txt"
        with tarfile.open(find_asset("vader")) as package:
            inner = _member(package, "hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
            raw = _member(archive, ending)
        try:
            lines = raw.decode("utf8").splitlines()
        except UnicodeDecodeError:  # the tweets and editorials were written on Windows
            lines = raw.decode("cp1252").splitlines()
        fields = [line.split("\t", 2) for line in lines if line.strip()]
        scored = [(html.unescape(text).strip(), float(score)) for _, score, text in fields]
        return [(text, int(score > 0)) for text, score in scored if abs(score) >= 0.5]


def _member(archive: tarfile.TarFile, ending: str) -> bytes:
    return archive.extractfile(next(m for m in archive if m.name.endswith(ending))).read()


class Spam(Texts, skip_registration=True):
    """SpamAssassin e-mails: subject and body."""

    ABOUT = "6,046 e-mails of the SpamAssassin corpus, about a third of them spam."
    NAMES = ("ham", "spam")

    def rows(self) -> Labelled:
        """Read every message; HTML parts lose their tags."""
        folders = ("easy-ham-1", "easy-ham-2", "hard-ham-1", "spam-1", "spam-2")
        return [
            (_letter(json.loads(path.read_text("utf8"))["text"]), int(folder.startswith("spam")))
            for folder in folders
            for path in sorted((find_asset("spam") / "data" / folder).glob("*.json"))
        ]


def _letter(raw: str) -> str:
    message = email.message_from_string(raw)
    pieces = [str(message.get("Subject", "")), "."]
    for part in message.walk():
        if part.get_content_type() in ("text/plain", "text/html"):
            body = (part.get_payload(decode=True) or b"").decode("latin-1")
            if part.get_content_type() == "text/html":
                body = re.sub(r"(?s)<(style|script).*?</\1>|<[^>]*>", " ", body)
            pieces.append(html.unescape(body))
    return " ".join(" ".join(pieces).split())


class Wordnet(Texts, skip_registration=True):
    """Definitions of WordNet 3.0, to be sorted into its 45 lexicographer files."""

    ABOUT = "117,659 definitions without their examples; the label is the lexicographer file."
    NAMES = tuple(
        "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute "
        "noun.body noun.cognition noun.communication noun.event noun.feeling noun.food noun.group "
        "noun.location noun.motive noun.object noun.person noun.phenomenon noun.plant "
        "noun.possession noun.process noun.quantity noun.relation noun.shape noun.state "
        "noun.substance noun.time verb.body verb.change verb.cognition verb.communication "
        "verb.competition verb.consumption verb.contact verb.creation verb.emotion verb.motion "
        "verb.perception verb.possession verb.social verb.stative verb.weather adj.ppl".split()
    )

    def rows(self) -> Labelled:
        """Read the four data files (format: wndb(5WN))."""
        return [(re.split(r';\s*"', gloss)[0].rstrip("; "), label) for gloss, label in _glosses()]


def _glosses() -> Iterator[tuple[str, int]]:
    for name in ("noun", "verb", "adj", "adv"):
        for line in (find_asset("wordnet") / f"data.{name}").read_text("latin-1").splitlines():
            if not line.startswith("  "):  # the licence at the top is indented
                head, gloss = line.split(" | ", 1)
                yield gloss.strip(), int(head.split()[1])


def _brown() -> Iterator[tuple[str, str, list[list[tuple[str, str]]]]]:
    """Yield (file, genre, sentences of (word, tag)); a line is a sentence."""
    root = find_asset("brown")
    for line in (root / "cats.txt").read_text().splitlines():
        if line.strip():
            file, genre = line.split()[:2]
            sentences = map(str.split, (root / file).read_text().splitlines())
            yield (
                file,
                genre,
                [[tuple(w.rsplit("/", 1)) for w in words] for words in sentences if words],
            )


class Pos(Local, skip_registration=True):
    """Part-of-speech tags of the Brown corpus, split by file within each genre."""

    def _info(self) -> tfds.core.DatasetInfo:
        tags = sorted({_tag(word) for _, _, lines in _brown() for line in lines for word in line})
        return self.describe(
            "Sentences of the Brown corpus: words joined by one blank, and a tag for each.",
            text=tfds.features.Text(),
            label=tfds.features.Sequence(tfds.features.ClassLabel(names=tags)),
        )

    def _split_generators(self, _) -> dict[str, Examples]:
        files = {file: genre for file, genre, _ in _brown()}
        genres = sorted(set(files.values()))
        held = hold_out(list(files), [genres.index(g) for g in files.values()], 0.2)
        return {
            "train": self._generate_examples(set(files) - held),
            "test": self._generate_examples(held),
        }

    def _generate_examples(self, files: set[str]) -> Examples:
        for file, _, sentences in _brown():
            for i, words in enumerate(sentences if file in files else ()):
                text = " ".join(word for word, _ in words)
                yield f"{file}-{i:05d}", {"text": text, "label": [_tag(word) for word in words]}


def _tag(word: tuple[str, str]) -> str:
    """Reduce a Brown tag to its base: no headline, title or citation marks, no contraction."""
    plain = re.sub(r"^(fw|nil)-(?=.)|-(tl|hl|nc|t)\b", "", word[1])
    return re.split(r"[+*](?=.)", plain)[0]


class Plaintext(Local, skip_registration=True):
    """Unlabelled English for masked language modelling, one record a paragraph.

    Holds the texts of `wordnet` and `pos`, their test parts too, without labels.
    """

    def _info(self) -> tfds.core.DatasetInfo:
        about = "Brown corpus, a 1913 dictionary, fortunes, definitions: 5 % of documents held out."
        return self.describe(about, text=tfds.features.Text())

    def _split_generators(self, _) -> dict[str, Examples]:
        documents = [
            (name, paragraphs)
            for name, read in (
                ("brown", _brown_text),
                ("gcide", _gcide_text),
                ("fortunes", _fortune_text),
                ("wordnet", _gloss_text),
            )
            for paragraphs in read()
        ]
        sources = [name for name, _ in documents]
        kinds = sorted(set(sources))
        held = hold_out(range(len(documents)), [kinds.index(name) for name in sources], 0.05)
        return {
            "train": self._generate_examples(documents, set(range(len(documents))) - held),
            "test": self._generate_examples(documents, held),
        }

    def _generate_examples(self, documents: list, members: set[int]) -> Examples:
        for i in sorted(members):
            for j, text in enumerate(documents[i][1]):
                yield f"{i:06d}-{j:04d}", {"text": text}


def _brown_text() -> Iterable[list[str]]:
    """Files of the corpus in paragraphs of eight sentences (it does not mark its own)."""
    for _, _, sentences in _brown():
        texts = [" ".join(word for word, _ in sentence) for sentence in sentences]
        blocks = (" ".join(texts[i : i + 8]) for i in range(0, len(texts), 8))
        yield [re.sub(r" ([.,;:?!])", r"\1", re.sub(r"``|''", '"', block)) for block in blocks]


def _gcide_text() -> Iterable[list[str]]:
    """Entries of the dictionary: an entry starts at a line without indent after a blank line."""
    path: Path = find_asset("gcide") / "gcide.dict.dz"
    book = gzip.decompress(path.read_bytes()).decode("utf8", errors="replace")
    for entry in re.split(r"\n\n(?=\S)", book):
        plain = re.sub(r"\s*\[(1913 Webster|PJC|WordNet [\d.]+)\]|\\[^\\\n]*\\ ?|[{}]", "", entry)
        paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", plain)]
        yield [part for part in paragraphs if part]


def _fortune_text() -> Iterable[list[str]]:
    for path in sorted(find_asset("fortunes").iterdir()):
        if path.is_file() and not path.is_symlink() and path.suffix == "":
            for saying in path.read_text("utf8", errors="replace").split("\n%\n"):
                if saying.strip():
                    yield [" ".join(saying.split())]


def _gloss_text() -> Iterable[list[str]]:
    return ([gloss] for gloss, _ in _glosses())
