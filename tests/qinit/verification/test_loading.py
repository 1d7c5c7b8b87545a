import shutil

import pytest

from qinit.trial.asked import Answer
from qinit.verification import loading
from qinit.verification.findings import Checked, Finding
from qinit.verification.loading import check_loading
from tests.helpers import quantize


@pytest.fixture(scope="module")
def run(llama, tmp_path_factory):
    place = tmp_path_factory.mktemp("run") / "run"
    quantize(llama, place, format="gptq")
    return place


@pytest.fixture
def asked(monkeypatch):
    """What the process would be asked, which is not started."""
    found = []

    def answers(what):
        found.append(what)
        yield Answer("adapter", "wrong")
        yield Answer("base", "to be known", grave=False)
        yield Answer("base", "loaded", kind="done")

    monkeypatch.setattr(loading, "answers", answers)
    monkeypatch.setattr("qinit.formats.base.Format.missing_packages", lambda _: [])
    return found


def events(run, *arguments, **options):
    return [each for each in check_loading(run, *arguments, **options) if isinstance(each, Checked | Finding)]


def test_what_is_answered_becomes_findings_about_files(run, llama, asked):
    assert events(run) == [
        Finding("eqft_init/adapter_model.safetensors", "wrong"),
        Finding("config.json", "to be known", grave=False),
        Checked("loaded", "loaded", 0),
    ]
    (what,) = asked
    assert (what.run, what.adapter) == (str(run), str(run / "eqft_init"))
    assert (what.class_name, what.how, what.source, what.trust_remote_code) == (
        *("LlamaForCausalLM", "whole", str(llama), False),  # the source that the report names
    )


def test_another_adapter_and_a_source_are_handed_on(run, asked, tmp_path):
    other, source = tmp_path / "other", tmp_path / "source"
    shutil.copytree(run / "eqft_init", other)
    first, *_ = events(run, other, source, trust_remote_code=True)
    assert first.file == str(other / "adapter_model.safetensors")
    assert (asked[0].adapter, asked[0].source, asked[0].trust_remote_code) == (str(other), str(source), True)


@pytest.mark.parametrize(("deep", "how"), [(False, "meta"), (True, "blocks")])
def test_what_memory_does_not_hold_is_loaded_without_weights_or_block_by_block(run, asked, monkeypatch, deep, how):
    monkeypatch.setattr(loading, "free_memory", lambda _: 1 << 10)
    first, *_ = events(run, deep=deep)
    assert asked[0].how == how
    assert ("--deep compares block by block" in str(first)) is not deep


def test_where_nothing_unpacks_it_names_are_compared_and_a_note_says_so(run, asked, monkeypatch):
    monkeypatch.setattr("qinit.formats.base.Format.missing_packages", lambda _: ["gptqmodel"])
    first, *_ = events(run)
    assert asked[0].how == "names"
    assert not first.grave
    assert first.what.startswith("gptqmodel not installed, so the run was not loaded, only its names compared")
    assert "pip install" in first.what
