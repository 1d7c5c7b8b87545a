import pytest
import torch

from qinit.machine import CPU
from qinit.stream import carried
from qinit.stream.shelf import Shelf
from tests.helpers import gauss


@pytest.fixture(params=["memory", "disk"])
def shelf(request, monkeypatch, tmp_path):
    monkeypatch.setattr(carried, "CARRIED_SHARE", 0.25 if request.param == "memory" else 0)
    return Shelf(tmp_path / "shelf", 1000, CPU)


def test_what_is_put_is_taken_once(shelf):
    one, other = gauss(2, 3, 4), gauss(5, 4, seed=1)
    shelf.put("a.b", 0, one)
    shelf.put("a.b", 2, other)
    shelf.put("c", 0, one + 1)
    assert torch.equal(shelf.take("a.b", 2), other)
    assert torch.equal(shelf.take("a.b", 0), one)
    assert torch.equal(shelf.take("c", 0), one + 1)
    assert shelf.take("a.b", 0) is None
    assert shelf.take("d", 0) is None


def test_on_disk_is_what_would_take_too_much_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(carried, "CARRIED_SHARE", 0)
    shelf = Shelf(tmp_path / "shelf", 1000, CPU)
    shelf.put("a", 0, gauss(2, 3))
    assert [file.stat().st_size for file in (tmp_path / "shelf").iterdir()] == [4 * 2 * 3]
    shelf.take("a", 0)
    assert not list((tmp_path / "shelf").iterdir())


def test_half_precision_comes_back_in_float32_from_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(carried, "CARRIED_SHARE", 0)
    shelf = Shelf(tmp_path / "shelf", 1000, CPU)
    value = gauss(2, 3).bfloat16()
    shelf.put("a", 0, value)
    assert torch.equal(shelf.take("a", 0), value.float())
