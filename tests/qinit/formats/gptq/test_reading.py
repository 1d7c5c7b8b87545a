import pytest
import torch

from qinit.formats.gptq.packing import pack_rows
from qinit.formats.gptq.reading import dequantized, grid_of
from tests.mixed import gptq_only
from tests.qinit.formats.gptq.test_format import GPTQ, IN, INT, make_target, random_codes


@pytest.mark.parametrize(
    ("dynamic", "expected"),
    [
        ({}, 2),
        ({r"+:^a\.b$": {"bits": 4}}, 4),
        ({r"+:a": {"bits": 4}}, 4),  # from the start, not the whole name
        ({r"+:b": {"bits": 4}}, 2),
        ({r"a": {"bits": 8}, r"+:^a\.b$": {"bits": 4}}, 8),  # the first that matches; no sign is +
        ({r"+:^a\.b$": {"group_size": 32}}, 2),
    ],
)
def test_the_width_is_the_one_that_gptqmodel_reads(dynamic, expected):
    bits, group_size = grid_of("a.b", {"bits": 2, "group_size": 64, "dynamic": dynamic})
    assert (bits, group_size) == (expected, 32 if "32" in str(dynamic) else 64)
    gptq_only()
    from gptqmodel.quantization.config import dynamic_get

    assert dynamic_get(dynamic, "a.b", "bits", 2) == expected


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_weights_come_back_exactly(bits):
    quantized = random_codes(bits)
    tensors = GPTQ.encode(make_target(), quantized, INT)
    parts = [tensors[f"model.layers.0.mlp.up_proj.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")]
    assert torch.equal(dequantized(*parts, bits=bits), INT.dequantize(quantized))


def test_the_groups_are_those_that_are_stored():
    quantized = random_codes(4)
    tensors = GPTQ.encode(make_target(), quantized, INT)
    order = torch.randperm(IN, generator=torch.Generator().manual_seed(0))
    prefix = "model.layers.0.mlp.up_proj."
    shuffled = pack_rows(quantized.codes[:, order].contiguous(), 4).T.contiguous()
    found = dequantized(
        shuffled, tensors[prefix + "qzeros"], tensors[prefix + "scales"], tensors[prefix + "g_idx"][order], bits=4
    )
    assert torch.equal(found, INT.dequantize(quantized)[:, order])
