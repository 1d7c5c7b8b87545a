"""Time and peak memory of each start of LoRA: `qinit adapter --method NAME` against PEFT's own initializer.

    OMP_NUM_THREADS=1 python benchmarks/starts.py --model SmolLM2-135M --text wikitext-2.valid.txt --dtype float32
    OMP_NUM_THREADS=1 python benchmarks/starts.py --blocks 4 --methods lora dora pissa-niter olora eva --dir BIG_DISK

Both write what fine-tuning starts from to the disk: the adapter, and the base where the start changes it. Each is a
process of its own, whose seconds, CPU seconds and peak resident memory are counted from outside, imports included, as
what a user waits for and needs. The first one after a restart also compiles and reads from the disk, so that a small
start is made before, of both, which does not count. --blocks N makes a checkpoint of N blocks of a 7B model's shapes
(random bfloat16, a temporary directory) and takes random tokens for text. --dtype is what PEFT holds the model in, auto
the checkpoint's own. MiLoRA has no counterpart in PEFT.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from memory import usage_of

# This process must stay small: a child's peak, as the kernel counts it, starts at its parent's. So no torch here.

NITER = 4
RANK = 16
# By name: the options of `qinit adapter`, and PEFT's init_lora_weights (None: it has none), or other arguments.
METHODS: dict[str, tuple[list[str], dict[str, Any] | None]] = {
    "lora": (["lora"], {}),
    "dora": (["dora"], {"use_dora": True}),
    "pissa": (["pissa"], {"init_lora_weights": "pissa"}),
    "pissa-niter": (["pissa", "--niter", str(NITER)], {"init_lora_weights": f"pissa_niter_{NITER}"}),
    "olora": (["olora"], {"init_lora_weights": "olora"}),
    "milora": (["milora"], None),
    "corda": (["corda"], {"init_lora_weights": "corda"}),
    "eva": (["eva"], {"init_lora_weights": "eva"}),
    "lora-ga": (["lora-ga"], {"init_lora_weights": "lora_ga"}),
}
READS_TEXT = ("corda", "eva", "lora-ga")
SMALL = {"samples": 2, "length": 32}


def by_peft(name: str, model: Path, out: Path, text: dict[str, Any], dtype: str) -> None:
    """Load the model, have PEFT make the start, and save it: the adapter, and the base if that is another now."""
    import peft
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    _, own = METHODS[name]
    assert own is not None
    kind = "auto" if dtype == "auto" else getattr(torch, dtype)
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=kind)
    base.config.use_cache = False
    tokens = _tokens(model, **text) if name in READS_TEXT else None
    options = {"r": RANK, "lora_alpha": RANK, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **own}
    options |= _of_text(name, peft)
    config = peft.LoraConfig(**options)
    if name in ("corda", "lora-ga"):  # these look for the targets before PEFT has written out what all-linear is
        linear = (key for key, module in base.named_modules() if isinstance(module, torch.nn.Linear))
        config.target_modules = {key.rpartition(".")[2] for key in linear} - {"lm_head"}
    if name == "corda":
        from peft.tuners.lora.corda import preprocess_corda

        preprocess_corda(base, config, run_model=lambda: [base(ids[None]) for ids in tokens])
    if name == "lora-ga":
        from peft.tuners.lora.loraga import preprocess_loraga

        preprocess_loraga(base, config, lambda: [base(ids[None], labels=ids[None]).loss.backward() for ids in tokens])
    adapted = peft.get_peft_model(base, config)
    if name == "eva":
        batches = [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])} for ids in tokens]
        peft.initialize_lora_eva_weights(adapted, batches, show_progress_bar=False)
    changed = isinstance(own.get("init_lora_weights"), str) and name != "eva"
    adapted.save_pretrained(out / "adapter")
    if changed:
        adapted.unload().save_pretrained(out)


def _of_text(name: str, peft: Any) -> dict[str, Any]:
    """Return the configuration of a start that looks at text; CorDA's wants the attrs package for a dataclass."""
    if name == "eva":
        return {"eva_config": peft.EvaConfig(rho=1.0)}
    if name == "lora-ga":
        return {"lora_ga_config": peft.LoraGAConfig()}
    if name != "corda":
        return {}
    from dataclasses import dataclass
    from types import SimpleNamespace

    sys.modules.setdefault("attr", SimpleNamespace(dataclass=dataclass))  # type: ignore[arg-type]
    from peft.tuners.lora.config import CordaConfig

    return {"corda_config": CordaConfig(corda_method="ipm")}


def _tokens(model: Path, source: str, samples: int, length: int) -> Any:
    """Return the tokens that `qinit adapter --calibration` takes."""
    from qinit.source.checkpoint import read_json
    from qinit.text.sources import load_samples

    config = read_json(model / "config.json", "a model has one")
    return load_samples(source, model, config, samples=samples, length=length, seed=0).tokens


def ours(name: str, model: Path, out: Path, text: dict[str, Any]) -> list[str]:
    """Return the command of qinit."""
    command = [sys.executable, "-m", "qinit_cli.main", "adapter", str(model), "--method", *METHODS[name][0]]
    command += ["--rank", str(RANK), "--out", str(out), "--no-check", "--quiet"]
    if name in READS_TEXT:
        command += ["--calibration", text["source"], "--calibration-samples", str(text["samples"])]
        command += ["--calibration-length", str(text["length"])]
    return command


def theirs(name: str, model: Path, out: Path, text: dict[str, Any], dtype: str) -> list[str]:
    """Return the command of PEFT: this file."""
    one = [json.dumps(each) for each in (name, str(model), str(out), text, dtype)]
    return [sys.executable, __file__, "--one", *one]


def measured(command: list[str]) -> dict[str, float]:
    peak, seconds, cpu = usage_of(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return {"peak_bytes": peak, "seconds": seconds, "cpu_seconds": cpu}


def compare(name: str, model: Path, text: dict[str, Any], dtype: str, place: str | None) -> dict[str, Any]:
    """Return what a start takes by qinit and by PEFT."""
    row: dict[str, Any] = {"method": name}
    for who in ("qinit", "peft"):
        with tempfile.TemporaryDirectory(prefix="qinit-starts-", dir=place) as temporary:
            out = Path(temporary) / "out"
            if who == "qinit":
                row[who] = measured(ours(name, model, out, text))
            else:
                row[who] = None if METHODS[name][1] is None else measured(theirs(name, model, out, text, dtype))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path)
    which.add_argument("--blocks", type=int)
    which.add_argument("--one", nargs=5, type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--text", default="random", help="a file, or random (tokens)")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--dir", help="where the temporary outputs go")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if asked.one:
        name, model, out, text, dtype = asked.one
        return by_peft(name, Path(model), Path(out), text, dtype)
    text = {"source": asked.text, "samples": asked.samples, "length": asked.length}
    with tempfile.TemporaryDirectory(prefix="qinit-starts-", dir=asked.dir) as temporary:
        model = asked.model or Path(temporary) / f"7B-shapes-{asked.blocks}-blocks"
        if asked.blocks:
            model.mkdir()
            own = [sys.executable, str(Path(__file__).with_name("memory.py")), "--generate"]
            subprocess.run([*own, str(model), "7B", str(asked.blocks)], check=True)
        compare("lora", model, {**text, **SMALL}, asked.dtype, asked.dir)
        imports = {who: measured([sys.executable, "-c", words]) for who, words in IMPORTS.items()}
        rows = []
        for name in asked.methods:
            rows.append(compare(name, model, text, asked.dtype, asked.dir))
            print(json.dumps(rows[-1]), flush=True)
        from common import conclude  # it imports torch, which the measured processes do on their own

        result = {"model": model.name, "rank": RANK, "dtype": asked.dtype, "text": text, "imports": imports}
        result["text"] = {**text, "source": Path(text["source"]).name}
        conclude("starts", {**result, "rows": rows}, asked.json)


IMPORTS = {
    "qinit": "import qinit.runner.run, qinit_cli.main",
    "peft": "import peft, torch, transformers; from transformers import AutoModelForCausalLM",
}

if __name__ == "__main__":
    main()
