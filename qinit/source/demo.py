"""The embedded demo model: shipped as package data, so that a first run needs no download."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

DEMO_NAME = "demo"
DEMO_WINDOW = 512  # tokens that it was trained on at once; further on its predictions fall apart
DEMO_TITLE = "the embedded demo model (Llama, 5.8M parameters, trained on Python documentation)"


def demo_directory() -> Path:
    """Return the directory of the demo checkpoint."""
    return Path(str(resources.files("qinit_demo")))


def held_out_text() -> str:
    """Return the text that was kept out of the demo model's training."""
    return (demo_directory() / "heldout.txt").read_text(encoding="utf-8")


def new_domain() -> tuple[str, str]:
    """Return (training text, test text) of a domain that the demo model was not trained on: Python's source code."""
    from qinit_demo.source_code import source_code

    return source_code()
