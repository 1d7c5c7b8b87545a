"""Stages: what is done with a block of the model after its layers are solved and before they are written.

To add one: one file with a subclass of Stage, and one line in STAGES; a method's row names it.
"""

from __future__ import annotations

from qinit.stages.base import Repaired, Stage

STAGES: dict[str, Stage] = {}

__all__ = ["STAGES", "Repaired", "Stage"]
