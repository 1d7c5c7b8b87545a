"""Writes docs/commands.md from the command line's own help: `make commands`.

    python docs/commands.py [--check]

With --check nothing is written; the exit code is 1 if something would be. The help is taken so wide that no line of it
is wrapped, and its panels become lists, which a narrow screen can wrap.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

# Before typer and rich are imported: the same text in every terminal.
os.environ.update(COLUMNS="1000", TERMINAL_WIDTH="1000", NO_COLOR="1", TERM="dumb")
for variable in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"):
    os.environ.pop(variable, None)

from qinit_cli.main import app  # noqa: E402 - after the settings
from typer.testing import CliRunner  # noqa: E402

FILE = Path(__file__).resolve().parent / "commands.md"
HEAD = """# Commands

Every command with all its options, as `qinit COMMAND --help` has them. The commands at a glance: [Use](usage.md).
`make commands` writes this page.
"""
TITLE = re.compile(r"^╭─ (?P<title>.*?) ─*╮$")
DEFAULT = re.compile(r"\[default: \(?(?P<value>.*?)\)?\]$")
TYPE = re.compile(r"^<\w+>$|^[A-Z_,]+$")  # <int>, STEPS


def commands() -> list[str]:
    """Return the names of all commands, in the order of the help."""
    return [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]


def section(*command: str) -> str:
    """Return a command's help as Markdown."""
    result = CliRunner().invoke(app, [*command, "--help"], prog_name="qinit", catch_exceptions=False)
    parts = [[f"## {' '.join(['qinit', *command])}"]]  # paragraphs, each of lines
    for line in map(str.strip, result.stdout.splitlines()):
        if title := TITLE.match(line):
            parts += [[f"**{title['title']}**"], []]
        elif line.startswith("│"):
            item = _item(line.strip("│"))
            if not (command and item.startswith("- `--help")):  # every command has it
                parts[-1].append(item)
        elif line.startswith("╰"):
            if not parts[-1]:  # nothing under this title
                del parts[-2:]
            parts.append([])
        elif line.startswith("Usage: "):
            parts += [["```text", line.removeprefix("Usage: "), "```"], []]
        elif line:
            parts[-1].append(_plain(line))
        else:
            parts.append([])
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def _item(row: str) -> str:
    """Return a panel's row as an item: the names and the type, what it is, and the default."""
    first, *fields = re.split(r"\s{2,}", row.strip().removeprefix("*").strip())
    names = [first]
    while fields and fields[0].startswith("-"):
        names.append(fields.pop(0))
    kind = f" {fields.pop(0)}" if fields and TYPE.match(fields[0]) else ""
    kind = "" if kind == " <bool>" else kind  # a switch takes no value
    said = " ".join(fields)
    default = DEFAULT.search(said)
    said = _plain(DEFAULT.sub("", said).strip())
    said = said.replace(r"\[required\]", "Required.")
    words = [said, f"Default: `{default['value']}`." if default else ""]
    return f"- `{', '.join(names)}{kind}`" + (f": {' '.join(filter(None, words))}" if any(words) else "")


def _plain(text: str) -> str:
    """Return a text so that Markdown shows it as it is."""
    return re.sub(r"([<\[\]*])", r"\\\1", text)


def page() -> str:
    """Return the page."""
    return "\n".join([HEAD, section(), *map(section, commands())])


def main() -> None:
    found = page()
    if sys.argv[1:] == ["--check"]:
        if not FILE.is_file() or FILE.read_text(encoding="utf-8") != found:
            sys.exit(f"error: {FILE.name} is not what the command line's help says; run make commands")
    else:
        FILE.write_text(found, encoding="utf-8")


if __name__ == "__main__":
    main()
