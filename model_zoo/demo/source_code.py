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

# Characters of each part, in the order in which they take modules, and at most so many of one module: what is measured
# on is a little of many modules. The validation part is the end of the training text, where it is cut off.
PARTS = {"test": (60_000, 3_000), "validation": (60_000, 3_000), "training": (1_200_000, 120_000)}
SHORTEST = 1_000  # characters of a module


@cache
def source_code() -> tuple[str, str]:
    """Return (training text, test text): no module is in two parts; which it is in follows from its name's hash."""
    library = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[str, list[str]] = {name: [] for name in PARTS}
    for path in sorted(library.glob("*.py"), key=lambda path: hashlib.sha256(path.name.encode()).digest()):
        part = next((name for name, (limit, _) in PARTS.items() if sum(map(len, parts[name])) < limit), None)
        if part is None:
            break
        code = _without_docstrings(path.read_bytes())
        if len(code) >= SHORTEST:
            parts[part].append(_cut(code, PARTS[part][1]))
    return "\n\n".join([*parts["training"], *parts["validation"]]), "\n\n".join(parts["test"])


def _cut(code: str, length: int) -> str:
    """Return the first `length` characters, up to the end of a line."""
    return code if len(code) <= length else code[: code.rfind("\n", 0, length) + 1]


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
