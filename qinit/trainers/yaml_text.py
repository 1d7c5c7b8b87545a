"""YAML that keeps its comments: values put into a template."""

from __future__ import annotations

import json
import re


def scalar(text: str) -> str:
    """Return a string as YAML reads it back, in quotes only where it needs them."""
    return text if re.fullmatch(r"[A-Za-z0-9/._][\w/.-]*", text) and not _other(text) else json.dumps(text)


def _other(text: str) -> bool:
    import yaml

    return not isinstance(yaml.safe_load(text), str)
