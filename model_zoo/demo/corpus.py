"""The demo model's text: the docstrings of the standard library and of pinned, well-documented packages.

Nothing is imported or run: wheels are read as zip files and their sources parsed. A document is one
module. Every 97th document (by hash of its name) is held out, and a paragraph that stands in a held-out
document is removed from all others, so that no held-out text was seen in training.
"""

from __future__ import annotations

import ast
import hashlib
import subprocess
import sys
import sysconfig
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGES = [
    *("aiohttp==3.14.5", "astropy==8.0.2", "bokeh==3.9.2", "click==8.5.1", "dask==2026.8.0"),
    *("django==5.2.19", "docutils==0.23", "flask==3.1.3", "hypothesis==6.170.15", "jax==0.10.2"),
    *("jinja2==3.1.6", "keras==3.15.1", "matplotlib==3.11.2", "mypy==2.4.1", "networkx==3.6.1"),
    *("nltk==3.10.4", "numba==0.68.1", "numpy==2.4.6", "pandas==3.1.1", "pillow==13.0.0"),
    *("pip==26.3", "pytest==9.2.0", "requests==2.34.2", "rich==15.0.0", "scikit-image==0.26.0"),
    *("scikit-learn==1.9.1", "scipy==1.17.1", "setuptools==84.2.1", "sphinx==9.0.4"),
    *("sqlalchemy==2.1.9", "statsmodels==0.15.0", "sympy==1.14.0", "tornado==6.6.1"),
    *("transformers==5.23.0", "twisted==26.10.0", "werkzeug==3.1.9", "xarray==2026.9.0"),
]
# Held-out text is shipped, so it comes only from projects under the PSF, BSD or MIT licence.
SHIPPED = {"python", "sympy", "networkx", "scipy", "numpy", "pandas", "sqlalchemy", "twisted"}
HELD_OUT_ONE_IN = 97


def docstrings(source: bytes) -> Iterator[str]:
    """Yield `signature + docstring` for each documented module, class and function of a source file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        text = ast.get_docstring(node)
        if not text or len(text) < 80:
            continue
        if isinstance(node, ast.Module):
            yield text
        elif isinstance(node, ast.ClassDef):
            yield f"class {node.name}\n\n{text}"
        else:
            yield f"{node.name}({ast.unparse(node.args)})\n\n{text}"


def sources(wheels: Path) -> Iterator[tuple[str, str, bytes]]:
    """Yield (package, module path, source) of the standard library and of every wheel in a directory."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(stdlib.rglob("*.py")):
        relative = path.relative_to(stdlib).as_posix()
        if not relative.startswith(("site-packages/", "test/", "lib2to3/tests/")):
            yield "python", relative, path.read_bytes()
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(".py") and "/tests/" not in name and "/_vendor/" not in name:
                    yield wheel.name.split("-")[0].lower(), name, archive.read(name)


def is_held_out(package: str, module: str) -> bool:
    digest = hashlib.sha256(f"{package}/{module}".encode()).digest()
    return package in SHIPPED and int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def _unseen_paragraphs(text: str, seen: set[bytes]) -> str:
    kept = []
    for paragraph in text.split("\n\n"):
        key = hashlib.blake2b(" ".join(paragraph.split()).encode(), digest_size=8).digest()
        if len(paragraph) < 40 or key not in seen:
            seen.add(key)
            kept.append(paragraph)
    return "\n\n".join(kept)


def build(wheels: Path) -> tuple[list[str], list[str]]:
    """Return (training documents, held-out documents), deduplicated by paragraph, held-out first."""
    documents = [
        (is_held_out(package, module), f"{package} {module}", list(docstrings(source)))
        for package, module, source in sources(wheels)
    ]
    seen: set[bytes] = set()
    result: dict[bool, list[str]] = {True: [], False: []}
    for held_out in (True, False):
        for flag, name, texts in documents:
            if flag == held_out and texts:
                body = "\n\n\n".join(filter(None, (_unseen_paragraphs(t, seen) for t in texts)))
                if len(body) >= 200:
                    result[held_out].append(f"{name}\n\n{body}\n")
    return result[False], result[True]


def download(wheels: Path, packages: Iterable[str] = PACKAGES) -> None:
    """Download the pinned wheels (not their dependencies) from the configured package index."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*pip, "-d", str(wheels), *packages], check=True)
