"""Whole trainings of tiny models: what is written, read again."""

import json

import pytest

from qinit.errors import CheckpointError
from qinit.snndlft.model import load
from qinit.snndlft.tasks import Data, read_task
from qinit.snndlft.training import Asked, run
from tests.helpers import names, quantize
from tests.models import make_bert, words
from tests.qinit.snndlft import tiny
from tests.qinit.snndlft.test_tasks import data, text


def test_a_classifier_is_trained_broken_off_gone_on_with_and_loaded(tmp_path):
    bert = make_bert(tmp_path / "bert", num_hidden_layers=2, initializer_range=0.2)
    rows = "".join(
        f"{words(*(20 * (i % 2) + 4 + (i * k) % 9 for k in range(1, 6)))},{'ab'[i % 2]}\n" for i in range(120)
    )
    (tmp_path / "a.csv").write_text(f"text,kind\n{rows}")
    config = tiny.config(layer_wise="half", spiking=False, tinit=2, tfinal=5, deltaT=2)
    asked = Asked(
        "bert", bert, Data(tmp_path / "a.csv", None, ("text",), "kind", "accuracy", 8, 0), config, 20, 8, 2e-2, "cpu"
    )

    class BrokenOffError(Exception):
        pass

    def broken_off(moment):
        if moment.step == 11:
            raise BrokenOffError

    with pytest.raises(BrokenOffError):
        run(asked, tmp_path / "out", progress=broken_off)
    said = []
    report = run(asked, tmp_path / "out", say=said.append)
    assert said[0] == "going on from checkpoint-10"
    whole = run(asked, tmp_path / "whole")
    assert report.moments == whole.moments
    assert report.totals["after"] == whole.totals["after"]
    assert report.moments[-1].loss < report.moments[0].loss - 0.1

    assert {"adapter_config.json", "adapter_model.safetensors", "qinit.json", "tokenizer.json"} < set(
        names(tmp_path / "out")
    )
    assert [name for name in names(tmp_path) if name.startswith(".")] == []
    kept = json.loads((tmp_path / "out/qinit.json").read_text())
    assert (kept["kind"], kept["classes"], kept["config"]["layer_wise"]) == ("snndlft", ["a", "b"], "half")
    assert (kept["totals"]["layers"], kept["totals"]["layers_trained"]) == (2, 1)
    assert sum(row["steps"] for row in kept["layers"]) == 4 * 2 + 16  # the first choice is after step 4
    assert kept["totals"]["head"] == 32 * 32 + 32 + 32 * 2 + 2  # the pooler is new too
    model, task = load(tmp_path / "out"), read_task(asked.data, bert)
    assert task.measure(model) == report.totals["after"]


@pytest.mark.usefixtures("snn")
def test_a_language_model_is_trained_with_spikes(reader, tmp_path):
    asked = Asked("tiny", reader, data(text(tmp_path, 400)), tiny.config(time_steps=2), 4, 4, 1e-2, "cpu")
    report = run(asked, tmp_path / "out")
    totals = report.totals
    assert (totals["metric"], totals["head"]) == ("perplexity", 0)
    assert 0 < totals["spike_rate"] < 1
    assert totals["energy_per_token"]["spiking"] > 0
    assert totals["trainable"] == totals["trainable_all_layers"] / 2
    assert read_task(asked.data, reader).measure(load(tmp_path / "out")) == pytest.approx(totals["after"], rel=1e-5)


@pytest.mark.usefixtures("snn")
def test_a_packed_run_of_qinit_is_a_base_too(reader, tmp_path):
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    quantize(reader, tmp_path / "base", format="gptq", bits=4, group_size=32, device="cpu")
    options = tiny.config(time_steps=2, layer_wise="all")
    asked = Asked("base", tmp_path / "base", data(text(tmp_path, 400)), options, 4, 4, 1e-2, "cpu")
    report = run(asked, tmp_path / "out")
    assert report.totals["ranks"] == 2 * 4
    assert read_task(asked.data, reader).measure(load(tmp_path / "out")) == pytest.approx(
        report.totals["after"], rel=1e-4
    )


def test_an_encoder_is_no_language_model(tmp_path):
    bert = make_bert(tmp_path / "bert")
    asked = Asked("bert", bert, data(text(tmp_path, 400)), tiny.config(**tiny.PLAIN), 4, device="cpu")
    with pytest.raises(CheckpointError, match=r"found BertForMaskedLM; --label trains a classifier"):
        run(asked, tmp_path / "out")
    assert not (tmp_path / "out").exists()
