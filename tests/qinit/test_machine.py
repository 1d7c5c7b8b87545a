import platform

import pytest
import torch

from qinit.errors import RecipeError
from qinit.machine import pick_device, ran_on


def test_it_names_the_processor_and_the_cores_and_no_host():
    found = ran_on()
    assert set(found) == {"cpu", "cores", "gpu"}
    assert found["cores"] >= 1
    assert platform.node() not in str(found["cpu"])


def test_auto_and_cpu_are_always_there():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda")


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:300", "cuda:99999999999999999999"])
def test_a_device_that_is_not_there_is_an_error(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match=f"no '{name}' here, torch sees 0 CUDA devices; use --device cpu"):
        pick_device(name)


def test_the_named_device_is_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    assert pick_device("cuda") == torch.device("cuda", 0)
    with pytest.raises(RecipeError, match="torch sees 2"):
        pick_device("cuda:2")
