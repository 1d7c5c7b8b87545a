"""The example of question answering: its scores, its labels, and that it trains on what lies beside it."""

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qinit.source.demo import demo_directory
from tests.peft_adapters import make_adapter

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def qa(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import qa

    yield qa
    sys.modules.pop("qa")


def test_it_learns_the_sample_from_an_adapter_and_keeps_what_it_learned(qa, tmp_path, monkeypatch, capsys):
    import peft

    monkeypatch.chdir(tmp_path)
    adapter = make_adapter(demo_directory(), tmp_path / "adapter", target_modules="all-linear", r=8)
    training = ["--steps", "25", "--batch", "5", "--rate", "0.01"]
    qa.main([str(adapter), *training, "--out", str(tmp_path / "trained")])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["before"]["exact_match"] == 0
    assert found["after"]["exact_match"] >= 80
    assert found["after"]["f1"] >= found["after"]["exact_match"]
    base = str(demo_directory())
    assert peft.PeftConfig.from_pretrained(tmp_path / "trained").base_model_name_or_path == base


def test_answers_are_compared_as_squad_compares_them(qa):
    assert qa.normalized("  The  Tower of London, (a castle). ") == "tower of london castle"
    assert qa.exact_match("the Beatles!", ["Beatles", "Fab Four"]) == 1
    assert qa.exact_match("Beatles band", ["Beatles"]) == 0
    assert qa.f1("The Beatles band", ["Rolling Stones", "Beatles"]) == pytest.approx(2 / 3)
    assert qa.f1("band band", ["band"]) == pytest.approx(2 / 3)
    assert (qa.f1("", ["x"]), qa.f1("the", ["a"])) == (0, 1)
    questions = [qa.Row("?", ["yes"]), qa.Row("?", ["no no"])]
    assert qa.scores(["Yes.", "no"], questions) == {"exact_match": 50, "f1": pytest.approx(100 * (1 + 2 / 3) / 2)}


def test_only_the_answer_and_its_end_are_learned(qa):
    tokenizer = AutoTokenizer.from_pretrained(demo_directory())
    row = qa.encode(qa.read("sample", "train", 1)[0], tokenizer)
    learned = [label for label in row["labels"] if label != qa.IGNORED]
    assert tokenizer.decode(learned) == " Paris" + tokenizer.eos_token
    assert row["input_ids"][-len(learned) :] == learned
    prompt = tokenizer.decode(row["input_ids"][: -len(learned)])
    assert prompt.endswith("Question: What is the capital of France?\nAnswer:")
    assert len({len(value) for value in row.values()}) == 1


def test_both_data_sets_are_read_by_their_own_columns(qa, monkeypatch):
    rows = {
        "mandarjoshi/trivia_qa": {"question": "q", "answer": {"value": "v", "aliases": ["w"]}},
        "google-research-datasets/nq_open": {"question": "q", "answer": ["v", "w"]},
    }
    asked = []

    def load_dataset(name, *config, split):
        asked.append((*config, split))
        return [rows[name]]

    monkeypatch.setattr(qa, "load_dataset", load_dataset)
    for name in ("trivia_qa", "nq_open"):
        assert qa.read(name, "validation", 7) == [qa.Row("q", ["v", "w"])]
    assert asked == [("unfiltered.nocontext", "validation[:7]"), ("validation[:7]",)]


@pytest.mark.parametrize(
    ("directory", "words"), [("gone", "gone: no such directory"), ("", "holds no adapter to train")]
)
def test_what_cannot_be_trained_is_one_line(qa, monkeypatch, capsys, directory, words):
    with pytest.raises(SystemExit) as stop:
        qa.main([directory or str(demo_directory())])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
