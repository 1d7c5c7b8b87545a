"""A base and its adapter against what a server loads, from configurations and headers alone."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qinit.adapters import ADAPTER_DIRECTORY, CONFIG_NAME, LoraAdapter
from qinit.errors import CheckpointError, RecipeError, ReportError, did_you_mean
from qinit.recipe_files import SPIKING
from qinit.report.card import TRAINED_DIRECTORY
from qinit.report.report import Report, is_training
from qinit.requirements import pip_command
from qinit.servers import SERVERS, BaseRule, Server
from qinit.servers.base import DENSE, GGUF, MLX, PEFT
from qinit.servers.stored import StoredBase
from qinit.source.checkpoint import read_json
from qinit.verification.findings import Finding
from qinit.verification.written import CONFIG
from qinit.widths.knapsack import tied

LORA = LoraAdapter.peft_type
MERGE = "`qinit merge DIR --adapter ADAPTER --out OUT` makes one model of both"


def server_named(name: str) -> Server:
    """Return a server by its name. Raises RecipeError for one that there is not."""
    if name not in SERVERS:
        raise RecipeError(f"--for: no '{name}'{did_you_mean(name, SERVERS)}; known are {', '.join(SERVERS)}")
    return SERVERS[name]


def check_serving(directory: Path, name: str, adapter: Path | None = None) -> Iterator[Finding]:
    """Hold a directory, a run's, a merge's or an export's, and its own or another adapter against a server's rules: a
    Finding for each that is broken, with what to do; grave where the server does not load it as it starts by default.

    Raises RecipeError for an unknown server, CheckpointError for what cannot be read.
    """
    server = server_named(name)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    if is_training(directory):
        raise CheckpointError(
            f"{directory}: is an adapter alone, which `qinit snndlft` trained; give its base, and this with --adapter"
        )
    stored = StoredBase.of(directory)
    rule, place = server.bases.get(stored.form), adapter or _own_adapter(directory)
    if rule is not None and rule.no_adapter and place is not None:
        what = f"{_title(server)} loads the base without its adapter: {rule.no_adapter}"
        yield Finding(CONFIG, f"{what}; {server.instead}")
    if rule is None:
        forms = ", ".join(server.bases)
        what = f"{_title(server)} loads no {_form(stored.form)} bases ({forms}); {server.instead}"
        yield Finding(CONFIG, what)
    else:
        yield from _check_base(directory, server, rule, stored)
    if place is not None:
        yield from _check_adapter(server, place)


def _title(server: Server) -> str:
    return server.version if server.version.startswith(server.name) else f"{server.name} {server.version}"


def _form(form: str) -> str:
    return "unpacked" if form == DENSE else form


def _check_base(directory: Path, server: Server, rule: BaseRule, stored: StoredBase) -> Iterator[Finding]:
    title = _title(server)
    for key, allowed, index in (("bits", rule.bits, 0), ("group size", rule.group_sizes, 1)):
        there = {grid[index] for grid in stored.grids}
        found = sorted(value for value in there if value is not None and value not in (allowed or ()))
        if allowed is not None and found:
            words = ", ".join(map(str, allowed))
            yield Finding(CONFIG, f"{title} loads {stored.form} with {key} {words}, found {found}; {server.instead}")
    if not rule.zero_points and any(zeros for _, _, zeros in stored.grids):
        what = f"{title} loads {stored.form} without zero points alone (sym: true)"
        yield Finding(CONFIG, f"{what}; make the run with --symmetric, or {server.instead}")
    if not rule.mixed and stored.mixed:
        yield Finding(CONFIG, f"{title} loads {stored.form} of one width alone; {server.instead}")
    elif server.fuses and stored.mixed:
        yield from _check_fused(directory, server, stored)
    if missing := [package for package in rule.packages if find_spec(package.replace("-", "_")) is None]:
        yield Finding(CONFIG, f"{' and '.join(missing)} not installed here; {pip_command(missing)}", grave=False)


def _check_fused(directory: Path, server: Server, stored: StoredBase) -> Iterator[Finding]:
    """Name what the server computes as one layer and has different widths."""
    try:
        rows = {row.name: (row.bits, row.group_size) for row in Report.read(directory).layers}
    except ReportError:
        yield Finding(
            CONFIG, "mixed widths, and no report names the layers: fused ones were not looked at", grave=False
        )
        return
    apart = [group for group in tied(list(rows)) if len({rows[name] for name in group}) > 1]
    if apart:
        what = (
            f"{_title(server)} computes {', '.join(apart[0])} as one layer, which needs one width ({len(apart)} such)"
        )
        yield Finding(CONFIG, f"{what}; make the run with --tie fused")


def _own_adapter(directory: Path) -> Path | None:
    places = (directory / ADAPTER_DIRECTORY, directory / TRAINED_DIRECTORY)
    return next((place for place in places if (place / CONFIG_NAME).is_file()), None)


def _check_adapter(server: Server, place: Path) -> Iterator[Finding]:
    config = read_json(place / CONFIG_NAME, "an adapter's directory has one")
    file, rule, title = str(place / CONFIG_NAME), server.adapter, _title(server)
    form = PEFT if "peft_type" in config else MLX
    if form != rule.form:
        stands = {PEFT: "as PEFT saves it", MLX: "as mlx-lm saves it", GGUF: "as a GGUF file"}
        yield Finding(file, f"{title} reads an adapter {stands[rule.form]}, found one {stands[form]}; {server.instead}")
    kind = config.get("peft_type")
    if kind == SPIKING:
        yield Finding(file, f"{title} does not know peft_type {kind}, whose spikes qinit.snndlft.load alone computes")
        return
    if rule.everything or form != PEFT:
        return
    if kind != LORA:
        yield Finding(file, f"peft_type {kind}, and {title} loads {LORA} alone; {server.instead}")
        return
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    known = [rank for rank in ranks if type(rank) is int]
    if rule.most_rank is not None and max(known, default=0) > rule.most_rank:
        larger = next((rank for rank in rule.rank_choices if rank >= max(known)), None)
        do = f"start it with {rule.rank_option} {larger}" if larger else f"at most {rule.rank_choices[-1]}: {MERGE}"
        yield Finding(file, f"a rank of {max(known)}, and {title} takes {rule.most_rank} by default; {do}")
    if rule.since and (differing := _differ(config)):
        what = f"{differing}: {title} reads that, {rule.since}"
        yield Finding(file, f"{what}; with these, {MERGE}", grave=False)
    if config.get("use_rslora") and not rule.rslora:
        yield Finding(file, f"use_rslora, which {title} does not know; {server.instead}")
    if config.get("use_dora") and not rule.dora:
        yield Finding(file, f"use_dora, which {title} does not know; {MERGE}")
    if others := [name for name in config.get("modules_to_save") or () if name not in rule.whole]:
        yield Finding(file, f"modules_to_save {others}, which {title} does not load; {MERGE}")
    for key in ("lora_bias", "trainable_token_indices", "layer_replication", "alora_invocation_tokens"):
        if config.get(key):
            yield Finding(file, f"{key}, which {title} does not know; {MERGE}")
    if config.get("bias") not in (None, "none"):
        yield Finding(file, f"bias {config['bias']!r}: {title} loads no biases; {MERGE}")


def _differ(config: dict[str, Any]) -> str:
    """Say what of ranks and scales is not the same for all layers."""
    r, alpha = config.get("r"), config.get("lora_alpha")
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    found = []
    if type(r) is int and max([r, *ranks.values()]) > r:
        found.append(f"r is {r} and rank_pattern goes up to {max(ranks.values())}")
    root = 0.5 if config.get("use_rslora") else 1
    if type(r) is int and isinstance(alpha, int | float):
        names = {*ranks, *alphas}
        scales = [alphas.get(name, alpha) / ranks.get(name, r) ** root for name in names]
        if any(abs(scale - alpha / r**root) > 1e-6 * abs(scale) for scale in scales):
            found.append("the scales of the layers are not one")
    return " and ".join(found)
