"""The text that comes with qinit: books, code, documentation and twenty-odd languages, all free to use.

SOURCES.md beside this file names every document; `benchmarks/bundled_text.py` gathers them. No document for checking
is also one for calibration.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files

KINDS = ("books", "code", "documentation", "languages")
CHECK = "check"
SEPARATOR = "\n\f\n"  # a line with nothing but a form feed stands between two documents of a file
PIECE = 3000  # bytes of UTF-8: nearer to a number of tokens than characters are, in every script
ENDS = ("\n\n", "\n", "。", ". ", " ")  # where a text is cut, best first
STEP = 0.6180339887498949  # multiples of the golden ratio, modulo 1, never come close to each other


def calibration_documents() -> list[str]:
    """Return pieces of about 3,000 bytes, in an order in which every prefix has about the mix of the whole."""
    return interleave([read_documents(kind) for kind in KINDS])


def check_documents() -> list[str]:
    """Return pieces of other documents, of the same mix, to measure a finished run on; never for calibration."""
    return interleave([read_documents(CHECK)])


def read_documents(name: str) -> list[str]:
    """Return the whole documents of one file: one of KINDS, or CHECK."""
    text = files(__name__).joinpath(f"{name}.txt").read_text(encoding="utf-8")
    return text.removesuffix("\n").split(SEPARATOR)


def interleave(kinds: list[list[str]]) -> list[str]:
    """Return the pieces of all kinds, each kind spread evenly over the whole by its characters."""
    placed = []
    for documents in kinds:
        pieces = spread(documents)
        total, done = sum(map(len, pieces)), 0
        for piece in pieces:
            placed.append(((done + len(piece) / 2) / total, piece))
            done += len(piece)
    return [piece for _, piece in sorted(placed, key=lambda pair: pair[0])]


def spread(documents: list[str]) -> list[str]:
    """Return the pieces of one kind, each document's spread evenly over the whole, and each in its own order."""
    placed = []
    for index, document in enumerate(documents):
        pieces = list(cut(document))
        first = (index * STEP) % 1
        placed += [((first + number) / len(pieces), piece) for number, piece in enumerate(pieces)]
    return [piece for _, piece in sorted(placed, key=lambda pair: pair[0])]


def cut(text: str) -> Iterator[str]:
    """Cut a document into pieces of like size, of about PIECE bytes, at the ends of paragraphs where there are any."""
    start, left = 0, max(1, round(len(text.encode()) / PIECE))
    while left > 1:
        end = place_to_cut(text, start, (len(text) - start) // left)
        yield text[start:end].strip("\n").rstrip()
        start, left = end, left - 1
    yield text[start:].strip("\n").rstrip()


def place_to_cut(text: str, start: int, size: int) -> int:
    """Return where a piece from `start` on ends: the last good place in its second half, at most `size` characters."""
    stop = start + size
    if stop >= len(text):
        return len(text)
    for end in ENDS:
        place = text.rfind(end, start + size // 2, stop)
        if place >= 0:
            return place + len(end)
    return stop
