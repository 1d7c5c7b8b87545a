import json

import pytest
import torch

from qinit.planner.make import make_plan
from qinit.recipe import Recipe, make_recipe
from qinit.workplace.signature import MOST, UNSIGNED, differences, signature

CPU = torch.device("cpu")


@pytest.fixture
def signed(tiny_llama):
    def sign(name="name", **options):
        return signature(make_plan(make_recipe(**{"calibration": "none", **options}), tiny_llama, name), CPU)

    return sign


def test_it_is_plain_json_and_has_every_option(signed):
    found = signed()
    assert json.loads(json.dumps(found)) == found
    assert found.keys() >= Recipe.model_fields.keys() - UNSIGNED
    assert found == signed()


def test_it_has_the_source_the_versions_and_the_device(signed):
    assert {
        *("model's name", "the model's config.json", "the model's tensors", "the model's model.safetensors"),
        *("version of qinit", "version of torch", "version of transformers", "version of numba", "version of numpy"),
        *("device in use", "threads (OMP_NUM_THREADS)"),
    } == signed(check=False).keys() - Recipe.model_fields.keys()


def test_whether_a_run_is_measured_at_its_end_does_not_matter(signed):
    assert signed(check=False) == signed()


def test_a_run_that_is_polished_further_is_part_of_it(tiny_llama):
    plan = make_plan(make_recipe(calibration="none"), tiny_llama, "name")
    one, other, none = (signature(plan, CPU, sums) for sums in ("its sums", "other sums", None))
    assert differences(one, other) == ["the run that is polished changed"]
    assert differences(one, none)[0].endswith(", now not given")


@pytest.mark.parametrize("options", [{"calibration": "text"}, {"calibration": "self", "polish": 5}])
def test_the_text_that_qinit_brings_is_part_of_it(tiny_reader, monkeypatch, options):
    plan = make_plan(make_recipe(**options), tiny_reader, "name")
    one = signature(plan, CPU)
    monkeypatch.setattr("qinit.workplace.signature.calibration_documents", lambda: ["another"])
    assert differences(one, signature(plan, CPU)) == ["the text that qinit brings changed"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": 3}, "bits was 2, now 3"),
        ({"lora_alpha": 7.5}, "lora_alpha was not given, now 7.5"),
        ({"use_rslora": True}, "use_rslora was False, now True"),
        ({"name": "other"}, "model's name was name, now other"),
    ],
)
def test_what_is_different_is_named(signed, change, words):
    assert differences(signed(), signed(**change)) == [words]


def test_another_source_is_named(signed, tiny_llama):
    before = signed()
    (tiny_llama / "config.json").write_text((tiny_llama / "config.json").read_text().replace("1e-06", "1e-05"))
    assert differences(before, signed()) == ["the model's config.json changed"]
    (tiny_llama / "model.safetensors").touch()
    assert "the model's model.safetensors was 215792 bytes of 2" in differences(before, signed())[1]


def test_widths_that_a_rule_gave_are_part_of_it(signed):
    mixed = {"ratio": 0.5, "allocation": "first"}
    assert differences(signed(**mixed), signed(**mixed, seed=1)) == ["seed was 0, now 1"]
    found = differences(signed(**mixed), signed(**{**mixed, "allocation": "last"}))
    assert found == ["allocation was first, now last", "the layers' widths and ranks changed"]


def test_many_differences_are_not_all_shown():
    then, now = ({str(number): value for number in range(20)} for value in (1, 2))
    assert len(differences(then, now)) == MOST + 1
    assert differences(then, now)[-1] == f"and {20 - MOST} more"
    assert differences({"gone": 1}, {}) == ["gone was 1, now not given"]
