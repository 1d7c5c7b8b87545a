"""The model: an adapter put on a base, and a saved one loaded again."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import AdaLoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.constants import TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING as CHOSEN_BY_PEFT

from qinit.adapters import CONFIG_NAME, WEIGHTS_STEM
from qinit.adapters.trained import read_trained
from qinit.errors import CheckpointError, TargetError
from qinit.evaluate.subject import find_model
from qinit.files.tensors import read_header
from qinit.machine import pick_device
from qinit.snndlft.base import load_for_training
from qinit.snndlft.config import SnnDlftConfig
from qinit.snndlft.layers import layers_of
from qinit.snndlft.method import SpikingAdaLoraConfig, register
from qinit.snndlft.report import SnnReport
from qinit.text.tokens import load_tokenizer

PADS = "a classifier looks for the token that pads: copy the base's tokenizer there"

register()


def adapt(base: Any, config: SnnDlftConfig, task_type: str | None = None, new: Sequence[str] = ()) -> PeftModel:
    """Put SNN-DLFT's adapters on a loaded model, 16-bit or quantized, in place, and return it as a PeftModel.

    `task_type` is PEFT's (CAUSAL_LM, SEQ_CLS, ...); a classifier's head trains too, and so do the modules `new`.
    Without `spiking` these are stock PEFT's AdaLoRA adapters. Raises TargetError for a base without the target modules
    and for ranks that do not fit into them, RecipeError where snntorch is missing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a configuration that the callback completes
        peft_config = _peft_config(base, config, task_type, new)
        try:
            model = get_peft_model(base, peft_config)
        except ValueError as error:
            reason = " ".join(str(error).split())[:300]
            raise TargetError(
                f"target_modules: no adapter can be put on this {type(base).__name__} ({reason})"
            ) from None
    _require_ranks(model, config)
    return model


def _peft_config(base: Any, config: SnnDlftConfig, task_type: str | None, new: Sequence[str]) -> AdaLoraConfig:
    targets: Any = config.target_modules
    if targets is None:
        targets = CHOSEN_BY_PEFT.get(getattr(base.config, "model_type", ""), "all-linear")
    shared = ("target_r", "init_r", "deltaT", "tinit", "tfinal", "beta1", "beta2", "orth_reg_weight")
    values = {name: getattr(config, name) for name in (*shared, "lora_alpha", "lora_dropout")}
    values |= {"task_type": task_type, "target_modules": list(targets) if isinstance(targets, tuple) else targets}
    if new:
        values |= {"modules_to_save": list(new), "exclude_modules": "|".join(map(re.escape, new))}
    values["total_step"] = config.tinit + config.tfinal + config.deltaT  # the callback knows how many there are
    if not config.spiking:
        return AdaLoraConfig(**values)
    return SpikingAdaLoraConfig(**values, time_steps=config.time_steps, decay=config.decay, threshold=config.threshold)


def _require_ranks(model: PeftModel, config: SnnDlftConfig) -> None:
    tuner: Any = model.base_model
    for layer in layers_of(tuner.model, tuner.trainable_adapter_name):
        for name, parts in layer.modules.items():
            inputs, outputs = parts["lora_A"].shape[1], parts["lora_B"].shape[0]
            if config.init_r > min(inputs, outputs):
                raise TargetError(
                    f"init_r: {config.init_r} does not fit into {name}, which is {outputs} x {inputs}; make it "
                    f"{min(inputs, outputs)} at most, or leave the module out with target_modules"
                )


def load(
    directory: str | Path,
    base: Any = None,
    *,
    trainable: bool = False,
    device: str = "cpu",
    dtype: Any = None,
    trust_remote_code: bool = False,
) -> PeftModel:
    """Load a saved adapter, spiking or not, with its base: the same logits as before it was saved. Without `base`, a
    loaded model, it is the one that the adapter names, with the classes of the training; `dtype` as it was trained: on
    a CPU float32, elsewhere the checkpoint's.

    Raises CheckpointError for what is no adapter or does not fit the base, HubError for a base on the Hub that cannot
    be had, RecipeError where snntorch is missing.
    """
    place = Path(directory)
    settings = read_trained(place)
    if base is None:
        found = base_of(place, settings)
        classes = SnnReport.read(place).classes if settings.get("task_type") == "SEQ_CLS" else None
        base, _ = load_for_training(
            found, classes, pick_device(device), dtype=dtype, trust_remote_code=trust_remote_code
        )
        if classes is not None and base.config.pad_token_id is None:  # it finds the last token by what pads
            base.config.pad_token_id = load_tokenizer(place, trust_remote_code, PADS).pad_token_id
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*rank_pattern keys.*")  # LoRA's of that name, AdaLoRA's are others
        warnings.filterwarnings("ignore", message=".*invalid shape.*")  # a module whose triplets are all masked
        warnings.filterwarnings("error", message=".*adapter keys.*")  # what is missing would be random
        try:
            model = PeftModel.from_pretrained(base, str(place), is_trainable=trainable, torch_device=str(base.device))
        except (ValueError, RuntimeError, OSError, KeyError, UserWarning) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{place}: the adapter cannot be loaded ({type(error).__name__}: {reason})") from None
        there = set(get_peft_model_state_dict(model))
    lost = sorted(set(read_header(place / f"{WEIGHTS_STEM}.safetensors")) - there)
    if lost:
        raise CheckpointError(f"{place}: the base has no place for {len(lost)} tensors of the adapter, as {lost[0]}")
    return model


def base_of(adapter: Path, settings: dict[str, Any]) -> Path:
    """Return the directory of the base that an adapter's configuration names: one here, or the Hub's. Raises
    CheckpointError for one that is not there, HubError for what the Hub answers."""
    named, revision = (settings.get(key) for key in ("base_model_name_or_path", "revision"))
    if not isinstance(named, str) or not named or (Path(named).is_absolute() and not Path(named).is_dir()):
        raise CheckpointError(f"{adapter / CONFIG_NAME}: names the base {named!r}, which is not there; pass a base")
    return find_model(named, None if Path(named).is_dir() else revision)
