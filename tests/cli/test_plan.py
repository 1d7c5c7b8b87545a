"""`qinit plan` for devices that are not here; what it says of this machine is in test_eqft.py and test_meqft.py."""

import json

import pytest

from qinit.planner.kinds import load_kind

QUICK = ("--rank", 4, "--calibration", "none", "--json", "--quiet")


def planned(command, *options):
    code, out, err = command("plan", *options, *QUICK)
    assert (code, err) == (0, "")
    return json.loads(out)


@pytest.mark.parametrize("processes", [1, 4])
def test_an_h100_is_planned_for_where_there_is_none(command, tiny_llama, processes):
    value = planned(command, tiny_llama, "--device-kind", "h100", "--processes", processes)
    card = load_kind("h100").card
    assert value["device"] == {"name": card.name, "type": "cuda", "memory": card.memory}
    assert value["processes"] == processes
    assert value["seconds"]["solving"] > 0
    assert "benchmarks/gpu.py" in value["seconds_origin"]


def test_the_length_and_the_batch_of_the_training_are_taken(command, tiny_llama):
    small, large = (
        planned(command, tiny_llama, "--device-kind", "h100", "--train-length", 64, "--train-batch", batch)[
            "fine_tuning"
        ]
        for batch in (1, 4)
    )
    assert (large["length"], large["batch"]) == (64, 4)
    assert large["without"]["logits"] == 4 * small["without"]["logits"] == 4 * 64 * 256 * 12


def test_a_processor_is_measured_here(command, tiny_llama):
    value = planned(command, tiny_llama, "--device-kind", "cpu")
    assert value["device"]["type"] == value["recipe"]["device"] == "cpu"
    assert "here" in value["seconds_origin"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device-kind", "h10"), "no 'h10' (did you mean 'h100'?); known are cpu, h100"),
        (("--device-kind", "h100", "--device", "cpu"), "give one of them"),
        (("--device-kind", "h100", "--processes", 15), "processes: 15 are more than the 14 layers that are solved"),
    ],
)
def test_bad_input_is_one_line(command, tiny_llama, options, message):
    code, out, err = command("plan", tiny_llama, *options, *QUICK)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


@pytest.mark.parametrize("option", ["--processes", "--train-length", "--train-batch"])
def test_none_of_something_is_refused(command, tiny_llama, option):
    code, _, err = command("plan", tiny_llama, option, 0)
    assert code == 2
    assert option in err


def test_a_window_is_no_longer_than_the_model_takes(command, tiny_llama):
    values = [planned(command, tiny_llama, "--device-kind", "h100", "--train-length", n) for n in (128, 4096)]
    assert values[0]["fine_tuning"]["without"] == values[1]["fine_tuning"]["without"]
