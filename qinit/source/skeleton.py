"""The model without its weights, built from config.json: within bounds that the weights' headers set, and without
running code that the checkpoint brings unless that was asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from qinit.errors import CheckpointError
from qinit.source.checkpoint import Checkpoint

# Whoever reads a configuration makes lists as long as these say, before there is a model.
LAYERS = re.compile(r"(layers?|depths?|blocks?|dense_replace)$")
LABELS = re.compile(r"labels$")
POSITIONS = re.compile(r"(positions?|position_embeddings|n_ctx|seq_len(gth)?)$")
LONGEST_TEXT = 2**24  # some models make a table of it; the longest in use is 10 million
FEW_LAYERS, FEW_LABELS = 1000, 100_000  # pass whatever the weights are: a configuration may describe parts left out
MODULES_PER_TENSOR, FEW_MODULES = 100, 10_000
FEW_BUFFER_BYTES = 1 << 30
INITIALIZERS = ("torch.nn.init", "transformers.initialization")  # modules; the second stands in for the first
KERNELS = re.compile(r"(attn|experts)_implementation")


def build_model(checkpoint: Checkpoint, *, include_buffers: bool, trust_remote_code: bool = False) -> Any:
    """Build the model on the meta device; buffers that are no weights (rotary frequencies) only exist without
    `include_buffers`. Raises CheckpointError for a configuration that transformers cannot build, that describes far
    more than the checkpoint's headers hold, or whose model is code in the checkpoint, without `trust_remote_code`."""
    import transformers
    from accelerate import init_empty_weights

    config, config_file = checkpoint.config, checkpoint.directory / "config.json"
    _require_sizes(checkpoint, trust_remote_code)
    try:
        model_config = transformers.AutoConfig.from_pretrained(
            checkpoint.directory, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # a config can break its class in any way
        reason = " ".join(str(error).split())[:300]
        raise own_code(config_file, error) or CheckpointError(
            f"{config_file}: transformers {transformers.__version__} does not know this model "
            f"(model_type {config.get('model_type')!r}): {reason}"
        ) from error
    try:
        with init_empty_weights(include_buffers=include_buffers), _bounded(checkpoint), _without_values():
            model_class = loader(config, trust_remote_code)
            if hasattr(model_class, "_from_config"):
                model = model_class._from_config(model_config)
            else:
                model = model_class.from_config(model_config, trust_remote_code=trust_remote_code)
    except CheckpointError:
        raise
    except Exception as error:  # a config can break a constructor in any way
        reason = " ".join(str(error).split())[:300]
        raise own_code(config_file, error) or CheckpointError(
            f"{config_file}: no model can be built from it ({type(error).__name__}: {reason})"
        ) from error
    return model


def _without_values() -> AbstractContextManager[Any]:
    """Draw no first values for what is on the meta device: PyTorch takes most of the building to draw nothing."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Skipping(TorchFunctionMode):
        def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = kwargs or {}
            tensor = args[0] if args else given.get("tensor")
            first = getattr(func, "__module__", "") in INITIALIZERS
            if first and isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
            return func(*args, **given)

    return Skipping()


def without_cache(model: Any) -> None:
    """Have a model keep no keys and values between its passes; parts of it may have configurations of their own."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False


def loader(config: dict[str, Any], trust_remote_code: bool = False) -> Any:
    """Return the class that loads this model: the first of the configuration's architectures that transformers has,
    else AutoModelForCausalLM; with trusted code the auto class that the code is registered for."""
    import transformers

    architectures, code = config.get("architectures") or (), config.get("auto_map")
    if trust_remote_code and isinstance(code, dict):
        names = [name for name in code if name.startswith("AutoModel") and hasattr(transformers, name)]
        names.sort(key=lambda name: (str(code[name]).rsplit(".", 1)[-1] not in architectures, "CausalLM" not in name))
        if names:
            return getattr(transformers, names[0])
    for name in architectures:
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return transformers.AutoModelForCausalLM


def own_code(file: Path, error: BaseException) -> CheckpointError | None:
    """Return the error for what transformers refused to load because it is code of the checkpoint's, None if it failed
    for another reason."""
    if "trust_remote_code" not in str(error):
        return None
    return CheckpointError(
        f"{file}: needs code that the checkpoint brings (auto_map), and that code can do anything; read it, then pass "
        "--trust-remote-code to run it"
    )


def _require_sizes(checkpoint: Checkpoint, trust_remote_code: bool) -> None:
    file, tensors = checkpoint.directory / "config.json", checkpoint.tensors
    widest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    for key, value in _entries(checkpoint.config):
        if isinstance(value, str) and "/" in value and KERNELS.search(key) and not trust_remote_code:
            raise CheckpointError(
                f"{file}: {key} names compiled code to download ({value!r}); take it out, or pass --trust-remote-code"
            )
        if not isinstance(value, int | float):
            continue
        if LAYERS.search(key) and value > max(FEW_LAYERS, len(tensors)):
            raise CheckpointError(
                f"{file}: {key} is {value}, but the checkpoint holds {len(tensors)} tensors; config and weights belong "
                "to different models"
            )
        if POSITIONS.search(key) and value > LONGEST_TEXT:
            raise CheckpointError(f"{file}: {key} is {value}, at most {LONGEST_TEXT} are read; correct it")
        if LABELS.search(key) and value > max(FEW_LABELS, widest):
            raise CheckpointError(
                f"{file}: {key} is {value}, but no tensor of the checkpoint is wider than {widest}; config and weights "
                "belong to different models"
            )


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield each dotted name in a configuration with its value, those in lists too, all the way down."""
    rest: list[tuple[str, Any]] = [("", config)]
    while rest:
        key, value = rest.pop()
        if isinstance(value, dict):
            rest += ((f"{key}.{name}".lstrip("."), item) for name, item in value.items())
        elif isinstance(value, list):
            rest += ((key, item) for item in value)
        else:
            yield key, value


@contextmanager
def _bounded(checkpoint: Checkpoint) -> Iterator[None]:
    """End the building of a model of far more modules, or of larger buffers, than its checkpoint can be of."""
    from torch.nn.modules import module

    file = checkpoint.directory / "config.json"
    most = max(FEW_MODULES, MODULES_PER_TENSOR * len(checkpoint.tensors))
    room = FEW_BUFFER_BYTES + checkpoint.weight_bytes
    count = size = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise CheckpointError(
                f"{file}: describes more than {most} modules, but the checkpoint holds {len(checkpoint.tensors)} "
                "tensors; config and weights belong to different models"
            )

    def weighed(_module: Any, name: str, buffer: Any) -> None:
        nonlocal size
        size += 0 if buffer is None else buffer.nbytes
        if size > room:
            raise CheckpointError(
                f"{file}: describes buffers of more than {room / 1e9:.1f} GB ('{name}' and others), which no "
                "checkpoint of this size has; correct its sizes"
            )

    hooks = [
        module.register_module_module_registration_hook(counted),
        module.register_module_buffer_registration_hook(weighed),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
