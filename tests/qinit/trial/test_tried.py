"""In the process of the tests, so that no case costs imports of its own; tests/qinit/trial/test_child.py starts one."""

import shutil
from pathlib import Path

import pytest
import torch

from qinit.errors import CheckpointError
from qinit.report.report import Report
from qinit.trial.asked import Asked
from qinit.trial.tried import tried
from tests.helpers import edit_json, edit_tensors, quantize
from tests.mixed import gptq_only
from tests.models import make_checkpoint
from tests.trained import train

WEIGHTS = "eqft_init/adapter_model.safetensors"
POLISHED = {"calibration": "random", "calibration_samples": 4, "calibration_length": 16, "polish": 2}
# name: family, options of the source, options of the run
SOUND = {
    "llama": ("llama", {}, {}),
    "gpt2": ("gpt2", {}, {}),
    "bert masked": ("bert", {"hidden_size": 64}, {}),
    "t5": ("t5", {"d_model": 64}, {}),
    "polished": ("llama", {}, POLISHED),
    "no low rank": ("llama", {}, {"method": "qlora", "format": "dense"}),
    "mixed": ("llama", {}, {"format": "gptq", "ratio": 0.5, "allocation": "random"}),
}
CASES = [
    (name, form)
    for name, (_, _, options) in SOUND.items()
    for form in ("dense", "gptq")
    if options.get("format", form) == form and (name, form) != ("t5", "gptq")  # of which transformers packs nothing
]


def answers(run, adapter=None, **options):
    """What is answered: problems, notes and what was done."""
    report = Report.read(run)
    trusted = bool(report.recipe["trust_remote_code"])
    found = [
        *tried(Asked(str(run), str(adapter or run / "eqft_init"), report.loader, **options, trust_remote_code=trusted))
    ]
    problems = [each.what for each in found if each.kind == "finding" and each.grave]
    notes = [each.what for each in found if each.kind == "finding" and not each.grave]
    return problems, notes, next((each.what for each in found if each.kind == "done"), None)


@pytest.fixture(scope="module")
def dense(llama, tmp_path_factory):
    place = tmp_path_factory.mktemp("dense") / "run"
    quantize(llama, place, format="dense")
    return place


@pytest.fixture
def run(dense, tmp_path):
    """A dense run of a Llama, to damage."""
    return Path(shutil.copytree(dense, tmp_path / "run"))


@pytest.mark.parametrize(("name", "form"), CASES)
def test_runs_of_all_kinds_are_what_their_files_say(name, form, tmp_path):
    if form == "gptq":
        gptq_only()
    family, source_options, options = SOUND[name]
    source = make_checkpoint(tmp_path / "source", family, **source_options)
    quantize(source, tmp_path / "run", **{"format": form, **options})
    problems, notes, done = answers(tmp_path / "run", how="whole", source=str(source))
    assert (problems, notes) == ([], [])
    assert "from Q + s B A of the files, gradients at " in done


def test_so_is_one_whose_class_is_code_of_its_own(own_code, tmp_path):
    quantize(own_code, tmp_path / "run", format="dense", trust_remote_code=True)
    problems, notes, done = answers(tmp_path / "run", how="whole")
    assert (problems, notes) == ([], [])
    assert done.startswith("loaded by OwnForCausalLM and PEFT, predictions ")


def test_a_trained_adapter_is_what_its_file_says(dense, tmp_path):
    trained = train(dense, tmp_path / "trained")
    problems, notes, done = answers(dense, trained, how="whole")
    assert (problems, notes) == ([], [])
    assert "gradients at 14 adapted modules" in done


def test_a_scale_that_is_another_one_shows_in_what_is_predicted(run, monkeypatch):
    monkeypatch.setattr("qinit.adapters.lora.LoraAdapter.scale", lambda *_: 1.01)
    (problem,), _, _ = answers(run, how="whole")
    assert problem.startswith("what LlamaForCausalLM and PEFT predict is ")


def test_a_layer_that_stays_random_is_named(run):
    edit_tensors(run / "model.safetensors", lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))
    problems, _, _ = answers(run, how="meta")
    assert problems == ["LlamaForCausalLM finds nothing for model.layers.0.mlp.up_proj.weight, which stay random"]


def test_what_the_source_lacked_too_is_a_note_where_there_is_no_source(run):
    def change(tensors):
        tensors["stray"] = torch.ones(2)

    edit_tensors(run / "model.safetensors", change)
    problems, (note,), _ = answers(run, how="meta", source=str(run.parent))  # which is no model
    assert problems == []
    assert note == (
        "LlamaForCausalLM passes over stray; so it was in the source, as far as can be seen (--source compares)"
    )


def test_against_a_source_it_is_a_problem(run, llama):
    edit_tensors(run / "model.safetensors", lambda tensors: tensors.update(stray=torch.ones(2)))
    assert answers(run, how="meta", source=str(llama))[0] == ["LlamaForCausalLM passes over stray"]


def test_values_that_are_not_finite_are_found(run):
    edit_tensors(run / "model.safetensors", lambda tensors: tensors["model.norm.weight"].fill_(torch.inf))
    with pytest.raises(CheckpointError, match="holds 64 NaN or Inf"):
        answers(run, how="whole")


def test_a_run_that_cannot_be_loaded_is_an_error(run):
    edit_json(run / "eqft_init/adapter_config.json", lambda config: config.update(r=9))
    with pytest.raises(CheckpointError, match="PEFT cannot load it"):
        answers(run, how="whole")


def test_what_no_inputs_are_known_for_is_a_note_and_what_breaks_as_loaded_is_a_problem(run, monkeypatch):
    tokens = {"input_ids": torch.arange(8)[None]}
    monkeypatch.setattr("qinit.trial.passes.possible_inputs", lambda *_: iter([{"pixels": torch.ones(2)}]))
    problems, notes, done = answers(run, how="whole")
    assert problems == []
    assert notes[0].startswith("LlamaForCausalLM was not run, as no inputs are known that it takes (pixels: ")
    assert done == "loaded by LlamaForCausalLM and PEFT"
    monkeypatch.setattr("qinit.trial.passes.possible_inputs", lambda *_: iter([tokens]))
    monkeypatch.setattr("peft.tuners.lora.layer.Linear.forward", lambda *_, **__: None)
    (problem,), _, _ = answers(run, how="whole")
    assert problem.startswith("LlamaForCausalLM runs on input_ids, but not as it was loaded: input_ids: ")


def test_names_need_no_package(run):
    assert answers(run, how="names") == ([], [], "names as stock transformers and PEFT look for them")
