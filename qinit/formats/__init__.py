"""Formats: how Q is stored so that a stock loader reads exactly the Q that the solver used. And readers of what others
have stored.

To add a format: one file with a subclass of Format, and one line in FORMATS; to read another form: one file with a
subclass of Reader, and one line in READERS.
"""

from __future__ import annotations

from typing import Any

from qinit.formats.auto_round import AutoRoundReader
from qinit.formats.awq import AwqReader
from qinit.formats.base import Format
from qinit.formats.bitsandbytes import BitsandbytesReader
from qinit.formats.compressed_tensors import CompressedTensorsReader
from qinit.formats.dense import DenseFormat
from qinit.formats.gptq.format import GptqFormat
from qinit.formats.reader import Reader, method_of

FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in (GptqFormat(), DenseFormat())}
READERS: tuple[Reader, ...] = (AwqReader(), BitsandbytesReader(), CompressedTensorsReader(), AutoRoundReader())


def format_of(config: dict[str, Any]) -> Reader | None:
    """Return the form that a base with this config.json is stored in, None for one that qinit does not know."""
    return next((fmt for fmt in (*FORMATS.values(), *READERS) if fmt.recognises(config)), None)


__all__ = ["FORMATS", "READERS", "DenseFormat", "Format", "GptqFormat", "Reader", "format_of", "method_of"]
