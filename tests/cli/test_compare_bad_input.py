"""What `qinit compare` refuses: one line, exit code 2, and nothing is written."""

from pathlib import Path

import pytest

from tests.compared import STARTS, TUNING, cells, result
from tests.models import add_tokenizer, make_bert, make_checkpoint, make_reader, words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "loftqq"), "--methods: no 'loftqq' (did you mean 'loftq'?); known are qlora, loftq, "),
        (("--methods", "loftq,loftq"), "--methods, --bits: some are given twice (loftq, loftq; 2)"),
        (("--bits", "8"), "bits: method loftq offers 2, 3 or 4, found 8"),
        (
            ("--bits", "2.5"),
            "--bits: 2.5 is a mix of two widths, which eqft alone has, between 2 and 8 bits; found loftq,",
        ),
        (("--methods", "eqft:none", "--bits", "1.5"), "--bits: 1.5 is a mix of two widths, which eqft alone has"),
        (("--bits", "inf"), "--bits: expected numbers like 2,3,4, found 'inf'"),
        (("--bits", "two"), "--bits: expected numbers like 2,3,4, found 'two'"),
        (("--text", "short.txt"), "short.txt: has 3 tokens, fewer than one window of 16"),
        (("--length", 129), "--length: the model takes 128 tokens, found 129"),
        (("--length", 1), "--length: expected 2 tokens or more, found 1"),
        (("--windows", 0), "--windows: expected 1 or more, found 0"),
        (("--jobs", 0), "--jobs: expected 1 or more, found 0"),
        (("--text", "gone.txt"), "gone.txt: no such file, and no data set id"),
        (
            ("--text", "test.txt", "--text", "./test.txt"),
            "--text: two texts have the same name (test.txt, test.txt",
        ),
        (("--finetune", 2), "--finetune: needs a text to train on; give --train-text FILE"),
        (("--train-text", "train.txt"), "--train-text: there is nothing to train; give --finetune STEPS"),
        ((*TUNING, "--finetune", 0), "--finetune: expected 1 or more, found 0"),
        ((*TUNING, "--batch", 60), "train.txt: has 900 tokens to train on, a tenth of them kept for validation"),
        ((*TUNING, "--micro-batch", 0), "--micro-batch: expected 1 or more, found 0"),
        ((*TUNING, "--learning-rates", "0,1"), "--learning-rates: expected different positive numbers, found 0, 1"),
        ((*TUNING, "--learning-rates", "nan"), "--learning-rates: expected different positive numbers, found nan"),
        ((*TUNING, "--full-learning-rates", "-1"), "--full-learning-rates: expected different positive numbers"),
        (
            (*TUNING, "--ceilings", "lorra"),
            "--ceilings: no 'lorra' (did you mean 'lora'?); known are lora and full",
        ),
        ((*TUNING, "--seeds", "1,1"), "--seeds: expected different numbers from 0 up, found 1, 1"),
        (("--calibration", "gone.txt", "--methods", "eqft"), "gone.txt: no such file"),
        (("--rank", 0), "rank: input should be greater than or equal to 1, found 0"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(compare, arguments, message):
    code, out, err = compare(*STARTS, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert not Path("out").exists()


def test_no_text_for_a_model_of_ones_own(compare):
    code, _, err = compare("--bits", 2)
    assert code == 2
    assert "--text: what to measure on is missing" in err


def test_a_tokenizer_of_another_model(compare, tmp_path):
    model = add_tokenizer(make_checkpoint(tmp_path / "other"), size=300)
    Path("test.txt").write_text(words(*range(200, 299)))
    code, _, err = compare(*STARTS, model=model)
    assert code == 2
    assert "the tokenizer made token id 298, but the model has ids up to 255" in err


def test_a_model_without_a_tokenizer(compare, tiny_llama):
    code, _, err = compare(*STARTS, model=tiny_llama)
    assert code == 2
    assert "has no tokenizer files" in err or "no tokenizer" in err


def test_an_encoder(compare, tmp_path):
    code, _, err = compare(*STARTS, model=make_bert(tmp_path / "bert"))
    assert code == 2
    assert "bert: is no causal language model (BertForMaskedLM)" in err


def test_a_directory_that_holds_something_else(compare, undrawn, tmp_path):
    Path("out").mkdir()
    Path("out/diary.txt").write_text("mine")
    for more in ((), ("--overwrite",)):
        code, _, err = compare(*STARTS, *more)
        assert code == 2
        assert "out: exists and has no compare.json, so qinit compare did not write it" in err
    assert Path("out/diary.txt").read_text() == "mine"


def test_a_directory_that_holds_another_models_comparison(compare, undrawn, tmp_path):
    assert compare(*STARTS, "--methods", "loftq")[0] == 0
    before = cells()
    other = make_reader(tmp_path / "other", seed=1)
    code, _, err = compare(*STARTS, model=other)
    assert code == 2
    assert "out: holds a comparison of another model (llama); choose another place with --out" in err
    assert cells() == before
    assert compare(*STARTS, "--methods", "loftq", "--overwrite", model=other)[0] == 0
    assert result()["model"] == "other"


def test_damaged_results_are_not_built_on(compare):
    Path("out").mkdir()
    Path("out/compare.json").write_text("[]")
    code, _, err = compare(*STARTS)
    assert code == 2
    assert "out/compare.json: not what qinit compare writes" in err
