import importlib.machinery
import sys
from types import ModuleType, SimpleNamespace

import pytest

from qinit.errors import QinitError, RecipeError
from qinit.evaluate.tasks import require_harness, run_tasks


class Harness:
    """Stands in for lm_eval with its public API: `asked` is what came in."""

    def __init__(self):
        self.asked, self.error = None, None
        self.results = {
            "arc_easy": {
                "alias": "arc_easy",
                "acc,none": 0.5,
                "acc_stderr,none": 0.01,
                "acc_norm,none": 1,
                "sample_len": 9,
            }
        }

    def simple_evaluate(self, *, model, tasks):
        self.asked = (model, tasks)
        if self.error:
            raise self.error
        return {"results": self.results, "configs": {}}


@pytest.fixture
def harness(monkeypatch):
    found = Harness()
    for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"):
        module = ModuleType(name)
        module.__path__ = []
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["lm_eval"].simple_evaluate = found.simple_evaluate
    sys.modules["lm_eval"].models = sys.modules["lm_eval.models"]
    sys.modules["lm_eval.models"].huggingface = sys.modules["lm_eval.models.huggingface"]
    sys.modules["lm_eval.models.huggingface"].HFLM = lambda **options: SimpleNamespace(**options)
    return found


def test_the_loaded_model_is_handed_over_and_the_numbers_come_back(harness):
    model, tokenizer = object(), object()
    found = run_tasks(model, tokenizer, ["arc_easy"], 4)
    handed, tasks = harness.asked
    assert (handed.pretrained, handed.tokenizer, handed.batch_size, tasks) == (model, tokenizer, 4, ["arc_easy"])
    assert found == {"arc_easy": {"acc,none": 0.5, "acc_stderr,none": 0.01, "acc_norm,none": 1.0}}


def test_what_fails_inside_is_one_line(harness):
    harness.error = KeyError("no such\ntask")
    with pytest.raises(QinitError, match=r"tasks: a, b: lm-evaluation-harness failed \(KeyError: .no such.*task.\)"):
        run_tasks(None, None, ["a", "b"], 1)


def test_without_it_the_error_has_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RecipeError, match=r"cannot be imported \(.*\); pip install \"qinit\[eval\]\""):
        require_harness()
