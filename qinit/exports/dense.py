"""Dense: Q as ordinary weights in the type of the rest of the model, with the adapter beside it as PEFT loads it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import torch

from qinit.adapters import ADAPTER_DIRECTORY, WEIGHTS_STEM, write_config
from qinit.exports.base import Export
from qinit.exports.finished import FinishedRun
from qinit.files.tensors import TensorSpec
from qinit.files.writer import SafetensorsWriter

CPU = torch.device("cpu")


class DenseExport(Export):
    name = "dense"
    reader = "transformers"

    def loses(self, run: FinishedRun) -> str | None:
        dtype = _dtype(run)
        if not run.weights.packed() or dtype in (torch.float16, torch.float32):
            return None
        return f"packed weights have float16's digits, and become {str(dtype).removeprefix('torch.')}, as the rest is"

    def nbytes(self, run: FinishedRun) -> int:
        return sum(spec.nbytes for spec in _specs(run)[0].values()) + run.adapter_bytes

    def write(self, run: FinishedRun, directory: Path, out: Path) -> None:
        specs, unpacked = _specs(run)
        writer = SafetensorsWriter(directory, specs.values())
        for name in specs.keys() & run.checkpoint.tensors.keys():
            writer.write_chunks(name, run.checkpoint.tensors[name].chunks())
        for parameter, name in unpacked.items():
            value = run.weights.read(parameter, CPU)
            assert value is not None
            writer.write(name, value.to(specs[name].dtype))
        writer.close()
        config = {key: value for key, value in run.checkpoint.config.items() if key != "quantization_config"}
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for relative in run.checkpoint.companions():
            (directory / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run.directory / relative, directory / relative)
        adapter = directory / ADAPTER_DIRECTORY
        adapter.mkdir()
        shutil.copyfile(run.adapter_directory / f"{WEIGHTS_STEM}.safetensors", adapter / f"{WEIGHTS_STEM}.safetensors")
        write_config(adapter, {**run.adapter.settings, "base_model_name_or_path": str(out)})


def _specs(run: FinishedRun) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """Return what is written, by name, and each packed layer's name there, by the model's for it."""
    modules = {f"{module.name}.weight": module for module in run.architecture.linear}
    parameters: dict[str, str] = {}
    unpacked: dict[str, str] = {}
    for parameter, parts in run.weights.packed().items():
        for part, tensor in parts.items():
            parameters[tensor.name] = parameter
            unpacked[parameter] = tensor.name.removesuffix(part) + "weight"
    specs: dict[str, TensorSpec] = {}
    for name, tensor in run.checkpoint.tensors.items():
        if name not in parameters:
            specs[name] = TensorSpec(name, tensor.dtype, tensor.shape)
            continue
        module, weight = modules[parameters[name]], unpacked[parameters[name]]
        shape = (module.out_features, module.in_features)
        specs[weight] = TensorSpec(weight, _dtype(run), shape[::-1] if module.transposed else shape)
    return specs, unpacked


def _dtype(run: FinishedRun) -> torch.dtype:
    """Return the type that most of the model's other numbers have."""
    counts: Counter[torch.dtype] = Counter()
    packed = {part.name for parts in run.weights.packed().values() for part in parts.values()}
    for name, tensor in run.checkpoint.tensors.items():
        if name not in packed and tensor.dtype.is_floating_point:
            counts[tensor.dtype] += tensor.numel
    return counts.most_common(1)[0][0] if counts else torch.float16
