"""Files of options: recipes in YAML or JSON, and adapter configurations of PEFT's (adapter_config.json), read as what
qinit calls the same."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from qinit.errors import RecipeError, did_you_mean
from qinit.files.reading import YAML_BYTES, parse_json, parse_yaml, read_regular

SUFFIXES = (".json", ".yaml", ".yml")
KEY = "peft_type"  # what every such file has
SPIKING = "SNN_DLFT"  # of what `qinit snndlft` trains with spikes
NOT_LINEAR = (
    "a spiking adapter cannot be merged: between Q and P are neurons that fire above a threshold, so that no matrix "
    "added to the base's weight computes the same; load base and adapter together (qinit.snndlft.load)"
)
# Who saved it, for what model, and what is found out anew. A base is named where a command asks for one.
BESIDE = frozenset(
    {
        *(KEY, "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"),
        "fan_in_fan_out",
    }
)
OPTIONS = {
    **{"r": "rank", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "use_rslora": "use_rslora"},
    **{"target_modules": "target_modules", "exclude_modules": "exclude"},
}
# Starts by what PEFT calls them, with the power iterations of a quick decomposition, as in pissa_niter_4.
STARTS = re.compile(r"(pissa|olora|milora|corda|eva|loftq|lora_ga)(?:_niter_(\d+))?")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
# What changes nothing at these values, as PEFT fills a file with its defaults.
NEUTRAL: dict[str, Any] = {"bias": "none", "megatron_core": "megatron.core", "qalora_group_size": 16}


def template_names() -> list[str]:
    """Return the names of the configurations that come with qinit."""
    return sorted(file.stem for file in _templates().glob("*.json"))


def find_recipe(file: Path) -> Path:
    """Return the file itself, or the configuration that comes with qinit and has this name. Raises RecipeError for a
    name of neither."""
    name = str(file)
    if file.suffix in SUFFIXES or len(file.parts) > 1 or file.exists():
        return file
    if name not in (known := template_names()):
        raise RecipeError(
            f"{name}: no such file, and no adapter configuration that comes with qinit{did_you_mean(name, known)}; "
            f"those are {', '.join(known)}"
        )
    return _templates() / f"{name}.json"


def _templates() -> Path:
    return Path(str(resources.files("qinit_templates")))


def read_recipe(file: Path) -> dict[str, Any]:
    """Return the options in a YAML or JSON file, also those that an adapter configuration of PEFT's stands for, or one
    that comes with qinit, by its name. Raises RecipeError."""
    file = find_recipe(file)
    values = parse_file(file)
    if not isinstance(values, dict):
        raise RecipeError(f"{file}: expected `option: value` lines, found {type(values).__name__}")
    if is_adapter_config(values):
        return recipe_of(values, str(file))
    if values.get("trust_remote_code"):
        raise RecipeError(
            f"{file}: trust_remote_code: a recipe may come from anywhere, so only the command line can give it, as "
            "--trust-remote-code"
        )
    return values


def read_adapter_config(file: Path) -> dict[str, Any]:
    """Return what a JSON file holds. Raises RecipeError for what cannot be read and for what is no adapter
    configuration."""
    values = parse_file(file)
    if not is_adapter_config(values):
        raise RecipeError(f"{file}: expected an adapter configuration as PEFT saves it, with its {KEY}")
    return dict(values)


def parse_file(file: Path) -> Any:
    """Return what a file holds, JSON by its ending, else YAML. Raises RecipeError."""
    parse, form = (parse_json, "JSON") if file.suffix == ".json" else (parse_yaml, "YAML")
    try:
        return parse(read_regular(file, YAML_BYTES))
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise RecipeError(f"{file}: not valid {form} ({error})") from None


def is_adapter_config(values: Any) -> bool:
    """Whether what a file holds is an adapter configuration rather than a recipe."""
    return isinstance(values, dict) and isinstance(values.get(KEY), str)


def recipe_of(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return what a LoRA configuration says as a recipe's options.

    Rank, alpha, dropout, rsLoRA, DoRA, targets and the start's name carry over, and NF4 as the method qlora. Raises
    RecipeError that begins with `where` for a configuration that is not LoRA's, and for what a recipe has no place for.
    """
    if values[KEY] != "LORA":
        raise RecipeError(
            f"{where}: {KEY} {values[KEY]} is no LoRA, and this command makes one; give it to "
            f"`qinit adapter BASE --recipe {where} --out DIR`"
        )
    found: dict[str, Any] = {name: values[key] for key, name in OPTIONS.items() if values.get(key) is not None}
    for name in ("target_modules", "exclude"):
        if name in found:
            found[name] = as_pattern(found[name], f"{where}: {name}")
    found |= _start(values, where)
    known = {*BESIDE, *OPTIONS, "init_lora_weights", "use_dora", "quantization_config"}
    for key, value in values.items():
        if key not in known and value and value != NEUTRAL.get(key):
            raise RecipeError(f"{where}: {key}: a recipe has no place for it ({str(value)[:60]}); take it out")
    return found


def as_pattern(names: Any, where: str) -> str:
    """Return target or exclude modules as an option: a regular expression as it is, a list as names with commas. Raises
    RecipeError that begins with `where`."""
    if isinstance(names, str):
        return names
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return ",".join(names)
    raise RecipeError(f"{where}: expected names or a regular expression, found {str(names)[:60]}")


def _start(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the method, and what goes with it, where the configuration names one."""
    quantization, start = values.get("quantization_config"), values.get("init_lora_weights", True)
    found: dict[str, Any] = {"use_dora": True} if values.get("use_dora") else {}
    if isinstance(start, str) and (match := STARTS.fullmatch(start)):
        found["method"] = match[1].replace("_", "-")
        found |= {"niter": int(match[2])} if match[2] else {}
    elif start not in (True, None):
        raise RecipeError(f"{where}: init_lora_weights: qinit makes no start {start!r}; take it out, or give --method")
    if quantization is not None:
        wrong = not isinstance(quantization, Mapping) or {key: quantization.get(key) for key in NF4} != NF4
        if wrong or "method" in found:
            raise RecipeError(f"{where}: quantization_config: expected NF4 ({NF4}) and no start of another method")
        found |= {"method": "qlora", "bits": 4, "format": "dense"}
    return found
