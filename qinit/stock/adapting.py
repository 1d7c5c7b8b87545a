"""What PEFT makes of an adapter that is on disk: tried with its own code on the skeleton without weights."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from qinit.adapters.base import PREFIX
from qinit.stock.skeleton import Skeleton

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class Refused(Exception):  # noqa: N818
    """PEFT raises an error for the adapter; the message is its own."""


@dataclass(frozen=True)
class Adapted:
    """What PEFT has once it has loaded the adapter: the tensors that it trains, with their shapes, by the names that it
    saves them under; `whole` are those among them that are parameters of the model's own, each with its name there.
    `lost` are tensors of the file that arrive nowhere. `on_parameters`: it has put adapters on bare parameters."""

    tensors: Mapping[str, tuple[int, ...]]
    whole: Mapping[str, str]
    lost: frozenset[str]
    on_parameters: bool


def adapt(skeleton: Skeleton, config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> Adapted:
    """Load an adapter of this adapter_config.json and these tensors as `PeftModel.from_pretrained` does. Raises
    Refused."""
    return _adapt(skeleton, json.dumps(config), tuple(tensors.items()))


@lru_cache(maxsize=128)
def _adapt(skeleton: Skeleton, config: str, tensors: Shapes) -> Adapted:
    from peft import PeftConfig, PeftModel
    from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
    from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict

    model = skeleton.build()
    own = {f"{PREFIX}{name}": name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    settings = json.loads(config)
    try:
        with warnings.catch_warnings(), without_packers():
            warnings.simplefilter("ignore")
            lora: Any = PeftConfig.from_peft_type(**settings)
            lora.inference_mode = False  # as for training
            kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(settings.get("task_type"), PeftModel)
            adapted = kind(model, lora, "default", low_cpu_mem_usage=True)
            saved = get_peft_model_state_dict(adapted, save_embedding_layers=False)
            shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
            file = {name: torch.empty(shape, device="meta") for name, shape in tensors}
            # What it saves itself takes precedence: other shapes would end the loading, and are seen from `shapes`.
            loaded: Any = set_peft_model_state_dict(adapted, {**file, **saved}, low_cpu_mem_usage=True)
    except Exception as error:  # PEFT and the model can refuse in any way
        first = re.split(r"(?<=[.!?])\s", " ".join(str(error).split()))[0]  # what follows may be sets in any order
        raise Refused(first[:300].rstrip(".")) from error
    whole = {name: own[name] for name in shapes if name in own}
    strays = {name.replace(".default", "") for name in (*loaded.unexpected_keys, *loaded.missing_keys)}
    return Adapted(shapes, whole, frozenset(strays & file.keys()), bool(getattr(lora, "target_parameters", None)))


@contextmanager
def without_packers() -> Iterator[None]:
    """Keep PEFT from importing what packs layers, seconds each, to see whether a layer is one of theirs: none is."""
    from peft.tuners.lora import model

    def nothing(*_: Any, **__: Any) -> None:
        return None

    others = [name for name in vars(model) if name.startswith(("dispatch_", "is_bnb")) and name != "dispatch_default"]
    before = {name: getattr(model, name) for name in others}
    vars(model).update(dict.fromkeys(others, nothing))
    try:
        yield
    finally:
        vars(model).update(before)
