"""Hostile files by name: what is done to a good model's surroundings, what reads it, and what the error says."""

from tests.cli.hostile import config, headers, index, outputs, recipes, reports, texts  # noqa: F401 - each adds cases
from tests.cli.hostile.hub import HUB_CASES
from tests.cli.hostile.world import CASES, SECRET, World, edit_config

__all__ = ["CASES", "HUB_CASES", "SECRET", "World", "edit_config"]
