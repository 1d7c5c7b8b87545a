"""What lies in a repository of the stand-in Hub, and what is said of it."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

OWNER = "me"


@dataclass(frozen=True)
class Blob:
    """A file's content; `source` is a path for one that is served from a directory."""

    source: bytes | Path
    is_lfs: bool = False

    @property
    def data(self) -> bytes:
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()

    @property
    def oid(self) -> str:
        """What the Hub compares: the SHA-256 of a large file, git's SHA-1 of any other."""
        data = self.data
        plain = b"blob %d\0" % len(data) + data
        return hashlib.sha256(data).hexdigest() if self.is_lfs else hashlib.sha1(plain).hexdigest()


@dataclass
class Repository:
    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    pull_requests: list[str] = field(default_factory=list)

    def tree(self, revision: str) -> tuple[str, dict[str, Blob]] | None:
        commit = self.refs.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None


class Refused(Exception):  # noqa: N818 - an answer
    def __init__(self, status: int, code: str = "", message: str = "", **body: Any):
        self.status, self.code, self.message, self.body = status, code, message, body


def entry(name: str, blob: Blob) -> dict[str, Any]:
    """Return what the Hub lists of a file."""
    size = blob.source.stat().st_size if isinstance(blob.source, Path) else len(blob.source)
    entry = {"type": "file", "path": name, "size": size, "oid": hashlib.sha1(name.encode()).hexdigest()}
    if blob.is_lfs:
        return {**entry, "lfs": {"oid": blob.oid, "size": size, "pointerSize": 100}}
    return {**entry, "oid": blob.oid}


def validated(card: str) -> dict[str, Any]:
    """Check a card's front matter as far as the Hub is known to refuse what qinit could write."""
    metadata = yaml.safe_load(card.split("---\n")[1]) if card.startswith("---\n") else {}
    base = metadata.get("base_model")
    if base is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(base)):
        message = f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
        raise Refused(400, errors=[{"message": message}])
    return {"errors": [], "warnings": []}


def discussion(repo_id: str, number: int, repository: Repository) -> dict[str, Any]:
    """Return what the Hub says of a pull request."""
    return {
        "num": number,
        "title": repository.pull_requests[number - 1],
        "author": {"name": OWNER},
        "createdAt": "2026-01-01T00:00:00.000Z",
        "status": "draft",
        "repo": {"name": repo_id, "type": "model"},
        "isPullRequest": True,
        "events": [],
        "filesWithConflicts": [],
        "changes": {"base": "refs/heads/main"},
    }
