"""Grids: the sets of values that quantized weights may take, and the search for each group's scale.

To add a grid: one file with a subclass of Grid, and one line in GRIDS.
"""

from __future__ import annotations

from qinit.grids.base import Grid, Quantized
from qinit.grids.exact import ExactGrid, GivenGrid
from qinit.grids.integer.grid import IntegerGrid, SymmetricGrid
from qinit.grids.normal_float import NormalFloatGrid

GRIDS: dict[str, Grid] = {grid.name: grid for grid in (IntegerGrid(), SymmetricGrid(), NormalFloatGrid(), ExactGrid())}

__all__ = ["GRIDS", "ExactGrid", "GivenGrid", "Grid", "IntegerGrid", "NormalFloatGrid", "Quantized", "SymmetricGrid"]
