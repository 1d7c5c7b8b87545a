import json
import math
from dataclasses import replace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qinit.errors import RecipeError
from qinit.recipe import Recipe, make_recipe
from qinit.solver.methods import CALIBRATED, METHODS
from qinit.words import parse_time
from tests.fuzz import changed, changes, examples, file_of, json_values, only_qinit_errors, texts


def write(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return file


def test_the_defaults_are_the_documented_ones():
    recipe = make_recipe()
    assert (recipe.method, recipe.bits, recipe.rank, recipe.iter, recipe.group_size) == ("eqft", 2, 16, None, 64)
    assert (recipe.format, recipe.target_modules, recipe.device, recipe.max_shard_size) == (
        *("gptq", "all-linear", "auto", "5GB"),
    )
    assert recipe.alpha == recipe.rank
    assert (recipe.calibration, recipe.text_field, recipe.calibration_samples, recipe.calibration_length) == (
        *("auto", None, 128, 512),
    )
    assert (recipe.calibration_mode, recipe.rounding, recipe.act_order, recipe.polish) == (
        "sequential",
        None,
        False,
        None,
    )


def test_auto_is_neither_yes_nor_no_yet():
    recipe = make_recipe()
    assert not recipe.calibrated
    assert recipe.row is METHODS["eqft"]
    assert not make_recipe(calibration="none").calibrated
    assert make_recipe(calibration="self").calibrated
    assert make_recipe(calibration="some/file.txt").calibrated


def test_calibration_changes_eqfts_row_and_its_rounds():
    calibrated = make_recipe(calibration="self")
    assert calibrated.row == CALIBRATED["eqft"]
    assert calibrated.iterations == CALIBRATED["eqft"].iterations
    assert make_recipe(calibration="none").iterations == METHODS["eqft"].iterations
    assert make_recipe(calibration="self", iter=7).iterations == make_recipe(calibration="none", iter=7).iterations == 7


@pytest.mark.parametrize(("rounding", "found"), [(None, "gptq"), ("gptq", "gptq"), ("nearest", "nearest")])
@pytest.mark.parametrize("act_order", [False, True])
def test_rounding_and_order_reach_the_row(rounding, found, act_order):
    row = make_recipe(calibration="self", rounding=rounding, act_order=act_order).row
    assert (row.rounding, row.act_order) == (found, act_order)
    assert row == replace(CALIBRATED["eqft"], rounding=found, act_order=act_order)


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.needs])
def test_a_peers_row_is_its_own_with_calibration(method):
    recipe = make_recipe(method=method, format="dense", calibration="self", iter=9)
    assert recipe.row is METHODS[method]
    assert recipe.iterations == METHODS[method].iterations
    assert make_recipe(method=method, format="dense").calibration == "auto"  # the plan decides


def test_a_file_sets_options_and_flags_win_over_it(tmp_path):
    file = write(tmp_path, "bits: 3\nrank: 8\nlora_alpha: 32\nuse_rslora: true\n")
    recipe = make_recipe(file, rank=4, seed=None)
    assert (recipe.bits, recipe.rank, recipe.lora_alpha, recipe.use_rslora, recipe.seed) == (3, 4, 32.0, True, 0)


def test_a_flag_that_is_false_wins_too(tmp_path):
    assert make_recipe(write(tmp_path, "use_rslora: true\n"), use_rslora=False).use_rslora is False


@given(
    st.sampled_from([2, 3, 4, 8]),
    st.integers(1, 10**6),
    st.none() | st.floats(1e-3, 1e6),
    st.booleans(),
    st.none() | st.text(min_size=1, max_size=8),
)
def test_a_dumped_recipe_makes_the_same_recipe(bits, rank, lora_alpha, use_rslora, exclude):
    recipe = make_recipe(bits=bits, rank=rank, lora_alpha=lora_alpha, use_rslora=use_rslora, exclude=exclude)
    dumped = json.dumps(recipe.model_dump())
    assert make_recipe(**json.loads(dumped)) == recipe


def test_a_dumped_recipe_is_a_recipe_file(tmp_path):
    calibration = {"calibration": "a.jsonl", "text_field": "body", "rounding": "nearest", "polish": 3}
    recipe = make_recipe(bits=4, lora_alpha=7.5, exclude="o_proj", model="some/model", **calibration)
    assert make_recipe(write(tmp_path, yaml.safe_dump(recipe.model_dump()))) == recipe
    assert make_recipe(write(tmp_path, json.dumps(recipe.model_dump()))) == recipe


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 2.0), (True, 8.0)])
def test_the_lora_scale_is_pefts(use_rslora, scale):
    recipe = make_recipe(rank=16, lora_alpha=32, use_rslora=use_rslora)
    assert math.isclose(recipe.lora_scale, scale)


@pytest.mark.parametrize("key", ["bit", "lora-alpha", "groupsize"])
def test_an_unknown_key_is_named_with_the_closest_known_one(tmp_path, key):
    with pytest.raises(RecipeError, match=rf"recipe\.yaml: unknown recipe key '{key}' \(did you mean '\w+'\?\)"):
        make_recipe(write(tmp_path, f"{key}: 2\n"))


@pytest.mark.parametrize("key", ["1", "null", "token", "nonsense"])
def test_an_unknown_key_without_a_close_one_lists_what_is_known(tmp_path, key):
    with pytest.raises(RecipeError, match="known are model, revision, base, method, bits"):
        make_recipe(write(tmp_path, f"{key}: hf_secret\n"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits: .*2, 3, 4 or 8, found 5"),
        ({"bits": "2"}, "bits: .*found '2'"),
        ({"rank": 0}, "rank: .*greater than or equal to 1, found 0"),
        ({"rank": -3}, "rank: .*found -3"),
        ({"rank": 1.5}, "rank: .*found 1.5"),
        ({"rank": True}, "rank: .*found True"),
        ({"iter": 0}, "iter: .*found 0"),
        ({"iter": 101}, "iter: .*found 101"),
        ({"group_size": 0}, "group_size: .*found 0"),
        ({"group_size": 48}, "needs a group size of 16, 32, 64.*found 48"),
        ({"lora_alpha": 0}, "lora_alpha: .*greater than 0, found 0"),
        ({"lora_alpha": float("inf")}, "lora_alpha: .*finite"),
        ({"lora_alpha": float("nan")}, "lora_alpha: "),
        ({"seed": -1}, "seed: .*found -1"),
        ({"format": "gtpq"}, r"format: no 'gtpq' \(did you mean 'gptq'\?\)"),
        ({"method": "eqtf"}, r"method: no 'eqtf' \(did you mean 'eqft'\?\)"),
        ({"method": "loftq"}, "gptq holds integer grids only.*use --format dense"),
        ({"method": "loftq", "format": "dense", "bits": 8}, "bits: method loftq offers"),
        ({"device": "gpu"}, "device: expected auto, cpu, cuda or cuda:N, found 'gpu'"),
        ({"device": "cuda:x"}, "device: expected"),
        ({"device": "cuda:"}, "device: expected"),
        ({"max_shard_size": "5"}, "max_shard_size: expected a size like 5GB"),
        ({"max_shard_size": "0GB"}, "max_shard_size: expected"),
        ({"target_modules": 3}, "target_modules: .*found 3"),
        ({"calibration": 3}, "calibration: .*found 3"),
        ({"calibration_samples": 0}, "calibration_samples: .*greater than or equal to 1, found 0"),
        ({"calibration_samples": 2.5}, "calibration_samples: .*found 2.5"),
        ({"calibration_length": 1}, "calibration_length: .*greater than or equal to 2, found 1"),
        ({"calibration_mode": "both"}, "calibration_mode: .*'sequential' or 'parallel', found 'both'"),
        ({"rounding": "up"}, "rounding: .*'gptq' or 'nearest', found 'up'"),
        ({"act_order": 1}, "act_order: .*found 1"),
        ({"polish": -1}, "polish: .*greater than or equal to 0, found -1"),
        ({"polish": True}, "polish: .*found True"),
        ({"calibration": "none", "text_field": "body"}, "text_field: needs calibration, which is none"),
        ({"calibration": "none", "rounding": "nearest"}, "rounding: needs calibration, which is none"),
        ({"calibration": "none", "act_order": True}, "act_order: needs calibration, which is none"),
        ({"calibration": "none", "polish": 1}, "polish: needs calibration, which is none"),
        ({"calibration": "self", "text_field": "body"}, "text_field: there is no field to name in calibration self"),
        ({"calibration": "random", "text_field": "body"}, "no field to name in calibration random"),
        ({"text_field": "body"}, "no field to name in calibration auto"),
        ({"method": "qera", "calibration": "none"}, "calibration: method qera needs it .*, found none"),
        *(
            ({"method": name, "format": "dense", "calibration": "self"}, f"method {name} looks at weights alone")
            for name in ("qlora", "loftq", "qpissa")
        ),
        ({"method": "eora", "calibration": "self", "rounding": "nearest"}, "rounding: method eora has its own"),
        ({"method": "cloq", "calibration": "self", "act_order": True}, "act_order: method cloq has its own"),
        *(
            ({option: value}, f"{option}: is about mixed widths; give ratio, target_bits or target_size")
            for option, value in {
                **{"bits_low": 2, "bits_high": 3, "bits_choices": [2, 3], "allocation": "first", "tie": "fused"},
                **{"sensitivity": "a.json", "rank_budget": "1MB", "count_adapter": True},
            }.items()
        ),
        ({"ratio": -0.1}, "ratio: .*greater than or equal to 0, found -0.1"),
        ({"ratio": 1.5}, "ratio: .*less than or equal to 1, found 1.5"),
        ({"ratio": 2}, "ratio: .*less than or equal to 1, found 2"),
        ({"ratio": float("nan")}, "ratio: .*found nan"),
        ({"ratio": True}, "ratio: .*found True"),
        ({"ratio": "0.5"}, "ratio: .*found '0.5'"),
        ({"target_bits": 0}, "target_bits: .*greater than 0, found 0"),
        ({"target_bits": float("inf")}, "target_bits: .*finite"),
        ({"ratio": 0.5, "target_bits": 3}, "target_bits: give it or ratio, not both"),
        ({"target_size": "60MB", "target_bits": 3}, "target_size: give it or target_bits, not both"),
        ({"target_size": "60"}, "target_size: expected a size like 5GB"),
        ({"target_size": "60MB", "allocation": "first"}, "target_size: needs allocation sensitivity, found first"),
        ({"target_size": "60MB", "rank_budget": "1MB"}, "rank_budget: the adapter is part of the one budget"),
        ({"ratio": 0.5, "count_adapter": True}, "count_adapter: belongs to target_bits, which is not given"),
        ({"ratio": 0.5, "bits": 3}, "bits: is one width for all; with ratio give bits_low and bits_high"),
        (
            {"ratio": 0.5, "bits_choices": [2, 4]},
            "bits_choices: belongs to target_bits or target_size, which is not given",
        ),
        ({"target_bits": 3, "bits_low": 2}, "bits_low: belongs to ratio, which is not given"),
        ({"target_bits": 3, "bits_high": 4}, "bits_high: belongs to ratio, which is not given"),
        ({"ratio": 0.5, "bits_low": 4}, "bits_low: must be below bits_high, found 4 and 3"),
        ({"ratio": 0.5, "bits_low": 3}, r"at least two widths are needed, found \(3,\)"),
        ({"ratio": 0.5, "bits_low": 5}, "bits_low: .*2, 3, 4 or 8, found 5"),
        ({"target_bits": 3, "bits_choices": "3"}, r"at least two widths are needed, found \(3,\)"),
        ({"target_bits": 3, "bits_choices": []}, r"at least two widths are needed, found \(\)"),
        ({"target_bits": 3, "bits_choices": "2,5"}, "bits_choices: .*2, 3, 4 or 8, found 5"),
        *(
            ({"target_bits": 3, "bits_choices": value}, "bits_choices: expected widths like 2,3,4, found")
            for value in ("2,x", "", "2,,3", "-2,3", "2.5,3", [2, "3"], [[2], [3]], [True, 2], [2, None])
        ),
        ({"target_bits": 3, "bits_choices": 4}, "bits_choices: .*found 4"),
        ({"ratio": 0.5, "allocation": "best"}, "allocation: .*'sensitivity', 'uniform', .*found 'best'"),
        ({"ratio": 0.5, "tie": "all"}, "tie: .*'none' or 'fused', found 'all'"),
        ({"ratio": 0.5, "rank_budget": "20"}, "rank_budget: expected a size like 5GB"),
        ({"ratio": 0.5, "rank_budget": "0MB"}, "rank_budget: expected a size"),
        ({"ratio": 0.5, "allocation": "last", "rank_budget": "1MB"}, "rank_budget: needs allocation sensitivity"),
        ({"ratio": 0.5, "allocation": "random", "sensitivity": "a"}, "sensitivity: .*sensitivity, found random"),
        ({"ratio": 0.5, "method": "qlora"}, "method: mixed widths are for eqft, found qlora"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_was_expected_and_found(options, message):
    with pytest.raises(RecipeError, match=message):
        make_recipe(**options)


def test_mixed_widths_are_dense_unless_told_otherwise():
    assert make_recipe().format == "gptq"
    assert make_recipe(ratio=0).format == make_recipe(target_bits=3).format == "dense"
    assert make_recipe(ratio=0.5, format="gptq").format == "gptq"


@pytest.mark.parametrize(
    ("options", "widths", "nominal"),
    [
        ({"bits": 3}, (3,), 3),
        ({"ratio": 0}, (2, 3), 2),
        ({"ratio": 1}, (2, 3), 3),
        ({"ratio": 0.25, "bits_high": 4}, (2, 4), 2.5),
        ({"ratio": 0.5, "bits_low": 4, "bits_high": 8}, (4, 8), 6),
        ({"target_bits": 3}, (2, 3, 4, 8), 3),
        ({"target_bits": 2.75, "bits_choices": "3, 2,3"}, (2, 3), 2.75),
        ({"target_bits": 4, "bits_choices": [8, 2]}, (2, 8), 4),
        ({"target_size": "60MB", "bits_choices": [2, 3]}, (2, 3), None),
    ],
)
def test_the_widths_that_layers_may_get(options, widths, nominal):
    recipe = make_recipe(**options)
    assert recipe.mixed is (len(widths) > 1)
    assert (recipe.widths, recipe.nominal_bits) == (widths, nominal)
    assert make_recipe(**json.loads(json.dumps(recipe.model_dump()))) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits: [2\n", "not valid YAML"),
        ("a: b: c\n", "not valid YAML"),
        ("? [a]\n: 1\n", "not valid YAML"),
        ("!!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("", "expected `option: value` lines, found NoneType"),
        ("- bits\n", "found list"),
        ("bits: 5\n", r"recipe\.yaml: bits: "),
    ],
)
def test_a_broken_file_is_one_line_that_names_it(tmp_path, text, message):
    file = write(tmp_path, text)
    with pytest.raises(RecipeError, match=message) as caught:
        make_recipe(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        make_recipe(tmp_path / "gone.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        make_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe9\n")
    with pytest.raises(RecipeError, match="not valid YAML"):
        make_recipe(tmp_path / "latin.yaml")


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        make_recipe().bits = 3


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("10m", 600), ("10 min", 600), ("90s", 90), ("1.5H", 5400), ("7", 420), (7, 420), (0.5, 30), ("0.001s", 0.001)],
)
def test_times(given, seconds):
    assert parse_time(make_recipe(calibration_budget=given).calibration_budget) == pytest.approx(seconds)


@pytest.mark.parametrize("given", ["", "m", "-1m", "1d", "1h30m", "nan", "inf", "²m", -3, float("nan"), True, [1]])
def test_what_is_no_time(given):
    with pytest.raises(RecipeError, match=r"calibration_budget: .*found"):
        make_recipe(calibration_budget=given)


GOOD_RECIPE = (
    b"model: a\nbits: 3\nrank: 8\nlora_alpha: 2.5\ncalibration: self\nact_order: true\ntarget_modules: q_proj\n"
)


def read_back(raw):
    """Read a recipe; one that is accepted can be kept in a report and be given again."""
    with file_of(raw, "recipe.yaml") as file, only_qinit_errors():
        recipe = make_recipe(file)
        assert not recipe.trust_remote_code
        assert make_recipe(**json.loads(json.dumps(recipe.model_dump()))) == recipe
        assert recipe.alpha > 0
        assert recipe.lora_scale > 0


@examples(30)
@given(st.binary(max_size=60) | st.builds(changed, st.just(GOOD_RECIPE), changes))
def test_fuzz_bytes_are_a_recipe_or_refused(raw):
    read_back(raw)


@examples(60)
@given(st.dictionaries(st.sampled_from(sorted(Recipe.model_fields)) | texts, json_values, max_size=3))
def test_fuzz_values_are_a_recipe_or_refused(values):
    read_back(yaml.safe_dump(values).encode())


def test_a_recipe_may_say_that_it_trusts_no_code(tmp_path):
    (tmp_path / "r.yaml").write_text("trust_remote_code: false\n")
    assert make_recipe(tmp_path / "r.yaml", trust_remote_code=True).trust_remote_code
    assert not make_recipe(tmp_path / "r.yaml").trust_remote_code


class TestQuality:
    def test_it_sets_what_nothing_else_is_said_of(self):
        fast, balanced, best = (make_recipe(quality=quality) for quality in ("fast", "balanced", "best"))
        assert balanced == make_recipe()
        assert (fast.calibration_budget, fast.polish) == ("5m", 0)
        assert (best.calibration_budget, best.polish) == ("30m", None)
        assert make_recipe(quality="fast", calibration_budget="1h", polish=3).calibration_budget == "1h"
        assert make_recipe(quality="fast", polish=3).polish == 3

    def test_polish_is_a_number_or_auto(self):
        assert make_recipe(polish="auto").polish is None
        assert make_recipe(polish="12").polish == 12
        assert make_recipe().polish_steps == 0
        with pytest.raises(RecipeError, match="polish: expected a number of steps, or auto, found 'many'"):
            make_recipe(polish="many")
        with pytest.raises(RecipeError, match=r"quality: .*'fine'"):
            make_recipe(quality="fine")


def test_symmetric_is_another_grid_of_every_row_that_has_the_integer_one():
    assert make_recipe(symmetric=True).row.grid == "sym"
    assert make_recipe(symmetric=True, method="cloq", calibration="random").row.grid == "sym"
    with pytest.raises(RecipeError, match="symmetric: is about integer grids, and method loftq has grid nf"):
        make_recipe(symmetric=True, method="loftq", format="dense")


def test_mixed_widths_are_tied_where_they_are_packed():
    assert make_recipe(ratio=0.5).tie == "none"
    assert make_recipe(ratio=0.5, format="gptq").tie == "fused"
    assert make_recipe(ratio=0.5, format="gptq", tie="none").tie == "none"
