"""Peak memory of `qinit eqft` on a 7B model's layer shapes, cut to 4 layers and to 8: it must not grow with depth. And
how its time grows with the weights: along a straight line.

Makes the checkpoints on the spot (sharded bf16, random weights, up to 6 GB of disk in a temporary directory, one
at a time), runs the command in a fresh process and reads that process's peak resident memory from outside.

    python benchmarks/memory.py [--iter 1] [--format gptq] [--dir BIG_DISK]
    python benchmarks/memory.py --calibration          the shapes of a 0.5B model, with random calibration text
    python benchmarks/memory.py --calibration --size 7B --layers 2 4 --format gptq
    python benchmarks/memory.py --time                 without data, from 25 million to a billion weights

Exits with 1 if the deepest peaks more than 5 % above the first, or anything above 2.5 GB (with calibration 4 GB, of a
7B model 6 GB); with --time if a run is more than 10 % off the line.
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

QINIT = [sys.executable, "-m", "qinit_cli.main"]
MAX_RATIO = 1.05
MOST = {("7B", False): 2.5e9, ("0.5B", False): 2.5e9, ("0.5B", True): 4e9, ("7B", True): 6e9}  # bytes, by calibration
MOST_OFF = 0.1  # of the line
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
STRAIGHT = {"25M": (512, 1536, 8), "100M": (768, 3072, 12), "350M": (1024, 4096, 23), "1B": (2048, 8192, 16)}
CONFIGS |= {  # their layers have so many weights
    name: {
        **COMMON,
        **{"hidden_size": width, "intermediate_size": inner, "num_attention_heads": 8, "num_key_value_heads": 2},
        **{"vocab_size": 8192, "tie_word_embeddings": True},
    }
    for name, (width, inner, _) in STRAIGHT.items()
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
    head = {} if config["tie_word_embeddings"] else {"lm_head.weight": (vocabulary, hidden)}
    return found | {"model.norm.weight": (hidden,), **head}


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


def made(place: str, size: str, layers: int) -> Path:
    """Write a checkpoint in a process of its own."""
    source = Path(place) / "source"
    source.mkdir()
    subprocess.run([sys.executable, __file__, "--generate", str(source), size, str(layers)], check=True)
    return source


def depths(arguments: argparse.Namespace, text: list[str]) -> tuple[dict[str, Any], bool]:
    """Measure the peak at every depth; return the result, and whether it is too much anywhere, or grows."""
    baseline, _ = peak_of([sys.executable, "-c", "import qinit.runner.run, transformers.models.qwen2.modeling_qwen2"])
    print(f"imports alone: {baseline / 1e6:.0f} MB", flush=True)
    rows = []
    peaks: dict[str, list[int]] = {name: [] for name in arguments.format}
    print(f"{'format':8} {'layers':>6} {'source GB':>9} {'peak MB':>8} {'reported MB':>11} {'seconds':>8}")
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory(prefix="qinit-memory-", dir=arguments.dir) as place:
            source, out = made(place, arguments.size, layers), Path(place) / "out"
            for name in arguments.format:
                options = ["--out", str(out), "--format", name, *text, "--overwrite", "--quiet"]
                peak, seconds = peak_of([*QINIT, "eqft", str(source), *options])
                totals = json.loads((out / "qinit.json").read_text())["totals"]
                peaks[name].append(peak)
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
    failed, most = False, MOST.get((arguments.size, arguments.calibration), 6e9)
    for name, found in peaks.items():
        ratio, highest = found[-1] / found[0], max(found)
        good = ratio <= MAX_RATIO and highest <= most
        failed |= not good
        print(
            f"{name}: {arguments.layers[-1]} layers to {arguments.layers[0]}: {ratio:.3f} (at most {MAX_RATIO}), "
            f"peak {highest / 1e9:.2f} GB (at most {most / 1e9}): {'ok' if good else 'FAILED'}"
        )
    return {"imports_bytes": baseline, "rows": rows}, failed


def straight(arguments: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Measure the seconds of a run without data against the weights that it quantizes; return the result, and whether
    one is too far from the straight line through all of them."""
    rows = []
    for size in arguments.sizes.split(","):
        with tempfile.TemporaryDirectory(prefix="qinit-time-", dir=arguments.dir) as place:
            source, out, took = made(place, size, STRAIGHT[size][-1]), Path(place) / "out", []
            for _ in range(arguments.repeats):
                options = ["--out", str(out), "--calibration", "none", "--overwrite", "--quiet", "--no-check"]
                peak_of([*QINIT, "eqft", str(source), *options])
                report = json.loads((out / "qinit.json").read_text())
                took.append(report["totals"]["seconds"])
            weights = sum(row["shape"][0] * row["shape"][1] for row in report["layers"])
            rows.append({"size": size, "weights": weights, "seconds": min(took), "all_seconds": took})
            print(f"{size:>5}: {weights / 1e6:7.1f} M weights, {min(took):7.2f} s", flush=True)
    start, slope = line([(row["weights"], row["seconds"]) for row in rows])
    for row in rows:
        row["off"] = row["seconds"] / (start + slope * row["weights"]) - 1
    worst = max(abs(row["off"]) for row in rows)
    print(f"{start:.2f} s and {1e9 * slope:.1f} s for a billion weights; at most {100 * worst:.1f} % off (10 asked)")
    return {"rows": rows, "start": start, "seconds_per_weight": slope, "threads": os.environ.get("OMP_NUM_THREADS")}, (
        worst > MOST_OFF
    )


def line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Return a and b of y = a + b x, near to the points (x, y) in proportion to y: least squares of what each is off by
    of its own y, so that the smallest counts as much as the largest."""
    one, x, xx, y, xy = (
        sum(value / own_y**2 for value, own_y in values)
        for values in zip(*([(1, b), (a, b), (a * a, b), (b, b), (a * b, b)] for a, b in points), strict=True)
    )
    slope = (one * xy - x * y) / (one * xx - x * x)
    return (y - slope * x) / one, slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iter", type=int, default=None)
    parser.add_argument("--calibration", action="store_true")
    parser.add_argument("--size", choices=CONFIGS, help="whose shapes (default: 7B, with calibration 0.5B)")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8], help="the depths, the lowest first")
    parser.add_argument("--format", nargs="+", default=["gptq", "dense"])
    parser.add_argument("--time", action="store_true", help="time against weights, and no memory")
    parser.add_argument("--sizes", default=",".join(STRAIGHT), help="of --time")
    parser.add_argument("--repeats", type=int, default=3, help="of --time; the quickest counts")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--dir", help="where the temporary checkpoints go")
    parser.add_argument("--generate", nargs=3, metavar=("DIR", "SIZE", "LAYERS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.generate:
        directory, size, layers = arguments.generate
        return generate(Path(directory), size, int(layers))
    arguments.size = arguments.size or ("0.5B" if arguments.calibration else "7B")
    text = TEXT if arguments.calibration else ["--calibration", "none"]
    text += ["--iter", str(arguments.iter)] if arguments.iter else []
    with tempfile.TemporaryDirectory(prefix="qinit-memory-", dir=arguments.dir) as place:
        # Compiling the kernel takes 200 MB, once.
        peak_of([*QINIT, "eqft", "--out", f"{place}/out", "--quiet", *text])
    result, failed = straight(arguments) if arguments.time else depths(arguments, text)
    if arguments.json:
        from common import conclude  # it imports torch, which the measured processes do on their own

        conclude("straight" if arguments.time else "memory", result, arguments.json)
    sys.exit(failed)


if __name__ == "__main__":
    main()
