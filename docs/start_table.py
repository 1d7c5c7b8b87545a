"""Writes the table of docs/starts.md from what `qinit methods` lists: `make commands`.

    python docs/start_table.py [--check]

With --check nothing is written; the exit code is 1 if something would be.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from qinit_cli.draw import words
from qinit_cli.methods import started

from qinit.report import markdown
from qinit.solver.methods import STARTS

FILE = Path(__file__).resolve().parent / "starts.md"
COLUMNS = {"name": "method", "factors": "A and B", "base": "base", "peft": "of PEFT's LoraConfig", "source": "source"}
TABLE = re.compile(r"^\| method \|.*?\n(?=\n)", re.DOTALL | re.MULTILINE)


def table() -> str:
    """Return the table as Markdown."""
    rows = [started(row) for row in STARTS.values()]
    return markdown.table(list(COLUMNS.values()), [[words(row[key]) for key in COLUMNS] for row in rows]) + "\n"


def main() -> None:
    before = FILE.read_text(encoding="utf-8")
    after, count = TABLE.subn(lambda _: table(), before)
    if count != 1:
        sys.exit(f"error: {FILE.name} must have one table that begins with `| method |`")
    if sys.argv[1:] == ["--check"]:
        if after != before:
            sys.exit(f"error: {FILE.name} is not what `qinit methods` lists; run make commands")
    else:
        FILE.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
