import pytest
import torch

from qinit.calibration.groups import Groups
from qinit.calibration.kept_inputs import KeptInputs
from qinit.stream import carried
from qinit.stream.carried import Batch
from tests.qinit.calibration.test_groups import layer

CPU = torch.device("cpu")
X, Y = torch.zeros(2, 3, 2), torch.ones(2, 3, 2)


@pytest.fixture
def groups():
    """q, then o, whose output is added to what q reads."""
    found = Groups({"q": layer("blocks.0.q"), "o": layer("blocks.0.o")}, {"q": None, "o": "q"}.get)
    found.add({"q": X, "o": Y})
    return found


@pytest.mark.parametrize("share", [carried.CARRIED_SHARE, 0.0])
def test_what_a_group_reads_is_there_once(share, groups, tmp_path, monkeypatch):
    monkeypatch.setattr(carried, "CARRIED_SHARE", share)  # 0: on disk
    kept = KeptInputs(tmp_path / "shelf", 12, CPU)
    first, second = groups.found
    batches = Batch(0, 2, None), Batch(2, 4, None)
    assert kept.take(second, batches[0]) is None
    for number, batch in enumerate(batches):
        kept.put(groups, second, batch, Y + number, X - number)
    for number, batch in enumerate(batches):
        assert torch.equal(kept.take(second, batch), Y + number)
        assert torch.equal(kept.take_start(second, batch), X - number)
        assert kept.take(second, batch) is None
    assert kept.take(first, batches[0]) is None
    assert kept.shelf.directory == (None if share else tmp_path / "shelf")
