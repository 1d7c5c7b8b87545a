"""How good a model is on a text: perplexity, and how close it is to the model that it was made from."""

from __future__ import annotations

from qinit.evaluate.figures import Figures, figures_of, measure, perplexity
from qinit.evaluate.windows import Windows, cut_windows

__all__ = ["Figures", "Windows", "cut_windows", "figures_of", "measure", "perplexity"]
