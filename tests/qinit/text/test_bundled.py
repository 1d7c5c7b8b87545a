"""The text that comes with qinit: how much, of what, from where, and that what is checked on is nowhere else."""

import json
import re
from pathlib import Path

import pytest

from qinit.text.bundled import (
    CHECK,
    KINDS,
    PIECE,
    calibration_documents,
    check_documents,
    cut,
    interleave,
    place_to_cut,
    read_documents,
)

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "qinit/text/bundled"
SHARED = ROOT.parent / "shared/text"
FILES = (*KINDS, CHECK)
SHARE = {"books": 0.40, "code": 0.20, "documentation": 0.15, "languages": 0.25}
WINDOW = 60  # characters: a text that has so many in a row of another is no other text


@pytest.fixture(scope="module")
def documents():
    return {name: read_documents(name) for name in FILES}


@pytest.fixture(scope="module")
def rows():
    """The table of SOURCES.md: file, kind, title, author, source, licence, characters."""
    lines = (FOLDER / "SOURCES.md").read_text(encoding="utf-8").splitlines()
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| \w+\.txt ", line)]
    assert {len(row) for row in found} == {7}
    return found


def size(texts):
    return sum(map(len, texts))


def windows(texts):
    return (text[i : i + WINDOW] for text in texts for i in range(len(text) - WINDOW + 1))


def in_common(some, others):
    """The first window of `others` that `some` have too, or None."""
    known = set(windows(some))
    return next((window for window in windows(others) if window in known), None)


def test_there_is_as_much_as_promised_and_of_each_kind(documents):
    total = size(text for kind in KINDS for text in documents[kind])
    assert 450_000 <= total <= 600_000
    assert {kind: size(documents[kind]) / total for kind in KINDS} == pytest.approx(SHARE, abs=0.02)


def test_what_is_checked_on_has_the_same_mix(documents, rows):
    total = size(documents[CHECK])
    assert 45_000 <= total <= 51_000
    found = {kind: sum(int(row[6]) for row in rows if row[:2] == ["check.txt", kind]) / total for kind in KINDS}
    assert found == pytest.approx(SHARE, abs=0.03)


def test_every_document_is_named_with_its_length(documents, rows):
    assert all(row[2:6] for row in rows)
    for name in FILES:
        assert [int(row[6]) for row in rows if row[0] == f"{name}.txt"] == [len(text) for text in documents[name]]


def test_no_file_is_taken_from_twice_and_no_document_is_long(rows):
    sources = [row[4] for row in rows]
    assert len(sources) == len(set(sources))
    assert max(int(row[6]) for row in rows) <= 30_000


def test_every_licence_that_asks_for_its_notice_has_it_and_no_other(rows):
    asking = {(row[4].split()[0], row[5]) for row in rows if row[5] != "public domain"}
    asking -= {("typescript", "Apache-2.0")}  # has no NOTICE
    notices = {file.stem: file.stat().st_size for file in FOLDER.glob("licenses/*.txt")}
    assert sorted(notices) == sorted(package for package, _ in asking)
    assert all(notices.values())


def test_fifteen_languages_and_several_scripts(documents, rows):
    rights = [row for row in rows if row[0] == "languages.txt" and row[2].startswith("Universal Declaration")]
    assert len(rights) >= 15
    text = "".join(documents["languages"])
    for sample in "äжשعहবก人の한ώத":
        assert sample in text


@pytest.mark.parametrize("file", [*sorted(FOLDER.rglob("*.txt")), FOLDER / "SOURCES.md"], ids=lambda file: file.name)
def test_the_files_are_clean(file):
    text = file.read_bytes().decode("utf-8")
    assert "\r" not in text
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert not re.search(r"[ \t]+\n", text)
    assert not re.search(r"[\w.+-]+@[\w-]+(\.[\w-]+)+", text)
    assert "gutenberg" not in text.lower() or file.name == "SOURCES.md"


def test_nothing_checked_on_is_calibrated_on(documents):
    assert in_common(documents[CHECK], [text for kind in KINDS for text in documents[kind]]) is None


def test_nothing_is_in_the_texts_that_models_are_measured_on(documents):
    files = sorted(SHARED.glob("*"))
    if not files:
        pytest.skip("no shared/text")
    others = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        others += [json.loads(line)["text"] for line in text.splitlines()] if file.suffix == ".jsonl" else [text]
    assert in_common([text for name in FILES for text in documents[name]], others) is None


@pytest.mark.parametrize(("pieces", "names"), [(calibration_documents, KINDS), (check_documents, (CHECK,))])
def test_the_pieces_are_the_documents_and_of_like_size(documents, pieces, names):
    found = pieces()
    assert sorted(piece for name in names for text in documents[name] for piece in cut(text)) == sorted(found)
    assert max(len(piece.encode()) for piece in found) <= 2 * PIECE
    letters = re.sub(r"\s", "", "".join(text for name in names for text in documents[name]))
    assert len(re.sub(r"\s", "", "".join(found))) == len(letters)
    assert found == pieces()


def test_every_beginning_has_the_mix(documents):
    kinds = {piece: kind for kind in KINDS for text in documents[kind] for piece in cut(text)}
    pieces, sizes = calibration_documents(), dict.fromkeys(KINDS, 0)
    for piece in pieces:
        sizes[kinds[piece]] += len(piece)
        total = sum(sizes.values())
        if total >= 20_000:
            assert all(sizes.values())
        if total >= 100_000:
            assert {kind: sizes[kind] / total for kind in KINDS} == pytest.approx(SHARE, abs=0.04)


def test_the_pieces_of_a_document_stay_in_order():
    texts = ["\n\n".join(f"{name}{number} " + "word " * 150 for number in range(9)) for name in "ab"]
    found = [re.findall(r"[ab]\d", piece) for piece in interleave([[texts[0]], [texts[1]]])]
    assert [mark for piece in found for mark in piece if mark[0] == "a"] == [f"a{number}" for number in range(9)]
    assert [piece[0][0] for piece in found] == ["a", "b", "a", "b"]


@pytest.mark.parametrize(
    ("text", "place"), [("aaa\n\nbbb bbb", 5), ("aaaaa. bbbbb", 7), ("甲甲甲甲甲。乙乙乙乙", 6), ("a" * 12, 8)]
)
def test_a_text_is_cut_where_something_ends(text, place):
    assert place_to_cut(text, 0, 8) == place
    assert place_to_cut(text, 0, len(text)) == len(text)
