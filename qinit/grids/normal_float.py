"""The normal-float grid: quantiles of the normal distribution, scaled by a block's absolute maximum.

Levels as LoftQ's (Li et al. 2023, arXiv:2310.08659) for 2, 3 and 4 bits; at 4 bits they are QLoRA's NF4
(Dettmers et al. 2023, arXiv:2305.14314) to within float rounding.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from qinit.grids.base import Grid, Quantized
from qinit.linalg.chunks import grouped, row_chunks

OFFSET = 0.9677083  # the outermost quantile, from QLoRA's create_normal_map
CANDIDATES = 24


@lru_cache
def levels(bits: int) -> torch.Tensor:
    """The 2^bits levels, ascending, from -1 to 1, with an exact zero; one more positive than negative."""
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    half = 2 ** (bits - 1)
    positive = normal.icdf(torch.linspace(OFFSET, 0.5, half + 1, dtype=torch.float64)[:-1])
    negative = -normal.icdf(torch.linspace(OFFSET, 0.5, half, dtype=torch.float64)[:-1])
    values = torch.cat([positive, torch.zeros(1, dtype=torch.float64), negative]).sort().values
    return (values / values.max()).float()


class NormalFloatGrid(Grid):
    name = "nf"
    bits: tuple[int, ...] = (2, 3, 4)
    searches: tuple[str, ...] = ("absmax", "mse")

    def quantize(
        self,
        target: torch.Tensor,
        weight: torch.Tensor,
        *,
        bits: int,
        group_size: int,
        search: str,
        previous: Quantized | None = None,
    ) -> tuple[Quantized, torch.Tensor]:
        table = levels(bits).to(weight.device)
        middles = (table[1:] + table[:-1]) / 2
        rows, columns = weight.shape
        codes = torch.empty((rows, columns), dtype=torch.uint8, device=weight.device)
        scales = torch.empty((rows, -(-columns // group_size)), device=weight.device)
        residual = torch.empty_like(weight)
        for part in row_chunks(rows, columns, device=weight.device):
            x = grouped(target[part], group_size)
            scale = x.abs().amax(-1)
            if search == "mse":
                scale = _best_scale(x, scale, table, middles)
            scale = torch.where(scale > 0, scale, 1.0)
            chosen = torch.bucketize(x / scale[..., None], middles)
            scales[part] = scale
            codes[part] = chosen.to(torch.uint8).flatten(1)[:, :columns]
            residual[part] = weight[part] - (table[chosen] * scale[..., None]).flatten(1)[:, :columns]
        return Quantized(bits, group_size, codes, scales), residual

    def dequantize(self, quantized: Quantized) -> torch.Tensor:
        table = levels(quantized.bits).to(quantized.codes.device)
        result = torch.empty(quantized.codes.shape, dtype=torch.float32, device=quantized.codes.device)
        for rows in row_chunks(*result.shape, device=result.device):
            values = table[grouped(quantized.codes[rows], quantized.group_size).int()]
            result[rows] = (values * quantized.scales[rows, :, None]).flatten(1)[:, : result.shape[1]]
        return result

    def bits_per_weight(self, bits: int, group_size: int) -> float:
        return bits + 32 / group_size  # float32 absmax, as LoftQ and bitsandbytes keep it


def _best_scale(x: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor, middles: torch.Tensor) -> torch.Tensor:
    """The least-squares scale <x,c>/<c,c> of the best clipping ratio, c the levels chosen under that ratio."""
    best_gain, best = torch.full_like(absmax, -1.0), absmax
    for ratio in torch.linspace(0.4, 1.0, CANDIDATES).tolist():
        c = table[torch.bucketize(x / (absmax * ratio).clamp(min=1e-30)[..., None], middles)]
        xc, cc = (x * c).sum(-1), (c * c).sum(-1).clamp(min=1e-30)
        better = xc * xc / cc > best_gain
        best_gain = torch.where(better, xc * xc / cc, best_gain)
        best = torch.where(better, xc / cc, best)
    return best
