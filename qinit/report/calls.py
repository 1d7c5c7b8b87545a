"""The Python that cards print to load what was written."""

from __future__ import annotations


def from_pretrained(loader: str, place: str, trusted: bool) -> str:
    """Return the call that loads a model with a class of transformers; `place` is an argument, or several, as Python
    reads them."""
    return f'{loader}.from_pretrained({place}, dtype="auto"{own_code(trusted)})'


def own_code(trusted: bool) -> str:
    """Return the argument that lets a model's own code run, behind a comma; nothing where it is not trusted."""
    return ", trust_remote_code=True" if trusted else ""
