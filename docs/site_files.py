"""Hooks of mkdocs: files outside docs/ that pages link to become part of the site, README.md as its first page.

Pages link as on GitHub, by the path to a file. What such a link leads to outside docs/ is copied under `files/`, all
but PAGES, and the link is rewritten. What is not there stays as it is, and mkdocs --strict refuses it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
# Markdown from outside docs/, which has a place in the menu.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(?P<before>\]\()(?P<path>[^)#\s]+)(?P<after>(?:#[^)\s]*)?\))")


def place(path: str) -> str:
    """Return where a file of the repository is among the site's sources: a path under docs/ without that folder."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return PAGES.get(path, f"files/{path}")


def target(link: str, page: str) -> str | None:
    """Return the repository's path that a link in `page`, a repository's path too, leads to; None for none."""
    path = os.path.normpath(PurePosixPath(page).parent / link)
    return path if not path.startswith("..") and (ROOT / path).is_file() else None


def linked(page: str) -> set[str]:
    """Return the files outside docs/ that a page links to."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = {target(match["path"], page) for match in LINK.finditer(text)}
    return {path for path in found if path and not path.startswith("docs/")}


def on_files(files: Any, config: Any) -> Any:
    """Add what is outside docs/."""
    pages = {f"docs/{file.src_uri}" for file in files.documentation_pages()} | PAGES.keys()
    for path in sorted(set().union(*map(linked, pages)) | PAGES.keys()):
        files.append(File.generated(config, place(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let links lead where on_files has put the files."""
    here = Path(page.file.abs_src_path).relative_to(ROOT).as_posix()

    def rewritten(match: re.Match[str]) -> str:
        path = target(match["path"], here)
        if path is None:
            return match[0]
        return f"{match['before']}{os.path.relpath(place(path), PurePosixPath(place(here)).parent)}{match['after']}"

    # A value and its spread stay on one line, also in a narrow table.
    return LINK.sub(rewritten, markdown).replace(" ± ", "\u00a0±\u00a0")
