"""Whether PEFT trains a family on a base of some form: tried, a step on a model of one small layer in that form."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from qinit.errors import CheckpointError
from qinit.families.bases import pack
from qinit.families.table import FAMILIES

WIDTH, TOKENS, RANK = 128, 8, 4
# What names modules of the real model, so that the small one's would not be packed.
OTHER_NAMES = ("modules_in_block_to_quantize", "block_name_to_quantize", "llm_int8_skip_modules", "dynamic")
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def not_trained(method: str, quantization: Mapping[str, Any] | None) -> str | None:
    """Return why PEFT does not train a family on a base with this quantization_config (None: one that is not
    quantized), in its own words, or None where it does. Raises CheckpointError where no base of that form runs here."""
    return _not_trained(method, None if quantization is None else json.dumps(quantization, sort_keys=True))


@lru_cache
def _not_trained(method: str, quantization: str | None) -> str | None:
    _require_runs(quantization)
    with torch.random.fork_rng(devices=[]), quietly():
        try:
            trained = _step(_adapted(method, _form(quantization)), FAMILIES[method].batch(1))
        except Exception as error:  # PEFT and its layers can refuse in any way
            return reason_of(error)
    return None if trained else "nothing that would be trained gets a gradient"


@lru_cache
def _require_runs(quantization: str | None) -> None:
    """Raise CheckpointError where the small model itself does not run: then nothing is known of what PEFT does."""
    with torch.random.fork_rng(devices=[]), quietly():
        try:
            _step(_small(_form(quantization)))
        except CheckpointError:
            raise
        except Exception as error:  # kernels can fail in any way
            raise CheckpointError(
                f"a base in this form does not run here, so that it cannot be tried: {reason_of(error)}"
            ) from error


def _form(quantization: str | None) -> dict[str, Any] | None:
    return None if quantization is None else json.loads(quantization)


@contextmanager
def quietly() -> Iterator[None]:
    """Keep PEFT's and transformers' warnings back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def reason_of(error: Exception) -> str:
    """Return an error's kind and its words, on one line and without a full stop."""
    words = " ".join(str(error).split())[:300].rstrip(".")
    return f"{type(error).__name__}{f': {words}' if words else ''}"


def _small(quantization: dict[str, Any] | None) -> Any:
    """Build a Llama of one layer, in bfloat16, that is packed as a base with this quantization_config is."""
    import transformers

    group = int((quantization or {}).get("group_size") or 0)
    width = max(WIDTH, group)
    sizes: dict[str, Any] = {
        **{"vocab_size": 64, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False, "dtype": torch.bfloat16},
    }
    config = transformers.LlamaConfig(**sizes)
    model: Any = transformers.LlamaForCausalLM(config)
    model = model.to(torch.bfloat16)
    if quantization is not None:
        config.quantization_config = {key: value for key, value in quantization.items() if key not in OTHER_NAMES}
        quantizer = pack(model)
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and parameter.is_meta:
                    module._parameters[name] = _zeros(parameter)
        quantizer.postprocess_model(model)
        model.hf_device_map = {"": torch.device("cpu")}  # as `from_pretrained` leaves it, a device and no word
    return model


def _zeros(parameter: Any) -> Any:
    """Return zeros of a parameter's kind, packed where the kind packs."""
    if type(parameter) is nn.Parameter:
        return nn.Parameter(torch.zeros(parameter.shape, dtype=parameter.dtype), requires_grad=False)
    options = {key: value for key, value in parameter.__dict__.items() if not key.startswith("_")}
    options |= {"requires_grad": False, **({"bnb_quantized": False} if "bnb_quantized" in options else {})}
    return type(parameter)(torch.zeros(parameter.shape, dtype=torch.bfloat16), **options).to("cpu")


def _adapted(method: str, quantization: dict[str, Any] | None) -> Any:
    import peft

    family, model = FAMILIES[method], _small(quantization)
    options: dict[str, Any] = {**family.defaults, **family.of_base(model.config), "task_type": "CAUSAL_LM"}
    options |= {"target_modules": LINEAR} if family.adapts else {}
    options |= {"feedforward_modules": LINEAR[-1:]} if family.feed_forward else {}
    options |= {family.rank: RANK} if family.rank else {}
    with tempfile.TemporaryDirectory() as place:
        if family.needs is not None:  # adapters that are there
            expert = peft.get_peft_model(_small(quantization), peft.LoraConfig(r=RANK, target_modules=LINEAR))
            expert.save_pretrained(place, save_embedding_layers=False)
            options[family.needs[0]] = {"0": place, "1": place}
        return peft.get_peft_model(model, getattr(peft, family.config)(**options))


def _step(model: Any, more: Mapping[str, torch.Tensor] | None = None) -> bool:
    """Carry out a training step, as it is or else as trainers do it, with autocast; returns whether something that is
    to be trained got a gradient."""
    tokens = torch.arange(TOKENS)[None]
    model.train()
    for last, context in ((False, nullcontext()), (True, torch.autocast("cpu", torch.bfloat16))):
        try:
            with context:
                found = model(input_ids=tokens, labels=tokens, **(more or {}))
            found.loss.backward()
            break
        except Exception:
            if last:
                raise
    return any(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
