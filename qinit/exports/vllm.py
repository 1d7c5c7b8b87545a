"""How a card says that vLLM serves an export."""

from __future__ import annotations

from qinit.report.report import Report

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank knows


def vllm_command(report: Report) -> str:
    """Return Markdown with the command that serves base and adapter, from within their directory, under the least
    --max-lora-rank that takes the adapter."""
    rank = max((row.rank for row in report.layers), default=1)
    most = next((known for known in RANKS if known >= rank), rank)
    return f"""\
```
vllm serve . --dtype float16 --enable-lora --max-lora-rank {most} --lora-modules start=./eqft_init
```"""
