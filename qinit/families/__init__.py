"""PEFT's other families: adapters that are no LoRA, each started by PEFT itself on a base without its weights.

To add one: one row in FAMILIES.
"""

from __future__ import annotations

from qinit.families.table import FAMILIES, Family, family_named, settings_in

__all__ = ["FAMILIES", "Family", "family_named", "settings_in"]
