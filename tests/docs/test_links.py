"""Every link in the documents to a file or a heading of this repository leads there."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/**/*.md"))
FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\[[^\]]*\]\(\s*<?(?P<target>[^)\s>]+)>?[^)]*\)")
HEADING = re.compile(r"^#{1,6} +(?P<title>.+?) *#*$", re.MULTILINE)
NAMED = re.compile(r"(?<![\w/])(?:tests|benchmarks)/[\w/]*(?:\.\w+)?")
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)  # http:, mailto:


def links(text):
    """Targets of a page's links, those in code left out."""
    return [match["target"] for match in LINK.finditer(CODE.sub("``", FENCE.sub("", text)))]


def anchors(text):
    """What GitHub calls the headings of a page."""
    found, seen = set(), {}
    for match in HEADING.finditer(FENCE.sub("", text)):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", match["title"])
        name = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        found.add(f"{name}-{seen[name]}" if name in seen else name)
        seen[name] = seen.get(name, 0) + 1
    return found


def broken(page):
    """What is wrong with a page's links, a line for each."""
    wrong = []
    for target in links(page.read_text(encoding="utf-8")):
        if ELSEWHERE.match(target):
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        if not (file.is_file() and file.is_relative_to(ROOT if page.is_relative_to(ROOT) else page.parent)):
            wrong.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(file.read_text(encoding="utf-8")):
            wrong.append(f"{target}: no such heading")
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    assert broken(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_tests_and_scripts_that_are_named_exist(page):
    named = NAMED.findall(page.read_text(encoding="utf-8"))
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_page_can_be_reached_from_the_readme():
    reached, left = set(), [ROOT / "README.md"]
    while left:
        page = left.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        targets = [target.partition("#")[0] for target in links(page.read_text(encoding="utf-8"))]
        left += [(page.parent / target).resolve() for target in targets if target and not ELSEWHERE.match(target)]
    assert set(PAGES) - reached == set()


def test_what_is_broken_is_found(tmp_path):
    (tmp_path / "there.md").write_text("# A heading, with `code`\n\n## Twice\n\n## Twice\n\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Own\n[1](there.md) [2](there.md#a-heading-with-code) [3](there.md#twice-1) [4](#own) [5](https://example.org/x)\n"
        "`[6](in code)`\n```\n[7](in-a-fence.md)\n```\n![two\nlines](picture.svg) [8](there.md#no-heading) [9](#none)\n"
        "[10](gone.md) [11](../outside.md)\n"
    )
    (tmp_path.parent / "outside.md").write_text("")
    assert broken(page) == [
        "picture.svg: no such file",
        "there.md#no-heading: no such heading",
        "#none: no such heading",
        "gone.md: no such file",
        "../outside.md: no such file",
    ]
