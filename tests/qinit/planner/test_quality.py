import json
from pathlib import Path

from qinit.planner import quality
from qinit.recipe import make_recipe


def test_what_was_measured_is_said_of_a_run_like_it(monkeypatch):
    monkeypatch.setattr(quality, "FOUND", {("best", 2, 16): 0.5})
    assert quality.found_words(make_recipe(quality="best")) == "KL 0.50"
    for other in ({"quality": "fast"}, {"quality": "best", "bits": 3}, {"quality": "best", "ratio": 0.5}):
        assert quality.found_words(make_recipe(**other)) == ""


def test_it_is_what_the_kept_results_say():
    file = Path(__file__).parents[3] / "model_zoo/results/qualities-SmolLM2-135M.json"
    result = json.loads(file.read_text(encoding="utf-8"))
    measured = {
        (row["quality"], row["bits"], result["rank"]): round(row["kl"], 3) for row in result["rows"] if row["quality"]
    }
    assert measured == quality.FOUND
