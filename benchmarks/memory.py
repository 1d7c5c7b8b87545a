"""Peak memory of `qinit eqft` on a 7B model's layer shapes, cut to 4 layers and to 8: it must not grow with depth.

Makes the checkpoints on the spot (sharded bf16, random weights, up to 6 GB of disk in a temporary directory, one
at a time), runs the command in a fresh process and reads that process's peak resident memory from outside.

    python benchmarks/memory.py [--iter 1] [--format gptq] [--dir BIG_DISK]

Exits with 1 if 8 layers peak more than 5 % above 4, or anything above 2.5 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

# This process must stay small: a child's peak, as the kernel counts it, starts at its parent's. So no torch here.

LAYERS = (4, 8)
MAX_RATIO = 1.05
MAX_PEAK = 2.5e9
SHARD_BYTES = 1_500_000_000
HIDDEN, INTERMEDIATE, KV, VOCABULARY = 3584, 18944, 512, 152064  # Qwen2.5-7B: 28 heads and 4 kv heads of 128
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(layers):
        block = f"model.layers.{i}."
        found |= {
            block + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            block + "self_attn.q_proj.bias": (HIDDEN,),
            block + "self_attn.k_proj.weight": (KV, HIDDEN),
            block + "self_attn.k_proj.bias": (KV,),
            block + "self_attn.v_proj.weight": (KV, HIDDEN),
            block + "self_attn.v_proj.bias": (KV,),
            block + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            block + "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            block + "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            block + "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
            block + "input_layernorm.weight": (HIDDEN,),
            block + "post_attention_layernorm.weight": (HIDDEN,),
        }
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def generate(directory: Path, layers: int) -> None:
    """Write the checkpoint, a few megabytes at a time."""
    import torch

    from qinit.safetensors_io import CHUNK_BYTES, SafetensorsWriter, TensorSpec

    (directory / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    specs = [TensorSpec(name, torch.bfloat16, shape) for name, shape in shapes(layers).items()]
    generator = torch.Generator().manual_seed(0)

    def chunks(nbytes: int) -> Iterator[torch.Tensor]:
        for start in range(0, nbytes, CHUNK_BYTES):
            count = min(CHUNK_BYTES, nbytes - start) // 2
            yield (torch.randn(count, generator=generator) * 0.02).bfloat16().view(torch.uint8)

    writer = SafetensorsWriter(directory, specs, max_bytes=SHARD_BYTES)
    for spec in specs:
        writer.write_chunks(spec.name, chunks(spec.nbytes))
    writer.close()


def peak_of(command: list[str]) -> tuple[int, float]:
    """Run a command; return its peak resident memory in bytes and its seconds."""
    started = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"exit code {process.returncode} from {' '.join(command)}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iter", type=int, default=5)
    parser.add_argument("--format", nargs="+", default=["gptq", "dense"])
    parser.add_argument("--dir", help="where the temporary checkpoints go")
    parser.add_argument("--generate", nargs=2, metavar=("DIR", "LAYERS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.generate:
        return generate(Path(arguments.generate[0]), int(arguments.generate[1]))

    python = [sys.executable, "-m", "qinit_cli.main"]
    baseline, _ = peak_of([sys.executable, "-c", "import qinit.runner, transformers.models.qwen2.modeling_qwen2"])
    print(f"imports alone: {baseline / 1e6:.0f} MB", flush=True)
    with tempfile.TemporaryDirectory(prefix="qinit-memory-", dir=arguments.dir) as temporary:
        peak_of([*python, "eqft", "--out", f"{temporary}/out", "--quiet"])  # compiling the kernel takes 200 MB, once
    peaks: dict[str, dict[int, int]] = {name: {} for name in arguments.format}
    print(f"{'format':8} {'layers':>6} {'source GB':>9} {'peak MB':>8} {'reported MB':>11} {'seconds':>8}")
    for layers in LAYERS:
        with tempfile.TemporaryDirectory(prefix="qinit-memory-", dir=arguments.dir) as temporary:
            source, out = Path(temporary) / "source", Path(temporary) / "out"
            source.mkdir()
            subprocess.run([sys.executable, __file__, "--generate", str(source), str(layers)], check=True)
            for name in arguments.format:
                options = ["--out", str(out), "--format", name, "--iter", str(arguments.iter)]
                peak, seconds = peak_of([*python, "eqft", str(source), *options, "--overwrite", "--quiet"])
                totals = json.loads((out / "qinit.json").read_text())["totals"]
                peaks[name][layers] = peak
                print(
                    f"{name:8} {layers:6} {totals['bytes_before'] / 1e9:9.2f} {peak / 1e6:8.0f} "
                    f"{totals['peak_memory_bytes'] / 1e6:11.0f} {seconds:8.1f}",
                    flush=True,
                )
    failed = False
    for name, found in peaks.items():
        ratio, highest = found[LAYERS[1]] / found[LAYERS[0]], max(found.values())
        good = ratio <= MAX_RATIO and highest <= MAX_PEAK
        failed |= not good
        print(
            f"{name}: {LAYERS[1]} layers to {LAYERS[0]}: {ratio:.3f} (at most {MAX_RATIO}), "
            f"peak {highest / 1e9:.2f} GB (at most {MAX_PEAK / 1e9}): {'ok' if good else 'FAILED'}"
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()
