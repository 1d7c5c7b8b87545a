"""Results on the published starts of LoRA, to tables."""

from __future__ import annotations

from statistics import mean

from table import Result, Table


def starts(result: Result) -> list[Table]:
    """What each start takes by qinit's streamed command and by PEFT, each in a process of its own."""
    rows = []
    for row in result["rows"]:
        ours, theirs = row["qinit"], row["peft"]
        line = [row["method"]]
        for key, scale, digits in (("seconds", 1.0, 1), ("cpu_seconds", 1.0, 1), ("peak_bytes", 1e6, 0)):
            line += [f"{each[key] / scale:.{digits}f}" if each else "-" for each in (ours, theirs)]
            line.append(f"{ours[key] / theirs[key]:.2f}" if theirs else "-")
        rows.append(line)
    header = ["method"]
    for what in ("seconds", "CPU seconds", "peak MB"):
        header += [f"qinit, {what}", f"PEFT, {what}", "ratio"]
    text, imports = result["text"], result["imports"]
    title = f"{result['model']}, rank {result['rank']}, PEFT's model in {result['dtype']}; text: {text['samples']} x "
    title += f"{text['length']} tokens of {text['source']}; imports alone: " + ", ".join(
        f"{who} {each['seconds']:.1f} s and {each['peak_bytes'] / 1e6:.0f} MB" for who, each in imports.items()
    )
    return [Table(title, header, rows)]


def starts_by_width(result: Result) -> list[Table]:
    """`qinit compare` of starts: one row each, with where it starts, where it ends and at which rate, by width; a table
    for each text. What is not measured yet is a dash."""
    from qinit.compare import table

    widths = sorted({row["bits"] for row in result["rows"]}, reverse=True)
    by_name = {(row["method"], row["bits"]): row for row in result["rows"]}
    methods = list(dict.fromkeys(row["method"] for row in result["rows"]))
    tables = []
    for text in (each["name"] for each in result["texts"]):
        rows = [_by_width(method, [by_name.get((method, bits)) for bits in widths], text) for method in methods]
        header = ["method", "trained"]
        for bits in widths:
            header += [f"{bits:g} bits: start", "end", "rate"]
        tables.append(Table(f"{table.title(result)}; {text}", header, rows))
    return tables


def _by_width(method: str, rows: list[Result | None], text: str) -> list[str]:
    trained = [row["trainable"] for row in rows if row and row.get("trainable")]
    line = [method, f"{mean(trained):,.0f}" if trained else "-"]
    for row in rows:
        start, end = ((row or {}).get(key) for key in ("start", "end"))
        line.append(f"{start[text]:.2f}" if start else "-")
        found = end[text] if end else None
        spread = f" ± {found['spread']:.2f}" if found and found["spread"] is not None else ""
        line.append(f"{found['mean']:.2f}{spread}" if found and found["mean"] is not None else "-")
        line.append(f"{row['rate']:g}" if row and row.get("rate") else "-")
    return line
