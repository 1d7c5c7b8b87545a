"""`--token VALUE` out of the process title, which every user of the machine can read."""

from __future__ import annotations

import contextlib
import json
import os
import sys

VARIABLE = "QINIT_HIDDEN_TOKENS"
HIDDEN = "(hidden)"


def hide_token() -> None:
    """Start the program again with the token in its environment, which only its owner can read, and not in its title.

    Afterwards `sys.argv` has the token as typed and the environment does not. HF_TOKEN needs none of this: the title
    shows `--token` for the tenth of a second that it takes to get here, and the shell's history for longer.
    """
    arguments = sys.argv[1:]
    places = _places(arguments)
    carried = os.environ.pop(VARIABLE, None)
    if carried is not None:
        for (index, prefix), token in zip(places, json.loads(carried), strict=False):
            sys.argv[1 + index] = prefix + token
        return
    before = sys.orig_argv[: len(sys.orig_argv) - len(arguments)]
    # Only a program of its own (no call from Python), and not on Windows, where exec makes another process.
    if not places or sys.orig_argv != [*before, *arguments] or os.name != "posix":
        return
    tokens = [arguments[index].removeprefix(prefix) for index, prefix in places]
    for index, prefix in places:
        arguments[index] = prefix + HIDDEN
    with contextlib.suppress(OSError):  # then it stays in the title, as in most programs
        os.execve(sys.executable, [*before, *arguments], {**os.environ, VARIABLE: json.dumps(tokens)})


def _places(arguments: list[str]) -> list[tuple[int, str]]:
    """Return where a token stands, and what stands before it in the same word."""
    found = []
    for index, (previous, word) in enumerate(zip(["", *arguments], arguments, strict=False)):
        if previous == "--token":
            found.append((index, ""))
        elif word.startswith("--token="):
            found.append((index, "--token="))
    return found
