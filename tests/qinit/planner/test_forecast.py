import pytest
import torch

from qinit.errors import RecipeError
from qinit.planner.forecast import Asked, forecast
from qinit.planner.kinds import load_kind
from qinit.planner.make import make_plan
from qinit.planner.memory import working_bytes
from qinit.planner.operations import Machine
from qinit.recipe import make_recipe
from tests.helpers import plan_of


@pytest.fixture(scope="module")
def h100():
    return load_kind("h100")


def test_a_plan_for_a_card_chooses_what_a_run_there_would(tiny_llama, h100):
    recipe = make_recipe(model=str(tiny_llama), rank=4, calibration="self", check=False)
    here, there = (make_plan(recipe, tiny_llama, "tiny", card=card) for card in (None, h100.card))
    assert (here.recipe.polish, there.recipe.polish) == (0, 200)  # a GPU polishes where nobody asks
    assert there.device == torch.device("cuda")
    said = forecast(there, h100, Asked())
    assert said.place == f"on {h100.card.name}"
    assert said.seconds.polishing > 0


def test_here_is_here_unless_there_are_several(tiny_llama):
    plan, machine = plan_of(tiny_llama, device="cpu"), Machine(torch.device("cpu"))
    one, two = (forecast(plan, machine, Asked(processes)) for processes in (1, 2))
    assert one.place == "here"
    assert two.place == f"on 2 x {one.card.name}"
    assert one.card.memory > 0


def test_each_process_has_its_part_of_the_text(tiny_llama, h100):
    plan = plan_of(tiny_llama, calibration="random", calibration_samples=512, calibration_length=128)
    one, four = (forecast(plan, h100, Asked(processes)).working_bytes for processes in (1, 4))
    assert four == working_bytes(plan, 4) < one == working_bytes(plan)


def test_autocast_goes_with_the_device(tiny_llama, h100):
    plan = plan_of(tiny_llama, device="cpu")
    there, here = (forecast(plan, machine, Asked()) for machine in (h100, Machine(torch.device("cpu"))))
    assert there.tuning[False].activations < here.tuning[False].activations
    assert there.tuning[False].base == here.tuning[True].base


def test_more_processes_than_layers_are_refused(tiny_llama, h100):
    with pytest.raises(RecipeError, match=r"processes: 15 are more than the 14 layers that are solved; give fewer"):
        forecast(plan_of(tiny_llama), h100, Asked(15))
