import torch

from qinit.grids import GRIDS
from qinit.linalg.low_rank import full_svd
from qinit.solver.methods import Method
from qinit.solver.solve import solve
from qinit.solver.spec import LayerSpec
from tests.helpers import gauss

EXACT = GRIDS["exact"]
PISSA = Method("pissa", "Meng et al. 2024, arXiv:2404.02948", "exact", "none", "low-rank", 1, refit=False)


def test_no_bit_changes_and_what_is_returned_is_a_copy():
    weight = gauss(5, 40)
    kept = weight.clone()
    quantized, residual = EXACT.quantize(weight, weight, bits=16, group_size=16, search="none")
    assert not residual.any()
    for _ in range(2):
        values = EXACT.dequantize(quantized)
        assert torch.equal(values, kept)
        values.zero_()  # whoever stores it rounds it in place
    assert torch.equal(weight, kept)
    assert EXACT.bits_per_weight(16, 64) == 16


def test_an_initializer_of_a_16_bit_base_is_a_row():
    weight = gauss(24, 32, seed=1)
    solution = solve(weight, LayerSpec(PISSA, 16, 32, 4, PISSA.iterations))
    principal = full_svd(weight, 4).factors
    torch.testing.assert_close(EXACT.dequantize(solution.quantized), weight - principal.B @ principal.A)
    assert solution.error < 1e-6
    rounded = solve(weight, LayerSpec(PISSA, 16, 32, 4, PISSA.iterations, storage=torch.bfloat16))
    assert 1e-4 < rounded.error < 1e-2  # what bfloat16 loses of it
