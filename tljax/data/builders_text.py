"""Text data sets for the TFDS builder: array_record files, no TensorFlow."""

import email
import gzip
import html
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator

from tensorflow_datasets.core.features import ClassLabel, Sequence, Text

from tljax.data.builders_image import Material, find_asset


def _labelled(names: tuple[str, ...], pairs: Iterable[tuple[str, int]]) -> Material:
    """Keep copies of a text (up to case and blanks) on one side of the split."""
    rows = [
        (" ".join(text.lower().split()), label, {"text": text, "label": label})
        for text, label in pairs
    ]
    return Material({"text": Text(), "label": ClassLabel(names=names)}, rows)


DOMAINS = {
    "movies": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "nyt": "nytEditorialSnippets",
    "tweets": "tweets",
}


def sentiment(domain: str) -> Material:
    """Sentences of four domains whose mean human valence is .5 of 4 or more either way (VADER)."""
    with tarfile.open(find_asset("vader")) as package:
        inner = _member(package, "hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        raw = _member(archive, f"{DOMAINS[domain]}_GroundTruth.txt")
    try:
        lines = raw.decode("utf8").splitlines()
    except UnicodeDecodeError:  # some of the files were written on Windows
        lines = raw.decode("cp1252").splitlines()
    rated = [line.split("\t", 2)[1:] for line in lines if line.strip()]
    pairs = [
        (html.unescape(text).strip(), int(float(score) > 0))
        for score, text in rated
        if abs(float(score)) >= 0.5
    ]
    return _labelled(("negative", "positive"), pairs)


def _member(archive: tarfile.TarFile, ending: str) -> bytes:
    return archive.extractfile(next(m for m in archive if m.name.endswith(ending))).read()


def spam() -> Material:
    """Subject and body of the 6,046 e-mails of SpamAssassin, about a third of them spam."""
    pairs = [
        (_letter(json.loads(path.read_text("utf8"))["text"]), int(folder.startswith("spam")))
        for folder in ("easy-ham-1", "easy-ham-2", "hard-ham-1", "spam-1", "spam-2")
        for path in sorted((find_asset("spam") / "data" / folder).glob("*.json"))
    ]
    return _labelled(("ham", "spam"), pairs)


def _letter(raw: str) -> str:
    message = email.message_from_string(raw)
    pieces = [str(message.get("Subject", "")), "."]
    for part in message.walk():
        if part.get_content_type() in ("text/plain", "text/html"):
            raw_body = part.get_payload(decode=True)
            body = raw_body.decode("latin-1") if isinstance(raw_body, bytes) else ""
            if part.get_content_type() == "text/html":
                body = re.sub(r"(?s)<(style|script).*?</\1>|<[^>]*>", " ", body)
            pieces.append(html.unescape(body))
    return " ".join(" ".join(pieces).split())


_LEXICOGRAPHER_FILES = """
adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body
noun.cognition noun.communication noun.event noun.feeling noun.food noun.group noun.location
noun.motive noun.object noun.person noun.phenomenon noun.plant noun.possession noun.process
noun.quantity noun.relation noun.shape noun.state noun.substance noun.time verb.body verb.change
verb.cognition verb.communication verb.competition verb.consumption verb.contact verb.creation
verb.emotion verb.motion verb.perception verb.possession verb.social verb.stative verb.weather
adj.ppl"""


def wordnet() -> Material:
    """The 117,659 definitions of WordNet 3.0 without examples; label: lexicographer file."""
    pairs = ((re.split(r';\s*"', gloss)[0].rstrip("; "), label) for gloss, label in _glosses())
    return _labelled(tuple(_LEXICOGRAPHER_FILES.split()), pairs)


def _glosses() -> Iterator[tuple[str, int]]:
    """Read the four data files (format: wndb(5WN))."""
    for name in ("noun", "verb", "adj", "adv"):
        for line in (find_asset("wordnet") / f"data.{name}").read_text("latin-1").splitlines():
            if not line.startswith("  "):  # the licence at the top is indented
                head, gloss = line.split(" | ", 1)
                yield gloss.strip(), int(head.split()[1])


def _brown() -> Iterator[tuple[str, str, list[list[tuple[str, ...]]]]]:
    """Yield (file, genre, sentences of (word, tag)); a line is a sentence."""
    root = find_asset("brown")
    for line in filter(str.strip, (root / "cats.txt").read_text().splitlines()):
        file, genre = line.split()[:2]
        lines = filter(str.strip, (root / file).read_text().splitlines())
        yield file, genre, [[tuple(w.rsplit("/", 1)) for w in line.split()] for line in lines]


def pos() -> Material:
    """Sentences of the Brown corpus, words joined by one blank, a tag each; files stay whole."""
    rows = []
    for file, genre, sentences in _brown():
        for pairs in sentences:
            words, tags = zip(*pairs, strict=True)
            row = {"text": " ".join(words), "label": [_tag(tag) for tag in tags]}
            rows.append((file, genre, row))
    names = sorted({tag for _, _, row in rows for tag in row["label"]})
    return Material({"text": Text(), "label": Sequence(ClassLabel(names=names))}, rows)


def _tag(tag: str) -> str:
    """Reduce a Brown tag to its base: no headline, title or foreign marks, no contraction."""
    plain = re.sub(r"^(fw|nil)-(?=.)|-(tl|hl|nc|t)\b", "", tag)
    return re.split(r"[+*](?=.)", plain)[0]


def plaintext() -> Material:
    """Unlabelled English in paragraphs; holds the texts of `wordnet` and `pos`, test parts too."""
    books = (_brown_text, _gcide_text, _fortune_text, _gloss_text)
    rows = [
        ((stratum, document), stratum, {"text": text})
        for stratum, book in enumerate(books)
        for document, paragraphs in enumerate(book())
        for text in filter(None, paragraphs)
    ]
    return Material({"text": Text()}, rows, held=0.05)


def _brown_text() -> Iterator[list[str]]:
    """Files of the corpus in paragraphs of eight sentences (it does not mark its own)."""
    for _, _, sentences in _brown():
        texts = [" ".join(word for word, _ in sentence) for sentence in sentences]
        blocks = (" ".join(texts[i : i + 8]) for i in range(0, len(texts), 8))
        yield [re.sub(r" ([.,;:?!])", r"\1", re.sub(r"``|''", '"', block)) for block in blocks]


def _gcide_text() -> Iterator[list[str]]:
    """Entries of the dictionary: an entry starts at a line without indent after a blank line."""
    packed = (find_asset("gcide") / "gcide.dict.dz").read_bytes()
    book = gzip.decompress(packed).decode("utf8", errors="replace")
    book = re.sub(r"\s*\[(1913 Webster|PJC|WordNet [\d.]+)\]|\\[^\\\n]*\\ ?|[{}]", "", book)
    for entry in re.split(r"\n\n(?=\S)", book):
        yield [" ".join(part.split()) for part in re.split(r"\n\s*\n", entry)]


def _fortune_text() -> Iterator[list[str]]:
    for path in sorted(find_asset("fortunes").iterdir()):
        if path.is_file() and path.suffix == "":
            for saying in path.read_text("utf8", errors="replace").split("\n%\n"):
                yield [" ".join(saying.split())]


def _gloss_text() -> Iterator[list[str]]:
    return ([gloss] for gloss, _ in _glosses())
