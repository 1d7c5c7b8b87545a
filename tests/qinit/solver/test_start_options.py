import pytest

from qinit.errors import RecipeError
from qinit.recipe import make_recipe
from qinit.solver.methods import STARTS


@pytest.mark.parametrize("name", STARTS)
def test_what_follows_from_a_start(name):
    recipe, row = make_recipe(method=name), STARTS[name]
    assert (recipe.bits, recipe.format, recipe.polish, recipe.calibration_mode) == (16, "dense", 0, "parallel")
    assert recipe.calibration == ("auto" if row.needs else "none")
    assert (recipe.use_rslora, recipe.adapter) == (name == "rslora", "dora" if name == "dora" else "lora")
    assert recipe.row == row
    assert make_recipe(**recipe.model_dump()) == recipe
    assert (recipe.calibration_samples == 16) == (name == "lora-ga")


@pytest.mark.parametrize(
    ("options", "row", "fmt"),
    [
        ({"bits": 4}, ("int", "mse"), "gptq"),
        ({"bits": 4, "symmetric": True}, ("sym", "mse"), "gptq"),
        ({"bits": 3, "grid": "nf"}, ("nf", "absmax"), "dense"),
        ({"bits": 2, "format": "dense"}, ("int", "mse"), "dense"),
    ],
)
def test_fewer_bits_are_those_of_a_grid(options, row, fmt):
    recipe = make_recipe(method="milora", **options)
    assert (recipe.row.grid, recipe.row.search) == row
    assert recipe.format == fmt


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "lora", "bits": 5}, "bits: method lora offers 2, 3, 4, 8 or 16, found 5"),
        ({"method": "lora", "bits": 8, "grid": "nf"}, "bits: method lora offers 2, 3, 4 or 16, found 8"),
        ({"method": "lora", "symmetric": True}, "symmetric: is about integer grids, and method lora has grid exact"),
        ({"method": "lora", "format": "gptq"}, "format: gptq"),
        ({"method": "eqft", "grid": "int"}, "grid: is about the base of a start"),
        ({"method": "lora", "grid": "nf"}, "grid: is about the base of a start"),
        ({"method": "lora", "bits": 4, "grid": "fn"}, "grid: no 'fn'"),
        ({"method": "eqft", "niter": 4}, "niter: is about pissa alone, found method eqft"),
        ({"method": "pissa", "corda_method": "kpm"}, "corda_method: is about corda alone, found method pissa"),
        ({"method": "corda", "corda_method": "kpn"}, "corda_method: no 'kpn' .did you mean 'kpm'"),
        ({"method": "dora", "bits": 4, "format": "gptq"}, "PEFT puts no dora on layers packed as GPTQ"),
        ({"method": "eva", "polish": 4}, "polish: method eva stays as it starts"),
        ({"method": "eqft", "use_dora": True}, "polish: trains A and B"),
        ({"method": "lora", "calibration": "self"}, "method lora looks at weights alone"),
        ({"method": "lora", "target_bits": 3}, "mixed widths are for eqft"),
    ],
)
def test_what_does_not_fit_is_one_line(options, words):
    with pytest.raises(RecipeError, match=words):
        make_recipe(**options)
