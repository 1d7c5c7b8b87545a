import pytest

from qinit.errors import RecipeError
from qinit.snndlft.config import SnnDlftConfig, make_config


def test_the_defaults_are_those_that_the_method_is_described_with():
    found = SnnDlftConfig()
    assert (found.target_r, found.init_r, found.deltaT, found.tinit, found.tfinal) == (8, 12, 1, 0, 0)
    assert (found.layer_wise, found.spiking, found.name) == ("half", True, "spiking AdaLoRA, half")
    assert make_config(spiking=False, layer_wise="all", tinit=None).name == "AdaLoRA"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_r": 12}, "target_r: must be below init_r, as ranks are only taken away, found 12 and 12"),
        ({"layer_wise": "third"}, "layer_wise: input should be 'single', 'half' or 'all', found 'third'"),
        ({"time_steps": 0}, "time_steps: input should be greater than or equal to 1, found 0"),
        ({"tint": 3}, "unknown option 'tint' (did you mean 'tinit'?)"),
    ],
)
def test_a_wrong_option_is_one_line(options, words):
    with pytest.raises(RecipeError) as error:
        make_config(**options)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tinit": 6, "tfinal": 4}, "tinit, tfinal: 6 and 4 steps leave none to allocate ranks in a run of 10"),
        ({"tinit": 5, "deltaT": 6}, "deltaT: 6 is beyond the 5 steps"),
        ({"tinit": 5, "tfinal": 4, "deltaT": 1}, None),
    ],
)
def test_a_schedule_must_fit_into_the_run(options, words):
    found = SnnDlftConfig(**options)
    if words is None:
        found.require_steps(10)
        return
    with pytest.raises(RecipeError, match=words):
        found.require_steps(10)
