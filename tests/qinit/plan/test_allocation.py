"""The measured sensitivities: their file, and what they were made for."""

import copy
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qinit.errors import RecipeError
from qinit.plan.allocation import Sensitivity
from qinit.widths.budget import options
from qinit.widths.validity import check_sensitivity, conditions
from tests.fuzz import changed, changes, examples, file_of, json_values, only_qinit_errors, with_value
from tests.helpers import calibrated_plan
from tests.models import make_float32

MIXED = {"calibration": "none", "target_bits": 4, "bits_choices": [2, 3, 8]}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return calibrated_plan(make_float32(tmp_path_factory.mktemp("llama") / "llama", "llama"), **MIXED)


@pytest.fixture
def made(plan):
    """A measurement as if it had been made for the plan."""
    nats = {
        name: {pair: 0.125 / (pair[0] + index) for pair in pairs}
        for index, (name, pairs) in enumerate(options(plan).items())
    }
    return Sensitivity(conditions(plan), "Fisher information on 24 tokens: random", nats)


@pytest.fixture
def file(made, tmp_path):
    made.write(tmp_path / "sensitivity.json")
    return tmp_path / "sensitivity.json"


class TestFile:
    def test_what_is_written_is_read(self, plan, made, file):
        found = Sensitivity.read(file)
        assert found == made
        check_sensitivity(found, plan, options(plan), file)

    @pytest.mark.parametrize(
        "text",
        [
            *("", "{", "[]", "null", "3", '"x"', "{}", "\ufffe", "[" * 10**5),
            *('{"layers": {}, "signature": 3, "how": ""}', '{"layers": [], "signature": {}, "how": ""}'),
            *(
                f'{{"signature": {{}}, "how": "", "layers": {{"a": {layer}}}}}'
                for layer in (
                    *("3", "[]", '{"2": 1}', '{"2x3x4": 1}', '{"axb": 1}', '{"2x4": "1"}', '{"2x4": null}'),
                    *('{"2x4": true}', '{"2x4": -1}', '{"2x4": NaN}', '{"2x4": Infinity}', f'{{"2x4": 1{"0" * 400}}}'),
                )
            ),
        ],
    )
    def test_a_damaged_one_is_one_line(self, tmp_path, text):
        (tmp_path / "a.json").write_text(text, encoding="utf-8")
        with pytest.raises(RecipeError, match=r"sensitivity: .*a\.json is no sensitivity\.json of qinit \(") as caught:
            Sensitivity.read(tmp_path / "a.json")
        assert "\n" not in str(caught.value)

    def test_what_cannot_be_read(self, tmp_path):
        for file in (tmp_path, tmp_path / "gone.json"):
            with pytest.raises(RecipeError, match="cannot be read"):
                Sensitivity.read(file)
        (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(RecipeError, match=r"no sensitivity\.json"):
            Sensitivity.read(tmp_path / "binary.json")

    def test_of_another_model(self, plan, file, tmp_path):
        other = calibrated_plan(make_float32(tmp_path / "other", "llama", seed=1), **MIXED)
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
            ({"bits_choices": [2, 4]}, "has nothing on model.layers.0.self_attn.q_proj at 4 bits and rank 4"),
            ({"rank_budget": "1MB"}, "has nothing on .* at 2 bits and rank 1"),
        ],
    )
    def test_of_another_recipe(self, plan, file, changes, message):
        other = calibrated_plan(plan.checkpoint.directory, **{**MIXED, **changes})
        with pytest.raises(RecipeError, match=message + ".*; leave the option out to measure anew"):
            check_sensitivity(Sensitivity.read(file), other, options(other), file)

    def test_of_a_part_of_the_widths(self, plan, file):
        values = json.loads(file.read_text())
        broken = copy.deepcopy(values)
        del broken["layers"]["model.layers.1.mlp.up_proj"]
        file.write_text(json.dumps(broken))
        with pytest.raises(RecipeError, match=r"has nothing on model\.layers\.1\.mlp\.up_proj at 2 bits"):
            check_sensitivity(Sensitivity.read(file), plan, options(plan), file)


GOOD_FILE = {"signature": {"model": "x"}, "how": "on text", "layers": {"a": {"2x4": 0.5, "3x4": 0.25}, "b": {"2x4": 1}}}


@examples(150)
@given(
    st.binary(max_size=40)
    | st.builds(changed, st.just(json.dumps(GOOD_FILE).encode()), changes)
    | st.builds(with_value, st.just(GOOD_FILE), st.integers(0, 10**4), json_values).map(
        lambda v: json.dumps(v).encode()
    )
)
def test_fuzz_bytes_are_a_measurement_or_refused(raw):
    with file_of(raw, "s.json") as file, only_qinit_errors():
        read = Sensitivity.read(file)
        assert all(0 <= nats < math.inf for layer in read.nats.values() for nats in layer.values())
        read.write(file)
        assert Sensitivity.read(file).nats == read.nats
