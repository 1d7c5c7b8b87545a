"""Files that come from elsewhere: looked at before they are read, read up to a limit, parsed within bounds.

What is wrong with a file itself is an OSError (its `strerror` says it), what is wrong in it a ValueError, so that a
reader puts both in its own words with the two clauses that it has for them anyway.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from io import FileIO
from pathlib import Path
from typing import Any

JSON_BYTES = 64 << 20  # the index of a model of 10^12 parameters has some 15 MB
YAML_BYTES = 1 << 18  # PyYAML takes two seconds for that
JSON_VALUES = 4_000_000  # about 100 bytes each in memory, whatever the text is
JSON_DEPTH = 64
# Controls, C1 included (a terminal obeys them), what turns the direction of text, and what UTF-8 cannot hold.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class UnfitError(OSError):
    """A file that is not what is read here; `strerror` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(errno.EINVAL, reason)


def open_regular(path: Path) -> FileIO:
    """Open a regular file to read, unbuffered; raises OSError for all else, and never waits for a pipe's writer."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    try:
        file = FileIO(path, "rb", opener=opener)
    except ValueError as error:  # a NUL in the name
        raise UnfitError(str(error)) from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UnfitError("not a regular file")
    return file


def read_regular(path: Path, limit: int) -> bytes:
    """Return what a regular file holds; raises OSError for more than `limit` bytes, of which it reads none."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = b"" if size > limit else file.read(limit + 1)  # some of /proc claim no size and never end
    if max(size, len(data)) > limit:
        raise UnfitError(f"has {max(size, len(data)) / 1e6:.1f} MB, at most {limit / 1e6:.1f} MB are read")
    return data


def require_inside(path: Path, directory: Path) -> None:
    """Raise OSError if `path` leads out of `directory` by a link, or to nothing.

    A snapshot in the Hub's cache has its files among the blobs of the same repository.
    """
    target, home = Path(os.path.realpath(path, strict=True)), Path(os.path.realpath(directory))
    blobs = home.parent.parent / "blobs"
    cached = home.parent.name == "snapshots" and target.is_relative_to(blobs)
    if not cached and not target.is_relative_to(home):
        raise UnfitError(
            f"a link that leads out of the directory, to {target}; put the file itself there if it belongs"
        )


def parse_json(raw: bytes) -> Any:
    """Parse JSON in UTF-8; raises ValueError for what is none, is too large or too deep or has a name twice."""
    if sum(map(raw.count, (b",", b"[", b"{"))) > JSON_VALUES:
        raise ValueError(f"more than {JSON_VALUES} values")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
        if b"\\ud" in raw or b"\\uD" in raw:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair, which is no character") from None
    level = [value]
    for _ in range(JSON_DEPTH):
        inner = (node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list))
        level = [child for children in inner for child in children if isinstance(child, dict | list)]
    if level:
        raise ValueError(f"nested more than {JSON_DEPTH} deep")
    return value


def parse_yaml(raw: bytes) -> Any:
    """Parse YAML of plain values in UTF-8; raises ValueError for what is none, and for anchors, aliases, tags of code
    and names that stand there twice: a page of aliases can stand for more than all memory."""
    import yaml

    from qinit.files.plain_yaml import PlainLoader

    if len(raw) > YAML_BYTES:
        raise ValueError(f"more than {YAML_BYTES} bytes")
    try:
        return yaml.load(raw.decode("utf-8"), Loader=PlainLoader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except (AttributeError, IndexError, KeyError, TypeError):  # what PyYAML makes of `!!bool maybe`
        raise ValueError("a value does not fit its tag") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def printable(text: str) -> str:
    """Return the text with everything that a terminal would obey, or that would hide what it is, as an escape."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(name for name in names if names.count(name) > 1)}' stands there twice")
    return result
