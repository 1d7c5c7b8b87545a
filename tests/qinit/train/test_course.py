import os

import pytest
import torch
from torch import nn

from qinit.train.course import Course
from tests.helpers import edit_tensors, gauss, names


class Descent:
    """Three parameters on their way to nothing, the last of which gets its first gradient at step 4 only."""

    def __init__(self, file=None):
        self.parameters = [nn.Parameter(gauss(*shape, seed=n)) for n, shape in enumerate([(3, 4), (5,), (2, 2)])]
        self.course = Course(self.parameters, torch.optim.AdamW(self.parameters, lr=0.1, weight_decay=0), file)

    def to(self, step, every=2):
        """Train up to a step; every second one is judged."""
        while self.course.step < step:
            late = self.course.step >= 3
            loss = sum((p.square() * (n + 1)).sum() for n, p in enumerate(self.parameters[: 3 if late else 2]))
            loss.backward()
            self.course.optimizer.step()
            self.course.optimizer.zero_grad()
            self.course.step += 1
            if self.course.step % every == 0:
                self.course.judge(float(sum(p.detach().square().sum() for p in self.parameters)))
        return self

    def state(self):
        return [p.detach().clone() for p in self.parameters] + list(self.course.best)


def same(one, other):
    return all(map(torch.equal, one.state(), other.state()))


def numbers(course):
    return course.step, course.stale, course.before, course.after


def test_the_best_is_kept_and_can_be_had_back():
    parameter = nn.Parameter(torch.zeros(2))
    course = Course([parameter], torch.optim.Adam([parameter]), None)
    for value, loss in ((1.0, 5.0), (2.0, 3.0), (3.0, 4.0), (4.0, 3.0)):
        parameter.data.fill_(value)
        course.judge(loss)
    assert (course.after, course.stale) == (3.0, 2)
    course.restore_best()
    assert parameter.tolist() == [2.0, 2.0]


def test_a_loss_that_is_no_number_is_not_the_best():
    parameter = nn.Parameter(torch.zeros(1))
    course = Course([parameter], torch.optim.Adam([parameter]), None)
    course.judge(1.0)
    course.judge(float("nan"))
    assert (course.after, course.stale) == (1.0, 1)


@pytest.mark.parametrize("broken_off", [2, 3, 4, 5, 9])
def test_what_goes_on_from_an_evaluation_ends_with_the_same_bits(tmp_path, broken_off):
    whole = Descent().to(12)
    Descent(tmp_path / "course").to(broken_off)
    again = Descent(tmp_path / "course")
    assert again.course.resume()
    assert again.course.step == broken_off - broken_off % 2
    assert same(again.to(12), whole)
    assert numbers(again.course) == numbers(whole.course)


def test_all_numbers_go_on_to_the_last_bit(tmp_path):
    descent = Descent(tmp_path / "course").to(4)
    descent.course.before, descent.course.stale = 1 / 3, 3
    descent.course.judge(float("inf"))
    again = Descent(tmp_path / "course")
    assert again.course.resume()
    assert numbers(again.course) == numbers(descent.course) == (4, 4, 1 / 3, descent.course.after)


def test_without_a_file_there_is_nothing_to_go_on_with(tmp_path):
    assert not Descent().course.resume()
    assert not Descent(tmp_path / "course").course.resume()


def garble(file):
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize(
    "damage",
    [
        garble,
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"{}"),
        lambda file: edit_tensors(file, lambda tensors: tensors.pop("2.best")),  # and the numbers are gone too
        lambda file: edit_tensors(file, lambda tensors: None),
    ],
)
def test_a_damaged_file_is_not_gone_on_with_and_changes_nothing(tmp_path, damage):
    Descent(tmp_path / "course").to(4)
    damage(tmp_path / "course")
    again = Descent(tmp_path / "course")
    assert not again.course.resume()
    assert same(again, Descent())
    assert not again.course.optimizer.state
    assert same(again.to(6), Descent().to(6))


def test_a_file_of_other_parameters_is_not_gone_on_with(tmp_path):
    Descent(tmp_path / "course").to(4)
    parameter = nn.Parameter(torch.zeros(2))
    assert not Course([parameter], torch.optim.Adam([parameter]), tmp_path / "course").resume()
    assert not parameter.any()


def test_a_crash_while_it_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    descent = Descent(tmp_path / "course").to(2)

    def crash(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(os, "fsync", crash)
        with pytest.raises(KeyboardInterrupt):
            descent.to(4)
    again = Descent(tmp_path / "course")
    assert again.course.resume()
    assert again.course.step == 2
    again.to(4)
    assert names(tmp_path) == ["course"]
