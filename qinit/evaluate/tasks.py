"""Tasks of EleutherAI's lm-evaluation-harness, on a model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qinit.errors import QinitError, RecipeError

INSTALL = 'pip install "qinit[eval]"'


def require_harness() -> None:
    """Raise RecipeError with the command to run when the harness is missing or cannot be imported."""
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise RecipeError(f"tasks: lm-evaluation-harness cannot be imported ({error}); {INSTALL}") from None


def run_tasks(model: Any, tokenizer: Any, tasks: Sequence[str], batch_size: int) -> dict[str, dict[str, float]]:
    """Return each task's metrics, named as the harness names them ("acc,none").

    Raises RecipeError when the harness is missing, QinitError for what goes wrong inside it (an unknown task, a data
    set that cannot be fetched).
    """
    require_harness()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size), tasks=list(tasks)
        )
    except Exception as error:  # each task has code and data of its own
        reason = " ".join(str(error).split())[:300]
        what = f"{type(error).__name__}: {reason}"
        raise QinitError(f"tasks: {', '.join(tasks)}: lm-evaluation-harness failed ({what})") from error
    return {
        task: {name: float(value) for name, value in metrics.items() if "," in name and isinstance(value, int | float)}
        for task, metrics in found["results"].items()
    }
