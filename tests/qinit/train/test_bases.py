import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qinit.formats import FORMATS
from qinit.grids import GRIDS, Quantized
from qinit.train.bases import CodedBase, DenseBase, through
from tests.helpers import gauss
from tests.qinit.formats.gptq.test_format import GROUP, make_target, random_codes

INT, GPTQ = GRIDS["int"], FORMATS["gptq"]
SHAPES = [(24, 64, 16), (5, 37, 16), (3, 7, 7), (1, 6, 4), (8, 40, 64)]  # out, in, group size


def coded(bits=2, rows=24, columns=40, group_size=16, seed=0):
    """Codes and zero points over their whole ranges, scales as float16 holds them."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group_size)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (rows, groups), generator=generator, dtype=torch.uint8)
    scales = torch.rand(rows, groups, generator=generator).add(0.1).half().float()
    return Quantized(bits, group_size, codes, scales, zeros)


def stretched(base, seed=5):
    """Give its scales a few steps of training."""
    base.stretch.data = gauss(*base.stretch.shape, seed=seed, scale=0.1)
    return base


def dense(quantized, stretch):
    """Q as one expression, for autograd."""
    scales = (quantized.scales * stretch.exp()).repeat_interleave(quantized.group_size, dim=1)
    zeros = quantized.zeros.repeat_interleave(quantized.group_size, dim=1)
    columns = quantized.codes.shape[1]
    return scales[:, :columns] * (quantized.codes.float() - zeros[:, :columns].float())


class TestWeight:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_it_is_what_the_grid_says_of_these_codes(self, bits, shape):
        quantized = coded(bits, *shape)
        base = CodedBase(quantized)
        assert torch.equal(base.weight(torch.float32), INT.dequantize(quantized))
        assert torch.equal(base.stretched(), quantized.scales)

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_with_trained_scales_it_is_what_the_grid_says_of_those(self, bits, shape):
        quantized = coded(bits, *shape)
        base = stretched(CodedBase(quantized))
        scales = base.stretched()
        assert not torch.allclose(scales, quantized.scales)
        assert torch.equal(base.weight(torch.float32), INT.dequantize(replace(quantized, scales=scales)))

    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_it_is_what_a_packed_layer_is_decoded_to(self, bits):
        quantized = random_codes(bits)
        stored = GPTQ.encode(make_target(), quantized, INT)
        base = CodedBase(GPTQ.codes(make_target(), stored, bits, GROUP))
        assert torch.equal(base.weight(torch.float32), GPTQ.decode(make_target(), stored, bits, GROUP))

    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_in_bfloat16_only_the_scale_and_the_product_are_rounded(self, bits):
        base = CodedBase(coded(bits))
        torch.testing.assert_close(base.weight(torch.bfloat16).float(), base.weight(torch.float32), rtol=2**-7, atol=0)

    def test_a_scale_that_is_trained_keeps_its_sign_however_far_it_goes(self):
        base = CodedBase(coded())
        base.stretch.data.fill_(-30.0)
        assert bool((base.stretched() > 0).all())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_a_dense_one_is_as_it_was_given(self, dtype):
        weight = gauss(24, 40).to(dtype)
        base = DenseBase(weight)
        assert base.stored is weight
        assert torch.equal(base.weight(torch.float32), weight.float())


class TestMemory:
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_a_code_of_four_bits_or_fewer_takes_half_a_byte(self, bits):
        base = CodedBase(coded(bits))
        assert base.codes.nbytes == (24 * 40 // 2 if bits <= 4 else 24 * 40)
        others = [tensor for name, tensor in base.state_dict().items() if name != "codes"]
        assert max(tensor.numel() for tensor in others) == 24 * 3  # one to a group

    @pytest.mark.parametrize("base", [CodedBase(coded()), DenseBase(gauss(24, 40))])
    def test_no_weight_is_kept_for_the_pass_back_but_what_is_stored(self, base, monkeypatch):
        made, saved = [], []
        real = type(base).weight

        def weight(self, dtype):
            found = real(self, torch.float64)  # so that a dense one is a copy too
            made.append(weakref.ref(found))
            return found

        monkeypatch.setattr(type(base), "weight", weight)
        x = gauss(3, 40).double().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda held: held):
            y = through(base, x)
        assert len(made) == 1
        assert made[0]() is None
        assert sum(tensor.numel() for tensor in saved) <= x.numel()
        y.sum().backward()
        assert len(made) == 2  # made once more
        assert made[1]() is None


class TestGradients:
    @settings(deadline=None, max_examples=40)
    @given(
        bits=st.sampled_from([2, 3, 4, 8]),
        rows=st.integers(1, 9),
        columns=st.integers(1, 40),
        group_size=st.sampled_from([1, 3, 4, 16, 64]),
        batch=st.lists(st.integers(1, 4), min_size=1, max_size=3),
        seed=st.integers(0, 2**16),
    )
    def test_they_are_those_of_the_same_matrix_made_by_autograd(self, bits, rows, columns, group_size, batch, seed):
        quantized = coded(bits, rows, columns, group_size, seed)
        base = stretched(CodedBase(quantized), seed)
        x, upstream = gauss(*batch, columns, seed=seed + 1), gauss(*batch, rows, seed=seed + 2)
        results = []
        for product in (through, lambda base, x: x @ dense(quantized, base.stretch).T):
            given_x = x.clone().requires_grad_()
            y = product(base, given_x)
            results.append((y.detach(), *torch.autograd.grad(y, (given_x, base.stretch), upstream)))
        for found, wanted in zip(*results, strict=True):
            assert found.shape == wanted.shape
            # Terms of one sum are up to 255 times its scale, and may cancel.
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()) + 2e-4 * bits**2)

    def test_of_float64_they_agree_with_finite_differences(self):
        base = stretched(CodedBase(coded(rows=4, columns=10, group_size=4)))
        x = gauss(3, 10).double().requires_grad_()
        assert torch.autograd.gradcheck(lambda x: through(base, x), (x,))

    def test_where_the_input_asks_for_none_the_scales_still_get_theirs(self):
        quantized = coded()
        base = CodedBase(quantized)
        x = gauss(3, 40)
        through(base, x).square().sum().backward()
        found, base.stretch.grad = base.stretch.grad, None
        (x @ dense(quantized, base.stretch).T).square().sum().backward()
        torch.testing.assert_close(found, base.stretch.grad, rtol=1e-4, atol=1e-3)

    def test_scales_that_are_not_trained_get_none_and_nothing_is_kept_for_them(self):
        base, x, saved = CodedBase(coded()), gauss(3, 40).requires_grad_(), []
        base.stretch.requires_grad_(False)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda held: held):
            y = through(base, x)
        y.sum().backward()
        assert saved == []
        assert base.stretch.grad is None
        torch.testing.assert_close(x.grad, base.weight(torch.float32).sum(0).expand(3, -1))

    def test_of_a_dense_one_nothing_is_trained(self):
        weight, x = gauss(24, 40), gauss(3, 40).requires_grad_()
        base = DenseBase(weight)
        assert list(base.parameters()) == []
        through(base, x).sum().backward()
        torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1))
