"""Peak memory of `qinit eqft` on a 7B model's layer shapes, cut to 4 layers and to 8: it must not grow with depth.

Makes the checkpoints on the spot (sharded bf16, random weights, up to 6 GB of disk in a temporary directory, one
at a time), runs the command in a fresh process and reads that process's peak resident memory from outside.

    python benchmarks/memory.py [--iter 1] [--format gptq] [--dir BIG_DISK]
    python benchmarks/memory.py --calibration          the shapes of a 0.5B model, with random calibration text

Exits with 1 if 8 layers peak more than 5 % above 4, or anything above 2.5 GB (4 GB with calibration).
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
from typing import Any

# This process must stay small: a child's peak, as the kernel counts it, starts at its parent's. So no torch here.

LAYERS = (4, 8)
MAX_RATIO = 1.05
SHARD_BYTES = 1_500_000_000
COMMON = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "dtype": "bfloat16", "bos_token_id": 0}
CONFIGS: dict[str, dict[str, Any]] = {  # Qwen2.5's
    "7B": {
        **COMMON,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "0.5B": {
        **COMMON,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
}
TEXT = ["--calibration", "random", "--calibration-samples", "32", "--calibration-length", "256"]


def shapes(config: dict[str, Any], layers: int) -> dict[str, tuple[int, ...]]:
    hidden, intermediate, vocabulary = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        block = f"model.layers.{i}."
        found |= {
            block + "self_attn.q_proj.weight": (hidden, hidden),
            block + "self_attn.q_proj.bias": (hidden,),
            block + "self_attn.k_proj.weight": (kv, hidden),
            block + "self_attn.k_proj.bias": (kv,),
            block + "self_attn.v_proj.weight": (kv, hidden),
            block + "self_attn.v_proj.bias": (kv,),
            block + "self_attn.o_proj.weight": (hidden, hidden),
            block + "mlp.gate_proj.weight": (intermediate, hidden),
            block + "mlp.up_proj.weight": (intermediate, hidden),
            block + "mlp.down_proj.weight": (hidden, intermediate),
            block + "input_layernorm.weight": (hidden,),
            block + "post_attention_layernorm.weight": (hidden,),
        }
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def generate(directory: Path, size: str, layers: int) -> None:
    """Write the checkpoint, a few megabytes at a time."""
    import torch

    from qinit.files.tensors import CHUNK_BYTES, TensorSpec
    from qinit.files.writer import SafetensorsWriter

    (directory / "config.json").write_text(json.dumps(CONFIGS[size] | {"num_hidden_layers": layers}))
    specs = [TensorSpec(name, torch.bfloat16, shape) for name, shape in shapes(CONFIGS[size], layers).items()]
    generator = torch.Generator().manual_seed(0)

    def chunks(nbytes: int) -> Iterator[torch.Tensor]:
        for start in range(0, nbytes, CHUNK_BYTES):
            count = min(CHUNK_BYTES, nbytes - start) // 2
            yield (torch.randn(count, generator=generator) * 0.02).bfloat16().view(torch.uint8)

    writer = SafetensorsWriter(directory, specs, max_bytes=SHARD_BYTES)
    for spec in specs:
        writer.write_chunks(spec.name, chunks(spec.nbytes))
    writer.close()


def peak_of(command: list[str], **options: Any) -> tuple[int, float]:
    """Run a command; return its peak resident memory in bytes and its seconds."""
    return usage_of(command, **options)[:2]


def usage_of(command: list[str], **options: Any) -> tuple[int, float, float]:
    """Run a command; return its peak resident memory in bytes, its seconds and those of the CPU."""
    started = time.perf_counter()
    process = subprocess.Popen(command, **options)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"exit code {process.returncode} from {' '.join(command)}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, time.perf_counter() - started, usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iter", type=int, default=None)
    parser.add_argument("--calibration", action="store_true")
    parser.add_argument("--format", nargs="+", default=["gptq", "dense"])
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--dir", help="where the temporary checkpoints go")
    parser.add_argument("--generate", nargs=3, metavar=("DIR", "SIZE", "LAYERS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.generate:
        directory, size, layers = arguments.generate
        return generate(Path(directory), size, int(layers))

    size, max_peak = ("0.5B", 4e9) if arguments.calibration else ("7B", 2.5e9)
    text = TEXT if arguments.calibration else ["--calibration", "none"]
    rounds = ["--iter", str(arguments.iter)] if arguments.iter else []
    python = [sys.executable, "-m", "qinit_cli.main"]
    baseline, _ = peak_of([sys.executable, "-c", "import qinit.runner.run, transformers.models.qwen2.modeling_qwen2"])
    print(f"imports alone: {baseline / 1e6:.0f} MB", flush=True)
    with tempfile.TemporaryDirectory(prefix="qinit-memory-", dir=arguments.dir) as temporary:
        peak_of(
            [*python, "eqft", "--out", f"{temporary}/out", "--quiet", *text]
        )  # compiling the kernel takes 200 MB, once
    rows = []
    peaks: dict[str, dict[int, int]] = {name: {} for name in arguments.format}
    print(f"{'format':8} {'layers':>6} {'source GB':>9} {'peak MB':>8} {'reported MB':>11} {'seconds':>8}")
    for layers in LAYERS:
        with tempfile.TemporaryDirectory(prefix="qinit-memory-", dir=arguments.dir) as temporary:
            source, out = Path(temporary) / "source", Path(temporary) / "out"
            source.mkdir()
            subprocess.run([sys.executable, __file__, "--generate", str(source), size, str(layers)], check=True)
            for name in arguments.format:
                options = ["--out", str(out), "--format", name, *rounds, *text]
                peak, seconds = peak_of([*python, "eqft", str(source), *options, "--overwrite", "--quiet"])
                totals = json.loads((out / "qinit.json").read_text())["totals"]
                peaks[name][layers] = peak
                rows.append(
                    {
                        **{"format": name, "layers": layers, "source_bytes": totals["bytes_before"]},
                        **{"peak_bytes": peak, "reported_bytes": totals["peak_memory_bytes"], "seconds": seconds},
                    }
                )
                print(
                    f"{name:8} {layers:6} {totals['bytes_before'] / 1e9:9.2f} {peak / 1e6:8.0f} "
                    f"{totals['peak_memory_bytes'] / 1e6:11.0f} {seconds:8.1f}",
                    flush=True,
                )
    failed = False
    if arguments.json:
        from common import conclude  # it imports torch, which the measured processes do on their own

        conclude("memory", {"imports_bytes": baseline, "rows": rows}, arguments.json)
    for name, found in peaks.items():
        ratio, highest = found[LAYERS[1]] / found[LAYERS[0]], max(found.values())
        good = ratio <= MAX_RATIO and highest <= max_peak
        failed |= not good
        print(
            f"{name}: {LAYERS[1]} layers to {LAYERS[0]}: {ratio:.3f} (at most {MAX_RATIO}), "
            f"peak {highest / 1e9:.2f} GB (at most {max_peak / 1e9}): {'ok' if good else 'FAILED'}"
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()
