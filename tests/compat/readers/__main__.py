"""Exports tiny models and the demo model, loads them by the programs of the table, and prints a line for each.

Dense float32 models show that names, order of rows, biases, hyperparameters and the adapter are right, to the last
digits; packed ones what the reader's own arithmetic costs on top. A run of one's own is measured on a text instead:

    python -m tests.compat.readers llama.cpp --run RUN --text FILE
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import safetensors.torch
import torch

import qinit
from qinit.exports import FinishedRun
from qinit.exports.write import export
from qinit.servers.stored import StoredBase
from qinit.source.demo import demo_directory
from tests.compat.readers import vocabularies
from tests.compat.trainers.environment import environment
from tests.helpers import quantize
from tests.models import make_checkpoint
from tests.stock import load

HERE = Path(__file__).parent
TOKENS = 48
WINDOWS, WINDOW = 12, 512  # at most, of the text that a run of one's own reads
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
EXACT = 2e-5  # relative, of float32 sums in another order
LIMIT = 600  # seconds; MLX compiles its kernels first


@dataclass(frozen=True)
class Reader:
    """A program, the form that it reads, and the pip commands of its environment. Its kernels round what a packed layer
    reads, so that logits move by up to `arithmetic`, relative. `symmetric`: it reads runs on that grid alone. `slow`:
    its products with packed layers take minutes for a long row on a CPU, so that of a text of one's own its weights
    are computed with by transformers."""

    name: str
    form: str
    install: tuple[str, ...]
    arithmetic: float
    symmetric: bool = False
    slow: bool = False
    unfit: tuple[str, ...] = ()

    @property
    def script(self) -> Path:
        return HERE / f"by_{self.name.replace('.', '_').replace('-', '_')}.py"


READERS = {
    reader.name: reader
    for reader in (
        Reader("llama.cpp", "gguf", ("pip install llama-cpp-python==0.3.36",), arithmetic=2e-2),
        Reader(
            "mlx-lm", "mlx", ("pip install mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2",), arithmetic=2e-4, slow=True
        ),
        Reader(
            "auto-round",
            "auto-round",
            ("pip install auto-round==0.16.1 transformers==5.23.0 accelerate",),
            arithmetic=EXACT,
            symmetric=True,
        ),
    )
}


@dataclass(frozen=True)
class Run:
    """A run to export; a `dense` one shows all but the packed grid, of which those that are `symmetric` fit all."""

    directory: Path
    dense: bool = False
    symmetric: bool = False


def runs(place: Path, asked: Sequence[Reader]) -> dict[str, Run]:
    """Make the runs that the readers take, by what they are in words."""
    made = {}
    for family in FAMILIES if any(not reader.symmetric for reader in asked) else ():
        source = make_checkpoint(place / family, family, "float32", initializer_range=0.1)
        _fill(source)
        quantize(source, place / f"{family}-dense", format="dense", rank=8)
        made[f"{family}, dense"] = Run(place / f"{family}-dense", dense=True)
    packed: list[dict[str, Any]] = [{"bits": 2, "symmetric": True}]
    if any(not reader.symmetric for reader in asked):
        packed += [{"bits": 3}, {"bits": 4}]
    if any(reader.symmetric for reader in asked):
        packed += [{"bits": bits, "symmetric": True} for bits in (3, 4, 8)]
        packed.append({"target_bits": 3.0, "allocation": "random", "format": "gptq", "symmetric": True})
    for options in packed:
        words = f"the demo model, {options.get('bits', 'mixed')} bits{', symmetric' * options.get('symmetric', False)}"
        out = place / words.replace(", ", "-").replace(" ", "-")
        quantize(demo_directory(), out, rank=16, **options)
        made[words] = Run(out, symmetric=options.get("symmetric", False))
    return made


def _fill(source: Path) -> None:
    """Give norms and biases other values than the ones and zeros of a new model."""
    file, generator = source / "model.safetensors", torch.Generator().manual_seed(0)
    tensors = safetensors.torch.load_file(file)
    for tensor in tensors.values():
        if tensor.ndim == 1:
            tensor += 0.2 * torch.randn(tensor.shape, generator=generator)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


def check(reader: Reader, run: Path, place: Path, rows: np.ndarray, programs: Path) -> tuple[float, str]:
    """Export a run and compare the reader's logits for rows of ids; return the relative difference, and all in words.
    Raises AssertionError where it cannot be read."""
    out = place / f"{run.name}-{reader.form}"
    export(FinishedRun.open(run), reader.form, out, requantize=True)
    by = logits_of_its_weights if reader.slow and rows.shape[1] > TOKENS else its_logits
    gaps, norms, losses = [], [], []
    pairs = zip(stock_logits(run, place, rows), by(reader, run, out, rows, programs), strict=True)
    for ids, (expected, logits) in zip(rows, pairs, strict=True):
        found = logits[:, : expected.shape[1]]
        gaps.append(np.linalg.norm(found - expected))
        norms.append(np.linalg.norm(expected))
        losses.append([_loss(each, ids) for each in (expected, found)])
    error = float(np.linalg.norm(gaps) / np.linalg.norm(norms))
    stock_ppl, ppl = np.exp(np.mean(losses, axis=0))
    told = f"perplexity {stock_ppl:.3f} in transformers + peft, {ppl:.3f} here ({100 * (ppl / stock_ppl - 1):+.3f} %)"
    return error, f"logits {error:.1e} apart, {told}"


def its_logits(reader: Reader, run: Path, out: Path, rows: np.ndarray, programs: Path) -> Iterator[np.ndarray]:
    """Yield what the reader makes of each row."""
    for ids in rows:
        np.save(out / "ids.npy", ids)
        _carry_out(programs, reader.script, out, out / "ids.npy", out / "logits.npy")
        yield np.load(out / "logits.npy")


def logits_of_its_weights(
    reader: Reader, run: Path, out: Path, rows: np.ndarray, programs: Path
) -> Iterator[np.ndarray]:
    """Yield what transformers and PEFT make of each row with the weights that the reader unpacks."""
    _carry_out(programs, HERE / f"unpacked_by_{reader.form}.py", out, out / "unpacked")
    model = load(run).eval()
    for file in (out / "unpacked").glob("*.npy"):
        module, weight = model.get_base_model().get_submodule(file.stem), torch.from_numpy(np.load(file))
        bias = module.base_layer.bias
        plain = torch.nn.Linear(*weight.shape[::-1], bias=bias is not None)
        plain.weight.data = weight
        if bias is not None:
            plain.bias.data = bias.float()
        module.base_layer = module.quant_linear_module = plain  # PEFT's layer on GPTQ calls the second
    for ids in rows:
        yield _logits(model, ids)


def _carry_out(programs: Path, script: Path, *arguments: Path) -> None:
    command = list(map(str, [programs / "python", script, *arguments]))
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    if done.returncode:
        raise AssertionError("\n".join(done.stderr.splitlines()[-20:]))


def _logits(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids)[None]).logits[0].float().numpy()


def stock_logits(run: Path, place: Path, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yield what stock transformers and PEFT make of each row, in float32 (of mixed widths, which they do not load,
    what qinit.load has); computed for the first reader, kept for the others."""
    kept = [place / f"{run.name}-{number}.npy" for number in range(len(rows))]
    stock = None
    if not kept[-1].is_file():
        mixed = StoredBase.of(run).mixed
        stock = (qinit.load(run, dtype=torch.float32) if mixed else load(run)).eval()
    for ids, file in zip(rows, kept, strict=True):
        if stock is not None:
            np.save(file, _logits(stock, ids))
        yield np.load(file)


def _loss(logits: np.ndarray, ids: np.ndarray) -> float:
    return float(torch.nn.functional.cross_entropy(torch.from_numpy(logits[:-1]), torch.from_numpy(ids[1:])))


def _text(run: Path, file: Path) -> np.ndarray:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(run)(file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    count = min(WINDOWS, len(ids) // WINDOW)
    return np.array(ids[: count * WINDOW]).reshape(count, WINDOW)


def _encoded(place: Path, programs: Path, run: Path | None, text: Path | None) -> int:
    """Compare tokenizers, those of every kind or that of a run; returns how many differ where they should not."""
    failed = 0
    given = vocabularies.texts(text.read_text(encoding="utf-8") if text else None)
    for name, made in [(run.name, run)] if run else vocabularies.runs(place):
        try:
            share, told = vocabularies.compare(made, place, programs, given)
            wrong = share > vocabularies.DIFFERENT.get(name, 0.0)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            wrong, told = True, str(error)
        failed += wrong
        print(f"llama.cpp: tokenizer {name}: {'FAILED: ' * wrong}{told}", flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.compat.readers")
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"of {', '.join(READERS)}; all if left out")
    parser.add_argument("--run", type=Path, help="measure this run alone, on --text")
    parser.add_argument("--text", type=Path)
    options = parser.parse_args()
    if unknown := set(options.readers) - READERS.keys():
        parser.error(f"no reader {', '.join(sorted(unknown))}; known are {', '.join(READERS)}")
    failed = 0
    with TemporaryDirectory(prefix="qinit-readers-") as place:
        asked = [READERS[name] for name in options.readers or READERS]
        made = {options.run.name: Run(options.run, symmetric=True)} if options.run else runs(Path(place), asked)
        for reader in asked:
            name, programs = reader.name, environment(reader)
            for words, run in made.items():
                if reader.symmetric and not run.symmetric:
                    continue
                random = np.random.default_rng(0).integers(5, 250 if run.dense else 4000, (1, TOKENS))
                try:
                    rows = _text(run.directory, options.text) if options.run else random
                    error, told = check(reader, run.directory, Path(place), rows, programs)
                    bound = EXACT if run.dense else reader.arithmetic
                    wrong = not options.run and not error < bound
                    told = f"FAILED: {told}, expected under {bound}" if wrong else told
                except (AssertionError, subprocess.TimeoutExpired) as error:
                    wrong, told = True, f"FAILED: {error}"
                failed += wrong
                print(f"{name}: {words}: {told}", flush=True)
            if reader.form == "gguf":
                failed += _encoded(Path(place), programs, options.run, options.text)
    print(f"{failed} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
