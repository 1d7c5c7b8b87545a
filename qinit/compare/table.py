"""The table: cells put together, means and spreads over seeds, and the same in words and as Markdown."""

from __future__ import annotations

import statistics
from typing import Any

from qinit.compare.comparison import FULL, LORA, Cell, Comparison, Row
from qinit.compare.schedule import Found, best_rate
from qinit.report import markdown

NAMES = {LORA: "16-bit LoRA", FULL: "full fine-tuning"}


def rows(comparison: Comparison, found: Found) -> list[dict[str, Any]]:
    """Return the table's rows, as compare.json has them.

    Perplexities are by text name. `end` has mean, spread (the sample standard deviation over seeds, None for one seed)
    and each seed's value at the best learning rate; `to_lora` is that mean over 16-bit LoRA's, `less_lora` the mean
    and spread of the differences to 16-bit LoRA seed by seed.
    """
    lines = [_row(comparison, row, found) for row in comparison.rows]
    lora = next((line["end"] for line in lines if line["method"] == LORA and line["bits"] == 16), None)
    for line in lines:
        line["to_lora"] = line["less_lora"] = None
        if lora and line["end"]:
            names = line["end"].keys()
            line["to_lora"] = {name: line["end"][name]["mean"] / lora[name]["mean"] for name in names}
            pairs = {name: _paired(line["end"][name]["seeds"], lora[name]["seeds"]) for name in names}
            line["less_lora"] = {name: _moments(differences) for name, differences in pairs.items()}
    return lines


def _row(comparison: Comparison, row: Row, found: Found) -> dict[str, Any]:
    names = [text.name for text in comparison.texts]
    start = found.get(Cell(row), {})
    best = best_rate(comparison, row, found)
    ends: dict[str, dict[str, float]] = {name: {} for name in names}
    for seed in comparison.seeds if best is not None else ():
        values = found.get(Cell(row, best, seed), {}).get("perplexities")
        for name, value in zip(names, values or (), strict=False):
            if value is not None:
                ends[name][str(seed)] = value
    measured = any(ends.values())
    return {
        "method": row.method,
        "bits": row.bits,
        "bits_per_weight": row.bits_per_weight,
        "trainable": start.get("trainable"),
        "weight_error": start.get("weight_error"),
        "start": dict(zip(names, start["perplexities"], strict=True)) if "perplexities" in start else None,
        "rates": [_swept(names, cell, found.get(cell, {})) for cell in comparison.sweep(row)],
        "rate": best,
        "end": {name: {**_moments(list(v.values())), "seeds": v} for name, v in ends.items()} if measured else None,
        "failed": _reasons(comparison, row, found),
    }


def _swept(names: list[str], cell: Cell, found: dict[str, Any]) -> dict[str, Any]:
    values = found.get("perplexities")
    return {
        "rate": cell.rate,
        "validation": found.get("validation"),
        "end": dict(zip(names, values, strict=True)) if values else None,
        "diverged": found.get("diverged"),
    }


def _reasons(comparison: Comparison, row: Row, found: Found) -> list[str]:
    """Say why cells of a row found nothing, each reason once."""
    cells = [Cell(row), *comparison.sweep(row)]
    cells += [cell for rate in row.rates for cell in comparison.repeats(row, rate)] if comparison.training else []
    failed = [found[cell]["failed"] for cell in cells if "failed" in found.get(cell, {})]
    swept = [found.get(cell, {}) for cell in comparison.sweep(row)]
    if swept and all("diverged" in one for one in swept):
        failed.append("every learning rate diverged")
    return list(dict.fromkeys(failed))


def _moments(values: list[float]) -> dict[str, float | None]:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values) if values else None, "spread": spread}


def _paired(values: dict[str, float], others: dict[str, float]) -> list[float]:
    return [values[seed] - others[seed] for seed in values if seed in others]


def header(result: dict[str, Any]) -> list[str]:
    """Return the columns' names."""
    texts = result["texts"]
    names = [text["name"] for text in texts]
    columns = ["bits", "method", "bits/weight", *_trained_column(result), *(f"start {name}" for name in names)]
    if result["training"]:
        columns += [f"end {name}" for name in names]
        columns += ["rate", *(f"/ LoRA {name}" for name in names), *(f"- LoRA {name}" for name in names)]
    return columns


def lines(result: dict[str, Any]) -> list[list[str]]:
    """Return the rows of compare.json in words; a row that failed says so at its end."""
    names = [text["name"] for text in result["texts"]]
    counted = bool(_trained_column(result))
    return [_line(row, names, bool(result["training"]), counted) for row in result["rows"]]


def _trained_column(result: dict[str, Any]) -> list[str]:
    """Return the column of how many numbers are trained, where a comparison has counted them."""
    return ["trained"] if any(row.get("trainable") for row in result["rows"]) else []


def _line(row: dict[str, Any], names: list[str], trained: bool, counted: bool) -> list[str]:
    method = _name(row, trained)
    line = [str(row["bits"]), method, f"{row['bits_per_weight']:.3f}"]
    line += [f"{row['trainable']:,}" if row.get("trainable") else "-"] if counted else []
    line += [_number((row["start"] or {}).get(name)) for name in names]
    if trained:
        line += [_spread((row["end"] or {}).get(name)) for name in names]
        line.append("-" if row["rate"] is None else f"{row['rate']:g}")
        line += [_number((row["to_lora"] or {}).get(name)) for name in names]
        line += [_spread((row["less_lora"] or {}).get(name), "+") for name in names]
    return line


def _name(row: dict[str, Any], trained: bool) -> str:
    known = NAMES if row["bits"] == 16 else {}
    return known.get(row["method"], row["method"]) if trained else row["method"].replace(FULL, "full precision")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _spread(value: dict[str, Any] | None, sign: str = "") -> str:
    if value is None or value["mean"] is None:
        return "-"
    return f"{value['mean']:{sign}.3f}" + ("" if value["spread"] is None else f" ± {value['spread']:.3f}")


def title(result: dict[str, Any]) -> str:
    """Say what was done, in one line."""
    words = [result["model"], f"rank {result['rank']}", f"perplexity over windows of {result['window']} tokens"]
    training = result["training"]
    if training:
        words.append(
            f"{training['steps']} steps of {training['batch']} x {training['length']} tokens of {_learn(result)}"
        )
    if training and len(result["seeds"]) > 1:
        words.append(f"mean ± standard deviation over {len(result['seeds'])} seeds at the best learning rate")
    return ", ".join(words)


def _learn(result: dict[str, Any]) -> str:
    return str(result["learn"]["name"])


def sweep_header(result: dict[str, Any]) -> list[str]:
    names = [text["name"] for text in result["texts"]]
    return ["bits", "method", "learning rate", "validation", *(f"end {name}" for name in names), "chosen"]


def sweep_lines(result: dict[str, Any]) -> list[list[str]]:
    """Return every learning rate of every row, with the first seed, in words."""
    names = [text["name"] for text in result["texts"]]
    found = []
    for row in result["rows"]:
        for one in row["rates"]:
            ends = [_number((one["end"] or {}).get(name)) for name in names]
            chosen = "diverged" if one["diverged"] else "yes" if one["rate"] == row["rate"] else ""
            method = _name(row, trained=True)
            found.append([str(row["bits"]), method, f"{one['rate']:g}", _number(one["validation"]), *ends, chosen])
    return found


def failures(result: dict[str, Any]) -> list[str]:
    """Say which rows have cells that failed, and why."""
    return [
        f"{_name(row, bool(result['training']))}, {row['bits']} bits: {reason}"
        for row in result["rows"]
        for reason in row["failed"]
    ]


def document(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    parts = [f"# {result['model']}: methods side by side", f"`{result['command']}`", title(result)]
    parts.append(markdown.table(header(result), lines(result)))
    parts += [f"Failed: {line}" for line in failures(result)]
    if result["training"]:
        first = f"The learning rate is chosen by the end of the training text ({result['validation_tokens']} tokens), "
        parts.append(f"{first}with seed {result['seeds'][0]}; the other seeds ran at the chosen one only.")
        parts.append(markdown.table(sweep_header(result), sweep_lines(result)))
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    machine = result["machine"]
    parts.append(f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores; {versions}.")
    return "\n\n".join(parts) + "\n"
