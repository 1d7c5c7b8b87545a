import torch

from qinit.errors import CheckpointError
from qinit.processes.group import ALONE
from tests.qinit.processes.together import together


def all_calls(processes):
    """Use every call once."""
    tensor = torch.full((3,), 10.0 * processes.rank if processes.rank else 1.0)
    own = processes.rank + 1.0
    processes.chain([tensor], lambda place: tensor.add_(own), "a chain")
    spread = torch.full((2, 2), processes.rank)
    processes.spread(list(spread), [0, processes.count - 1], "rows")
    return (
        processes.gather(processes.rank, "ranks"),
        processes.to_first(processes.rank, "to the first"),
        processes.from_first(lambda: ("from", processes.rank), "from the first"),
        tensor.tolist(),
        spread.tolist(),
    )


def test_each_is_told_the_same():
    first, *others = together(3, all_calls)
    chained, spread = [6.0] * 3, [[0, 0], [2, 2]]  # 1, and 2 and 3 of those behind it
    assert first == ([0, 1, 2], [0, 1, 2], ("from", 0), chained, spread)
    assert others == [([0, 1, 2], [], ("from", 0), chained, spread)] * 2


def test_one_alone_tells_itself():
    assert all_calls(ALONE) == ([0], [0], ("from", 0), [1.0] * 3, [[0, 0], [0, 0]])


def test_an_error_of_one_is_that_of_all_with_its_notes():
    def do(processes):
        if processes.rank == 1:
            error = CheckpointError("a file: damaged")
            error.add_note("kept")
            raise error
        processes.gather(0, "work")

    for error in together(3, do):
        assert isinstance(error, CheckpointError)
        assert str(error) == "a file: damaged"
        assert error.__notes__ == ["kept"]


def test_what_is_no_error_of_a_user_s_is_said_as_it_is():
    def do(processes):
        if processes.rank:
            raise KeyError("x")
        processes.meet("work")

    first, second = together(2, do)
    assert isinstance(second, KeyError)
    assert isinstance(first, RuntimeError)
    assert str(first) == "KeyError: 'x'"


def test_processes_at_different_calls_do_not_wait_for_ever():
    found = together(2, lambda processes: processes.gather(0, f"call {processes.rank}"))
    assert all(isinstance(error, RuntimeError) and "others are not" in str(error) for error in found)
