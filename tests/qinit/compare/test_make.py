"""What a comparison refuses is in tests/cli/test_compare.py."""

from pathlib import Path

import pytest

from qinit.compare.make import _at_full_width, _recipe
from qinit.errors import CompareError, RecipeError

HERE = Path("model")


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
    recipe = _recipe(method, 2, {}, HERE)
    assert recipe.method == method.split(":")[0].split("@")[0]
    assert (recipe.calibration, recipe.quality) == (calibration, quality)
    assert not recipe.check


def test_all_methods_get_the_options_that_concern_them():
    options = {"calibration": "text", "rounding": "nearest", "rank": 4}
    assert _recipe("eqft", 2, options, HERE).rounding == "nearest"
    assert _recipe("cloq", 2, options, HERE).rounding is None
    assert {_recipe(method, 2, options, HERE).rank for method in ("eqft", "cloq", "loftq")} == {4}


def test_a_quality_that_there_is_not():
    with pytest.raises(RecipeError, match="quality"):
        _recipe("eqft@fine", 2, {}, HERE)


def test_starts_have_rows_at_16_bits_on_the_model_itself_where_that_stays():
    bases = [_recipe(name, 16, {"polish": 3, "group_size": 32}, HERE).base for name in ("dora", "pissa")]
    assert bases == ["model", None]
    assert _recipe("dora", 4, {"group_size": 32}, HERE).base is None
    assert _recipe("eva", 16, {"calibration": "auto"}, HERE).calibration == "self"
    assert _at_full_width("lora", [16], ())
    assert not _at_full_width("lora", [16], ("lora", "full"))
    assert not _at_full_width("eqft", [16, 2], ())
    with pytest.raises(CompareError, match="eqft rounds, so give it fewer too"):
        _at_full_width("eqft", [16], ())
