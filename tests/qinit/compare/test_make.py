"""What a comparison refuses is in tests/cli/test_compare.py."""

import pytest

from qinit.compare.make import _recipe
from qinit.errors import RecipeError


@pytest.mark.parametrize(
    ("method", "calibration", "quality"),
    [
        ("eqft", "auto", "balanced"),
        ("eqft:text", "text", "balanced"),
        ("eqft@best", "auto", "best"),
        ("eqft:self@fast", "self", "fast"),
        ("loftq", "none", "balanced"),
        ("cloq", "self", "balanced"),
    ],
)
def test_a_method_may_have_a_calibration_and_a_quality_of_its_own(method, calibration, quality):
    recipe = _recipe(method, 2, {})
    assert recipe.method == method.split(":")[0].split("@")[0]
    assert (recipe.calibration, recipe.quality) == (calibration, quality)
    assert not recipe.check


def test_all_methods_get_the_options_that_concern_them():
    options = {"calibration": "text", "rounding": "nearest", "rank": 4}
    assert _recipe("eqft", 2, options).rounding == "nearest"
    assert _recipe("cloq", 2, options).rounding is None
    assert {_recipe(method, 2, options).rank for method in ("eqft", "cloq", "loftq")} == {4}


def test_a_quality_that_there_is_not():
    with pytest.raises(RecipeError, match="quality"):
        _recipe("eqft@fine", 2, {})
