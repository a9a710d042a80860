"""Clean documents out of the archives of the prose corpus.

Each reader takes an archive and yields `Document`s in a fixed order. What they promise: paragraphs
are separated by one blank line and wrapped prose is one line a paragraph, while verse keeps its
lines; no tabs, no doubled or trailing spaces, no rules of hyphens.
"""

import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

SHORTEST_CHARS = 2_000  # a shorter part of a book joins the part after it
LONGEST_CHARS = 60_000  # 15,000 tokens; only addresses and acts are longer, and they are cut
CUT_CHARS = 3_000  # how far before the place of an even cut a better one is looked for
VERSE_SHARE = 1 / 3  # of a paragraph's lines that start in lower case; verse has none, prose most

PLAY_PART = re.compile(r"(ACT\s+\w+|INDUCTION|PROLOGUE)\.?", re.IGNORECASE)
POEM_PART = re.compile(r"PARADISE LOST|THE (FIRST|SECOND|THIRD|FOURTH) BOOK")
LINE_NUMBER = re.compile(r" {2,}\d+[ \r]*$", re.MULTILINE)
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
RULE = re.compile(r"[-=_* ]{3,}")
SPEAKER = re.compile(r"[A-Z][\w .,'&-]{0,38}\.|[A-Z][A-Z '&]{1,38}")
MILTON = {
    "areopagitica_gut": "areopagitica",
    "paradise_lost_(no_introduction)_gut": "paradise-lost",
    "paradise_regained_gut": "paradise-regained",
    "poemata_gut": "poemata",
    "poetical_works_gut": "poetical-works",
}
"""Left out: second copies under another name, a school edition of Comus that is mostly notes, and
a reprint of four poems that the poetical works hold too."""

OPENING = {"``": '"', "(": "(", "[": "["}
CLOSING = {"''": '"', ")": ")", "]": "]"} | {mark: mark for mark in ",.;:?!"}
DOUBLED = frozenset(";:?!")  # the tagged Brown corpus writes these twice
MOVED = frozenset(",.?!")  # into the quote that they follow


@dataclass(frozen=True)
class Document:
    """One text and where it comes from, such as `brown/ca01`."""

    source: str
    text: str


def brown(archive: Path) -> Iterator[Document]:
    """Yield the files of the Brown corpus without their part-of-speech tags."""
    for name, tagged in members(archive, r"package/c[a-r]\d\d"):
        paragraphs = re.split(r"\n\s*\n", tagged)
        words = [[pair.rpartition("/")[0] for pair in each.split()] for each in paragraphs]
        yield Document(f"brown/{name}", "\n\n".join(untokenised(each) for each in words if each))


def addresses(archive: Path) -> Iterator[Document]:
    """Yield the State of the Union addresses, the long ones in parts."""
    for name, text in members(archive, r"package/sotu/data/\w+\.txt"):
        yield from numbered(f"sotu/{name}", cut(paragraphs_of(text)))


def moby_dick(archive: Path) -> Iterator[Document]:
    """Yield the chapters of Moby Dick in the order of their names."""
    for name, text in members(archive, r"package/moby-dick/data/(chapter_\d+|ep\w+|ex\w+)\.txt"):
        yield Document(f"moby-dick/{name}", "\n\n".join(paragraphs_of(text)))


def shakespeare(archive: Path) -> Iterator[Document]:
    """Yield the acts of the plays and the poems, in modern spelling.

    The First Folio's versions of the same plays (`_gut_f`) are left out.
    """
    for name, text in members(archive, r"[^/]+/shksprdata/texts/\w+_gut\.txt"):
        parts = parts_at(paragraphs_of(text), PLAY_PART)
        # A play opens with its title and a list of its persons, which are no prose.
        yield from numbered(f"shakespeare/{name.removesuffix('_gut')}", book(parts[1:] or parts))


def milton(archive: Path) -> Iterator[Document]:
    """Yield the books of Milton's epics, his shorter poems and the Areopagitica."""
    for name, text in members(archive, r"[^/]+/miltondata/texts/[^/]+_gut\.txt"):
        if title := MILTON.get(name):
            paragraphs = paragraphs_of(LINE_NUMBER.sub("", text))
            yield from numbered(f"milton/{title}", book(parts_at(paragraphs, POEM_PART)))


def members(archive: Path, pattern: str) -> Iterator[tuple[str, str]]:
    """Yield (stem, text) of the files of a .tar.gz whose path matches, sorted by path."""
    with tarfile.open(archive) as tar:
        found = (each for each in tar.getmembers() if re.fullmatch(pattern, each.name))
        for member in sorted(found, key=lambda each: each.name):
            file = tar.extractfile(member)
            assert file is not None, f"{member.name} is no plain file"
            yield PurePosixPath(member.name).stem, CONTROL.sub("", file.read().decode("utf-8-sig"))


def untokenised(words: Sequence[str]) -> str:
    """Join the tokens of a paragraph as they would be printed.

    The Brown corpus writes every mark after a closing quote. Those that American printers set
    before it move there; for ? and ! that is right in speech, and wrong after a quoted word.
    """
    text, before, is_open, is_glued = "", "", False, True
    for word in words:
        if word == before and word in DOUBLED:
            continue
        if word == "''" and before.endswith(word) and before != word:
            continue  # inches are doubled too: 12'' ''
        opens, closes = OPENING.get(word), CLOSING.get(word)
        if word == "'":  # the same mark opens and closes a quote within a quote
            opens, closes = (None, word) if is_open else (word, None)
            is_open = not is_open
        ends_quote = before == "''" or (before == "'" and not is_open)
        if word in MOVED and ends_quote:
            text = text[:-1] + word + text[-1]
        elif closes:
            text += closes
        else:
            text += ("" if is_glued else " ") + (opens or word.replace("''", '"'))  # inches
        before, is_glued = word, opens is not None
    return text


def paragraphs_of(text: str) -> list[str]:
    """Split a text at blank lines, tidy its spaces and join the lines of prose."""
    blocks = re.split(r"\n\s*\n", text.replace("\r\n", "\n"))
    tidied = ([" ".join(line.split()) for line in block.splitlines()] for block in blocks)
    kept = ([line for line in lines if line and not RULE.fullmatch(line)] for lines in tidied)
    return [joined(lines) for lines in kept if lines]


def joined(lines: list[str]) -> str:
    """Make one line of a wrapped paragraph; leave verse, and a speaker's name, on its own line."""
    if lines[0].startswith("[") and lines[-1].endswith("]"):
        return " ".join(lines)  # a stage direction
    head, body = ([lines[0]], lines[1:]) if SPEAKER.fullmatch(lines[0]) else ([], lines)
    wrapped = sum(line[0].islower() for line in body[1:])
    is_prose = wrapped > 0 and wrapped >= VERSE_SHARE * len(body[1:])
    return "\n".join([*head, *([" ".join(body)] if is_prose else body)])


def parts_at(paragraphs: list[str], heading: re.Pattern[str]) -> list[list[str]]:
    """Split paragraphs into parts, each but the first beginning with a line that is a heading."""
    parts: list[list[str]] = [[]]
    for paragraph in paragraphs:
        if heading.fullmatch(paragraph.partition("\n")[0]):
            parts.append([])
        parts[-1].append(paragraph)
    return [part for part in parts if part]


def book(parts: list[list[str]]) -> Iterator[str]:
    """Join parts that are too short to the ones after them, and cut those that are too long."""
    kept: list[str] = []
    for index, part in enumerate(parts):
        kept += part
        is_last = index == len(parts) - 1
        if is_last or len("\n\n".join(kept)) >= SHORTEST_CHARS:
            yield from cut(kept)
            kept = []


def cut(paragraphs: list[str]) -> Iterator[str]:
    """Yield documents of about equal length, each at most `LONGEST_CHARS` where a cut is possible.

    Cuts fall between paragraphs; in an address of one paragraph they fall between sentences.
    """
    whole = "\n\n".join(paragraphs)
    pieces = -(-len(whole) // LONGEST_CHARS)
    start = 0
    for piece in range(1, pieces):
        about = len(whole) * piece // pieces
        ends = (whole.rfind(mark, about - CUT_CHARS, about) for mark in ("\n\n", ". ", "\n"))
        end = next((end + 1 for end in ends if end > start), about)
        yield whole[start:end].strip()
        start = end
    yield whole[start:].strip()


def numbered(source: str, texts: Iterator[str]) -> Iterator[Document]:
    """Name the documents of one book: the only one after the book, several with a number."""
    found = list(texts)
    for number, text in enumerate(found, 1):
        yield Document(source if len(found) == 1 else f"{source}/{number}", text)
