"""What can be tried here: one function for each way of using qinit, on a model that is made on the spot.

`main` tries them in this process, in the current directory, and writes a line of JSON before and after each. Engines
crash, hang and print: `examine` runs it in a child and gets an answer all the same. Imports are late, so that one that
fails is one row.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from qinit.errors import QinitError

VOCABULARY, LONGEST_REASON = 96, 300


class NothingToTryError(Exception):
    """What the probe is about is not there, a GPU for instance."""


@dataclass(frozen=True)
class Probe:
    """A way of using qinit: what it needs beside qinit's own requirements, and whether qinit is of no use without it.
    `run` returns what was seen, in a few words, or raises."""

    title: str
    run: Callable[[], str]
    needs: tuple[str, ...] = ()
    core: bool = False


def _torch() -> str:
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device"
    count = torch.cuda.device_count()
    names = (f"{torch.cuda.get_device_name(i)}, {torch.cuda.mem_get_info(i)[1] / 1e9:.0f} GB" for i in range(count))
    return "; ".join(names)


def _kernel() -> str:
    """The numba kernel against plain torch: the same codes but where two are equally good."""
    import torch

    from qinit.grids.integer.candidates import REFINEMENTS, clip_ratios, zero_points
    from qinit.grids.integer.search_cpu import quantize_cpu
    from qinit.grids.integer.search_torch import quantize_torch

    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    for bits in (2, 3, 4, 8):
        arguments = (weight, weight, bits, 32, clip_ratios(bits), REFINEMENTS, None, zero_points(bits, False))
        errors = [float(quantize(*arguments)[1].norm()) for quantize in (quantize_cpu, quantize_torch)]
        alike = 1e-3 if bits < 8 else 1e-2  # at 8 bits float32 hardly tells which candidate is closer
        if abs(errors[0] - errors[1]) > alike * errors[1]:
            raise ValueError(f"at {bits} bits its error is {errors[0]:.5f}, that of torch {errors[1]:.5f}")
    return "as the torch reference"


def _dense() -> str:
    return _train(_stock(_run(format="dense")))


def _calibrated() -> str:
    run = _run(format="dense", calibration="random", calibration_samples=4, calibration_length=16)
    return _train(_stock(run))


def _trainer() -> str:
    from transformers import Trainer, TrainingArguments

    options: dict[str, Any] = {"max_steps": 1, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    arguments = TrainingArguments(output_dir="trainer", per_device_train_batch_size=2, **options)
    texts = [{"input_ids": ids, "labels": ids} for ids in _tokens().tolist()]
    trainer = Trainer(model=_stock(_run(format="dense")), args=arguments, train_dataset=texts)
    return f"loss {trainer.train().training_loss:.3f}"


def _sft() -> str:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    run = _run(format="dense")
    options: dict[str, Any] = {"max_steps": 1, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    trainer = SFTTrainer(
        model=_stock(run),
        args=SFTConfig(output_dir="sft", per_device_train_batch_size=2, max_length=32, bf16=False, **options),
        train_dataset=Dataset.from_list([{"text": "w5 w6 w7 w8"}] * 4),
        processing_class=AutoTokenizer.from_pretrained(run),
    )
    return f"loss {trainer.train().training_loss:.3f}"


def _datasets() -> str:
    from datasets import Dataset, load_dataset

    rows = Dataset.from_list([{"text": "a"}, {"text": "b"}])
    if list(rows["text"]) != ["a", "b"]:
        raise ValueError("a data set does not give back its rows")
    return f"{load_dataset.__name__} is there; the Hub was not asked"


def _report() -> str:
    from qinit.report.pictures.files import write_pictures
    from qinit.report.report import Report

    run = _run(format="dense")
    picture, page = write_pictures(Report.read(run), Path("pictures"))
    return f"{picture.name}, {page.name}"


def _bitsandbytes() -> str:
    """A QLoRA step: the peer's own base, quantized by bitsandbytes while it is loaded."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(_source(), quantization_config=config, dtype=torch.float32)
    return _train(get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")))


def _gptq(bits: int) -> Callable[[], str]:
    return lambda: _train(_stock(_run(format="gptq", bits=bits)))


def _mixed() -> str:
    from qinit.loading import load

    return _train(load(_run_mixed(), trainable=True))


def _gptqmodel() -> str:
    import torch
    from gptqmodel import BACKEND, GPTQModel

    model = GPTQModel.load(str(_run_mixed()), backend=BACKEND.GPTQ_TORCH, device="cpu").model
    with torch.inference_mode():
        logits = model(input_ids=_tokens()).logits
    if not bool(logits.isfinite().all()):
        raise ValueError("its logits are not finite")
    return "2 and 3 bits in one model"


def _cuda() -> str:
    """The GPU's search against the CPU's kernel, and a training step there."""
    import torch

    if not torch.cuda.is_available():
        raise NothingToTryError("torch sees no CUDA device")
    from qinit.grids import GRIDS

    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    errors = []
    for device in ("cpu", "cuda"):
        there = weight.to(device)
        _, residual = GRIDS["int"].quantize(there, there, bits=2, group_size=32, search="mse")
        errors.append(float(residual.norm()))
    if abs(errors[0] - errors[1]) > 1e-3 * errors[0]:
        raise ValueError(f"its error is {errors[1]:.5f}, that of the CPU {errors[0]:.5f}")
    return _train(_stock(_run(format="dense", device="cuda")).to("cuda"))


# Those that patch their neighbours when they are imported come last.
PROBES: dict[str, Probe] = {
    "torch": Probe("torch", _torch, core=True),
    "kernel": Probe("numba kernel", _kernel, core=True),
    "dense": Probe("eqft, dense: load and train with transformers and peft", _dense, core=True),
    "calibrated": Probe("eqft with calibration", _calibrated, core=True),
    "cuda": Probe("CUDA: quantize and train", _cuda),
    "trainer": Probe("transformers.Trainer", _trainer),
    "datasets": Probe("calibration on data sets of the Hub", _datasets, ("datasets",)),
    "report": Probe("qinit report", _report, ("matplotlib", "plotly")),
    "sft": Probe("trl.SFTTrainer", _sft, ("trl", "datasets")),
    "bitsandbytes": Probe("bitsandbytes NF4: a QLoRA step", _bitsandbytes, ("bitsandbytes",)),
    **{
        f"gptq-{bits}": Probe(f"eqft, gptq, {bits} bits: load and train", _gptq(bits), ("gptqmodel", "optimum"))
        for bits in (2, 3, 4, 8)
    },
    "mixed": Probe("meqft, gptq: qinit.load and train", _mixed, ("gptqmodel", "optimum")),
    "gptqmodel": Probe("meqft, gptq: GPTQModel.load", _gptqmodel, ("gptqmodel", "optimum")),
}


@cache
def _source() -> Path:
    """Make a tiny Llama with a tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = Path(f"source-{os.getpid()}").absolute()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(directory)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(directory)
    return directory


def _run(**options: Any) -> Path:
    """Run qinit on it."""
    from qinit.planner.make import make_plan
    from qinit.recipe import make_recipe
    from qinit.runner.run import run

    words = "-".join(map(str, options.values()))
    out = Path(f"run-{os.getpid()}-{words}").absolute()
    if not out.exists():
        defaults = {"rank": 4, "iter": 2, "group_size": 32, "calibration": "none", "device": "cpu"}
        recipe = make_recipe(model=str(_source()), **{**defaults, **options})
        list(run(make_plan(recipe, _source(), "tiny"), out))
    return out


def _run_mixed() -> Path:
    return _run(format="gptq", ratio=0.5, allocation="random")


def _stock(run: Path) -> Any:
    """Load a run as the README does."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(run, dtype="auto")
    return PeftModel.from_pretrained(base, run, subfolder="eqft_init", is_trainable=True)


def _tokens() -> Any:
    import torch

    return torch.randint(4, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))


def _train(model: Any) -> str:
    """Take one step on two texts, after which they must be more likely."""
    import torch

    model.train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    tokens = _tokens().to(model.device)
    losses = []
    for _ in range(2):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    if not losses[1] < losses[0]:
        raise ValueError(f"a training step took the loss from {losses[0]:.4f} to {losses[1]:.4f}")
    return f"loss {losses[0]:.3f} -> {losses[1]:.3f}"


def main(module: str, *names: str) -> None:
    """Try these of a module's PROBES and write what came of each to stdout; what else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    probes: dict[str, Probe] = import_module(module).PROBES
    for name in names:
        answers.write(json.dumps({"name": name}) + "\n")
        answers.write(json.dumps({"name": name, **_attempt(probes[name])}) + "\n")


def _attempt(probe: Probe) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        state, detail = "works", probe.run()
    except NothingToTryError as error:
        state, detail = "absent", str(error)
    except Exception as error:  # engines break in any way
        state, detail = "fails", _reason(error)
    return {"state": state, "detail": detail, "seconds": round(time.perf_counter() - started, 2)}


def _reason(error: Exception) -> str:
    words = " ".join(str(error).split())[:LONGEST_REASON]
    return words if isinstance(error, QinitError) else f"{type(error).__name__}: {words}"
