"""What a Hub answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def listed(name: str) -> Callable[[str, Any], Any]:
    """The Hub's list of files has one more of this name, as soon as there is a list."""

    def change(path: str, reply: Any) -> Any:
        if isinstance(reply, dict):
            return {**reply, "siblings": [*reply["siblings"], {"rfilename": name}]}
        return [*reply, {"type": "file", "path": name, "size": 2, "oid": "0" * 40}]

    return change


CANNOT_BE_USED = "a/b: the Hub's answer cannot be used"


# name: (what becomes of each JSON reply, what the error says)
HUB_CASES: dict[str, tuple[Callable[[str, Any], Any], str]] = {
    "a file that leaves": (listed("../../evil.json"), CANNOT_BE_USED),
    "a file that leaves from below": (listed("a/../../../evil.json"), CANNOT_BE_USED),
    "a file that leaves by backslashes": (listed("..\\evil.json"), CANNOT_BE_USED),
    "a file named ..": (listed(".."), CANNOT_BE_USED),
    "a reply that is a list": (lambda path, reply: [], CANNOT_BE_USED),
    "a reply that is null": (lambda path, reply: None, CANNOT_BE_USED),
    "a list of files that is a number": (lambda path, reply: {**reply, "siblings": 5}, CANNOT_BE_USED),
}
