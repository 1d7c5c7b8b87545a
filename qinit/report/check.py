"""What a run was measured to be at its end, in words."""

from __future__ import annotations

from typing import Any


def check_words(row: dict[str, Any]) -> dict[str, str]:
    """Return the rows of a table for `check` in a report's totals. Raises ArithmeticError, KeyError, TypeError and
    ValueError for what is none."""
    alone = {} if "base_alone" not in row else {"KL, base alone": f"{row['base_alone']['kl']:.4f} nats per token"}
    return {
        **alone,
        "KL from the original": f"{row['kl']:.4f} nats per token",
        "same top token": f"{100 * row['top1_agreement']:.1f} %",
        "perplexity": f"{row['perplexity']:.3f}, original {row['reference_perplexity']:.3f}",
        "measured on": f"{row['tokens']} tokens of {row['text']}",
    }
