import pytest
import torch

from qinit.errors import QinitError
from qinit.grids.integer.rounding import round_gptq
from qinit.linalg.hessian import (
    activation_norm,
    add_second_moment,
    damped_cholesky,
    lower_blocks,
    squared,
    without,
)
from tests.helpers import gauss
from tests.layers import correlated, fading, output_error


@pytest.mark.parametrize("size", [1, 256, 600])
def test_a_second_moment_in_blocks_is_that_of_all_tokens(size):
    x, blocks = gauss(50, size), lower_blocks(size, torch.device("cpu"))
    assert sum(map(torch.numel, blocks)) <= size * max(256, 0.75 * size)
    add_second_moment(blocks, x[:20], 0.0, 1 / 20)
    add_second_moment(blocks, x[20:], 20 / 50, 1 / 50)
    found = squared(blocks)
    torch.testing.assert_close(found, x.T @ x / 50)
    torch.testing.assert_close(found, found.T)


class TestWithout:
    hessian = fading(40, 300)
    A = gauss(5, 40, seed=3, scale=0.02)

    def test_it_is_the_error_after_the_best_b(self):
        residual = gauss(16, 40, seed=4, scale=0.02)
        H, A, E = self.hessian.double(), self.A.double(), residual.double()
        best = E @ H @ A.T @ torch.linalg.inv(A @ H @ A.T)
        least = output_error(E - best @ A, H)
        assert output_error(residual, without(self.hessian, self.A)) == pytest.approx(least, rel=1e-3)
        worse = best + 0.01 * gauss(16, 5, seed=6, scale=0.02)
        assert output_error(E - worse @ A, H) > least

    @pytest.mark.parametrize("tokens", [12, 300])
    def test_both_parts_are_positive_semidefinite(self, tokens):
        hessian = fading(40, tokens)
        left = without(hessian, self.A)
        slack = 1e-4 * float(hessian.diagonal().mean())
        for part in (left, hessian - left):
            assert float(torch.linalg.eigvalsh(part.double()).min()) >= -slack
        torch.testing.assert_close(left, left.T, rtol=0, atol=slack)

    def test_the_adapter_s_own_inputs_are_gone(self):
        left = without(self.hessian, self.A) @ self.A.T
        assert float(left.abs().max()) <= 1e-3 * float((self.hessian @ self.A.T).abs().max())

    def test_dependent_and_zero_rows_change_nothing(self):
        expected = without(self.hessian, self.A)
        dependent = torch.cat([self.A, self.A[:2] + self.A[2:4], 2 * self.A[:1], torch.zeros(1, 40)])
        atol = 2e-3 * float(self.hessian.diagonal().mean())
        torch.testing.assert_close(without(self.hessian, dependent), expected, rtol=0, atol=atol)
        assert torch.equal(without(self.hessian, torch.zeros(3, 40)), self.hessian)

    def test_all_inputs_can_be_repaired_at_full_rank(self):
        left = without(self.hessian, torch.linalg.qr(gauss(40, 40, seed=8, scale=0.02)).Q)
        assert float(left.abs().max()) <= 1e-3 * float(self.hessian.diagonal().mean())


class TestDamping:
    def test_the_factor_is_that_of_the_damped_matrix(self):
        hessian = correlated(48)
        factor = damped_cholesky(hessian, 0.01)
        damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(48)
        torch.testing.assert_close(factor @ factor.T, damped, rtol=1e-4, atol=1e-4 * float(damped.max()))
        assert torch.equal(factor, factor.tril())

    def test_a_singular_matrix_is_damped_as_asked(self):
        hessian = correlated(64, tokens=5)
        factor = damped_cholesky(hessian, 0.01)
        expected = hessian.diagonal() + 0.01 * hessian.diagonal().mean()
        torch.testing.assert_close((factor @ factor.T).diagonal(), expected, rtol=1e-4, atol=0)

    @pytest.mark.parametrize(("eigenvalue", "needed"), [(-0.05, 0.1), (-0.5, 1.0), (-5.0, 10.0)])
    def test_an_indefinite_one_is_damped_ten_times_more_until_it_works(self, eigenvalue, needed):
        diagonal = torch.ones(16)
        diagonal[3] = eigenvalue
        diagonal[4:] += (1 - eigenvalue) / 12  # a mean of one
        factor = damped_cholesky(torch.diag(diagonal), 0.01)
        torch.testing.assert_close(factor.square(), torch.diag(diagonal + needed), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("eigenvalue", [1.0, -0.5])
    def test_what_a_function_makes_is_overwritten_and_a_matrix_is_kept(self, eigenvalue):
        hessian = correlated(24)
        hessian[3, 3] = eigenvalue * float(hessian.diagonal().mean())
        kept, made = hessian.clone(), []

        def make():
            made.append(hessian.T.clone().T)  # its columns side by side
            return made[-1]

        factor = damped_cholesky(make, 0.01)
        assert factor.data_ptr() == made[-1].data_ptr()
        assert len(made) == (1 if eigenvalue > 0 else 3)  # at .01, .1, 1
        assert torch.equal(factor, damped_cholesky(hessian, 0.01))
        assert torch.equal(hessian, kept)

    def test_no_damping_is_an_honest_start(self):
        factor = damped_cholesky(torch.diag(torch.tensor([1.0, 2.0, 0.0])), 0.0)
        torch.testing.assert_close(factor.square().diagonal(), torch.tensor([1.0, 2.0, 0.0]) + 1e-4)

    @pytest.mark.parametrize("broken", [torch.tensor([[1.0, 90.0], [90.0, 1.0]]), torch.full((2, 2), float("nan"))])
    def test_what_stays_indefinite_is_an_error(self, broken):
        with pytest.raises(QinitError, match="2 inputs stays indefinite"):
            damped_cholesky(broken, 0.01)
        with pytest.raises(QinitError, match="calibration text"):
            round_gptq(gauss(3, 2, scale=0.02), broken, bits=2, group_size=8, search="mse")


def test_the_activation_norm_is_that_of_the_outputs():
    x = gauss(300, 32).double()
    E = gauss(16, 32, seed=1)
    expected = float((x @ E.double().T).square().sum(1).mean().sqrt())
    assert activation_norm(E, x.T @ x / 300) == pytest.approx(expected, rel=1e-9)
