import pytest

from tests.helpers import quantize, repair

RUN = {"format": "dense", "group_size": 32}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({**RUN, "bits": 4}, "quantized to 4 bits by qinit (dense, 16.00 bits per quantized weight as stored), with a"),
        ({"method": "pissa"}, "with a part of its weights in a LoRA adapter of rank 4 in `eqft_init/`, by qinit: the"),
        ({**RUN, "method": "pissa", "bits": 3}, "in `eqft_init/`, the start pissa of full precision: fine-tuning"),
    ],
)
def test_a_run_says_what_its_base_and_its_adapter_are(options, words, llama, tmp_path):
    report = quantize(llama, tmp_path / "run", **{"iter": None, **options})
    card = (tmp_path / "run" / "README.md").read_text()
    assert words in card
    assert (f"| {report.done} layers | 14 (0 kept as they are) |") in card
    assert report.done == ("adapted" if options.get("method") and "bits" not in options else "quantized")


def test_an_adapter_alone_says_what_it_is_for(llama, tmp_path):
    report = repair(llama, llama, tmp_path / "out", method="lora")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"An adapter of rank 4 by qinit for `{llama}`, the start lora: it changes nothing" in card
    assert report.done == "adapted"
