"""Results on what plans say, to tables."""

from __future__ import annotations

from table import Result, Table


def finetune_memory(result: Result) -> list[Table]:
    """What fine-tuning was said to take against what it took."""
    parts = ("base", "adapter", "optimizer", "activations", "logits", "working")
    rows = [
        [
            *(row["model"], f"{row['format']}, {row['dtype']}", f"{row['bits']}", f"{row['rank']}"),
            *(f"{row['batch']} x {row['length']}", "yes" if row["checkpointing"] else "no"),
            *(f"{row[part] / 1e6:.0f}" for part in parts),
            *(f"{row['said'] / 1e6:.0f}", f"{row['measured'] / 1e6:.0f}", f"{row['said'] / row['measured']:.2f}"),
        ]
        for row in result["rows"]
    ]
    header = [
        "model",
        "stored as",
        "bits",
        "rank",
        "tokens",
        "checkpointing",
        *parts,
        "said, MB",
        "measured, MB",
        "ratio",
    ]
    return [Table("memory of fine-tuning beside the libraries, MB", header, rows)]


def scale(result: Result) -> list[Table]:
    """What runs and fine-tuning take by the size of the model, and how that compares with what was measured."""
    rows = [
        [
            *(row["model"], f"{row['weights'] / 1e9:.2f}", *(f"{row[key] / 1e9:.1f}" for key in ("source", "written"))),
            *(_time(row[key][count]) for key in ("without_data", "calibrated") for count in result["processes"]),
            *(f"{row['working'][count] / 1e9:.1f}" for count in result["processes"]),
            *(f"{row['tuning'][key] / 1e9:.1f}" for key in ("checkpointing", "without")),
        ]
        for row in result["rows"]
    ]
    counts = result["processes"]
    header = ["model's shapes", "10^9 weights", "source, GB", "run, GB"]
    header += [f"{what}, {count}" for what in ("no data", "calibrated", "memory of each, GB") for count in counts]
    header += ["fine-tuning, GB", "without checkpointing"]
    against = [
        [each["what"], *(f"{each[key]:.3g} {each['unit']}" for key in ("said", "measured"))]
        for each in result["against"]
    ]
    return [
        Table(f"2 bits, rank 16, group 64, on 1 and more of {result['card']}", header, rows),
        Table("the 8B model's shapes: said and measured", ["what", "said", "measured"], against),
    ]


def _time(seconds: float) -> str:
    if seconds < 300:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
