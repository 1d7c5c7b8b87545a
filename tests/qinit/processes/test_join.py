import pytest
import torch

from qinit.errors import ProcessesError, RecipeError
from qinit.processes.group import ALONE
from qinit.processes.join import joined, require_device


def test_without_others_it_is_one_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as processes:
        assert processes is ALONE


def test_what_is_not_set_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ProcessesError, match=r"^WORLD_SIZE is 2, but MASTER_ADDR, MASTER_PORT is not set; "), joined():
        pass


class TestDevice:
    @pytest.fixture(autouse=True)
    def two_gpus(self, monkeypatch):
        """The third of four processes on a machine with two GPUs."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        for name, value in {"WORLD_SIZE": 4, "RANK": 2, "LOCAL_RANK": 2}.items():
            monkeypatch.setenv(name, str(value))

    @pytest.mark.parametrize("name", ["auto", "cuda"])
    def test_each_needs_one_of_its_own(self, name, monkeypatch):
        with pytest.raises(
            RecipeError, match=r"^device: process 2 is number 2 of its machine, where torch sees 2 CUDA"
        ):
            require_device(name)
        monkeypatch.setenv("LOCAL_RANK", "1")
        require_device(name)

    def test_one_for_all_is_refused(self):
        with pytest.raises(RecipeError, match=r"^device: 'cuda:0' is one GPU for 4 processes; leave its number out"):
            require_device("cuda:0")

    def test_a_cpu_is_everybody_s(self):
        require_device("cpu")

    def test_one_process_takes_what_it_likes(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "1")
        require_device("cuda:7")
