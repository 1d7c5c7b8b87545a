import math

import pytest
import torch

from qinit.planner import operations as module
from qinit.planner.operations import MOST_SHAPES, OPERATIONS, Machine, timed
from qinit.solver.methods import CALIBRATED, METHODS
from qinit.solver.spec import LayerSpec

CPU = torch.device("cpu")
SMALL = {
    "product": (8, 16, 24),
    "step": (8, 16, 24),
    "attention": (2, 8, 4),
    "recall": (2, 4, 2, 8, 4),
    "draw": (3, 50),
    "moment": (8, 16),
    "directions": (40, 48),
    "pass": (7, 9),
    "exponential": (63,),
    "small": (100,),
}
LARGE = {
    "product": (65536, 8192, 28672),
    "step": (256, 8192, 28672),
    "attention": (64, 4096, 128),
    "recall": (64, 64, 8, 2048, 128),
    "draw": (1024, 262144),
    "moment": (65536, 28672),
    "directions": (1056, 28672),
    "pass": (70 * 10**9,),
    "exponential": (65536, 262144),
    "small": (5000,),
}


def spec(method="eqft", calibrated=False):
    row = (CALIBRATED if calibrated else METHODS)[method]
    return LayerSpec(row, bits=2, group_size=32, rank=4, iterations=row.iterations)


@pytest.fixture
def machine(monkeypatch):
    """A machine on which every call takes a second; what it made is in `machine.made`."""
    made = []
    monkeypatch.setattr(module, "timed", lambda action, device: made.append(action) or 1.0)
    machine = Machine(CPU)
    machine.made = made
    return machine


def test_every_operation_has_its_shapes_here():
    assert SMALL.keys() == LARGE.keys() == OPERATIONS.keys()


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_small_shape_is_measured_as_it_is(machine, name):
    assert OPERATIONS[name].cut(SMALL[name], "cpu") == SMALL[name]
    assert machine.seconds(name, SMALL[name], 3) == pytest.approx(3)
    machine.made[0]()  # it runs


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_of_a_large_shape_a_part_is_measured_and_scaled(name, kind):
    operation, shape = OPERATIONS[name], LARGE[name]
    cut = operation.cut(shape, kind)
    assert all(1 <= part <= whole for part, whole in zip(cut, shape, strict=True))
    assert operation.cost(cut) < operation.cost(shape)
    if name in ("product", "step"):
        assert math.prod(cut) <= module.LARGEST[kind]
        assert cut[1] * cut[2] <= module.LARGEST_MATRIX[kind]
    if name in ("draw", "pass", "exponential"):
        assert math.prod(cut) <= module.LARGEST_VECTOR[kind]


def test_what_was_cut_counts_by_its_share(machine):
    assert machine.seconds("product", (1 << 16, 64, 64)) == pytest.approx((1 << 16) / module.ROWS)
    assert machine.seconds("moment", (module.ROWS, 4 * module.ROWS)) == pytest.approx(4)


def test_a_shape_is_measured_once(machine):
    for _ in range(3):
        machine.seconds("product", (8, 16, 24))
        machine.seconds("product", (1 << 16, 64, 64))
        machine.seconds("product", (1 << 17, 64, 64))  # cut to the same
    assert len(machine.made) == 2


def test_of_many_shapes_some_are_measured_and_the_others_scaled(machine):
    sizes = [8 * (1 + number) for number in range(50)]
    found = [machine.seconds("product", (8, size, 8)) for size in sizes]
    assert len(machine.made) == MOST_SHAPES
    assert found[:MOST_SHAPES] == [1.0] * MOST_SHAPES
    assert found[-1] == pytest.approx(sizes[-1] / sizes[MOST_SHAPES - 1])  # the nearest
    for rows in sizes:
        machine.solving(spec(), rows, 64)
    assert len(machine.made) == 2 * MOST_SHAPES


def test_after_its_time_an_operation_is_measured_once_only(machine):
    machine.spent = 100.0
    assert machine.seconds("pass", (10,)) == 1
    assert machine.seconds("pass", (20,)) == 2
    assert machine.seconds("draw", (1, 10)) == 1
    assert len(machine.made) == 2


def test_what_takes_the_most_is_measured_again(machine, monkeypatch):
    machine.seconds("pass", (10,), 1)
    machine.seconds("draw", (1, 10), 100)
    seen = []

    def again(action, _device):
        seen.append(action)
        machine.spent += 0.4
        return 4.0

    monkeypatch.setattr(module, "timed", again)
    machine.spent = module.MOST_SECONDS - 1
    machine.sharpen()
    assert len(seen) == 3
    assert machine.seconds("draw", (1, 10)) == pytest.approx((1 + 3 * 4) / 4)
    assert machine.seconds("pass", (10,)) == 1
    Machine(CPU).sharpen()  # nothing to measure


def test_a_small_matrix_is_solved_as_it_is(machine):
    assert machine.solving(spec(), 32, 64, 5) == pytest.approx(5)
    machine.made[0]()


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_part_of_a_large_matrix_is_solved(machine, calibrated):
    found = machine.solving(spec(calibrated=calibrated), 4000, 8000)
    (((rows, columns),),) = (shapes for shapes in machine.known.values())
    assert columns % 32 == 0
    assert rows * columns <= 2 * module.SOLVED
    assert 0.4 < rows / columns < 0.6
    share = 4000 * 8000 / (rows * columns)
    law = (1 + 8000 / module.INPUTS_OF_HALF) / (1 + columns / module.INPUTS_OF_HALF) if calibrated else 1
    assert found == pytest.approx(share * law)


def test_by_a_full_svd_few_rounds_of_a_small_part_are_solved(machine):
    many = LayerSpec(METHODS["loftq"], bits=2, group_size=64, rank=4, iterations=12)
    assert machine.solving(many, 2048, 2048) == pytest.approx(12 / module.ROUNDS_BY_SVD * 8**3)
    ((known, shapes),) = machine.known.items()
    assert known.iterations == module.ROUNDS_BY_SVD
    assert list(shapes) == [(256, 256)]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_measured(machine, method):
    machine.solving(spec(method, calibrated=method in CALIBRATED), 32, 64)
    machine.made[0]()


def test_a_call_is_repeated_until_it_says_something(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def action():
        calls.append(now[0])
        now[0] += 1.0 if len(calls) == 1 else 0.008  # the first loads something

    assert timed(action, CPU) == pytest.approx(0.008)
    assert len(calls) == 1 + 3

    def slow():
        now[0] += 0.5

    assert timed(slow, CPU) == pytest.approx(0.5)
