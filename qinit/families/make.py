"""An adapter of a family, made by PEFT on a base without its weights, and written."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qinit.adapters.base import CONFIG_NAME, WEIGHTS_STEM, write_config
from qinit.adapters.lora import target_modules, task_type
from qinit.errors import CheckpointError, OutputError, RecipeError, TargetError, did_you_mean
from qinit.families.bases import fill_embedding, hollow_base
from qinit.families.card import snippet_of, write_card
from qinit.families.table import FAMILIES, Family, family_named
from qinit.families.targets import Chosen, choose, feed_forward_of
from qinit.families.trial import not_trained, quietly, reason_of
from qinit.files.manifest import some_of, strangers
from qinit.formats import format_of, method_of
from qinit.recipe_files import BESIDE, as_pattern
from qinit.source.checkpoint import Checkpoint, read_json
from qinit.source.skeleton import loader, without_cache
from qinit.source.targets import Architecture

OWN = (CONFIG_NAME, f"{WEIGHTS_STEM}.safetensors", "README.md")  # the files of an adapter
RANDOM = "RANDOM"  # prompts, in PEFT's words


@dataclass(frozen=True)
class Wanted:
    """What is asked for: the base's directory, what it is to be called, the family, and options that are None where
    the family's own holds. `settings` are those of an adapter configuration, by PEFT's names; options win over it."""

    base: Path
    name: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None
    lora_alpha: float | None = None
    target_modules: str | None = None
    exclude: str | None = None
    seed: int = 0
    trust_remote_code: bool = False

    @property
    def family(self) -> Family:
        return FAMILIES[self.method]


@dataclass(frozen=True)
class Made:
    """What was written: how many parameters are trained, how many modules are adapted, the bytes of the weights, and
    the lines of Python that load it."""

    parameters: int
    modules: int
    nbytes: int
    snippet: tuple[str, ...]


def make_adapter(wanted: Wanted, out: Path, *, overwrite: bool = False) -> Made:
    """Write the adapter's directory for a base. PEFT makes it, with its own initial values, and has loaded what was
    written before it stands at `out`. Memory: the adapter's, twice; never the base's weights.

    Raises RecipeError for a setting that the family has not and for a base that PEFT does not train it on, TargetError
    for targets that match nothing or a rank beyond a layer, CheckpointError for a damaged base, OutputError.
    """
    _require_place(out, overwrite)
    checkpoint = Checkpoint.open(wanted.base, quantized=True)
    chosen = choose(checkpoint, *_patterns(wanted), trust_remote_code=wanted.trust_remote_code)
    options = _options(wanted, checkpoint, chosen)
    _require_trained(wanted, checkpoint)
    try:
        with torch.random.fork_rng(devices=[]), quietly():
            torch.manual_seed(wanted.seed)
            model = _adapted(wanted, checkpoint, options, chosen.architecture)
            _require_targets(wanted, model, chosen)
            return _write(wanted, checkpoint, model, out, overwrite)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror}); nothing was left there") from error


def _require_place(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise OutputError(f"{out}: exists; choose another place with --out, or give --overwrite")
    if out.exists() and (not (out / CONFIG_NAME).is_file() or (out / "config.json").exists()):
        raise OutputError(f"{out}: holds something else than an adapter, and is not replaced; choose another --out")
    if out.exists() and (others := strangers(out, OWN)):
        raise OutputError(
            f"{out}: holds what qinit did not write and what would be lost: {some_of(others)}; move it elsewhere, or "
            "choose another --out"
        )


def _patterns(wanted: Wanted) -> tuple[str | None, str | None]:
    """Return targets and what is left out, as options have them."""
    if not wanted.family.adapts:
        for option in ("target_modules", "exclude"):
            if getattr(wanted, option) is not None:
                raise RecipeError(
                    f"--{option.replace('_', '-')}: {wanted.method} adapts no linear layers; leave it out"
                )
        return None, None
    given = wanted.target_modules, wanted.exclude
    saved = (wanted.settings.get(key) for key in ("target_modules", "exclude_modules"))
    both = [mine if mine is not None else theirs for mine, theirs in zip(given, saved, strict=True)]
    targets, exclude = (None if one is None else as_pattern(one, "target_modules") for one in both)
    return targets, exclude


def _options(wanted: Wanted, checkpoint: Checkpoint, chosen: Chosen) -> dict[str, Any]:
    """Return the arguments of the family's configuration class."""
    import peft

    family = wanted.family
    fields = {each.name for each in dataclasses.fields(getattr(peft, family.config))}
    own = {key: value for key, value in wanted.settings.items() if key not in BESIDE}
    if wanted.settings and (named := family_named(wanted.settings)) != wanted.method:
        raise RecipeError(f"--method {wanted.method}: the adapter configuration is one of {named}; give one of the two")
    for key in own:
        if key not in fields:
            raise RecipeError(f"{key}: {family.config} has no such setting{did_you_mean(key, fields)}; take it out")
    for option, key, value in (("rank", family.rank, wanted.rank), ("lora-alpha", family.alpha, wanted.lora_alpha)):
        if value is not None and not key:
            raise RecipeError(f"--{option}: {wanted.method} has none; leave it out, or give its settings with --recipe")
        own |= {key: value} if value is not None else {}
    architecture = chosen.architecture
    options = {**family.defaults, **own, "task_type": task_type(architecture)}
    options |= {"base_model_name_or_path": wanted.name, "inference_mode": False}
    if options["task_type"] is None and issubclass(getattr(peft, family.config), peft.PromptLearningConfig):
        raise RecipeError(
            f"--method {wanted.method}: PEFT puts prompts before models of its own tasks alone, and "
            f"{architecture.class_name} is for none of them"
        )
    if problem := family.problem(options):
        raise RecipeError(f"--method {wanted.method}: {problem}")
    if family.needs is not None:
        places = options.get(family.needs[0])
        if not isinstance(places, Mapping) or not places:
            raise RecipeError(f"--method {wanted.method}: {family.needs[1]}")
        options[family.needs[0]] = {str(number): place for number, place in enumerate(places.values())}
    if family.adapts:
        options["target_modules"] = target_modules(chosen.names, architecture)
        options["exclude_modules"] = None
        _require_rank(options.get(family.rank), chosen)
    if "fan_in_fan_out" in fields:
        options["fan_in_fan_out"] = any(module.transposed for module in chosen.modules)
    if family.feed_forward:
        ends = as_list(options.get("feedforward_modules")) or feed_forward_of(chosen)
        names = [name for name in chosen.names if any(f".{name}".endswith(f".{end}") for end in ends)]
        options |= _by_one_pattern(chosen, names, options["target_modules"])
    return {key: value for key, value in options.items() if key in fields}


def as_list(names: Any) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())


def _by_one_pattern(chosen: Chosen, inner: list[str], targets: Any) -> dict[str, Any]:
    """Return targets and feed-forward modules so that PEFT, which wants the latter among the former by their names,
    sees the same in both."""
    if isinstance(targets, str):
        return {"target_modules": targets, "feedforward_modules": inner}
    named = target_modules(inner, chosen.architecture) if inner else []
    if isinstance(named, list) and set(named) <= set(targets):
        return {"target_modules": targets, "feedforward_modules": named}
    return {"target_modules": chosen.names, "feedforward_modules": inner}


def _require_rank(rank: Any, chosen: Chosen) -> None:
    for module in chosen.modules:
        most = min(module.out_features, module.in_features)
        if isinstance(rank, int) and rank > most:
            raise TargetError(f"rank: {rank} is beyond {module.name}, whose shape allows {most} at most")


def _require_trained(wanted: Wanted, checkpoint: Checkpoint) -> None:
    import peft

    quantization = checkpoint.config.get("quantization_config")
    try:
        problem = not_trained(wanted.method, quantization)
    except CheckpointError as error:
        raise CheckpointError(f"{wanted.base}: {error}") from error
    if problem:
        form = "that is not quantized" if quantization is None else f"quantized as {method_of(checkpoint.config)}"
        raise RecipeError(
            f"--method {wanted.method}: peft {peft.__version__} does not train it on a base {form}: {problem}"
        )


def _adapted(wanted: Wanted, checkpoint: Checkpoint, options: dict[str, Any], architecture: Architecture) -> Any:
    """Return the hollow base with PEFT's adapter. Raises RecipeError with what PEFT says against it."""
    import peft

    base = _base(wanted, checkpoint)
    if options.get("prompt_tuning_init", RANDOM) != RANDOM:  # from the embeddings of words
        fill_embedding(base, checkpoint, architecture)
    more = wanted.family.of_base(base.config.get_text_config())
    options |= {key: value for key, value in more.items() if options.get(key) is None}
    try:
        model = peft.get_peft_model(base, getattr(peft, wanted.family.config)(**options))
    except Exception as error:  # PEFT can refuse in any way
        raise RecipeError(f"--method {wanted.method}: PEFT refuses it on {wanted.base}: {reason_of(error)}") from error
    wanted.family.start(model)
    return model


def _base(wanted: Wanted, checkpoint: Checkpoint) -> Any:
    base = hollow_base(checkpoint, trust_remote_code=wanted.trust_remote_code)
    without_cache(base)
    return base


def _adapted_modules(model: Any) -> list[str]:
    """Return the names, in the base, of the modules that PEFT has put an adapter on."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model.get_base_model()
    return [name for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)]


def _require_targets(wanted: Wanted, model: Any, chosen: Chosen) -> None:
    """Raise RecipeError where PEFT has adapted other modules than the chosen ones."""
    if wanted.family.adapts and (others := set(_adapted_modules(model)).symmetric_difference(chosen.names)):
        raise RecipeError(
            f"--method {wanted.method}: PEFT does not adapt just the chosen modules ({', '.join(sorted(others)[:3])}); "
            "choose others with --target-modules or --exclude"
        )


def _write(wanted: Wanted, checkpoint: Checkpoint, model: Any, out: Path, overwrite: bool) -> Made:
    """Save the adapter beside its place, load it as PEFT does, and rename it."""
    final = out.resolve()
    partial, old = (final.with_name(f".{final.name}.{word}") for word in ("partial", "old"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        model.save_pretrained(str(partial), save_embedding_layers=False)
        shutil.copymode(partial / CONFIG_NAME, partial / f"{WEIGHTS_STEM}.safetensors")  # else the user's alone
        settings = read_json(partial / CONFIG_NAME, "PEFT writes one")
        for key, value in settings.items():  # PEFT keeps names as sets, whose order differs from run to run
            settings[key] = sorted(value) if key.endswith("_modules") and isinstance(value, list) else value
        write_config(partial, settings | {"inference_mode": False})
        _require_loadable(wanted, checkpoint, model, partial)
        made = _described(wanted, checkpoint, model, partial, final)
        if final.exists() and overwrite:
            final.rename(old)
        partial.rename(final)
        return made
    finally:
        if old.exists() and not final.exists():
            old.rename(final)
        for rest in (partial, old):
            shutil.rmtree(rest, ignore_errors=True)


def _require_loadable(wanted: Wanted, checkpoint: Checkpoint, model: Any, directory: Path) -> None:
    """Raise CheckpointError if stock PEFT does not load what was written, to the last bit."""
    from peft import PeftModel, get_peft_model_state_dict

    try:
        loaded = PeftModel.from_pretrained(_base(wanted, checkpoint), str(directory))
    except Exception as error:  # PEFT can refuse in any way
        raise CheckpointError(f"{wanted.base}: PEFT does not load its adapter again: {reason_of(error)}") from error
    written, read = (get_peft_model_state_dict(each, save_embedding_layers=False) for each in (model, loaded))
    lost = [name for name, value in written.items() if name not in read or not torch.equal(value, read[name])]
    if lost:
        raise CheckpointError(f"{wanted.base}: PEFT does not load '{lost[0]}' of the adapter as it was written")


def _described(wanted: Wanted, checkpoint: Checkpoint, model: Any, directory: Path, final: Path) -> Made:
    """Write the card; returns what was made."""
    form = format_of(checkpoint.config)
    told = form and form.loader_options(wanted.base, checkpoint.config, trust_remote_code=wanted.trust_remote_code)
    snippet = snippet_of(
        wanted.name,
        None if told else loader(checkpoint.config, wanted.trust_remote_code).__name__,  # mixed widths
        str(final),
        prompts=model.active_peft_config.is_prompt_learning,
        cache=wanted.family.caches,
        trusted=wanted.trust_remote_code,
    )
    parameters = sum(each.numel() for each in model.parameters() if each.requires_grad)
    modules = len(_adapted_modules(model))
    write_card(
        directory, wanted.method, wanted.family, wanted.name, parameters=parameters, modules=modules, snippet=snippet
    )
    nbytes = sum(file.stat().st_size for file in directory.rglob(f"{WEIGHTS_STEM}*"))
    return Made(parameters, modules, nbytes, tuple(snippet))
