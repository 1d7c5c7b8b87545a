import json

import pytest
import torch

import qinit.train.polish
from qinit.text.samples import Samples
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
