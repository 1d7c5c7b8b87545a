"""docs/architecture.md says of the folders what the contract in pyproject.toml holds them to."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_has_every_file_and_folder_in_the_order_of_the_contract():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    table = page.partition("| of `qinit/` |")[2].partition("\n\n")[0]
    rows = [re.findall(r"`([\w/.]+)`", line.split("|")[1]) for line in table.splitlines()[2:]]
    named = [name.removesuffix(".py").rstrip("/") for row in rows for name in row]
    place = {name: len(layers) - i for i, layer in enumerate(layers) for name in layer.split(" | ")}
    assert sorted(named) == sorted(place)
    assert [place[name] for name in named] == sorted(place[name] for name in named)
