import torch

from qinit.families.bases import hollow_base
from qinit.source.checkpoint import Checkpoint
from tests.models import make_checkpoint


def test_a_base_has_its_shapes_and_types_and_no_memory(llama):
    checkpoint = Checkpoint.open(llama)
    model = hollow_base(checkpoint)
    for name, parameter in model.named_parameters():
        assert tuple(parameter.shape) == checkpoint.tensors[name].shape
        assert (parameter.dtype, parameter.device.type) == (torch.bfloat16, "cpu")
        assert parameter.untyped_storage().nbytes() == 2
        assert not parameter.requires_grad
    assert all(buffer.untyped_storage().nbytes() <= 8 for buffer in model.buffers())


def test_what_is_tied_stays_tied(tmp_path):
    model = hollow_base(Checkpoint.open(make_checkpoint(tmp_path / "gpt2", "gpt2")))
    assert model.lm_head.weight is model.transformer.wte.weight
