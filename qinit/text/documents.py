"""Calibration text from this machine: a text file or a JSONL file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qinit.errors import CalibrationError, did_you_mean
from qinit.files.reading import parse_json, read_regular

JSON_SUFFIXES = {".jsonl", ".json"}
LARGEST_FILE = 2**30  # bytes: a file is read whole, and calibration needs a few megabytes of it
DEFAULT_FIELD = "text"


def read_text(path: Path) -> str:
    """Return a file's text. Raises CalibrationError for what is no readable UTF-8 file with text in it."""
    try:
        if path.is_dir():
            raise CalibrationError(f"{path}: is a directory; give one text file or JSONL file")
        raw = read_regular(path, LARGEST_FILE)
    except OSError as error:
        advice = "give one text file or JSONL file, of a few MB; an excerpt is enough"
        raise CalibrationError(f"{path}: cannot be read ({error.strerror}); {advice}") from None
    if b"\0" in raw:
        raise CalibrationError(f"{path}: no text (byte {raw.index(0)} is NUL); give plain text in UTF-8")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}: not UTF-8 text (byte {error.start} cannot be decoded); convert it, or unpack it if it is packed"
        ) from None
    if not text.strip():
        raise CalibrationError(f"{path}: holds no text" + ("" if raw else " (it is empty)"))
    return text.replace("\r\n", "\n")


def read_file(path: Path, text_field: str | None = None, *, blanks: bool = False) -> list[str]:
    """Return the documents of a file: one per line of JSONL, those without text only if `blanks`, else the whole text
    as one.

    Raises CalibrationError, naming the line and the fields in it, for JSONL without text under `text_field`.
    """
    text = read_text(path)
    if not is_jsonl(path):
        return [text]
    documents = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold U+2028
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = parse_json(line.encode())
        except ValueError as error:
            raise CalibrationError(f"{where}: not valid JSON ({error}); expected one object per line") from None
        documents.append(text_of(row, text_field, where))
    kept = not_blank(documents, str(path), text_field)
    return documents if blanks else kept


def is_jsonl(path: Path) -> bool:
    """Tell whether a file is read as one JSON object per line."""
    return path.suffix.lower() in JSON_SUFFIXES


def text_of(row: Any, text_field: str | None, where: str) -> str:
    """Return the text of a row of JSONL or of a data set; null is no text.

    Raises CalibrationError, naming `where`, the fields in the row and --text-field, when it has none.
    """
    field = text_field or DEFAULT_FIELD
    if not isinstance(row, dict):
        raise CalibrationError(f"{where}: expected an object with a field '{field}', found {type(row).__name__}")
    if field not in row:
        found = ", ".join(map(str, row)) or "none"
        raise CalibrationError(
            f"{where}: no field '{field}'{did_you_mean(field, map(str, row))}; its fields are {found}; "
            "choose one with --text-field"
        )
    if row[field] is None:
        return ""
    if not isinstance(row[field], str):
        raise CalibrationError(
            f"{where}: field '{field}' holds {type(row[field]).__name__}, expected text; "
            f"choose another of {', '.join(map(str, row))} with --text-field"
        )
    return row[field]


def not_blank(documents: list[str], where: str, text_field: str | None) -> list[str]:
    """Return the documents with text in them; raises CalibrationError, naming `where`, when there are none."""
    kept = [document for document in documents if document.strip()]
    if not kept:
        raise CalibrationError(f"{where}: field '{text_field or DEFAULT_FIELD}' holds no text in any of its rows")
    return kept
