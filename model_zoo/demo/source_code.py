"""A domain that the demo model has not seen: the source code of the standard library's top-level modules.

The model was trained on docstrings, so these are taken out; comments and layout go too, as the text is written anew
from the syntax tree. Every Python carries the modules, so nothing is downloaded; another Python version has other code.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from functools import cache
from pathlib import Path

LIMITS = {"test": 150_000, "training": 1_200_000}  # characters
SHORTEST, LONGEST = 1_000, 120_000  # characters: no module is more than a tenth of the training text


@cache
def source_code() -> tuple[str, str]:
    """Return (training text, test text): whole modules in the order of their names' hashes, test modules first."""
    library = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[str, list[str]] = {"test": [], "training": []}
    for path in sorted(library.glob("*.py"), key=lambda path: hashlib.sha256(path.name.encode()).digest()):
        part = next((name for name, limit in LIMITS.items() if sum(map(len, parts[name])) < limit), None)
        if part is None:
            break
        code = _without_docstrings(path.read_bytes())
        if SHORTEST <= len(code) <= LONGEST:
            parts[part].append(code)
    return "\n\n".join(parts["training"]), "\n\n".join(parts["test"])


def _without_docstrings(source: bytes) -> str:
    """Return a module's code without docstrings and comments; nothing for what does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            while ast.get_docstring(node, clean=False) is not None:  # without the first string, a second is one
                node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree) + "\n"
