"""Loads what qinit wrote, base and adapter, as a transformers model that stock PEFT trains."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from qinit.adapters import ADAPTER_DIRECTORY, CONFIG_NAME, WEIGHTS_STEM
from qinit.errors import CheckpointError
from qinit.formats import format_of
from qinit.machine import pick_device
from qinit.report.report import REPORT_NAME
from qinit.source.checkpoint import read_json
from qinit.source.skeleton import loader


def load(
    directory: str | Path,
    *,
    adapter: bool = True,
    trainable: bool = False,
    dtype: Any = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a directory that qinit wrote: dense, GPTQ with one width or GPTQ with a width per layer.

    Returns a PeftModel, whose adapter alone is trained if `trainable`; without `adapter` the base, a model of the
    checkpoint's own transformers class. What stock transformers and PEFT load is loaded by them alone. For mixed
    widths, which transformers' GPTQConfig drops, stock `from_pretrained` runs with a quantizer that differs from its
    own in one thing: each packed layer is made in the width that config.json's `dynamic` gives it.

    `dtype` is what transformers takes; "auto" is the checkpoint's. `device` is auto, cpu, cuda or cuda:N; without it
    the CPU. Memory: GPTQ stays packed (a training step keeps each layer's dequantized weight for the backward pass
    unless gradient checkpointing is on), dense takes 16 bits or more per weight; the adapter is float32.

    `trust_remote_code` runs code that lies in the directory, for a model that transformers does not know.

    Raises CheckpointError if the directory or its adapter is missing, damaged or not qinit's, or if a package that it
    needs is not installed, and RecipeError if the device is not there.
    """
    place = Path(directory)
    class_name, config = _read(place)
    if adapter:
        _require_adapter(place)
    if format_of(config) is None:
        raise _not_ours(place)
    return load_parts(
        place,
        place / ADAPTER_DIRECTORY if adapter else None,
        class_name,
        config,
        trainable,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )


def load_parts(
    base: Path,
    adapter: Path | None,
    class_name: str,
    config: dict[str, Any],
    trainable: bool = False,
    *,
    dtype: Any = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a base whose config.json is `config`, and put an adapter on it, wherever the two lie; as `load` does."""
    where = None if device is None else pick_device(device)
    model, info = load_base(base, class_name, config, dtype=dtype, device=where, trust_remote_code=trust_remote_code)
    missing = sorted(info["missing_keys"])
    if missing:  # they would be random
        raise CheckpointError(
            f"{base}: lacks {len(missing)} weights of {type(model).__name__} ({', '.join(missing[:3])})"
        )
    return model if adapter is None else _load_adapter(model, adapter, trainable)


def load_base(
    base: Path,
    class_name: str,
    config: dict[str, Any],
    *,
    dtype: Any = "auto",
    device: Any = None,
    trust_remote_code: bool = False,
    **values: Any,
) -> tuple[Any, dict[str, Any]]:
    """Load a base whose config.json is `config` by stock `from_pretrained` of its class, with other `values` for its
    configuration if need be; returns it and what transformers says of its keys. `device` may be meta. Raises
    CheckpointError."""
    import transformers

    own = "auto_map" in config
    model_class = (
        loader(config, trust_remote_code) if own and trust_remote_code else getattr(transformers, class_name, None)
    )
    if model_class is None:
        code = " or, as the model is code that lies there, read it and pass trust_remote_code=True" if own else ""
        raise CheckpointError(
            f"{base}: transformers {transformers.__version__} has no {class_name}; install the version that "
            f"{REPORT_NAME} names under versions{code}"
        )
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, **values}
    if device is not None:
        options["device_map"] = {"": device}
    if not isinstance(config.get("quantization_config"), dict | None):
        raise _not_ours(base)
    fmt = format_of(config)
    if fmt is not None:
        options |= fmt.loader_options(base, config, trust_remote_code=trust_remote_code)
    try:
        model, info = model_class.from_pretrained(
            base,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
        return (model if fmt is None or str(device) == "meta" else fmt.opened(model)), info
    except Exception as error:  # a damaged directory can break its class in any way
        raise CheckpointError(f"{base}: cannot be loaded ({_reason(error)})") from error


def _not_ours(directory: Path) -> CheckpointError:
    return CheckpointError(
        f"{directory / 'config.json'}: its quantization_config is not what qinit writes; run qinit again"
    )


def _read(directory: Path) -> tuple[str, dict[str, Any]]:
    """Return the class of a run's model and its config.json; raises CheckpointError."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; give the one that qinit wrote")
    if (directory / CONFIG_NAME).is_file():
        raise CheckpointError(
            f"{directory / CONFIG_NAME}: lies beside the base, so that transformers would load the model that it names "
            "instead; qinit did not write it, move it away"
        )
    advice = "qinit.load reads directories that qinit wrote; transformers' from_pretrained reads others"
    report = read_json(directory / REPORT_NAME, advice)
    source = report.get("source")
    class_name = source.get("class") if isinstance(source, dict) else None
    if not isinstance(class_name, str):
        raise CheckpointError(f"{directory / REPORT_NAME}: names no model class under source, so not qinit's; {advice}")
    return class_name, read_json(directory / "config.json", "the directory is incomplete; run qinit again")


def _require_adapter(directory: Path) -> None:
    for name in (CONFIG_NAME, f"{WEIGHTS_STEM}.safetensors"):
        file = directory / ADAPTER_DIRECTORY / name
        if not file.is_file():
            raise CheckpointError(f"{file}: not found; load the base alone with adapter=False")
    file = directory / ADAPTER_DIRECTORY / CONFIG_NAME
    config = read_json(file, "")
    if config.get("peft_type") != "LORA" or config.get("megatron_config"):  # PEFT would import what that names
        raise CheckpointError(f"{file}: not an adapter that qinit wrote; load the base alone with adapter=False")


def _load_adapter(model: Any, directory: Path, trainable: bool) -> Any:
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*adapter keys.*")  # factors that are missing would be random
            return PeftModel.from_pretrained(
                model,
                str(directory),
                is_trainable=trainable,
                torch_device=str(model.device),  # else it reads the file on a GPU where there is one
            )
    except Exception as error:  # as above
        raise CheckpointError(f"{directory}: the adapter cannot be loaded ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
