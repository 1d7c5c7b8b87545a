"""The file of the measured sensitivities."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qinit.errors import RecipeError
from qinit.plan.allocation import Sensitivity
from tests.fuzz import changed, changes, examples, file_of, json_values, only_qinit_errors, with_value
from tests.sensitivities import made_up, mixed_widths


@pytest.fixture(scope="module")
def plan(llama):
    return mixed_widths(llama)


@pytest.fixture
def file(plan, tmp_path):
    made_up(plan).write(tmp_path / "sensitivity.json")
    return tmp_path / "sensitivity.json"


class TestFile:
    def test_what_is_written_is_read(self, plan, file):
        assert Sensitivity.read(file) == made_up(plan)

    @pytest.mark.parametrize(
        "text",
        [
            *("", "{", "[]", "null", "3", '"x"', "{}", "\ufffe", "[" * 10**5),
            *('{"layers": {}, "signature": 3, "how": ""}', '{"layers": [], "signature": {}, "how": ""}'),
            *(
                f'{{"signature": {{"group_size": 64}}, "how": "", "layers": {{"a": {layer}}}}}'
                for layer in (
                    *("3", "[]", '{"2": 1}', '{"2x3x4x5": 1}', '{"axb": 1}', '{"2x4": "1"}', '{"2x4": null}'),
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


GOOD_FILE = {
    "signature": {"model": "x", "group_size": 64},
    "how": "on text",
    "layers": {"a": {"2x4": 0.5, "3x4": 0.25}, "b": {"2x4": 1}},
}


@examples(50)
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
