"""bitsandbytes NF4: for runs on the nf grid at 4 bits, whose values are rebuilt from their own levels and an absmax.

    X.weight                uint8 [out*in/2, 1]   row by row, the even element in the high nibble
    X.weight.absmax         f32   [out*in/group]  any value: need not be the block's maximum
    X.weight.quant_map      f32   [16]            must be there
    X.weight.quant_state.bitsandbytes__nf4  uint8[], JSON: quant_type, blocksize, dtype, shape

A run on that grid keeps neither codes nor absmax, but values in the checkpoint's dtype. Of each group they are found
again: under every level that its largest value may have, absmax lies between the bounds that each value's rounding
sets, and one is taken only if all values come back to the last bit (`nf4_codes`).
"""

from __future__ import annotations

import json
from typing import Any

import torch

from qinit.exports.checkpoint import CheckpointExport, Layer, Rounded, left_linear
from qinit.exports.finished import FinishedRun
from qinit.formats.bitsandbytes import DTYPES, NF4, STATE
from qinit.linalg.chunks import row_chunks
from qinit.report.report import Report
from qinit.solver.methods import METHODS
from qinit.source.checkpoint import read_finite

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # of bitsandbytes' kernels


class BnbNf4Export(CheckpointExport):
    name = "bnb-nf4"
    reader = "transformers with bitsandbytes"
    levels = "levels of bitsandbytes times an absmax"

    def cannot_hold(self, run: FinishedRun) -> str | None:
        recipe, method = run.report.recipe, METHODS.get(str(run.report.recipe.get("method")))
        if method is None or method.grid != "nf":
            those = ", ".join(name for name, row in METHODS.items() if row.grid == "nf")
            return f"holds NF4's levels alone, and method {recipe.get('method')} has others; {those} have these"
        rows = [row for row in run.report.layers if row.kept is None]
        if unfit := next((row for row in rows if row.bits != 4 or row.group_size not in BLOCK_SIZES), None):
            sizes = ", ".join(map(str, BLOCK_SIZES))
            return (
                f"holds 4 bits in groups of {sizes}, and {unfit.name} has {unfit.bits} in groups of {unfit.group_size}"
            )
        if len({row.group_size for row in rows}) > 1:
            return "holds groups of one size"
        layers = self.layout(run)
        if len(layers) < len(rows):
            return "packs nn.Linear alone, and some of the quantized layers are none"
        if other := next((each for each in layers if each.shape[1] % each.group_size), None):
            return f"{other.module.name} has {other.shape[1]} inputs, which is no multiple of {other.group_size}"
        return None

    def layout(self, run: FinishedRun) -> list[Layer]:
        rows = {row.name: row for row in run.report.layers if row.kept is None}
        found = []
        for module in run.architecture.linear:
            row, tensor = rows.get(module.name), run.weights.names.find(f"{module.name}.weight")
            if row is not None and tensor is not None and not module.transposed and not module.subclass:
                prefix = tensor.name.removesuffix("weight")
                found.append(Layer(module, prefix, row.bits or 0, row.group_size or 0, {"weight": tensor}))
        return found

    def parts(self, run: FinishedRun, layer: Layer) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        count = layer.module.out_features * layer.module.in_features
        return {
            "weight": (torch.uint8, (count // 2, 1)),
            "weight.absmax": (torch.float32, (count // layer.group_size,)),
            "weight.quant_map": (torch.float32, (len(NF4),)),
            STATE: (torch.uint8, (len(_state(layer)),)),
        }

    def encode(self, run: FinishedRun, layer: Layer, rounded: Rounded) -> dict[str, torch.Tensor]:
        values = read_finite(layer.parts["weight"]).reshape(-1, layer.group_size)
        codes, absmax, exact = nf4_codes(values)
        rounded.groups, rounded.lost = rounded.groups + len(exact), rounded.lost + int((~exact).sum())
        pairs = codes.view(-1, 2)
        return {
            "weight": (pairs[:, :1] << 4) | pairs[:, 1:],
            "weight.absmax": absmax,
            "weight.quant_map": torch.tensor(NF4),
            STATE: torch.frombuffer(bytearray(_state(layer)), dtype=torch.uint8),
        }

    def quantization_config(self, run: FinishedRun, layers: list[Layer]) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": _dtype(layers[0]),
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": left_linear(run, layers),
        }

    def load(self, report: Report) -> str:
        return f"With `pip install bitsandbytes`:\n\n{super().load(report)}"


def nf4_codes(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find codes uint8 [groups, size] and absmax float32 [groups] whose products, rounded to the values' dtype, are
    `values` [groups, size]; and a mask [groups] of where they are, to the last bit. Elsewhere each value goes to the
    nearest level of the group's maximum."""
    codes = torch.empty(values.shape, dtype=torch.uint8)
    absmax, exact = torch.empty(len(values)), torch.empty(len(values), dtype=torch.bool)
    for rows in row_chunks(*values.shape):
        codes[rows], absmax[rows], exact[rows] = _found(values[rows])
    return codes, absmax, exact


def _found(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    table, x = torch.tensor(NF4), values.float()
    middles, magnitude = (table[1:] + table[:-1]) / 2, x.abs()
    top, largest = magnitude.max(1, keepdim=True)
    sign = x.gather(1, largest).sign()[:, 0]
    absmax = torch.where(top > 0, top, 1.0)[:, 0]
    codes = _nearest(x / absmax[:, None], middles)
    exact = ((_levels(table, codes) * absmax[:, None]).to(values.dtype) == values).all(1)
    if bool(exact.all()):
        return codes, absmax, exact
    upper, lower = (  # halfway to the neighbours: what lies between is rounded to the value
        (magnitude + torch.nextafter(values.abs(), torch.full_like(values, towards)).float()) / 2
        for towards in (torch.inf, 0)
    )
    for level in sorted({abs(each) for each in NF4} - {0.0}, reverse=True):
        signs = [each for each in (-1, 1) if each * level in NF4]
        open_ = (~exact & torch.isin(sign, torch.tensor(signs, dtype=sign.dtype))).nonzero()[:, 0]
        if not len(open_):
            continue
        ours, size = values[open_], top[open_] / level
        chosen = codes[open_] if level == 1 else _nearest(x[open_] / size, middles)
        products = _levels(table, chosen)
        used = products.abs()
        least = torch.where(used > 0, lower[open_] / used, 0).amax(1)
        most = torch.where(used > 0, upper[open_] / used, torch.inf).amin(1)
        for candidate in ((least + most) / 2, least, most, size[:, 0]):
            again = (products * candidate[:, None]).to(values.dtype)
            found = open_[(right := (again == ours).all(1) & ~exact[open_])]
            codes[found], absmax[found], exact[found] = chosen[right], candidate[right], True
            if bool(exact[open_].all()):
                break
    return codes, absmax, exact


def _nearest(x: torch.Tensor, middles: torch.Tensor) -> torch.Tensor:
    """Return the level of each value as uint8: how many of the middles between levels lie below it."""
    codes = torch.zeros(x.shape, dtype=torch.uint8)
    for middle in middles.tolist():
        codes += x > middle
    return codes


def _levels(table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return table.index_select(0, codes.flatten().int()).view(codes.shape)


def _state(layer: Layer) -> bytes:
    state = {"quant_type": "nf4", "blocksize": layer.group_size, "dtype": _dtype(layer), "shape": list(layer.shape)}
    return json.dumps(state).encode()


def _dtype(layer: Layer) -> str:
    """Return the name of the type that values are rounded to."""
    dtype = layer.parts["weight"].dtype
    return next(name for name, each in DTYPES.items() if each == dtype)
