import pytest
import yaml

from qinit.errors import RecipeError
from qinit.trainers.training import Training, compared_rate


def test_a_data_set_is_a_file_a_folder_or_one_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert Training.on("train.jsonl").rows == (
        f'load_dataset("json", data_files="{tmp_path}/train.jsonl", split="train")'
    )
    assert Training.on("trl-lib/Capybara").rows == 'load_dataset("trl-lib/Capybara", split="train")'
    assert Training.on("folder").rows == f'load_dataset("{tmp_path}/folder", split="train")'


@pytest.mark.parametrize("rate", [1e-4, 2.5e-5, 0.008, 1.0, 30.0])
def test_a_rate_is_read_back_as_it_is(rate):
    training = Training.on("a/b", rate)
    assert float(training.python_rate) == rate
    assert yaml.safe_load(training.yaml_rate) == rate


def test_the_rate_of_a_comparison_is_the_one_of_the_method_and_the_width():
    rows = [{"method": "eqft", "bits": 2, "rate": 0.006}, {"method": "qlora", "bits": 4, "rate": None}]
    assert compared_rate({"rows": rows}, "file", "eqft", 2) == 0.006
    for method, bits in (("eqft", 3), ("qlora", 4)):
        with pytest.raises(RecipeError, match=f"file: compares no {method} at {bits} bits; there are eqft at 2"):
            compared_rate({"rows": rows}, "file", method, bits)
    with pytest.raises(RecipeError, match="expected what `qinit compare --json` prints"):
        compared_rate([], "file", "eqft", 2)
