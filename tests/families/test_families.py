"""A part of the matrix that `make test-families` runs whole: one cell for each kind of trouble that loaders make."""

import pytest

from tests.families.cells import try_cell
from tests.families.checker import findings
from tests.families.table import FAMILIES
from tests.helpers import edit_tensors
from tests.stock import ADAPTER

pytest.importorskip("gptqmodel", reason="pip install 'qinit[gptq]'")
pytest.importorskip("optimum", reason="pip install 'qinit[gptq]'")

CELLS = [
    ("Llama 3", "sequence", "gptq"),  # PEFT trains the head itself
    ("BERT", "token", "dense"),
    ("ModernBERT", "masked", "gptq"),  # the parent initializes packed children
    ("Falcon", "language model", "gptq"),  # a subclass of nn.Linear
    ("Mamba", "language model", "dense"),  # a weight that is read, not called
    ("DeepSeek-V3", "language model", "gptq"),  # experts beside dense layers of the same names
    ("BART", "generation", "gptq"),
    ("T5", "generation", "dense"),
    ("LLaVA", "generation", "gptq"),  # names of the file are not those of the modules
    ("CLIP", "none", "dense"),  # reads more than tokens
]


@pytest.mark.parametrize(("name", "head", "fmt"), CELLS)
def test_a_trainer_starts_from_q_plus_the_adapter_or_the_plan_says_why_not(name, head, fmt, tmp_path):
    cell = try_cell(FAMILIES[name], head, fmt, "auto", tmp_path)
    assert cell.state != "wrong", cell.found
    assert cell.found or cell.state == "yes"


def test_the_checker_sees_what_is_wrong(tmp_path):
    family = FAMILIES["Llama 2"]
    assert try_cell(family, "language model", "dense", "none", tmp_path).state == "yes"
    run = tmp_path / "dense-none"

    def change(tensors):
        tensors[next(name for name in tensors if "up_proj.lora_B" in name)] *= 0.5

    edit_tensors(run / ADAPTER / "adapter_model.safetensors", change)
    assert any("up_proj: error with the adapter" in line for line in findings(tmp_path / "source", run))
    edit_tensors(run / "model.safetensors", lambda tensors: tensors.pop("model.norm.weight"))
    assert any("missing_keys" in line for line in findings(tmp_path / "source", run))


def test_every_family_has_a_class_for_each_head_that_makes_its_kind():
    for family in FAMILIES.values():
        assert family.class_of(family.heads[0]), family.name
