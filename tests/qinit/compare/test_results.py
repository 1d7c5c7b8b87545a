import json
import sys

from qinit.compare.results import result, write_result
from tests.qinit.compare.comparisons import TEXTS, comparison, found_for


class TestResult:
    def test_what_was_compared_on_what(self):
        made = comparison()
        value = result(made, found_for(made), "qinit compare m")
        assert value["kind"] == "compare"
        assert value["command"] == "qinit compare m"
        assert value["texts"] == [{"name": text.name, "tokens": len(text.ids), "digest": text.digest} for text in TEXTS]
        assert value["learn"]["tokens"] == 90
        assert value["validation_tokens"] == 9
        assert value["rank"] == made.rows[1].recipe.rank
        assert len(value["rows"]) == len(made.rows)

    def test_starts_alone(self):
        value = result(comparison(training=None, learn=None, validation=None), {}, "")
        assert value["training"] is None
        assert value["learn"] is None
        assert value["validation_tokens"] is None


class TestWriteResult:
    def test_numbers_alone(self, tmp_path):
        made = comparison()
        value = result(made, found_for(made), "")
        assert [path.name for path in write_result(tmp_path, value)] == ["compare.json"]
        assert json.loads((tmp_path / "compare.json").read_text()) == json.loads(json.dumps(value))

    def test_a_picture_whose_package_is_missing_is_left_out(self, tmp_path, monkeypatch):
        for package in ("matplotlib.figure", "plotly.graph_objects"):
            monkeypatch.setitem(sys.modules, package, None)
        made = comparison()
        written = write_result(tmp_path, result(made, found_for(made), ""), pictures=True)
        assert {path.name for path in written} == {"compare.json", "compare.md"}
        assert sorted(path.name for path in tmp_path.iterdir()) == ["compare.json", "compare.md"]
