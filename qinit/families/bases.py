"""A base as the stock loader has it, without its weights: each tensor is one zero, seen in the tensor's shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qinit.errors import CheckpointError
from qinit.formats import format_of
from qinit.requirements import pip_command
from qinit.source.checkpoint import Checkpoint
from qinit.source.skeleton import build_model
from qinit.source.targets import Architecture


def hollow_base(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """Return the model that `from_pretrained` makes of a base, its layers packed where it packs them, on the CPU: PEFT
    asks for the types, shapes and places of weights. Memory: 8 bytes a tensor. Raises CheckpointError where a package
    that packs layers is missing, or the loader refuses the base."""
    model = build_model(checkpoint, include_buffers=True, trust_remote_code=trust_remote_code)
    if checkpoint.config.get("quantization_config") is not None:
        _require_packages(checkpoint)
        pack(model)
    hollow(model)
    return model


def fill_embedding(model: Any, checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Give a hollow base the embedding that its checkpoint has. Raises CheckpointError where it has none as it is."""
    table = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is table)
    stored = architecture.names_in(checkpoint).find(f"{name}.weight")
    if stored is None:
        raise CheckpointError(f"{checkpoint.directory}: no plain tensor for the embedding {name}.weight")
    table.weight = nn.Parameter(stored.read(), requires_grad=False)


def pack(model: Any) -> Any:
    """Put packed layers in the place of linear ones, as the loader does by the model's quantization_config, without
    their values; returns the quantizer. Raises CheckpointError where the loader refuses."""
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        quantizer = AutoHfQuantizer.from_config(model.config.quantization_config, pre_quantized=True)
        quantizer.preprocess_model(model=model, dtype=model.dtype, device_map={"": "cpu"}, checkpoint_files=[])
    except Exception as error:  # a configuration can break its quantizer in any way
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"quantization_config: transformers does not load it ({reason})") from error
    model.hf_quantizer, model.config.quantization_config = quantizer, quantizer.quantization_config
    for width in ("4bit", "8bit"):  # what bitsandbytes tells PEFT
        setattr(model, f"is_loaded_in_{width}", bool(getattr(quantizer.quantization_config, f"load_in_{width}", False)))
    return quantizer


def hollow(model: Any) -> None:
    """Put one zero, seen in its shape, in the place of each parameter and buffer."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    own[name] = made.setdefault(id(tensor), _hollow(tensor))


def _hollow(tensor: torch.Tensor) -> torch.Tensor:
    plain = type(tensor) in (nn.Parameter, torch.Tensor)
    dtype = tensor.dtype if plain else torch.uint8  # what bitsandbytes packs is bytes once it is loaded
    zero = torch.zeros((), dtype=dtype).expand(tensor.shape)
    made = torch.Tensor._make_subclass(type(tensor), zero, False)
    made.__dict__.update(tensor.__dict__)
    return made


def _require_packages(checkpoint: Checkpoint) -> None:
    form = format_of(checkpoint.config)
    if form is not None and (missing := form.missing_packages()):
        raise CheckpointError(
            f"{checkpoint.directory}: packed as {form.title}, and without {' and '.join(missing)} PEFT cannot be asked "
            f"what it does there; {pip_command(missing)}"
        )
