"""numba's compiler as the CPU kernels use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """Return the function as numba compiles it, with what was compiled kept for the next process: beside the code, or
    in the user's cache. Where neither can be written it is compiled anew in every process."""
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba finds no place for its cache
        return numba.njit(**options)(function)
