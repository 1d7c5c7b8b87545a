"""The site: what docs/site_files.py makes of links, and that a broken one fails."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("material", reason="pip install 'qinit[docs]'")

ROOT = Path(__file__).resolve().parents[2]


def copy_to(directory):
    """Put what the site is made of elsewhere."""
    pages = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE")
    for name in ("docs", "benchmarks", "examples", "mkdocs.yml", *pages):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, directory / name, ignore=shutil.ignore_patterns("out", "__pycache__"))
        else:
            shutil.copy(source, directory / name)
    return directory


def build(directory):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(directory / "mkdocs.yml")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    copy = copy_to(tmp_path_factory.mktemp("site"))
    result = build(copy)
    assert result.returncode == 0, result.stderr
    return copy / "build/site"


def test_files_outside_docs_are_part_of_the_site(site):
    front = (site / "index.html").read_text()
    assert 'href="commands.html#qinit-eqft"' in front
    assert 'href="contributing.html"' in front
    assert 'src="images/start-and-end.svg"' in front
    assert 'href="files/LICENSE"' in front
    assert 'href="../contributing.html"' in (site / "extend/index.html").read_text()
    assert 'href="extend/index.html"' in (site / "contributing.html").read_text()
    assert 'href="files/benchmarks/two_sided.py"' in (site / "study.html").read_text()
    assert (site / "files/benchmarks/two_sided.py").is_file()
    assert not list(site.glob("*.py"))


def test_nothing_is_loaded_from_elsewhere(site):
    pages = "".join(page.read_text() for page in site.rglob("*.html"))
    assert not [word for word in ('src="http', 'rel="stylesheet" href="http', "fonts.googleapis") if word in pages]


def test_a_broken_link_fails_and_is_named(tmp_path):
    broken = (
        ("README.md", "[gone](docs/gone-1.md)"),
        ("README.md", "[gone](docs/method.md#gone-2)"),
        ("docs/extend/index.md", "[gone](../../GONE-3.md)"),
        ("docs/method.md", "![gone](images/gone-4.svg)"),
    )
    copy = copy_to(tmp_path)
    for page, link in broken:
        with (copy / page).open("a", encoding="utf-8") as file:
            file.write(f"\n{link}\n")
    result = build(copy)
    assert result.returncode == 1
    warnings = [line for line in result.stderr.splitlines() if line.startswith("WARNING")]
    assert [sum(f"gone-{number}" in line.lower() for line in warnings) for number in (1, 2, 3, 4)] == [1, 1, 1, 1]
    assert len(warnings) == len(broken)


def test_links_are_taken_by_the_path_in_the_repository(monkeypatch):
    spec = importlib.util.spec_from_file_location("site_files", ROOT / "docs/site_files.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    assert found.target("../../CONTRIBUTING.md", "docs/extend/index.md") == "CONTRIBUTING.md"
    assert found.target("../../../etc/passwd", "docs/extend/index.md") is None
    assert found.target("gone.md", "docs/index.md") is None
    assert [found.place(path) for path in ("README.md", "docs/method.md", "LICENSE")] == [
        *("index.md", "method.md", "files/LICENSE"),
    ]
