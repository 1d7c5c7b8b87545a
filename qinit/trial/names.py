"""Whether stock transformers and PEFT find every tensor of a run by its name: on the meta device, from headers."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from qinit.adapters import WEIGHTS_STEM
from qinit.errors import CheckpointError
from qinit.files.tensors import read_header
from qinit.formats import format_of
from qinit.source.checkpoint import read_json
from qinit.source.quiet import no_progress_bar
from qinit.source.skeleton import loader
from qinit.stock.adapting import without_packers

SHOWN = 5  # names in a sentence


@dataclass(frozen=True)
class LoadingInfo:
    """What transformers says of a checkpoint that it has loaded: parameters that nothing was there for, which are
    random then, tensors that it passed over, and those of another shape."""

    missing: frozenset[str]
    unexpected: frozenset[str]
    mismatched: frozenset[str]

    @classmethod
    def of(cls, info: dict[str, Any]) -> LoadingInfo:
        """Take it from what `from_pretrained` returns with `output_loading_info`."""
        mismatched = (each[0] if isinstance(each, tuple) else each for each in info.get("mismatched_keys") or ())
        parts = (info.get("missing_keys") or (), info.get("unexpected_keys") or (), mismatched)
        return cls(*(frozenset(map(str, names)) for names in parts))

    def beyond(self, other: LoadingInfo) -> LoadingInfo:
        """Return what is not so in another checkpoint of the same model."""
        pairs = ((getattr(self, key), getattr(other, key)) for key in ("missing", "unexpected", "mismatched"))
        return LoadingInfo(*(mine - theirs for mine, theirs in pairs))

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mismatched)

    def problems(self, class_name: str) -> Iterator[str]:
        """Say each kind in a sentence."""
        for kind, what in (("missing", "finds nothing for"), ("unexpected", "passes over"), ("mismatched", "wants")):
            names = getattr(self, kind)
            if names:
                rest = {"missing": "which stay random", "mismatched": "in another shape"}.get(kind, "")
                yield f"{class_name} {what} {shown(names)}" + (f", {rest}" if rest else "")


def shown(names: Collection[str]) -> str:
    """Return some of the names, and how many there are."""
    some = ", ".join(sorted(names)[:SHOWN])
    return some if len(names) <= SHOWN else f"{some} and {len(names) - SHOWN} more"


def lost_names(
    run: Path, adapter: Path, source: Path | None, class_name: str | None = None, *, trust_remote_code: bool = False
) -> list[str]:
    """Say which tensors of a run's base and of an adapter stock transformers and PEFT would not find in their places;
    `source`, the model that the run was made from, may lack what it lacks.

    No weight is read and no package is needed: packed layers are taken for ordinary ones, which their parts stand for.
    Raises CheckpointError for what cannot be read at all.
    """
    config = read_json(run / "config.json", "the directory is incomplete; run qinit again")
    fmt = format_of(config)
    parts = fmt.parts if fmt is not None else ()
    model, info = on_meta(run, class_name, trust_remote_code=trust_remote_code)
    packed = {name for name in info.unexpected if name.rpartition(".")[2] in parts}
    stems = {name.rpartition(".")[0] for name in packed}
    prefix = f"{model.base_model_prefix}."
    known = {*stems, *(prefix + stem for stem in stems), *(stem.removeprefix(prefix) for stem in stems)}
    unpacked = {name for name in info.missing if name.removesuffix(".weight") in known}
    found = LoadingInfo(info.missing - unpacked, info.unexpected - packed, info.mismatched)
    if found and source is not None:
        found = found.beyond(on_meta(source, class_name, trust_remote_code=trust_remote_code)[1])
    problems = [*found.problems(type(model).__name__)]
    if len(unpacked) != len(stems):
        problems.append(f"{type(model).__name__} has {len(unpacked)} layers for {len(stems)} that are packed")
    with without_packers():
        adapted, said = put_on(model, adapter)
    return [*problems, *said, *lost_factors(adapted, adapter)]


def on_meta(
    directory: Path, class_name: str | None = None, *, trust_remote_code: bool = False
) -> tuple[Any, LoadingInfo]:
    """Let transformers load a checkpoint on the meta device, as if nothing in it was packed. Raises CheckpointError."""
    import transformers

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    config = read_json(directory / "config.json", "a model directory has one")
    fmt = format_of(config)
    same_name = fmt is not None and "weight" in fmt.parts  # packed in another shape, as bitsandbytes does
    named = None if class_name is None or trust_remote_code else getattr(transformers, class_name, None)
    try:
        with silent():
            settings = transformers.AutoConfig.from_pretrained(directory, **options)
            if getattr(settings, "quantization_config", None) is not None:
                del settings.quantization_config
            model, info = (named or loader(config, trust_remote_code)).from_pretrained(
                directory,
                config=settings,
                device_map={"": "meta"},
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=same_name,
                **options,
            )
    except Exception as error:  # a checkpoint can break its class in any way
        raise CheckpointError(f"{directory}: transformers cannot load it ({reason(error)})") from error
    return model, LoadingInfo.of(info)


def put_on(model: Any, adapter: Path, *, meta: bool = True) -> tuple[Any, list[str]]:
    """Put an adapter on a model with PEFT, to be trained; returns that, and what PEFT warns of, but for what
    `lost_factors` says. On the meta device its values are not kept. Raises CheckpointError where PEFT cannot."""
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as caught, silent():
        warnings.simplefilter("always")
        try:
            adapted = PeftModel.from_pretrained(
                model, str(adapter), is_trainable=True, low_cpu_mem_usage=meta, torch_device="cpu"
            )
        except Exception as error:  # as above
            raise CheckpointError(f"{adapter}: PEFT cannot load it ({reason(error)})") from error
    said = [" ".join(str(each.message).split()) for each in caught if _is_of_peft(each)]
    return adapted, [f"PEFT warns: {each}" for each in said if "adapter keys" not in each]


def _is_of_peft(warning: warnings.WarningMessage) -> bool:
    return "peft" in Path(warning.filename).parts and not issubclass(warning.category, FutureWarning)


def lost_factors(model: Any, adapter: Path) -> Iterator[str]:
    """Say which tensors of an adapter's file are not in the model that it was put on, which of the model's are not in
    the file, and which would not be trained."""
    from peft import get_peft_model_state_dict

    there = set(read_header(adapter / f"{WEIGHTS_STEM}.safetensors"))
    with silent():
        taken = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if there - taken:
        yield f"PEFT drops {shown(there - taken)}"
    if taken - there:
        yield f"PEFT finds nothing for {shown(taken - there)}, which start at random"
    frozen = {name for name, parameter in model.named_parameters() if "lora_" in name and not parameter.requires_grad}
    if frozen:
        yield f"PEFT does not train {shown(frozen)}"


@contextmanager
def silent() -> Iterator[None]:
    """Keep off the screen what other packages say while they load."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with no_progress_bar(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    finally:
        logging.set_verbosity(level)


def reason(error: BaseException) -> str:
    """Return an error as part of one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
