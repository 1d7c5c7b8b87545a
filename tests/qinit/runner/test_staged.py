"""A method with a stage: layers of a block are held back until it has had its say."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from qinit.errors import CalibrationError
from qinit.events import Done, Finished, Passing, Resumed, Working
from qinit.linalg.low_rank import LowRank
from qinit.solver.methods import CALIBRATED
from qinit.stages import STAGES, Stage
from tests.broken_off import RANDOM, finish, result_in, start, undisturbed
from tests.models import ENTANGLED, make_float32
from tests.stock import delta, dense_weight, load, lora_modules, relative

OPTIONS = {**RANDOM, "use_rslora": True, "lora_alpha": 7.0}
CHANGED = ("o_proj", "up_proj")  # what the stage gives other factors
SHARE = 0.9


class Shrink(Stage):
    """Makes what two of a block's layers add smaller. `seen` is what it was given, block by block."""

    name = "shrink"

    def __init__(self):
        self.seen = []

    def improved(self, block, layers):
        assert not torch.is_grad_enabled()
        states, index = block.states, block.states.index
        apart = []
        for batch in states.batches:
            call = states.calls.of(batch, index)
            one = call(block.module, states.original.read(batch))
            other = call(block.repaired, states.repaired.read(batch))
            apart.append(float((one - other).norm() / one.norm()))
        self.seen.append((index, list(layers), max(apart)))
        for name, repaired in layers.items():
            module = block.repaired.get_submodule(name.removeprefix(block.prefix))
            low_rank = repaired.low_rank
            torch.testing.assert_close(module.weight, repaired.quantized + low_rank.B @ low_rank.A)
        return {
            name: LowRank(SHARE * repaired.low_rank.B, repaired.low_rank.A)
            for name, repaired in layers.items()
            if name.endswith(CHANGED)
        }


@pytest.fixture
def stage(monkeypatch):
    """Let eqft have the stage, for as long as a test runs."""
    made = Shrink()
    monkeypatch.setitem(STAGES, made.name, made)
    monkeypatch.setitem(CALIBRATED, "eqft", replace(CALIBRATED["eqft"], stages=(made.name,)))
    return made


@pytest.fixture(scope="module")
def plain(strong_llama, tmp_path_factory):
    """The same run without it."""
    out = tmp_path_factory.mktemp("plain") / "out"
    return out, finish(strong_llama, out, **OPTIONS)[-1].report


def product(factors, name):
    prefix = f"base_model.model.{name}.lora_"
    return factors[f"{prefix}B.weight"] @ factors[f"{prefix}A.weight"]


@pytest.mark.parametrize("form", ["gptq", "dense"])
def test_what_is_loaded_is_what_the_stage_has_made_and_the_rows_have_its_errors(strong_llama, tmp_path, stage, form):
    report = finish(strong_llama, tmp_path / "out", **OPTIONS, format=form)[-1].report
    modules = lora_modules(load(tmp_path / "out"))
    weights = load_file(strong_llama / "model.safetensors")
    assert len(report.layers) == len(modules) == 14
    for row in report.layers:
        weight, module = weights[f"{row.name}.weight"].float(), modules[row.name]
        base = dense_weight(module.base_layer)
        assert relative(base, weight) == pytest.approx(row.error_start, rel=2e-3)
        assert relative(base + delta(module), weight) == pytest.approx(row.error, rel=2e-3)
        # What the output is off by was measured before.
        assert (row.output_error is None) == row.name.endswith(CHANGED)


def test_in_the_first_block_the_factors_alone_change_and_those_behind_see_it(strong_llama, tmp_path, stage, plain):
    finish(strong_llama, tmp_path / "out", **OPTIONS)
    out, _ = plain
    bases = [load_file(place / "model.safetensors") for place in (out, tmp_path / "out")]
    factors = [load_file(place / "eqft_init/adapter_model.safetensors") for place in (out, tmp_path / "out")]
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        first, second = f"model.layers.0.{name}", f"model.layers.1.{name}"
        assert torch.equal(bases[0][f"{first}.qweight"], bases[1][f"{first}.qweight"])
        share = SHARE if name.endswith(CHANGED) else 1.0
        torch.testing.assert_close(product(factors[1], first), share * product(factors[0], first))
        assert not torch.equal(product(factors[1], second), share * product(factors[0], second))


def test_it_gets_each_block_once_with_all_of_its_layers_and_both_models_text(strong_llama, tmp_path, stage):
    events = finish(strong_llama, tmp_path / "out", **OPTIONS)
    names = [event.row.name for event in events if isinstance(event, Done) and event.row]
    assert [(index, layers) for index, layers, _ in stage.seen] == [(0, names[:7]), (1, names[7:])]
    assert all(0 < apart < 1 for *_, apart in stage.seen)


def test_a_layer_is_done_when_its_block_is(strong_llama, tmp_path, stage):
    events = finish(strong_llama, tmp_path / "out", **OPTIONS)
    kinds = [type(event) for event in events if isinstance(event, Working | Done) and ".layers." in event.name]
    blocks = [kind for kind in kinds if kind in (Working, Done)]
    assert blocks[:14] == [Working] * 7 + [Done] * 7
    assert {event.row for event in events if isinstance(event, Done) and event.row} == set(events[-1].report.layers)


@pytest.mark.parametrize(
    ("kind", "name", "layers"),
    [
        (Working, "model.layers.0.mlp.up_proj.weight", None),  # nothing is finished
        (Working, "model.layers.1.mlp.up_proj.weight", 7),  # while the second block is solved
        (Done, "model.layers.1.self_attn.v_proj.weight", 10),  # while it is written
    ],
)
def test_a_run_that_is_broken_off_within_a_block_goes_on_with_the_same_bytes(
    strong_llama, place, stage, kind, name, layers
):
    wanted = undisturbed(strong_llama, place, **OPTIONS)
    events = start(strong_llama, place / "out", **OPTIONS)
    while not (isinstance(event := next(events), kind) and event.name == name):
        assert not isinstance(event, Finished)
    events.close()
    stage.seen.clear()
    found = finish(strong_llama, place / "out", **OPTIONS)
    if layers is not None:
        assert isinstance(found[0], Resumed)
        assert found[0].layers == layers
        assert Passing(0, 2) in found
        assert [index for index, layers, _ in stage.seen if layers] == [1]
    assert result_in(place / "out") == wanted


def test_factors_that_nobody_asked_for_are_no_change(strong_llama, tmp_path, stage, plain, monkeypatch):
    monkeypatch.setattr(Shrink, "improved", lambda *_: {})
    report = finish(strong_llama, tmp_path / "out", **OPTIONS)[-1].report
    out, expected = plain
    for file in ("model.safetensors", "eqft_init/adapter_model.safetensors"):
        found, wanted = load_file(tmp_path / "out" / file), load_file(out / file)
        first = [name for name in wanted if ".layers.0." in name]
        assert first
        assert all(torch.equal(found[name], wanted[name]) for name in first)
    # The text goes on in another way behind a block that a stage may change, so the second block's are equal but for
    # rounding.
    for row, other in zip(report.layers, expected.layers, strict=True):
        assert row.error == pytest.approx(other.error, rel=0.02)
    assert report.totals["output_error"] == pytest.approx(expected.totals["output_error"], rel=0.02)


def test_a_model_that_does_not_run_block_by_block_is_refused(place, tmp_path, stage):
    source = make_float32(tmp_path / "m", "gemma4", **ENTANGLED)
    options = {**RANDOM, "calibration_length": 16, "format": "dense", "group_size": 32}
    with pytest.raises(
        CalibrationError, match=r"method eqft works block by block \(shrink\).* keys and values of others"
    ):
        finish(source, place / "out", **options)
    assert list(place.iterdir()) == []
