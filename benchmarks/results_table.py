"""Writes the tables of README.md and docs/ from the results in model_zoo/results: `make results-table`.

    python benchmarks/results_table.py [--check] [FILE...]

What stands between `<!-- results:NAME -->` and `<!-- /results -->` is replaced by the command of
model_zoo/results/NAME.json and its tables; `<!-- results:NAME:VIEW -->` takes a selection of it, see tables.VIEWS. With
--check nothing is written; the exit code is 1 if something would be.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from tables import KINDS, VIEWS, Table

from qinit.report import markdown

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "model_zoo" / "results"
PAGES = ("README.md", "docs/after-training.md", "docs/families.md", "docs/study.md")
FILES = (*(ROOT / page for page in PAGES), *sorted((ROOT / "docs" / "results").glob("*.md")))
BLOCK = re.compile(
    r"(?P<begin><!-- results:(?P<name>[\w.-]+)(?::(?P<view>[\w-]+))? -->\n).*?(?P<end><!-- /results -->)", re.DOTALL
)


def block(name: str, view: str | None = None, results: Path = RESULTS) -> str:
    """Return what stands between the marks of one result: its command and its tables, or those of a view of it."""
    if view is not None and view not in VIEWS:
        sys.exit(f"error: <!-- results:{name}:{view} -->: no view '{view}'; there are {', '.join(VIEWS)}")
    file = results / f"{name}.json"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in results.glob("*.json")))
        sys.exit(f"error: <!-- results:{name} -->: no {file.name} in {results.name}; there are {known}")
    result = json.loads(file.read_text(encoding="utf-8"))
    command = f"`{result['command']}`:" if result["command"] else "The command was not recorded:"
    tables = VIEWS[view](result) if view else KINDS[result["kind"]](result)
    return "\n\n".join([command, *map(titled, tables)]) + "\n\n"  # Markdown: a table ends with an empty line


def titled(table: Table) -> str:
    return f"*{table.title}*\n\n{markdown.table(table.header, table.rows)}"


def filled(text: str, results: Path = RESULTS) -> str:
    """Return a text with every marked block written anew."""
    if len(re.findall(r"<!-- results:", text)) != len(BLOCK.findall(text)):
        sys.exit("error: a <!-- results:NAME --> has no <!-- /results --> after it")
    return BLOCK.sub(lambda match: match["begin"] + block(match["name"], match["view"], results) + match["end"], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", default=FILES)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    for file in options.files:
        before = file.read_text(encoding="utf-8")
        after = filled(before)
        if options.check and before != after:
            sys.exit(f"error: {file.name} is not what model_zoo/results says; run make results-table")
        if not options.check:
            file.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
