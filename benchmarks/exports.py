"""Peak memory and speed of `qinit export` on blocks of Llama-2-7B's shapes, beside a plain copy of the same bytes.

Makes a finished run of random codes on the spot, as `--symmetric` has them (2 bits in groups of 64, rank 16; for
bnb-nf4 a dense one on NF4's levels), writes each form in a fresh process, and copies what was written, file by file, to
the disk. Both times are of the work alone, without imports.

    python benchmarks/exports.py [--blocks 4] [--bits 2] [--to gguf mlx ...] [--hidden 4096] [--dir BIG_DISK]

Exits with 1 if anything peaks above 2.5 GB, or takes more than twice the time of its copy on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memory import peak_of

# This process must stay small: a child's peak, as the kernel counts it, starts at its parent's. So no torch here.

MAX_PEAK = 2.5e9
SLOWEST = 2.0
VOCABULARY = 1000  # to a block, as the 7B model has
FORMS = ("gguf", "mlx", "compressed-tensors", "gptq", "auto-round", "dense", "bnb-nf4")
NF4 = "bnb-nf4"
SIZES = {"--bits": 2, "--blocks": 4, "--hidden": 4096}


def config_of(blocks: int, hidden: int) -> dict[str, Any]:
    return {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu"},
        **{"hidden_size": hidden, "intermediate_size": 11008 * hidden // 4096, "num_hidden_layers": blocks},
        **{"num_attention_heads": hidden // 128, "num_key_value_heads": hidden // 128, "rms_norm_eps": 1e-5},
        **{"vocab_size": VOCABULARY * blocks, "max_position_embeddings": 4096, "tie_word_embeddings": False},
    }


def shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, vocabulary = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for block in range(config["num_hidden_layers"]):
        stem = f"model.layers.{block}."
        for name in "qkvo":
            yield f"{stem}self_attn.{name}_proj.weight", (hidden, hidden)
        for name in ("gate", "up"):
            yield f"{stem}mlp.{name}_proj.weight", (inner, hidden)
        yield f"{stem}mlp.down_proj.weight", (hidden, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{stem}{name}.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def generate(run: Path, bits: int, blocks: int, hidden: int, *, nf: bool) -> None:
    """Write a run that might have been solved: its plan is a real one, made from headers, and its values are random."""
    import torch

    from qinit.files.tensors import CHUNK_BYTES, TensorSpec, write_header_only
    from qinit.files.writer import SafetensorsWriter
    from qinit.formats.bitsandbytes import NF4 as LEVELS
    from qinit.formats.gptq.packing import pack_rows
    from qinit.planner.make import make_plan
    from qinit.recipe import make_recipe
    from qinit.report.finish import complete, make_report, write_configurations
    from qinit.report.report import LayerRow

    source = run.parent / "source"
    source.mkdir()
    config = config_of(blocks, hidden)
    (source / "config.json").write_text(json.dumps(config))
    header, place = {}, 0
    for name, shape in shapes(config):
        spec = TensorSpec(name, torch.bfloat16, shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [place, place + spec.nbytes]}
        place += spec.nbytes
    write_header_only(source / "model.safetensors", header)
    how = {"method": "loftq", "format": "dense", "bits": 4} if nf else {"bits": bits, "symmetric": True}
    recipe = make_recipe(model="random", rank=16, calibration="none", polish=0, check=False, **how)
    plan = make_plan(recipe, source, "random")
    generator = torch.Generator().manual_seed(0)
    levels = torch.tensor(LEVELS)

    def pieces(spec: TensorSpec) -> Iterator[torch.Tensor]:
        part = spec.name.rpartition(".")[2]
        for start in range(0, spec.nbytes, CHUNK_BYTES):
            count = min(CHUNK_BYTES, spec.nbytes - start) // spec.dtype.itemsize
            if spec.dtype == torch.int32 and part == "qweight":
                value = torch.randint(-(2**31), 2**31, (count,), generator=generator, dtype=torch.int64).int()
            elif spec.name in on_levels:
                absmax = torch.rand(count // 64, 1, generator=generator) * 0.05 + 0.01
                value = (levels[torch.randint(16, (count // 64, 64), generator=generator)] * absmax).bfloat16()
            else:
                value = (torch.randn(count, generator=generator) * 0.02).to(spec.dtype)
            yield value.flatten().view(torch.uint8)

    def whole(spec: TensorSpec) -> torch.Tensor | None:
        """What is not random all over: zero points, one of the two of the symmetric grid, and groups."""
        part = spec.name.rpartition(".")[2]
        if part == "g_idx":
            return (torch.arange(spec.numel) // 64).int()
        if part == "qzeros":
            rows, words = spec.shape
            half = 2 ** (bits - 1)
            chosen = half - torch.randint(2, (rows, words * 32 // bits), generator=generator)
            return pack_rows(chosen.to(torch.uint8), bits)
        return None

    on_levels = {spec.name for layer in plan.quantized for spec in layer.specs} if nf else set()
    run.mkdir()
    for directory, specs, stem in (
        (run, plan.base_specs, "model"),
        (plan.adapter_directory(run), plan.adapter_specs, "adapter_model"),
    ):
        directory.mkdir(exist_ok=True)
        writer = SafetensorsWriter(directory, specs, stem=stem)
        for spec in specs:
            value = whole(spec)
            writer.write_chunks(spec.name, pieces(spec) if value is None else [value.flatten().view(torch.uint8)])
        writer.close()
    rows = tuple(
        LayerRow(
            layer.target.name,
            (layer.target.module.out_features, layer.target.module.in_features),
            *(layer.bits, layer.group_size, layer.rank, layer.target.nbytes, layer.bytes_after),
            *(0.5, 0.4, (), 0.0),
        )
        for layer in plan.layers
    )
    write_configurations(plan, run, run)
    report = make_report(plan, rows, calibration={}, notes=(), command="", seconds=0.0, peak_memory_bytes=0)
    complete(plan, report, run)


def export_timed(run: Path, form: str, out: Path) -> None:
    """Write a form, and print the seconds that it took and those of the CPU."""
    from qinit.exports import FinishedRun
    from qinit.exports.write import export

    opened = FinishedRun.open(run)
    _timed(lambda: export(opened, form, out, requantize=True))


def copy_timed(run: Path, out: Path) -> None:
    """Copy a directory to the disk, and print the same."""

    def copy() -> None:
        shutil.copytree(run, out)
        for file in (path for path in out.rglob("*") if path.is_file()):
            with file.open("rb") as handle:
                os.fsync(handle.fileno())

    _timed(copy)


def _timed(work: Any) -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    print(json.dumps({"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", nargs="+", choices=FORMS, default=FORMS)
    for name, value in SIZES.items():
        parser.add_argument(name, type=int, default=value)
    parser.add_argument("--dir", help="where the temporary runs go")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=3, metavar=("WHAT", "FROM", "TO"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    size = [getattr(asked, name.removeprefix("--")) for name in SIZES]
    if asked.one:
        what, place, out = asked.one[0], Path(asked.one[1]), Path(asked.one[2])
        if what in ("int", "nf"):
            generate(place, *size, nf=what == "nf")
        elif what == "copy":
            copy_timed(place, out)
        else:
            export_timed(place, what, out)
        return
    options = (word for pair in zip(SIZES, size, strict=True) for word in pair)
    own = [sys.executable, __file__, *map(str, options)]
    rows: list[dict[str, Any]] = []
    print(f"{'form':20} {'GB':>6} {'peak MB':>8} {'seconds':>8} {'CPU s':>7} {'copied s':>9} {'CPU s':>7}")
    for kind, forms in (("int", [form for form in asked.to if form != NF4]), ("nf", [f for f in asked.to if f == NF4])):
        if not forms:
            continue
        with tempfile.TemporaryDirectory(prefix="qinit-exports-", dir=asked.dir) as temporary:
            run, out, copied = (Path(temporary) / name for name in ("run", "out", "copied"))
            subprocess.run([*own, "--one", kind, str(run), "-"], check=True)
            for form in forms:
                peak, took = _one(own, form, run, out)
                _, copy = _one(own, "copy", out, copied)
                nbytes = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
                row = {"form": form, "bytes": nbytes, "peak_bytes": peak, **took}
                rows.append(row | {f"copy_{key}": value for key, value in copy.items()})
                times = f"{took['seconds']:8.2f} {took['cpu_seconds']:7.2f}"
                times += f" {copy['seconds']:9.2f} {copy['cpu_seconds']:7.2f}"
                print(f"{form:20} {nbytes / 1e9:6.2f} {peak / 1e6:8.0f} {times}", flush=True)
                shutil.rmtree(out)
                shutil.rmtree(copied)
    if asked.json:
        from common import conclude  # it imports torch, which the measured processes do on their own

        conclude("exports", {"rows": rows}, asked.json)
    bad = [
        row["form"] for row in rows if row["peak_bytes"] > MAX_PEAK or row["seconds"] > SLOWEST * row["copy_seconds"]
    ]
    sys.exit(f"too much memory or time: {', '.join(bad)}" if bad else 0)


def _one(own: list[str], what: str, place: Path, out: Path) -> tuple[int, dict[str, float]]:
    """Do one thing in a process of its own; returns its peak and its times."""
    with tempfile.TemporaryFile("w+") as file:
        peak, _ = peak_of([*own, "--one", what, str(place), str(out)], stdout=file)
        file.seek(0)
        return peak, json.loads(file.read().splitlines()[-1])


if __name__ == "__main__":
    main()
