import pytest
import torch

from qinit.doctor import devices as module
from qinit.doctor.devices import devices, process_words


@pytest.fixture
def gpus(monkeypatch):
    """Let torch see so many GPUs, 80 bytes each and half of it free."""

    def give(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
        for name, size in (("total_memory", 80), ("free_memory", 40)):
            monkeypatch.setattr(module, name, lambda device, size=size: size)

    return give


def test_a_processor_alone_is_used(gpus):
    gpus(0)
    (cpu,) = devices()
    assert (cpu.device, cpu.memory, cpu.free, cpu.used) == ("cpu", 80, 40, True)
    assert cpu.name
    assert process_words([cpu]) == f"one, of {torch.get_num_threads()} threads on the processor"


def test_the_first_of_several_gpus_is_used_by_one_process(gpus):
    gpus(3)
    found = devices()
    assert [(each.device, each.used) for each in found] == [
        *(("cuda:0", True), ("cpu", False), ("cuda:1", False), ("cuda:2", False))
    ]
    assert found[0].name == "card 0"
    assert "torchrun --nproc-per-node 3 " in process_words(found)
