"""What a recipe says where its method is a published start: what follows from the method, and what does not fit it."""

from __future__ import annotations

from typing import Any

from qinit.errors import did_you_mean
from qinit.solver.methods import SEARCHES, STARTS

CORDA = ("ipm", "kpm")  # instruction-previewed and knowledge-preserved
FEW_SAMPLES = 16  # a gradient says enough on


def start_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a recipe that follow from its method, if that is a start, and from those that are given."""
    row = STARTS.get(str(values.get("method")))
    if row is None:
        return {}
    found: dict[str, Any] = {"bits": 16, "calibration_mode": "parallel", "polish": 0}
    found |= {"use_rslora": row.rslora, "use_dora": row.adapter == "dora"}
    if not row.needs:
        found["calibration"] = "none"
    if "gradient" in row.needs:
        found["calibration_samples"] = FEW_SAMPLES
    dora = values.get("use_dora", found["use_dora"])
    if values.get("bits", 16) == 16 or values.get("grid") == "nf" or dora:  # no packed format holds it, or takes it
        found["format"] = "dense"
    return found


def start_problem(
    method: str,
    *,
    bits: int,
    grid: str | None,
    niter: int | None,
    corda_method: str | None,
    polish: int | None,
    use_dora: bool,
) -> str | None:
    """Return what does not fit a start of full precision, or a method that is none, or None."""
    row = STARTS.get(method)
    if grid is not None and grid not in SEARCHES:
        return f"grid: no '{grid}'{did_you_mean(grid, SEARCHES)}; known are {' and '.join(SEARCHES)}"
    if grid is not None and (row is None or bits == 16):
        return f"grid: is about the base of a start ({', '.join(STARTS)}) in fewer than 16 bits"
    if niter is not None and (row is None or row.factors != "svd"):
        those = ", ".join(name for name, each in STARTS.items() if each.factors == "svd")
        return f"niter: is about {those} alone, found method {method}"
    if corda_method is not None and (row is None or row.factors != "covariance"):
        return f"corda_method: is about corda alone, found method {method}"
    if corda_method not in (None, *CORDA):
        return f"corda_method: no '{corda_method}'{did_you_mean(str(corda_method), CORDA)}; known are ipm and kpm"
    if polish and row is not None:
        return f"polish: method {method} stays as it starts; leave it out"
    if use_dora and polish != 0:
        return "polish: trains A and B, and would leave the magnitudes of use_dora behind; give 0"
    return None
