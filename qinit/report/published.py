"""What stands on the Hub: cards and reports without places on this machine."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qinit.report.adapter_card import adapter_snippet
from qinit.report.card import is_hub_id, with_base, with_section
from qinit.report.lead import lead
from qinit.report.report import Report

CACHED = re.compile(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/[^/]+/?$")  # as huggingface_hub lays it out
BEFORE = re.compile(r", the start ([\w-]+): it changes nothing before it is trained\.")  # of a card's first words
TRAINED = """\
The adapter was trained, starting from the one that qinit made. What is under Measured, and in `qinit.json`, is said of
that start, which is not in this repository.
"""


def hub_id_of(place: str) -> str | None:
    """Return the id on the Hub of a model that is named by it, or lies in the Hub's own cache; None for another
    place."""
    if found := CACHED.search(place):
        return "/".join(found.groups())
    return place if is_hub_id(place) else None


@dataclass(frozen=True)
class Published:
    """The `report` of an adapter as it is published, and the one that it was made from. `base` is the base's id on the
    Hub, None where nobody knows one."""

    report: Report
    own: Report
    base: str | None

    @classmethod
    def of(cls, own: Report, base: str | None) -> Published:
        """Take the places out of a report: of the base stays its id on the Hub, of others their last name."""
        place = own.totals["base"]["name"]
        names = {each: base or Path(each).name for each in (place, str(own.recipe["base"]))}
        return cls(_public(own, names), own, base)

    def card(self, text: str, repo_id: str, *, trained: bool) -> str:
        """Return the card as it stands on the Hub: it loads from `repo_id`; what a person wrote into it is kept."""
        lines = "\n".join(adapter_snippet(self.report, repo_id, trained=trained))
        text = text.replace("\n".join(adapter_snippet(self.own, ".")), lines)
        text = _retold(text.replace(lead(self.own), lead(self.report)), self.own, self.report)
        if trained:
            text = BEFORE.sub(r", trained from the start \1.", text)
            text = with_section(text, "## Trained\n", TRAINED.split("\n"))
        base = {"base_model": self.base, "base_model_relation": "adapter"} if self.base is not None else {}
        return with_base(text, lambda _: base)


def public_report(own: Report) -> Report:
    """Return the report of a run or an export as it is published: a model that lies on this machine by its id on the
    Hub where it comes from there, all else by its last name."""
    return _public(
        own, {place: hub_id_of(place) or Path(place).name for place in (own.model, str(own.recipe["model"]))}
    )


def public_card(text: str, own: Report) -> str:
    """Return its card, in which the report is told as it is published."""
    return _retold(text, own, public_report(own))


def _public(own: Report, names: dict[str, str]) -> Report:
    found = own.to_dict()
    command = shlex.join(_without(word, names) for word in shlex.split(own.command))
    found |= {key: _without(found[key], names) for key in ("model", "recipe", "source", "totals", "notes")}
    return Report(**{**found, "command": command, "layers": own.layers, "export": _without(own.export, names)})


def _retold(text: str, own: Report, public: Report) -> str:
    """Return a card with the public report's words in the place of those of its own."""
    text = text.replace(own.command, public.command)
    recipes = [yaml.safe_dump(each.recipe, sort_keys=False) for each in (own, public)]
    text = text.replace(recipes[0], recipes[1])
    told = {str(own.recipe[key]): str(value) for key, value in public.recipe.items()} | {own.model: public.model}
    if "base" in own.totals:
        told |= {own.totals["base"]["name"]: public.totals["base"]["name"]}
    for place in sorted((each for each in told if each.startswith("/")), key=len, reverse=True):
        text = text.replace(place, told[place])
    return text


def _without(value: Any, names: dict[str, str]) -> Any:
    """Return a value of a report with the last name in the place of each path from the root, and of those in `names`
    what stands there."""
    if isinstance(value, dict):
        return {key: _without(each, names) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_without(each, names) for each in value)
    if not isinstance(value, str):
        return value
    if value in names:
        return names[value]
    if value.startswith("/"):
        return Path(value).name
    for place in names:
        value = value.replace(place, names[place]) if place.startswith("/") else value
    return value
