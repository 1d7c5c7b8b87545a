import os
import re

import pytest

from qinit.compare import workers
from qinit.compare.schedule import Schedule
from qinit.compare.workers import Begun, Ended, Stepped, carry_out, set_out
from qinit.errors import CompareError, OutputError, ProcessesError
from qinit.processes.group import Processes
from tests.qinit.compare.comparisons import comparison, found_for
from tests.qinit.processes.together import together


@pytest.fixture
def schedule(tmp_path):
    return Schedule(comparison(out=tmp_path))


def carried_out(schedule, work, monkeypatch):
    """Return the events of a comparison whose cells are worked on by `work`."""
    events = []
    monkeypatch.setattr(workers, "work", work)
    carry_out(schedule, events.append)
    return events


class TestCarryOut:
    def test_every_cell_begins_and_ends_once(self, schedule, monkeypatch):
        whole = found_for(schedule.comparison)
        events = carried_out(schedule, lambda made, cell, progress: whole[cell], monkeypatch)
        begun = [event.cell for event in events if isinstance(event, Begun)]
        assert begun == [event.cell for event in events if isinstance(event, Ended)]
        assert len(begun) == len(set(begun)) == schedule.comparison.cells
        assert schedule.found == {cell: whole[cell] for cell in begun}

    @pytest.mark.parametrize(
        ("error", "said"), [(CompareError("no text"), "no text"), (MemoryError("no\nroom"), "MemoryError: no room")]
    )
    def test_a_cell_that_fails_ends_its_row_alone(self, schedule, monkeypatch, error, said):
        whole = found_for(schedule.comparison)
        broken = schedule.comparison.rows[1]

        def work(made, cell, progress):
            if cell.row == broken:
                raise error
            return whole[cell]

        carried_out(schedule, work, monkeypatch)
        assert [found for cell, found in schedule.found.items() if cell.row == broken] == [{"failed": said}]
        assert all("failed" not in found for cell, found in schedule.found.items() if cell.row != broken)

    def test_results_that_cannot_be_written_stop_it(self, schedule, monkeypatch):
        def work(made, cell, progress):
            raise OutputError("the disk is full")

        with pytest.raises(OutputError, match="disk is full"):
            carried_out(schedule, work, monkeypatch)

    def test_steps_are_told_now_and_then(self, schedule, monkeypatch):
        whole = found_for(schedule.comparison)
        clock = iter(number * 0.4 for number in range(10_000))
        monkeypatch.setattr(workers.time, "monotonic", lambda: next(clock))

        def work(made, cell, progress):
            for step in range(9):
                progress(step, 1.0)
            return whole[cell]

        steps = [event.step for event in carried_out(schedule, work, monkeypatch) if isinstance(event, Stepped)]
        assert 0 < len(steps) < 9 * schedule.comparison.cells


class TestSeveralProcesses:
    @pytest.fixture(autouse=True)
    def worked(self, tmp_path, monkeypatch):
        """Where each process notes the cells that it has worked on."""

        def work(made, cell, progress):
            (tmp_path / f"{os.getpid()}-{cell.name.replace('/', '-')}").touch()
            return found_for(made)[cell]

        monkeypatch.setattr(workers, "work", work)
        return lambda: [file.name for file in tmp_path.glob("[0-9]*-*")]

    def test_each_takes_cells_and_the_first_knows_all(self, tmp_path, worked):
        made = comparison(out=tmp_path / "out")

        def do(processes):
            schedule, events = Schedule(made), []
            set_out(made, processes)
            carry_out(schedule, events.append, processes=processes)
            return schedule.found, len(events)

        (found, told), others = together(2, do)
        alone = Schedule(made)
        carry_out(alone, lambda event: None)
        assert found == alone.found
        assert (told, others[0]) == (made.cells + made.cells // 2 + made.cells % 2, {})
        both = [name.partition("-") for name in worked() if not name.startswith(f"{os.getpid()}-")]
        assert len({process for process, _, _ in both}) == 2
        assert len({cell for _, _, cell in both}) == len(both) == made.cells
        assert not list((tmp_path / "out/cells").iterdir())

    @pytest.mark.parametrize(
        ("differing", "said"),
        [({"window": 5}, "the first: what is compared changed; "), ({"out": ""}, "process 1 .* does not see")],
    )
    def test_they_must_compare_the_same_at_the_same_place(self, tmp_path, monkeypatch, differing, said):
        monkeypatch.setattr("qinit.runner.several.PATIENCE", 0.1)

        def do(processes):
            other = {"out": tmp_path / str(processes.rank)} if "out" in differing else differing
            set_out(comparison(**{"out": tmp_path / "0", **(other if processes.rank else {})}), processes)

        for error in together(2, do):
            assert re.search(said, str(error))

    def test_more_than_there_are_cells(self, tmp_path):
        made = comparison(out=tmp_path)
        with pytest.raises(ProcessesError, match=f"^99 processes for {made.cells} cells: some would have nothing"):
            set_out(made, Processes(0, 99))
