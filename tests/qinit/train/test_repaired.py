import json

import pytest
import torch

import qinit.train.polish
from qinit.linalg.low_rank import LowRank
from qinit.text.samples import Samples
from qinit.train.repaired import FLOOR, Repaired
from tests.helpers import gauss
from tests.models import make_checkpoint
from tests.qinit.train.starts import CPU, load, split, tokens


def test_teacher_and_student_share_all_but_the_targets_and_the_gradient_reaches_each_layer(start):
    directory, bases, factors = start
    teacher = qinit.train.polish._load(directory, json.loads((directory / "config.json").read_text()))
    student = qinit.train.repaired._make_student(teacher, bases, factors, CPU)
    originals = dict(teacher.named_parameters())
    trained = []
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            trained.append(name)
        else:
            assert parameter is originals[name]
    assert sorted(trained) == sorted(f"{name}.{factor}" for name in factors for factor in "AB")
    samples = Samples(tokens(), None, "")
    qinit.train.polish._terms(teacher, student, samples, torch.arange(4)).loss().backward()
    assert all(bool(student.get_parameter(name).grad.any()) for name in trained)
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_blocks_are_recomputed_with_the_gradient_of_a_plain_backward_pass(tmp_path, family, monkeypatch):
    """Dropout stays off although the blocks are told that they are trained: OPT and GPT-2 have it."""
    directory = make_checkpoint(tmp_path / "model", family)
    bases, factors = split(load(directory))
    samples, config = Samples(tokens(), None, ""), json.loads((directory / "config.json").read_text())
    gradients, calls = [], []
    for _ in range(2):
        teacher = qinit.train.polish._load(directory, config)
        student = qinit.train.repaired._make_student(teacher, bases, factors, CPU)
        first = student.get_submodule(next(iter(bases)))
        first.register_forward_hook(lambda *_: calls.append(len(gradients)))
        qinit.train.polish._terms(teacher, student, samples, torch.arange(4)).loss().backward()
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.requires_grad})
        monkeypatch.setattr(f"transformers.{type(teacher).__name__}.supports_gradient_checkpointing", False)
    assert calls == [0, 0, 1]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-7)


def factors(rows=24, columns=40, rank=4, seed=1):
    return LowRank(gauss(rows, rank, seed=seed), gauss(rank, columns, seed=seed + 1))


class TestLayer:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("bias", [False, True])
    def test_it_computes_with_q_and_the_product(self, bias, dtype):
        base, low_rank, x = gauss(24, 40).to(dtype), factors(), gauss(3, 5, 40, seed=9)
        added = gauss(24, seed=7) if bias else None
        layer = Repaired(base, added, low_rank)
        expected = x @ (base.float() + low_rank.B @ low_rank.A).T + (0 if added is None else added)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(layer.weight, base.float())
        assert layer.base.dtype == dtype

    def test_without_factors_it_is_q_alone_and_nothing_of_it_is_trained(self):
        base, x = gauss(24, 40), gauss(5, 40, seed=9)
        layer = Repaired(base, None, None)
        torch.testing.assert_close(layer(x), x @ base.T)
        assert list(layer.parameters()) == []

    @pytest.mark.parametrize("shape", [(24, 40, 4), (40, 24, 24), (1, 8, 1)])
    def test_both_factors_start_with_the_roots_of_the_singular_values(self, shape):
        low_rank = factors(*shape)
        layer = Repaired(torch.zeros(shape[:2]), None, LowRank(100 * low_rank.B, low_rank.A / 100))
        B, A = layer.B.detach(), layer.A.detach()
        torch.testing.assert_close(B @ A, low_rank.B @ low_rank.A, rtol=1e-3, atol=1e-3)
        values = torch.linalg.svdvals(low_rank.B @ low_rank.A)[: shape[2]]
        torch.testing.assert_close(A @ A.T, values.clamp(min=FLOOR * values[0]).diag(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close((B.T @ B).diagonal()[0], values[0], rtol=1e-3, atol=0)

    def test_a_direction_that_holds_nothing_is_not_dead(self):
        low_rank = factors()
        low_rank.B[:, 2] = low_rank.B[:, 1]
        low_rank.A[2] = low_rank.A[1]  # rank 3
        layer = Repaired(gauss(24, 40), None, low_rank)
        norms = layer.A.detach().norm(dim=1)
        assert float(norms.min()) >= 0.99 * (FLOOR * float(norms.max()) ** 2) ** 0.5
        torch.testing.assert_close((layer.B @ layer.A).detach(), low_rank.B @ low_rank.A, rtol=1e-3, atol=1e-3)

    def test_a_plain_lora_start_takes_its_size_from_q(self):
        sizes = []
        for scale in (1.0, 100.0):
            layer = Repaired(scale * gauss(24, 40), None, LowRank(torch.zeros(24, 4), gauss(4, 40)))
            assert not layer.B.any()
            assert layer.A.any()
            sizes.append(layer.size)
        assert sizes[1] == pytest.approx(10 * sizes[0], rel=1e-4)

    def test_a_step_is_in_proportion_to_the_entries(self):
        small, large = (
            Repaired(gauss(24, 40), None, LowRank(scale * factors().B, factors().A)).groups(0.1)
            for scale in (1.0, 16.0)
        )
        for one, other in zip(small, large, strict=True):
            assert other["lr"] == pytest.approx(4 * one["lr"], rel=1e-3)
        rates = [group["lr"] for group in small]
        assert rates[0] * 24**0.5 == pytest.approx(rates[1] * 40**0.5)
