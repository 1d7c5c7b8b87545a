import pytest

from qinit.plan.plan import Plan
from tests.helpers import plan_of
from tests.models import make_checkpoint

LANGUAGE = "model.language_model."


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("llava") / "m", "llava")


def about(plan: Plan, words: str) -> list[str]:
    return [note for note in plan.notes if words in note]


def test_of_a_model_that_sees_the_language_part_is_taken_and_the_rest_named(llava):
    plan = plan_of(llava, format="dense")
    assert len(plan.layers) == 14
    assert all(layer.target.name.startswith(LANGUAGE) for layer in plan.layers)
    (note,) = about(plan, "beside the language model")
    assert "12 in model.vision_tower, 2 in model.multi_modal_projector" in note


@pytest.mark.parametrize(("asked", "count"), [(".*", 28), ("linear_1", 1), (r"model\.vision_tower.*fc\d", 4)])
def test_the_rest_is_chosen_by_name_or_expression_and_then_not_remarked_on(llava, asked, count):
    plan = plan_of(llava, format="dense", target_modules=asked)
    assert len(plan.layers) == count
    assert not about(plan, "beside the language model")


def test_what_the_loader_cuts_out_of_a_tensor_is_left_with_the_reason(tmp_path):
    plan = plan_of(make_checkpoint(tmp_path / "m", "dinov2"), format="dense")
    assert not any("gate_proj" in layer.target.name for layer in plan.layers)
    (note,) = about(plan, "layer.1.mlp.gate_proj stays as it is")
    assert "mlp.weights_in.weight while it loads the model" in note
