"""Strategies for tests of readers: JSON of any form, good files with bytes changed, and how many of them to try."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from qinit.errors import QinitError

MORE = int(os.environ.get("QINIT_FUZZ", "1"))  # times as many examples: QINIT_FUZZ=600 pytest -k fuzz

numbers = st.one_of(
    st.integers(-3, 300),
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**30, 1e999, -1e999, float("nan"), 1e-320, 1e308, 0.5, -0.0]),
)
texts = st.one_of(
    st.text(max_size=8), st.sampled_from(["", ".", "..", "/", "a\0b", "\x1b[2J", "x" * 300, "1e9", "2x4"])
)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)
Change = tuple[int, int, bytes]
changes: st.SearchStrategy[list[Change]] = st.lists(
    st.tuples(
        st.integers(0, 2**20),
        st.integers(0, 8),
        st.one_of(
            st.binary(max_size=4),
            st.sampled_from(
                [b"{", b"[", b"}", b'"', b",", b"-", b"9" * 25, b"NaN", b"null", b"\0", b"\xff", b"\\ud800"]
            ),
        ),
    ),
    min_size=1,
    max_size=6,
)


def examples(count: int) -> Callable[[Any], Any]:
    """Settings for that many examples, or a multiple of it; a machine may be busy, so no deadline."""
    return settings(max_examples=count * MORE, deadline=None, suppress_health_check=list(HealthCheck))


def changed(raw: bytes, edits: list[Change]) -> bytes:
    """Replace some bytes, at places that are taken modulo the length, by others."""
    for place, count, new in edits:
        at = place % (len(raw) + 1)
        raw = raw[:at] + new + raw[at + count :]
    return raw


def with_value(value: Any, path: int, new: Any) -> Any:
    """Return JSON like `value` with one of its parts, found by any number, replaced."""
    value = json.loads(json.dumps(value))
    node = value
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        if not keys:
            return value
        path, index = divmod(path, len(keys))
        inner = node[keys[index]]
        if not isinstance(inner, dict | list) or not inner or path % 3 == 0:
            node[keys[index]] = new
            return value
        node = inner


@contextmanager
def only_qinit_errors() -> Iterator[None]:
    """Let a reader refuse what it is given; all other exceptions are defects."""
    with suppress(QinitError):
        yield


@contextmanager
def file_of(raw: bytes, name: str) -> Iterator[Path]:
    with TemporaryDirectory() as directory:
        file = Path(directory) / name
        file.write_bytes(raw)
        yield file
