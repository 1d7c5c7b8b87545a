"""MLX: base and adapter as mlx-lm reads them, safetensors by transformers' names."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qinit.adapters import CONFIG_NAME
from qinit.exports.base import Export
from qinit.exports.finished import FinishedRun
from qinit.exports.lora import Factors, factors, no_factors
from qinit.exports.mlx.layers import PARTS, biases_of, encode, group_size
from qinit.exports.mlx.reading import RereadMlx
from qinit.exports.reread import Reread
from qinit.files.tensors import TensorSpec
from qinit.files.writer import SafetensorsWriter
from qinit.report.report import Report
from qinit.source.targets import LinearModule

CPU = torch.device("cpu")
CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")  # loaded and compared
ADAPTER = "adapters"
IN_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")


class MlxExport(Export[list[TensorSpec]]):
    name = "mlx"
    reader = "mlx-lm"
    library = "mlx"

    def cannot_hold(self, run: FinishedRun) -> str | None:
        kind = run.architecture.class_name
        if kind not in CLASSES:
            return f"{kind} is not written; {', '.join(CLASSES)} are"
        beyond = (name for name in run.adapter.parts if not IN_BLOCK.fullmatch(name))
        if (name := next(beyond, None)) is not None:
            return f"the adapter is on {name}, and mlx-lm counts an adapter's layers within the blocks"
        return no_factors(run)

    def load(self, report: Report) -> str:
        line = f"mlx_lm.generate --model . --adapter-path {ADAPTER} --prompt 'Once upon a time'"
        return f"With `pip install mlx-lm`:\n\n```\n{line}\n```\n"

    def loses(self, run: FinishedRun) -> str | None:
        rounded = groups = 0
        worst = 0.0
        for module in run.architecture.linear:
            grid = run.weights.grid(module) if _width_of(run, module) is not None else None
            if grid is not None:
                found = biases_of(grid)
                rounded, groups = rounded + found.rounded, groups + grid.scales.numel()
                worst = max(worst, found.worst)
        if not rounded:
            return None
        return (
            f"the biases -s z of {rounded} of {groups} groups are rounded to float16, by {100 * worst:.2g} % of a step "
            "of the grid at most"
        )

    def reread(self, directory: Path, report: Report, *, trust_remote_code: bool) -> Reread:
        return RereadMlx(directory, directory / ADAPTER)

    def layout(self, run: FinishedRun) -> list[TensorSpec]:
        return list(_specs(run))

    def nbytes(self, run: FinishedRun, layout: list[TensorSpec]) -> int:
        return sum(spec.nbytes for spec in layout) + run.adapter_bytes

    def write(self, run: FinishedRun, layout: list[TensorSpec], directory: Path, out: Path) -> None:
        writer = SafetensorsWriter(directory, layout)
        modules = {f"{module.name}.weight": module for module in run.architecture.linear}
        for parameter in _parameters(run):
            module = modules.get(parameter)
            grid = run.weights.grid(module) if module is not None and _width_of(run, module) is not None else None
            if grid is not None and module is not None:
                parts = run.weights.packed_parts(module)
                assert parts is not None
                for part, value in zip(PARTS, encode(grid, parts["qweight"].read()), strict=True):
                    writer.write(f"{module.name}.{part}", value)
                continue
            stored = run.weights.read(parameter, CPU)
            assert stored is not None
            writer.write(parameter, stored.to(_dtype(run, parameter)))
        writer.close()
        text = json.dumps(_config(run), indent=2)
        (directory / "config.json").write_text(text + "\n", encoding="utf-8")
        for relative in run.checkpoint.companions():
            (directory / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run.directory / relative, directory / relative)
        if run.adapter.parts:
            _write_adapter(run, directory / ADAPTER)


def _parameters(run: FinishedRun) -> list[str]:
    assert run.architecture.naming is not None
    return [name for name in run.architecture.naming.model.state_dict() if run.weights.has(name)]


def _width_of(run: FinishedRun, module: LinearModule) -> tuple[int, int] | None:
    """Return bits and MLX's group size of a packed layer, None for one that is not packed or that MLX does not hold."""
    width = run.weights.width(module)
    size = None if width is None else group_size(*width, module.in_features)
    return None if width is None or size is None else (width[0], size)


def _specs(run: FinishedRun) -> Iterator[TensorSpec]:
    """Yield what is written, in the model's order."""
    assert run.architecture.naming is not None
    shapes = {name: tuple(value.shape) for name, value in run.architecture.naming.model.state_dict().items()}
    modules = {f"{module.name}.weight": module for module in run.architecture.linear}
    for parameter in _parameters(run):
        module = modules.get(parameter)
        width = None if module is None else _width_of(run, module)
        if module is None or width is None:
            yield TensorSpec(parameter, _dtype(run, parameter), shapes[parameter])
            continue
        (rows, columns), (bits, size) = shapes[parameter], width
        words, halves = columns * bits // 32, (rows, columns // size)
        yield TensorSpec(f"{module.name}.weight", torch.uint32, (rows, words))
        yield TensorSpec(f"{module.name}.scales", torch.float16, halves)
        yield TensorSpec(f"{module.name}.biases", torch.float16, halves)


def _dtype(run: FinishedRun, parameter: str) -> torch.dtype:
    """Return the type of what is not packed: as it is stored. Where layers are packed bfloat16 becomes float16, which
    their scales have: MLX would compute in float32 with both. A layer that MLX has no groups for is float16, as the
    stock kernel rounds it to."""
    stored, fmt = run.weights.names.find(parameter), run.weights.format
    if stored is None:
        return torch.float16
    return torch.float16 if stored.dtype == torch.bfloat16 and fmt is not None and fmt.parts else stored.dtype


def _config(run: FinishedRun) -> dict[str, Any]:
    """Return config.json: the run's, with the widths as mlx-lm has them, and where transformers 5 puts the rotary
    embedding's numbers together, these where mlx-lm looks for them too."""
    config = {key: value for key, value in run.checkpoint.config.items() if key != "quantization_config"}
    rope = dict(config.get("rope_parameters") or {})
    if rope:
        config.setdefault("rope_theta", rope.pop("rope_theta", None))
        if rope.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", rope)
    config["tie_word_embeddings"] = not run.weights.has("lm_head.weight")
    widths = {}
    for module in run.architecture.linear:
        if (width := _width_of(run, module)) is not None:
            widths[module.name] = width
    if widths:
        most = Counter(widths.values()).most_common(1)[0][0]
        others = {name: _width(*each) for name, each in widths.items() if each != most}
        config["quantization"] = {**_width(*most), **others}
    return config


def _width(bits: int, size: int) -> dict[str, int]:
    return {"group_size": size, "bits": bits}


def _write_adapter(run: FinishedRun, directory: Path) -> None:
    """Write the adapter in mlx-lm's layout: one rank, to which smaller ones are filled up with zeros, and one scale. It
    stands on the same layers of all blocks from the first that has one, neutral where the run has none."""
    directory.mkdir()
    found = factors(run)
    rank, scale = max(each.rank for each in found), Counter(each.scale for each in found).most_common(1)[0][0]
    places = [IN_BLOCK.fullmatch(each.module.name) for each in found]
    first = min(int(place[1]) for place in places if place)
    blocks = run.checkpoint.config["num_hidden_layers"]
    specs = [spec for each in found for spec in _factor_specs(each.module, rank)]
    writer = SafetensorsWriter(directory, specs, stem="adapters")
    for each in found:
        _write_factors(writer, each, rank, scale)
    writer.close()
    config = {
        "fine_tune_type": "lora",
        "num_layers": blocks - first,
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": 0.0,
            "keys": sorted({place[2] for place in places if place}),
        },
    }
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _factor_specs(module: LinearModule, rank: int) -> list[TensorSpec]:
    return [
        TensorSpec(f"{module.name}.lora_a", torch.float32, (module.in_features, rank)),
        TensorSpec(f"{module.name}.lora_b", torch.float32, (rank, module.out_features)),
    ]


def _write_factors(writer: SafetensorsWriter, each: Factors, rank: int, scale: float) -> None:
    a, b = each.read(scale)
    missing = rank - each.rank
    writer.write(f"{each.module.name}.lora_a", torch.nn.functional.pad(a.T, (0, missing)))
    writer.write(f"{each.module.name}.lora_b", torch.nn.functional.pad(b.T, (0, 0, 0, missing)))
