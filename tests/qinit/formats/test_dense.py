from pathlib import Path

import pytest
import torch

from qinit.files.tensors import StoredTensor
from qinit.formats import FORMATS
from qinit.grids import GRIDS
from qinit.source.targets import LinearModule, Target
from tests.helpers import gauss

DENSE, INT = FORMATS["dense"], GRIDS["int"]


def make_target(dtype=torch.bfloat16, transposed=False) -> Target:
    shape = (40, 24) if transposed else (24, 40)
    tensor = StoredTensor("model.x.weight", dtype, shape, Path("model.safetensors"), 0)
    return Target(LinearModule("model.x", 24, 40, transposed), tensor)


def quantized(grid="int", bits=2):
    weight = gauss(24, 40)
    search = GRIDS[grid].searches[0]
    return GRIDS[grid].quantize(weight, weight, bits=bits, group_size=16, search=search)[0]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("grid", GRIDS)
def test_q_is_stored_in_the_checkpoint_s_dtype_and_orientation(grid, dtype, transposed):
    target, q = make_target(dtype, transposed), quantized(grid)
    stored = DENSE.encode(target, q, GRIDS[grid])
    (spec,) = DENSE.specs(target, 2, 16)
    assert [(spec.name, spec.dtype, spec.shape)] == [(n, t.dtype, t.shape) for n, t in stored.items()]
    values = stored["model.x.weight"]
    assert values.is_contiguous()
    expected = GRIDS[grid].dequantize(q).to(DENSE.storage(target))
    assert torch.equal(values.T if transposed else values, expected)
    decoded = DENSE.decode(target, stored, 2, 16)
    assert decoded.dtype == torch.float32
    assert decoded.is_contiguous()
    assert torch.equal(decoded, expected.float())


def test_it_holds_every_grid_and_shape_and_needs_no_configuration():
    for grid in GRIDS:
        assert DENSE.cannot_hold(grid, 2, 7) is None
    assert DENSE.cannot_hold_shape(LinearModule("x", 3, 5, transposed=False), 64) is None
    assert DENSE.quantization_config({"model.x": (2, 64)}, []) is None
    assert DENSE.mixed_bits


def test_it_has_no_codes():
    target = make_target()
    assert DENSE.codes(target, DENSE.encode(target, quantized(), INT), 2, 16) is None


@pytest.mark.parametrize("transposed", [False, True])
def test_an_expert_may_lie_in_several_tensors_one_after_the_other_along_its_outputs(transposed):
    def stored(name, outputs):
        shape = (40, outputs) if transposed else (outputs, 40)
        return StoredTensor(name, torch.bfloat16, shape, Path("model.safetensors"), 0)

    target = Target(LinearModule("experts[0]", 24, 40, transposed), stored("w1", 16), (stored("w3", 8),))
    tensors = DENSE.encode(target, quantized(), INT)
    assert [(spec.name, spec.shape) for spec in DENSE.specs(target, 2, 16)] == [
        (name, tuple(tensor.shape)) for name, tensor in tensors.items()
    ]
    decoded = DENSE.decode(target, tensors, 2, 16)
    assert torch.equal(decoded, INT.dequantize(quantized()).bfloat16().float())
    w1 = tensors["w1"].T if transposed else tensors["w1"]
    assert torch.equal(w1.float(), decoded[:16])
