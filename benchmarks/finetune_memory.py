"""What `qinit plan` says that fine-tuning takes, against the peak of a process that trains on the CPU.

    OMP_NUM_THREADS=1 python benchmarks/finetune_memory.py [--model SmolLM2-135M] [--cases 0,3] [--json FILE]

Random Llamas are made and quantized on the spot, without data and in one round. Each case is a process of its own,
which first trains a tiny model of the same format, so that libraries are in memory; then it loads the run and takes two
steps of `qinit.train.finetune`, the second with AdamW's moments. What counts is the peak of its resident memory over
what it was before the run was loaded. glibc gives memory back at once there (MALLOC_MMAP_THRESHOLD_), so that the peak
is what is in use. The goal is a ratio within 15 %.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
WIDE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 3, "num_attention_heads": 16}
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {**TINY, "num_key_value_heads": 2, "vocab_size": 256},
    "small": {**SMALL, "num_key_value_heads": 4, "vocab_size": 8192},
    "wide": {**WIDE, "num_key_value_heads": 4, "vocab_size": 16384},
}
GIVEN = "given"  # the model that --model names
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Case:
    """A model, how its base is stored, and what it is trained on."""

    model: str
    format: str
    dtype: str
    bits: int
    rank: int
    length: int
    batch: int
    checkpointing: bool

    @property
    def name(self) -> str:
        return f"{self.model}-{self.format}-{self.dtype}-{self.bits}-{self.rank}"


CASES = [  # few tokens in bfloat16: without instructions for it a processor is a hundred times slower
    Case("small", "gptq", "bfloat16", 2, 16, 256, 1, False),
    Case("small", "gptq", "bfloat16", 2, 16, 256, 1, True),
    Case("small", "gptq", "bfloat16", 3, 64, 64, 2, False),
    Case("small", "dense", "float32", 4, 16, 256, 4, False),
    Case("small", "dense", "float32", 4, 16, 1024, 1, True),
    Case("wide", "gptq", "float32", 4, 16, 256, 2, False),
    Case("wide", "gptq", "float32", 4, 64, 256, 2, True),
    Case(GIVEN, "gptq", "bfloat16", 2, 16, 32, 1, False),
    Case(GIVEN, "gptq", "bfloat16", 2, 16, 32, 1, True),
    Case(GIVEN, "dense", "bfloat16", 2, 16, 32, 2, False),
]


def source_of(case: Case, place: Path, given: Path | None) -> Path:
    if case.model != GIVEN:
        return place / f"{case.model}-{case.dtype}"
    assert given is not None
    return given


def make_run(case: Case, place: Path, given: Path | None) -> Path:
    """Quantize the model of a case, where that has not been done."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from qinit.runner.run import run
    from qinit.steps import finish

    out = place / case.name
    if out.exists():
        return out
    source = source_of(case, place, given)
    if not source.exists():
        torch.manual_seed(0)
        config = LlamaConfig(**MODELS[case.model], max_position_embeddings=2048, bos_token_id=1, eos_token_id=2)
        LlamaForCausalLM(config).to(getattr(torch, case.dtype)).save_pretrained(source)
    finish(run(plan_of(case, source), out))
    return out


def plan_of(case: Case, source: Path) -> Any:
    from qinit.planner.make import make_plan
    from qinit.recipe import make_recipe

    options = {"bits": case.bits, "rank": case.rank, "format": case.format, "iter": 1, "group_size": 32}
    recipe = make_recipe(model=str(source), calibration="none", check=False, device="cpu", **options)
    return make_plan(recipe, source, source.name)


def train(directory: Path, length: int, batch: int, checkpointing: bool) -> None:
    """Take two steps on random tokens."""
    import torch

    from qinit.loading import load
    from qinit.train.finetune import Training, finetune

    model = load(directory, trainable=True)
    Path("/proc/self/clear_refs").write_text("5")  # what loading took for a moment does not count
    tokens = torch.randint(3, model.config.vocab_size, (2 * batch * length,))
    finetune(model, tokens, Training(2, length, batch, checkpointing=checkpointing), rate=1e-4, seed=0)


def memory(field: str) -> int:
    """Return VmRSS or VmHWM of this process, in bytes."""
    found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return 1024 * int(found[1])


def child(tiny: Path, directory: Path, length: int, batch: int, checkpointing: bool) -> None:
    """Print the bytes that training took at its peak, libraries not counted."""
    train(tiny, 16, 1, checkpointing)
    before = memory("VmRSS")
    train(directory, length, batch, checkpointing)
    print(f"peak {memory('VmHWM') - before}")


def measured(case: Case, place: Path, given: Path | None) -> dict[str, Any]:
    """Return what a case was said to take and what it took, in bytes."""
    from qinit.planner.finetuning import fine_tuning

    directory, tiny = make_run(case, place, given), make_run(replace(case, model="tiny", bits=2, rank=4), place, None)
    source = source_of(case, place, given)
    plan = plan_of(case, source)
    said = fine_tuning(plan, case.length, case.batch, checkpointing=case.checkpointing, autocast=False)
    words = [str(tiny), str(directory), str(case.length), str(case.batch), str(int(case.checkpointing))]
    command = [sys.executable, __file__, "--child", *words]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False)
    found = re.search(r"^peak (\d+)$", done.stdout, re.MULTILINE)
    if done.returncode or not found:
        sys.exit(f"{case.name}: {done.stderr[-2000:]}")
    model = source.name if case.model == GIVEN else case.model
    return {**asdict(case), "model": model, **asdict(said), "said": said.total, "measured": int(found[1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint of a Llama, which is measured too")
    parser.add_argument("--cases", default="", help="numbers of the cases, from 0; all without it")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures to this file")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        tiny, directory, *numbers = options.child
        length, batch, checkpointing = map(int, numbers)
        return child(Path(tiny), Path(directory), length, batch, bool(checkpointing))

    from common import conclude

    cases = [CASES[int(number)] for number in options.cases.split(",") if number] or CASES
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for case in cases:
            if case.model == GIVEN and options.model is None:
                continue
            rows.append(measured(case, Path(place), options.model))
            row = rows[-1]
            print(f"{case.name}: {json.dumps(row)} {row['said'] / row['measured']:.3f}", flush=True)
    conclude("finetune-memory", {"rows": rows}, options.json, seeds=[0])


if __name__ == "__main__":
    main()
