"""Calibration: text for a model to read, and what its layers see while it does."""

from __future__ import annotations

from qinit.calibration.samples import Samples
from qinit.calibration.statistics import Statistics

__all__ = ["Samples", "Statistics"]
