"""Formats: how Q is stored so that a stock loader reads exactly the Q that the solver used.

To add a format: one file with a subclass of Format, and one line in FORMATS.
"""

from __future__ import annotations

from typing import Any

from qinit.formats.base import Format
from qinit.formats.dense import DenseFormat
from qinit.formats.gptq.format import GptqFormat

FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in (GptqFormat(), DenseFormat())}


def format_of(config: dict[str, Any]) -> Format | None:
    """Return the format that a base with this config.json is stored in, None for one that qinit does not know."""
    return next((fmt for fmt in FORMATS.values() if fmt.recognises(config)), None)


__all__ = ["FORMATS", "DenseFormat", "Format", "GptqFormat", "format_of"]
