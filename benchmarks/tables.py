"""Results to tables, for the screen and for the documents: what a table shows is written down once, here.

A result is a JSON object with `kind` (which of the functions below draws it), `command`, `versions`, `machine` and
`seeds` (null where that was not recorded), and what was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean, stdev

from plan_tables import finetune_memory, scale
from start_tables import starts, starts_by_width
from table import Result, Table


def fidelity(result: Result) -> list[Table]:
    """Starts, with each row's ratios to LoftQ at the same bits and rank."""
    loftq = {(row["bits"], row["rank"]): row for row in result["rows"] if row["method"] == "loftq"}
    kl = ["KL"] if all("kl" in row for row in result["rows"]) else []  # earlier results have none
    rows = []
    for row in result["rows"]:
        peer = loftq[row["bits"], row["rank"]]
        rows.append(
            [
                *(str(row["bits"]), str(row["rank"]), row["method"], f"{row['bits_per_weight']:.3f}"),
                *(f"{row['weight_error']:.4f}", f"{row['perplexity']:.3f}"),
                *(f"{row['perplexity'] / result['full_precision']:.4f}", f"{row['excess_nats']:.4f}"),
                *(f"{row['kl']:.4f}" for _ in kl),
                *(f"{row[key] / peer[key]:.3f}" for key in ("weight_error", "excess_nats")),
            ]
        )
    header = ["bits", "rank", "method", "bits/weight", "weight error", "perplexity", "x full", "excess (nats)"]
    title = f"start perplexity of {result['model']}, full precision {result['full_precision']:.3f}"
    return [Table(title, [*header, *kl, "error / LoftQ", "excess / LoftQ"], rows)]


def mixed(result: Result) -> list[Table]:
    """What mixed widths buy, one table for each rank; that of real runs with the KL divergence, and its share."""
    tables = []
    for one in result["results"]:
        kl = {row["ratio"]: row["kl"] for row in one["rows"] if "kl" in row and row["ratio"] in (0, 1)}
        rows = [
            [
                *(f"{r['ratio']:g}", f"{2 + r['ratio']:g}", r["allocation"]),
                *(f"{r['perplexity']:.3f}", f"{r['closed']:.3f}"),
                *((f"{r['kl']:.4f}", f"{(kl[0] - r['kl']) / (kl[0] - kl[1]):.3f}") if kl else ()),
            ]
            for r in one["rows"]
        ]
        title = f"{result['model']}, 2 and 3 bits, rank {one['rank']}, calibration {result['calibration']}"
        title += f", full precision {result['full_precision']:.3f}"
        header = ["ratio", "bits", "allocation", "perplexity", "closed", *(["KL", "closed of KL"] if kl else [])]
        tables.append(Table(title, header, rows))
    return tables


def schedule(result: Result) -> list[Table]:
    """Variants of EQFT's row."""
    ranks = result["ranks"]
    header = [f"{what}, rank {rank}" for rank in ranks for what in ("error", "excess nats")]
    rows = [
        [
            row["variant"],
            *(f"{value:.4f}" for pair in zip(row["errors"], row["excess_nats"], strict=True) for value in pair),
        ]
        for row in result["rows"]
    ]
    title = f"{result['bits']} bits, full precision {result['full_precision']:.3f}"
    return [Table(title, ["variant", *header], rows)]


def calibration(result: Result) -> list[Table]:
    """Variants of EQFT's row with calibration."""
    full, ranks = result["full_precision"], result["ranks"]
    header = [f"{what}, rank {rank}" for rank in ranks for what in ("x full", "KL")]
    tables = []
    for bits in dict.fromkeys(row["bits"] for row in result["rows"]):
        rows = [
            [
                row["variant"],
                *(
                    f"{value:.4f}"
                    for perplexity, kl in zip(row["perplexities"], row["kl"], strict=True)
                    for value in (perplexity / full, kl)
                ),
            ]
            for row in result["rows"]
            if row["bits"] == bits
        ]
        title = f"{result['model']}, {bits} bits, full precision {full:.3f}, KL on its own text in nats"
        tables.append(Table(title, ["variant", *header], rows))
    return tables


GPTQ, SOLVER = ("gptq_s", "gptq_by_inverse_s"), ("solver_parallel_s", "solver_sequential_s")


def calibration_cost(result: Result) -> list[Table]:
    """The solver against GPTQ, and the exact low rank under H against its closed form."""
    rows = [
        [
            *(str(r["size"]), *(f"{r[key]:.3f}" for key in (*GPTQ, *SOLVER))),
            *(f"{r[solver] / r[gptq]:.2f}" for gptq in GPTQ for solver in SOLVER),
        ]
        for r in result["rows"]
    ]
    header = ["size", "GPTQ s", "GPTQ by H^-1 s", "parallel s", "sequential s", "parallel / GPTQ", "sequential / GPTQ"]
    header += ["parallel / by H^-1", "sequential / by H^-1"]
    closed = [
        [
            *(str(r["size"]), f"{r['low_rank_s']:.3f}", f"{r['low_rank_steps']}: {r['low_rank_objective']:.4f}"),
            *(f"{r[key] / r['low_rank_s']:.0f}" for key in ("closed_form_float64_s", "closed_form_float32_s")),
        ]
        for r in result["rows"]
    ]
    title = f"{result['threads']} threads, 2 bits, rank {result['rank']}"
    names = ["size", "low rank s", "steps: objective", "closed form f64 / low rank", "f32"]
    return [Table(title, header, rows), Table("the exact low rank under H", names, closed)]


def speed(result: Result) -> list[Table]:
    """One matrix: EQFT, LoftQ, one NF4 pass, and the floor."""
    rows = [
        [
            *(row["size"], f"{row['eqft_seconds']:.3f}", f"{row['loftq_seconds']:.2f}", f"{row['nf4_seconds']:.3f}"),
            *(f"{row['loftq_to_eqft']:.1f}", f"{row['eqft_to_nf4']:.2f}", f"{row['eqft_to_floor']:.1f}"),
            f"{row['eqft_error']:.4f} / {row['loftq_error']:.4f}",
        ]
        for row in result["rows"]
    ]
    bandwidth = result["rows"][-1]["bandwidth"]
    title = f"{result['threads']} threads, product {result['flops'] / 1e9:.0f} GFLOP/s, copy {bandwidth / 1e9:.0f} GB/s"
    header = ["size", "eqft s", "LoftQ s", "NF4 pass s", "LoftQ / eqft", "eqft / NF4 pass", "eqft / floor"]
    return [Table(title, [*header, "errors eqft / LoftQ"], rows)]


def memory(result: Result) -> list[Table]:
    """Peak memory by depth."""
    rows = [
        [
            *(row["format"], str(row["layers"]), f"{row['source_bytes'] / 1e9:.2f}", f"{row['peak_bytes'] / 1e6:.0f}"),
            *(f"{row['reported_bytes'] / 1e6:.0f}", f"{row['seconds']:.1f}"),
        ]
        for row in result["rows"]
    ]
    title = f"imports alone: {result['imports_bytes'] / 1e6:.0f} MB"
    return [Table(title, ["format", "layers", "source GB", "peak MB", "reported MB", "seconds"], rows)]


def straight(result: Result) -> list[Table]:
    """Time against weights."""
    rows = [
        [row["size"], f"{row['weights'] / 1e6:.1f}", f"{row['seconds']:.2f}", f"{100 * row['off']:+.1f}"]
        for row in result["rows"]
    ]
    slope, start = 1e9 * result["seconds_per_weight"], result["start"]
    title = f"{result['threads']} threads; the line: {start:.2f} s and {slope:.1f} s for a billion weights"
    return [Table(title, ["shapes", "million weights in layers", "seconds", "off the line, %"], rows)]


def compare(result: Result) -> list[Table]:
    """`qinit compare`."""
    from qinit.compare import table

    return [Table(table.title(result), table.header(result), table.lines(result))]


def estimates(result: Result) -> list[Table]:
    """What runs were said to take, in all and in their parts, and what they took."""

    def pair(said: float, real: float) -> str:
        return f"{said:.1f} / {real:.1f}" if said or real >= 0.05 else "-"

    parts = [part for part in result["rows"][0]["parts"] if any(any(row["parts"][part]) for row in result["rows"])]
    rows = [
        [
            *(row["model"], row["case"], pair(row["estimate"], row["real"]), f"{row['estimate'] / row['real']:.2f}"),
            *(pair(*row["parts"][part]) for part in parts),
            f"{row['asked']:.1f}",
        ]
        for row in result["rows"]
    ]
    title = f"{result['threads']} threads, {'with a busy neighbour' if result['busy'] else 'no other work'}"
    header = ["model", "run", "estimate / real s", "ratio", *parts, "to estimate s"]
    return [Table(title, header, rows)]


SHORT = ("lora", "eqft", "loftq", "qpissa", "qlora")  # the ceiling and each method as it is by default


def compare_short(result: Result) -> list[Table]:
    """`qinit compare`: start and end of a few methods on the first text only."""
    from qinit.compare import table

    text = result["texts"][0]["name"]
    names = ["bits", "method", "bits/weight", f"start {text}", f"end {text}", f"/ LoRA {text}"]
    columns = [table.header(result).index(name) for name in names]
    rows = [
        [line[column] for column in columns]
        for row, line in zip(result["rows"], table.lines(result), strict=True)
        if row["method"] in SHORT
    ]
    return [Table(table.title(result), ["bits", "method", "bits/weight", "start", "end", "end / LoRA's"], rows)]


def qualities(result: Result) -> list[Table]:
    """What each quality, and other methods, give and take."""
    rows = [
        [
            *(str(row["bits"]), row["method"] + (f" {row['quality']}" if row["quality"] else "")),
            *(f"{row['bits_per_weight']:.3f}", row["text"] or "-", f"{row['polish'] or '-'}"),
            *(f"{row['kl']:.3f}", f"{100 * row['agreement']:.1f} %", f"{row['perplexity']:.2f}"),
            f"{row['seconds'] / 60:.1f}",
        ]
        for row in result["rows"]
    ]
    header = [
        "bits",
        "method",
        "bits/weight",
        "calibrated on",
        "polish",
        "KL",
        "same top token",
        "perplexity",
        "minutes",
    ]
    title = f"{result['model']}, rank {result['rank']}, {result['tokens']} tokens, full precision perplexity "
    return [Table(f"{title}{result['full_precision']:.2f}", header, rows)]


def gpu(result: Result) -> list[Table]:
    """Each part's figures, a row each."""
    own = {"kind", "command", "versions", "machine", "seeds", "model", "device"}
    rows = []
    for part, figures in result.items():
        if part not in own:
            nested = {key: value for key, value in figures.items() if isinstance(value, dict)}
            flat = {key: value for key, value in figures.items() if key not in nested}
            flat |= {f"{key}: {inner}": value for key, values in nested.items() for inner, value in values.items()}
            words = ((what, f"{value:.3g}" if isinstance(value, float) else str(value)) for what, value in flat.items())
            rows += [[part, what, word] for what, word in words]
    return [Table(f"{result['model']} on {result['machine']['gpu'] or result['device']}", ["part", "what", ""], rows)]


def embeddings(result: Result) -> list[Table]:
    """What is left of sentence embeddings."""
    rows = [
        [
            *(f"`{row['options']}`" if row["options"] else "as it is", row["text"] or "-"),
            *(f"{row['bits_per_weight']:.3f}", f"{row['cosine']:.4f}", f"{row['least']:.3f}"),
            f"{row['seconds'] / 60:.1f}",
        ]
        for row in result["rows"]
    ]
    title = f"{result['model']}, {result['bits']} bits, rank {result['rank']}, {result['sentences']} sentences"
    header = ["options", "calibrated on", "bits/weight", "cosine to full precision", "least", "minutes"]
    return [Table(title, header, rows)]


def families(result: Result) -> list[Table]:
    """Which families of models load, by head and format; heads of a family that are alike share a row."""
    cells = {(c["family"], c["head"], c["format"], c["calibration"]): c for c in result["cells"]}
    rows: dict[tuple[str, ...], list[str]] = {}
    for family, head in dict.fromkeys((cell["family"], cell["head"]) for cell in result["cells"]):
        words = [
            _both(*(cells[family, head, fmt, calibration] for calibration in ("none", "auto")))
            for fmt in ("dense", "gptq")
        ]
        rows.setdefault((family, *words, cells[family, head, "dense", "auto"]["calibrated"] or "-"), []).append(head)
    table = [[family, ", ".join(heads), *words] for (family, *words), heads in rows.items()]
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("transformers", "peft"))
    return [Table(f"{versions}", ["family", "head", "dense", "gptq", "calibration"], table)]


def _both(free: Result, calibrated: Result) -> str:
    """Say what came of a cell without data and with calibration, once where it is the same."""
    one, other = (_state(cell) for cell in (free, calibrated))
    return one if one == other else f"without data: {one}; calibrated: {other}"


def _state(cell: Result) -> str:
    if cell["state"] != "yes":
        return f"{cell['state']}: {cell['found'][0]}"
    return "yes" if not cell["left"] else f"yes; left: {'; '.join(cell['left'])}"


def snndlft(result: Result) -> list[Table]:
    """AdaLoRA and its spiking versions: means over the seeds, with the standard deviation of the measure."""
    noises = list(result["rows"][0].get("noise") or ())
    rows = []
    for variant in dict.fromkeys(row["variant"] for row in result["rows"]):
        of = [row for row in result["rows"] if row["variant"] == variant]
        spiking = of[0]["spike_rate"] is not None
        rows.append(
            [
                *(variant, _spread([row["after"] for row in of])),
                *(_spread([row["noise"][noise] for row in of]) for noise in noises),
                *(f"{mean([row['trainable'] for row in of]):,.0f}", f"{mean([row['rank_in_use'] for row in of]):.1f}"),
                *(
                    f"{mean([row['ever_trained'] for row in of]):.1f}",
                    f"{mean(r['optimizer_bytes'] for r in of) / 1e6:.2f}",
                ),
                f"{1000 * mean([row['seconds_per_step'] for row in of]):.0f}",
                f"{mean([row['peak_memory_bytes'] for row in of]) / 1e6:.0f}",
                f"{mean([row['spike_rate'] for row in of]):.3f}" if spiking else "-",
                *(
                    [f"{1e9 * mean([row['energy'][kind] for row in of]):.0f}" for kind in ("spiking", "dense")]
                    if spiking
                    else ["-", "-"]
                ),
            ]
        )
    metric, head = result["rows"][0]["metric"], result["rows"][0]["head"]
    before = ", ".join(sorted({f"{row['before']:.3f}" for row in result["rows"]}))
    title = f"{result['model']}, {result['steps']} steps of {result['batch']}, learning rate {result['rate']:g}, "
    title += f"{len(result['seeds'])} seeds, {result['threads']} thread(s); {metric} before: {before}"
    title += f"; head {head:,} values" if head else ""
    header = ["variant", metric, *noises, "trainable", "mean rank", "layers ever chosen", "optimizer MB", "ms / step"]
    return [Table(title, [*header, "peak MB", "spike rate", "nJ / token", "nJ without spikes"], rows)]


def combined(result: Result) -> list[Table]:
    """Two adapters made one: the loss of either text as PEFT combines them and with the start once."""
    texts, rows = result["texts"], []
    for row in result["rows"]:
        kinds = ("naive", "ours") if "weights" in row else ("losses",)
        figures = [f"{row[kind][text]:.3f}" for kind in kinds for text in texts]
        weights = ", ".join(f"{weight:g}" for weight in row.get("weights", ()))
        rows.append([weights or "-", row["what"], *(figures if len(kinds) == 2 else ["-"] * len(texts) + figures)])
    title = f"{result['model']}, 2 bits, rank 16, {result['steps']} steps at {result['rate']:g}, density "
    title += f"{result['density']:g}; loss in nats per token"
    header = ["weights", "what", *(f"PEFT: {text}" for text in texts), *(f"start once: {text}" for text in texts)]
    return [Table(title, header, rows)]


def _spread(values: list[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


KINDS: dict[str, Callable[[Result], list[Table]]] = {
    **{"fidelity": fidelity, "mixed": mixed, "schedule": schedule, "speed": speed},
    **{"calibration": calibration, "calibration-cost": calibration_cost, "memory": memory, "compare": compare},
    **{"straight": straight},
    **{"estimates": estimates, "qualities": qualities, "gpu": gpu, "families": families, "embeddings": embeddings},
    **{"snndlft": snndlft, "combined": combined, "finetune-memory": finetune_memory, "scale": scale},
    "starts": starts,
}
# What a document may take of a result instead of all: <!-- results:NAME:VIEW -->.
VIEWS: dict[str, Callable[[Result], list[Table]]] = {"short": compare_short, "by-width": starts_by_width}
