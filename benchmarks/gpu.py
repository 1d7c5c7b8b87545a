"""What qinit does on a GPU: does it compute the same as on the CPU, how long an 8B model takes, and where that goes.

    python benchmarks/gpu.py [--device cuda] [--parts card,parity,...] [--tiny] [--json FILE]

The model has Llama-3.1-8B's shapes, 4 of its 32 blocks, and random weights, which are drawn on the device and written
to a temporary directory (4 GB). The time of a whole run is that of 4 blocks, and 28 times what these take more than 2,
halved. The parts come in the order of what they are worth, and each is printed and kept as soon as it is there.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import conclude
from safetensors.torch import load_file, save_file

from qinit.clock import Clock
from qinit.machine import CPU
from qinit.planner.make import make_plan
from qinit.recipe import make_recipe
from qinit.runner.run import run
from qinit.solver.methods import get_method
from qinit.solver.solve import solve
from qinit.solver.spec import LayerSpec, Solution
from qinit.solver.statistics import Statistics
from qinit.text.self_text import write_text

BLOCKS = 32  # of the whole model
RECIPE = {"bits": 2, "rank": 16, "group_size": 64, "check": False, "polish": 0}
LLAMA_8B = {
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
    **{"num_hidden_layers": 4, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0},
}
TINY = {
    **{"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"num_hidden_layers": 4, "vocab_size": 512, "max_position_embeddings": 512},
}


@dataclass(frozen=True)
class Setting:
    """What is measured, and where."""

    device: torch.device
    model: dict[str, Any]
    samples: int
    length: int
    place: Path

    @property
    def source(self) -> Path:
        return self.place / "model"


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, call: Callable[[], Any], times: int = 1) -> float:
    """Return the seconds of one call, of so many after a first one."""
    call()
    wait(device)
    started = time.perf_counter()
    for _ in range(times):
        call()
    wait(device)
    return (time.perf_counter() - started) / times


def peak(device: torch.device) -> float | None:
    """Return the peak of the device's memory since the last call, in GB."""
    if device.type != "cuda":
        return None
    found = torch.cuda.max_memory_allocated(device) / 1e9
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return found


def make_model(directory: Path, config: dict[str, Any], device: torch.device) -> None:
    """Write a random Llama, drawn on the device in the scale that trained ones have."""
    directory.mkdir(parents=True)
    width, inner, vocabulary = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    keys = width // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens": (vocabulary, width), "lm_head": (vocabulary, width)}
    norms = ["model.norm"]
    for block in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{block}."
        for name, outputs in (("q", width), ("k", keys), ("v", keys), ("o", width)):
            shapes[f"{prefix}self_attn.{name}_proj"] = (outputs, width)
        for name, shape in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
            shapes[f"{prefix}mlp.{name}_proj"] = shape
        norms += [prefix + "input_layernorm", prefix + "post_attention_layernorm"]
    generator = torch.Generator(device).manual_seed(0)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=generator, device=device, dtype=torch.float32) * 0.02
        shards.setdefault(shard_of(name), {})[f"{name}.weight"] = drawn.to(torch.bfloat16).cpu()
    for name in norms:
        shards[shard_of(name)][f"{name}.weight"] = torch.ones(width, dtype=torch.bfloat16)
    for file, tensors in shards.items():
        save_file(tensors, directory / file, {"format": "pt"})
    write_index(directory, {name: file for file, tensors in shards.items() for name in tensors})
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps({**kind, **ids, **config}))


def shard_of(name: str) -> str:
    """Every block has a file of its own, so that a model of fewer blocks is a directory of (hard) links."""
    return f"block-{name.split('.')[2]}.safetensors" if name.startswith("model.layers.") else "ends.safetensors"


def write_index(directory: Path, files: dict[str, str]) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def shortened(source: Path, blocks: int) -> Path:
    """Return the same model with its first blocks alone."""
    directory = source.with_name(f"{source.name}-{blocks}")
    directory.mkdir()
    config = json.loads((source / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": blocks}))
    files = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    kept = {*(f"block-{i}.safetensors" for i in range(blocks)), "ends.safetensors"}
    write_index(directory, {name: file for name, file in files.items() if file in kept})
    for file in kept:
        (directory / file).hardlink_to(source / file)
    return directory


def card(setting: Setting) -> dict[str, Any]:
    """The machine: matrix products a second, and bytes."""
    device, size = setting.device, 8192 if setting.device.type == "cuda" else 512
    found: dict[str, Any] = {"name": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        seconds = timed(device, lambda one=one, other=other: one @ other, 3)
        found[f"TFLOP/s {name}"] = 2 * size**3 / seconds / 1e12
    one = torch.ones(64, device=device)
    found["us of a small call"] = timed(device, lambda: [one * 0.5 for _ in range(1000)]) * 1e3
    block = torch.empty(1 << (30 if device.type == "cuda" else 24), dtype=torch.uint8, device=device)
    found["GB/s copied"] = 2 * block.numel() / timed(device, block.clone, 3) / 1e9
    if device.type == "cuda":
        found["memory, GB"] = torch.cuda.get_device_properties(device).total_memory / 1e9
    return found


def parity(setting: Setting) -> dict[str, Any]:
    """The same layer, from the same statistics, and the same tiny model, on the CPU and on the device: the share of
    codes that differ, and by how much of itself the error does. A code that falls to the other side by a last bit is
    fed back to those after it, so that codes part and the error must not."""
    found = {"a layer": layer_parity(setting.device)}
    source = setting.place / "tiny"
    make_model(source, TINY, torch.device("cpu"))
    samples = {"calibration": "random", "calibration_samples": 16, "calibration_length": 64}
    for name, options in (
        ("without data", {"calibration": "none"}),
        ("calibrated", samples),
        ("polished", {**samples, "polish": 4}),
    ):
        reports, codes = [], []
        for device in ("cpu", str(setting.device)):
            out = setting.place / f"parity-{name.replace(' ', '-')}-{len(reports)}"
            recipe = make_recipe(**{**RECIPE, "model": str(source), "device": device, **options})
            *_, last = run(make_plan(recipe, source, "tiny"), out)
            reports.append([layer.output_error or layer.error for layer in last.report.layers])
            tensors = load_file(out / "model.safetensors")
            codes.append(torch.cat([t.flatten() for n, t in sorted(tensors.items()) if n.endswith("qweight")]))
        different = codes[0] ^ codes[1]
        fields = sum(int(((different >> shift) & 3).ne(0).sum()) for shift in range(0, 32, 2))
        found[name] = {
            "codes that differ": fields / (16 * len(codes[0])),
            "largest difference of a layer's error": max(abs(a / b - 1) for a, b in zip(*reports, strict=True)),
            "difference of the mean error": abs(sum(reports[0]) / sum(reports[1]) - 1),
        }
    return found


def layer_parity(device: torch.device) -> dict[str, Any]:
    """Return the largest differences over widths, with data and without."""
    weight, known = layer_of()
    there = Statistics(known.hessian.to(device), known.magnitude.to(device), known.tokens, known.drift.to(device))
    return largest(
        apart(*(solve(weight.to(place), spec_of(bits, given), 0, given) for place, given in pair))
        for bits in (2, 3, 4)
        for pair in (((CPU, None), (device, None)), ((CPU, known), (device, there)))
    )


def last_bits(setting: Setting) -> dict[str, Any]:
    """What one part in ten million of the statistics moves, on the CPU alone: to hold the layer of `parity` against."""
    weight, known = layer_of()
    found = {}
    for bits in (2, 3, 4):
        first, others = solve(weight, spec_of(bits, known), 0, known), []
        for seed in range(3):
            noise = 1 + 1e-7 * torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(seed))
            other = replace(known, hessian=known.hessian * noise[:, None] * noise)
            others.append(apart(first, solve(weight, spec_of(bits, other), 0, other)))
        found[f"{bits} bits"] = largest(others)
    return found


def layer_of() -> tuple[torch.Tensor, Statistics]:
    shape = 512, 768
    weight = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return weight, make_statistics(shape, CPU)


def spec_of(bits: int, statistics: Statistics | None) -> LayerSpec:
    method = get_method("eqft", calibrated=statistics is not None)
    return LayerSpec(method, bits, 64, 16, method.iterations)


def apart(one: Solution, other: Solution) -> dict[str, float]:
    a, b = (solution.output_error or solution.error for solution in (one, other))
    codes = (solution.quantized.codes.cpu() for solution in (one, other))
    return {"codes that differ": float(torch.ne(*codes).float().mean()), "difference of the error": abs(a / b - 1)}


def largest(found: Iterable[dict[str, float]]) -> dict[str, float]:
    rows = list(found)
    return {name: max(row[name] for row in rows) for name in rows[0]}


def layers(setting: Setting) -> dict[str, Any]:
    """Seconds to solve one layer of each shape without data, and all of the whole model."""
    recipe = make_recipe(**RECIPE, model=str(setting.source), calibration="none", device=str(setting.device))
    plan = make_plan(recipe, setting.source, "model")
    found: dict[str, Any] = {}
    whole = 0.0
    seen: dict[tuple[int, ...], float] = {}
    for layer in plan.quantized:
        shape = layer.target.tensor.shape
        if shape not in seen:
            weight = layer.target.tensor.read().to(setting.device, torch.float32)
            spec = plan.layer_spec(layer)
            seen[shape] = timed(setting.device, lambda weight=weight, spec=spec: solve(weight, spec, 0, None))
            found[" x ".join(map(str, shape))] = seen[shape]
        whole += seen[shape] * BLOCKS / setting.model["num_hidden_layers"]
    return {**found, f"{BLOCKS} blocks": whole, "peak, GB": peak(setting.device)}


def calibrated_layers(setting: Setting) -> dict[str, Any]:
    """Seconds to solve one layer of each shape under statistics, and all of the whole model; smallest first."""
    recipe = make_recipe(**RECIPE, model=str(setting.source), calibration="random", device=str(setting.device))
    plan = make_plan(recipe, setting.source, "model")
    found: dict[str, Any] = {}
    counts = Counter(layer.target.tensor.shape for layer in plan.quantized)
    first = {layer.target.tensor.shape: layer for layer in reversed(plan.quantized)}
    for shape, layer in sorted(first.items(), key=lambda pair: math.prod(pair[0])):
        weight, spec = layer.target.tensor.read().to(setting.device, torch.float32), plan.layer_spec(layer)
        statistics = make_statistics(shape, setting.device)
        found[" x ".join(map(str, shape))] = timed(
            setting.device, lambda weight=weight, spec=spec, known=statistics: solve(weight, spec, 0, known)
        )
    whole = sum(found[" x ".join(map(str, shape))] * count for shape, count in counts.items())
    return {**found, f"{BLOCKS} blocks": whole * BLOCKS / setting.model["num_hidden_layers"]}


def make_statistics(shape: tuple[int, ...], device: torch.device) -> Statistics:
    """Draw statistics of inputs that go together, and are of different sizes, as those of real layers are."""
    generator = torch.Generator(device).manual_seed(0)
    outputs, inputs = shape
    tokens = 2 * inputs
    mixed = torch.randn(tokens, inputs // 8, generator=generator, device=device)
    mixed = mixed @ torch.randn(inputs // 8, inputs, generator=generator, device=device) * (8 / inputs) ** 0.5
    x = mixed + 0.3 * torch.randn(tokens, inputs, generator=generator, device=device)
    x *= torch.rand(inputs, generator=generator, device=device).add_(0.1)
    gap = 0.01 * torch.randn(tokens, outputs, generator=generator, device=device)
    return Statistics(x.T @ x / tokens, x.abs().mean(0), tokens, gap.T @ x / tokens)


def without_data(setting: Setting) -> dict[str, Any]:
    return whole_run(setting, {"calibration": "none"})


def calibrated(setting: Setting) -> dict[str, Any]:
    samples = {"calibration_samples": setting.samples, "calibration_length": setting.length}
    found = whole_run(setting, {"calibration": "random", **samples})
    config, tokens = setting.model, setting.samples * setting.length
    keys = config["hidden_size"] * config["num_key_value_heads"] // config["num_attention_heads"]
    block = config["hidden_size"] * (2 * config["hidden_size"] + 2 * keys + 3 * config["intermediate_size"])
    found["TFLOP/s forward, of a block's matrix products"] = (
        2.7 * 2 * block * tokens * config["num_hidden_layers"] / max(found["split"].get("forward", 0.0), 1e-9) / 1e12
    )
    return found


def whole_run(setting: Setting, options: dict[str, Any]) -> dict[str, Any]:
    """Quantize from disk to disk: the seconds of half of the blocks, of all, and of the whole model from these."""
    split: dict[str, float] = {}

    def quantize(source: Path) -> None:
        out = setting.place / f"run-{options['calibration']}-{source.name}"
        recipe = make_recipe(**{**RECIPE, "model": str(source), "device": str(setting.device), **options})
        with Clock() as clock:
            for _ in run(make_plan(recipe, source, "model"), out):
                pass
            wait(setting.device)
        split.update({name: round(value, 3) for name, value in clock.split().items()})
        shutil.rmtree(out)

    return {**two_sizes(setting, quantize), "split": split}


def own_text(setting: Setting) -> dict[str, Any]:
    """Seconds for the model to write the text, loading included."""
    options = {"samples": setting.samples, "length": setting.length, "seed": 0, "device": setting.device}
    return two_sizes(setting, lambda source: write_text(source, 1, **options))


def two_sizes(setting: Setting, do: Callable[[Path], Any]) -> dict[str, Any]:
    """Return the seconds for a model of half of the blocks (the second time, as the first loads and compiles what is
    needed), for one of all, and from these two for the whole model; and the peak of the device's memory."""
    blocks = setting.model["num_hidden_layers"]
    half = setting.place / f"model-{blocks // 2}"
    half = half if half.exists() else shortened(setting.source, blocks // 2)
    seconds = []
    for source in (half, half, setting.source):
        gc.collect()
        peak(setting.device)
        started = time.perf_counter()
        do(source)
        seconds.append(time.perf_counter() - started)
    each = (seconds[2] - seconds[1]) / (blocks - blocks // 2)
    return {
        "the first time beside the second": seconds[0] - seconds[1],
        **{f"{blocks // 2} blocks": seconds[1], f"{blocks} blocks": seconds[2], "a block more": each},
        **{f"{BLOCKS} blocks": seconds[2] + each * (BLOCKS - blocks), "peak, GB": peak(setting.device)},
    }


PARTS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "card": card,
    "parity": parity,
    "layers": layers,
    "calibrated layers": calibrated_layers,
    "without data": without_data,
    "calibrated": calibrated,
    "own text": own_text,
    "last bits": last_bits,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--tiny", action="store_true", help="a rehearsal with tiny shapes")
    parser.add_argument("--dir", type=Path, default=None, help="where there is room for 8 GB")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures to this file")
    options = parser.parse_args()
    device = torch.device(options.device)
    model, samples, length = (TINY, 8, 64) if options.tiny else (LLAMA_8B, 128, 512)
    result: dict[str, Any] = {"model": "tiny" if options.tiny else "Llama-3.1-8B's shapes", "device": device.type}
    with tempfile.TemporaryDirectory(dir=options.dir) as place:
        setting = Setting(device, model, samples, length, Path(place))
        started = time.perf_counter()
        make_model(setting.source, model, device)
        print(f"the model: {time.perf_counter() - started:.1f} s", flush=True)
        for name in options.parts.split(","):
            started = time.perf_counter()
            try:
                result[name] = PARTS[name](setting)
            except Exception as error:  # the other parts are worth as much
                result[name] = {"failed": f"{type(error).__name__}: {error}"}
                if options.tiny:
                    raise
            print(f"{name}, {time.perf_counter() - started:.1f} s: {json.dumps(result[name])}", flush=True)
            if options.json is not None:
                options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    conclude("gpu", result, options.json, seeds=[0])


if __name__ == "__main__":
    main()
