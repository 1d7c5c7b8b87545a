"""Formats: how Q is stored so that a stock loader reads exactly the Q that the solver used.

To add a format: one file with a subclass of Format, and one line in FORMATS.
"""

from __future__ import annotations

from qinit.formats.base import Format
from qinit.formats.dense import DenseFormat
from qinit.formats.gptq.format import GptqFormat

FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in (GptqFormat(), DenseFormat())}

__all__ = ["FORMATS", "DenseFormat", "Format", "GptqFormat"]
