"""The names of all options that LLaMA-Factory and Axolotl have, in the versions that templates are written for.

    pip download --no-deps llamafactory==0.9.5 transformers==5.6.0 axolotl==0.19.0
    python -m tests.qinit.trainers.templates.option_names *.whl

reads them out of the packages' own argument classes, without importing any, and writes option_names.json.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")
# The files whose classes have the options, by package: what each trainer reads its YAML with.
CLASSES = {
    "llama-factory": {
        "llamafactory": [
            f"llamafactory/hparams/{name}_args.py" for name in ("model", "data", "finetuning", "training")
        ],
        "transformers": ["transformers/training_args.py", "transformers/training_args_seq2seq.py"],
    },
    "axolotl": {
        "axolotl": [f"axolotl/utils/schemas/{name}.py" for name in ("config", "model", "peft", "training")],
    },
    "axolotl datasets": {"axolotl": ["axolotl/utils/schemas/datasets.py"]},
}


def option_names() -> dict[str, set[str]]:
    return {trainer: set(names) for trainer, names in json.loads(FILE.read_text()).items()}


def main(wheels: list[str]) -> None:
    opened = {Path(wheel).name.partition("-")[0]: zipfile.ZipFile(wheel) for wheel in wheels}
    found = {
        trainer: sorted(
            {name for package, files in parts.items() for file in files for name in _fields(opened[package].read(file))}
        )
        for trainer, parts in CLASSES.items()
    }
    FILE.write_text(json.dumps(found, indent=0) + "\n")


def _fields(source: bytes) -> list[str]:
    classes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef))
    fields = (node for each in classes for node in each.body if isinstance(node, ast.AnnAssign))
    return [node.target.id for node in fields if isinstance(node.target, ast.Name)]


if __name__ == "__main__":
    main(sys.argv[1:])
