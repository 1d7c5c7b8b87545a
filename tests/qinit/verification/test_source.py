import shutil

import torch

from tests.helpers import edit_tensors
from tests.models import make_checkpoint
from tests.qinit.verification.runs import vouched
from tests.qinit.verification.test_values import BASE, UP


def test_a_source_of_another_shape_is_named_and_its_weights_are_not_compared(copy_of, tmp_path):
    _, run = copy_of("gptq")
    other = make_checkpoint(tmp_path / "other", "llama", intermediate_size=160)
    found = vouched(run, other)
    assert "config.json: differs from the source's: intermediate_size: expected 160, found 128" in found
    assert any("totals: bytes_before, found in the source" in line for line in found)
    assert any("the source is another model: " in line for line in found)
    assert not any("against the source: " in line for line in found)


def test_a_source_with_another_type_is_named(copy_of, tmp_path):
    _, run = copy_of("dense")
    other = make_checkpoint(tmp_path / "other", "llama", "float32")
    found = vouched(run, other)
    assert any("expected float32 [64], found bfloat16 [64]" in line for line in found)
    assert any(f"{UP}: bytes_before, against the source: expected 32768, found 16384" in line for line in found)


def test_files_that_were_copied_are_the_source_s(copy_of, tmp_path):
    source, run = copy_of("gptq")
    other = shutil.copytree(source, tmp_path / "other")
    (other / "generation_config.json").write_text("{}")
    (other / "tokenizer.json").write_text("{}")
    found = vouched(run, other)
    assert sorted(found) == [
        "generation_config.json: is not the source's",
        "tokenizer.json: is missing, but the source has it",
    ]


def test_a_tensor_that_the_source_has_and_the_run_has_not_is_named(copy_of, tmp_path):
    _, run = copy_of("gptq")
    other = make_checkpoint(tmp_path / "other", "llama")
    edit_tensors(other / BASE, lambda tensors: tensors.update(extra=torch.zeros(3)))
    assert "config.json: the source's tensor 'extra' is not among the weights" in vouched(run, other)
