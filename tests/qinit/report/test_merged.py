import json

import pytest
import yaml

from qinit.errors import ReportError
from qinit.merge.plan import plan_merge
from qinit.merge.run import merge
from qinit.report.merged import MergeReport, is_merge, merged_card, on_hub
from qinit.report.report import Report
from tests.helpers import edit_json

CHECK = {
    "kl": 0.0123,
    "top1_agreement": 0.9,
    "perplexity": 3.5,
    "reference_perplexity": 3.4,
    "tokens": 99,
    "text": "it",
}


@pytest.fixture(scope="module")
def merged(finished, tmp_path_factory):
    out = tmp_path_factory.mktemp("merged") / "out"
    *_, last = merge(plan_merge(finished), out, command="qinit merge run --out out")
    return out, last.report


def test_what_is_read_is_what_was_written_and_a_run_is_told_from_it(merged, finished):
    out, report = merged
    assert MergeReport.read(out) == report
    assert (is_merge(out), is_merge(finished), is_merge(out / "gone")) == (True, False, False)
    with pytest.raises(ReportError, match="is a merge, not a run"):
        Report.read(out)
    with pytest.raises(ReportError, match="not the report of a merge"):
        MergeReport.read(finished)


def test_the_card_says_what_was_merged_and_loads_it_here_and_on_the_hub(merged):
    out, report = merged
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {"library_name": "transformers", "tags": ["qinit", "merge"]}
    assert "the adapter that qinit made with it" in card
    assert 'model = LlamaForCausalLM.from_pretrained(".", dtype="auto")' in card
    assert 'from_pretrained("me/merged", dtype="auto")' in on_hub(card, report, "me/merged")
    assert "| parameters that the adapter changes | 14 |" in card
    assert "qinit merge run --out out" in card


def test_the_card_of_one_on_the_hub_s_model_names_it_and_of_one_quantized_anew_its_cost(merged, tmp_path):
    out, _ = merged
    (tmp_path / "qinit.json").write_text((out / "qinit.json").read_text())
    anew = {"bits": 4, "format": "gptq", "bits_per_weight": 4.3, "error": 0.05, "check": CHECK}
    edit_json(tmp_path / "qinit.json", lambda r: r.update(model="meta-llama/Llama-3.2-1B", requantized=anew))
    card = merged_card(MergeReport.read(tmp_path), {"license": "mit", "datasets": ["x"]})
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == "meta-llama/Llama-3.2-1B"
    assert (front["license"], "datasets" in front) == ("mit", False)
    assert "pip install gptqmodel" in card
    assert "| KL from the merged model | 0.0123 nats per token |" in card
    assert "quantized anew, without an adapter" in card
    assert json.loads((tmp_path / "qinit.json").read_text())["kind"] == "merge"
