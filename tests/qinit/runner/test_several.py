"""One run by several processes: the same bytes for any number of them, errors in one line of one, and going on."""

import re
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from qinit.workplace.place import partial_of
from tests.broken_off import result_in
from tests.helpers import names

TEXT = ("--calibration-samples", 64, "--calibration-length", 32)  # 8 shards of 256 tokens
RUNS = {
    "data-free": (["eqft", "--calibration", "none", "--iter", 1], 3),
    "sequential": (["eqft", "--calibration", "self", *TEXT], 2),
    "parallel and mixed": (
        ["meqft", "--calibration", "random", *TEXT, "--calibration-mode", "parallel", "--ratio", 0.5, "--polish", 2],
        3,
    ),
}


def line(kind, source, out):
    return [*RUNS[kind][0], source, "--rank", 4, "--no-check", "--out", out, "--quiet"]


@pytest.mark.parametrize("kind", RUNS)
def test_the_result_is_the_same_for_any_number_of_processes(kind, forks, strong_llama, place, tmp_path):
    found = []
    for count in (1, RUNS[kind][1]):
        assert forks.together(tmp_path / "log", count, *line(kind, strong_llama, place / "out")) == [0] * count
        found.append(result_in(place / "out"))
        shutil.rmtree(place / "out")
    assert found[0] == found[1]
    assert names(place) == []


def test_a_run_whose_processes_were_killed_goes_on_to_the_same_bytes(forks, strong_llama, place, tmp_path):
    arguments = line("sequential", strong_llama, place / "out")
    assert forks.together(tmp_path / "log", 2, *arguments) == [0, 0]
    wanted = result_in(place / "out")
    shutil.rmtree(place / "out")
    journal = str(partial_of(place / "out") / "journal")
    for rank, layers in ((1, 3), (0, 8)):
        kill = {"rank": rank, "layers": layers, "journal": journal}
        codes = forks.together(tmp_path / "log", 2, *arguments, kill=kill)
        assert codes[rank] == -signal.SIGKILL
        assert codes[1 - rank] == 2
        assert not (place / "out").exists()
    assert forks.together(tmp_path / "log", 2, *arguments) == [0, 0]
    assert result_in(place / "out") == wanted
    assert names(place) == ["out"]


@pytest.fixture
def sources(strong_llama, place):
    """Two models of one name beside where runs go, and one with NaN in a layer that is the second process's."""
    for number in range(2):
        shutil.copytree(strong_llama, place / f"machine{number}/model")
    change(place / "machine1/model", lambda tensors: {name: tensor + 1 for name, tensor in tensors.items()})
    shutil.copytree(strong_llama, place / "damaged")
    change(place / "damaged", lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3, 4].fill_(torch.nan))
    return place


def change(model, how):
    tensors = load_file(model / "model.safetensors")
    changed = how(tensors)
    save_file(changed if isinstance(changed, dict) else tensors, model / "model.safetensors", metadata={"format": "pt"})


MODEL = "{place}/machine0/model"
BAD = {
    "more processes than layers": ([MODEL, "--target-modules", "o_proj"], 3, "3 processes for 2 layers: "),
    "other threads": ([MODEL], 2, r"process 1 of 2 .*: threads \(OMP_NUM_THREADS\) was 1, now 2; start all "),
    "other options": ([MODEL, "--seed", "{rank}"], 2, "process 1 of 2 .*: seed was 0, now 1; "),
    "another source": (["model"], 2, "process 1 of 2 .*: the model's model.safetensors was .* in pieces of it, now "),
    "another place": ([MODEL, "--out", "{place}/out{rank}"], 2, "out0: process 1 .* does not see what the first "),
    "a damaged layer": (["{place}/damaged"], 2, r"'model.layers.1.mlp.up_proj.weight' holds 1 NaN or Inf"),
    "no device": ([MODEL, "--device", "cuda"], 2, "process 0 is number 0 of its machine, where torch sees 0 CUDA "),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line_of_one_process_and_ends_all(what, forks, sources, tmp_path):
    given, count, message = BAD[what]
    if what == "no device" and torch.cuda.is_available():
        pytest.skip("there is one")
    before = names(sources)
    arguments = ["--rank", 4, "--no-check", "--calibration", "none", "--quiet", "--out", sources / "out", *given]
    arguments = [str(word).replace("{place}", str(sources)) for word in arguments]
    differently = {f"rank{rank}": {"DIRECTORY": str(sources / f"machine{rank}")} for rank in range(2)}
    if what == "other threads":
        differently["rank1"]["THREADS"] = "2"
    assert forks.together(tmp_path / "log", count, "eqft", *arguments, **differently) == [2] * count
    (said,) = (tmp_path / "log0").read_text().splitlines()
    assert re.search(f"^error: .*{message}", said)
    assert not any((tmp_path / f"log{rank}").read_text() for rank in range(1, count))
    assert names(sources) == before
