import copy
import json

import pytest

from qinit.errors import RecipeError
from qinit.plan.allocation import Sensitivity
from qinit.widths.budget import options
from qinit.widths.validity import SIGNED, check_sensitivity, conditions
from tests.models import make_checkpoint
from tests.sensitivities import made_up, mixed_widths


@pytest.fixture(scope="module")
def plan(llama):
    return mixed_widths(llama)


@pytest.fixture
def file(plan, tmp_path):
    made_up(plan).write(tmp_path / "sensitivity.json")
    return tmp_path / "sensitivity.json"


def test_a_measurement_fits_the_plan_that_it_was_made_for(plan, file):
    found = Sensitivity.read(file)
    check_sensitivity(found, plan, options(plan), file)
    few = {name: pairs[:1] for name, pairs in options(plan).items()}
    check_sensitivity(found, plan, few, file)  # more than is needed is no harm


def test_conditions_are_the_model_s_bytes_and_what_of_the_recipe_changes_a_measurement(plan):
    found = conditions(plan)
    assert found == conditions(mixed_widths(plan.checkpoint.directory, target_bits=3, bits_choices=[2, 4]))
    assert found.keys() == {"model", *SIGNED}
    json.dumps(found)


def test_of_another_model(plan, file, tmp_path):
    other = mixed_widths(make_checkpoint(tmp_path / "other", seed=1))
    with pytest.raises(RecipeError, match="was measured for another model"):
        check_sensitivity(Sensitivity.read(file), other, options(other), file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 8}, r"another rank \(4, now 8\)"),
        ({"group_size": 16}, r"another group_size \(32, now 16\)"),
        ({"seed": 1}, r"another seed \(0, now 1\)"),
        ({"calibration": "random"}, r"another calibration \('none', now 'random'\)"),
        ({"target_modules": "o_proj"}, "another target_modules"),
        ({"exclude": "o_proj"}, "another exclude"),
        (
            {"bits_choices": [2, 4]},
            "has nothing on model.layers.0.self_attn.q_proj at 4 bits in groups of 32 and rank 4",
        ),
        ({"rank_budget": "1MB"}, "has nothing on .* at 2 bits in groups of 32 and rank 1"),
    ],
)
def test_of_another_recipe(plan, file, changes, message):
    other = mixed_widths(plan.checkpoint.directory, **changes)
    with pytest.raises(RecipeError, match=message + ".*; leave the option out to measure anew"):
        check_sensitivity(Sensitivity.read(file), other, options(other), file)


def test_of_a_part_of_the_widths(plan, file):
    values = json.loads(file.read_text())
    broken = copy.deepcopy(values)
    del broken["layers"]["model.layers.1.mlp.up_proj"]
    file.write_text(json.dumps(broken))
    with pytest.raises(RecipeError, match=r"has nothing on model\.layers\.1\.mlp\.up_proj at 2 bits"):
        check_sensitivity(Sensitivity.read(file), plan, options(plan), file)
