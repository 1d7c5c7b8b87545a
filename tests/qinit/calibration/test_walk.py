from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from qinit.calibration import walk as module
from qinit.calibration.activations import repairable
from qinit.calibration.walk import OpenBlock, Seen, Walk
from qinit.errors import CalibrationError
from qinit.events import Measuring
from qinit.stream import carried
from tests.helpers import calibrated_plan, padded, random_samples
from tests.models import FAMILIES, make_float32
from tests.traces import Trace, assert_close, oriented, second_moment, stock

CPU = torch.device("cpu")
ALL = (*FAMILIES, "gpt_neox", "gemma2", "gemma4", "bert", "t5", "bart")
# What a block's layers write to, by the end of their name; all others: unknown.
WRITES = {
    **{name: {"o_proj": "input", "down_proj": "output"} for name in FAMILIES},
    "opt": {"out_proj": "input", "fc2": "output"},
    "gpt2": {"attn.c_proj": "input", "mlp.c_proj": "output"},
    "gpt_neox": {"attention.dense": "output", "mlp.dense_4h_to_h": "output"},
    "gemma2": {},
    "gemma4": {},
    "bert": {"attention.output.dense": "input", "output.dense": "intermediate.dense"},
    "t5": {"SelfAttention.o": "input", "wo": "output"},
    "bart": {"self_attn.out_proj": "input", "encoder_attn.out_proj": "encoder_attn.q_proj", "fc2": "fc1"},
}
OUTSIDE = ("cls.predictions.transform.dense", "model.per_layer_model_projection")  # of the row of blocks


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """Return a function from a family to its plan, each made once."""
    return cache(lambda family: calibrated_plan(make_float32(tmp_path_factory.mktemp(family) / family, family)))


@pytest.fixture
def small_batches(monkeypatch):
    """Three samples of random_samples at once, so that the last batch is shorter."""
    monkeypatch.setattr(module, "batch_size", lambda plan, samples, device: 3)


def parallel(plan, samples, **options):
    events = list(Walk(plan, samples, CPU, "parallel", **options).visit())
    return {event.layer.target.name: event for event in events if isinstance(event, Seen)}


def sequential(plan, samples, change=lambda name, weight: weight, **options):
    """Walk, and repair every layer to what `change` makes of it; returns the layers in the order of the walk."""
    seen = {}
    for event in Walk(plan, samples, CPU, "sequential", **options).visit():
        if isinstance(event, Seen):
            seen[event.layer.target.name] = event
            event.repair(event.layer, change(event.layer.target.name, event.weight.clone()))
    return seen


def perturbed(name, weight):
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return weight + 0.3 * weight.std() * torch.randn(weight.shape, generator=generator)


def block_of(name):
    parts = name.split(".")
    number = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: number + 1])


def written(family, name):
    return next((kind for end, kind in WRITES[family].items() if name.endswith("." + end)), None)


@pytest.mark.parametrize("family", ALL)
def test_in_parallel_every_layer_sees_what_it_sees_in_the_stock_model(family, plan, small_batches):
    plan, samples = plan(family), random_samples()
    seen = parallel(plan, samples)
    names = [layer.target.name for layer in plan.quantized]
    trace = Trace(stock(plan), names, samples)
    assert sorted(seen) == sorted(name for name in names if name not in OUTSIDE)
    for name, event in seen.items():
        assert event.statistics.tokens == samples.count
        assert event.statistics.drift is None
        assert_close(event.statistics.hessian, trace.hessian(name))
        assert_close(event.statistics.magnitude, trace.inputs[name].abs().mean(0))
        assert torch.equal(event.weight, oriented(stock(plan).get_submodule(name).weight, event.layer))


@pytest.mark.parametrize("family", ALL)
def test_an_exact_repair_leaves_no_drift(family, plan, small_batches):
    plan, samples = plan(family), random_samples()
    seen = sequential(plan, samples)
    trace = Trace(stock(plan), list(seen), samples)
    first, *others = seen.values()
    assert first.statistics.drift is None  # nothing has been repaired in front of it
    for event in others:
        assert_close(event.statistics.hessian, trace.hessian(event.layer.target.name))
    assert not any(event.statistics.drift.any() for event in others if event.statistics.drift is not None)


@pytest.mark.parametrize("family", ALL)
def test_later_layers_see_the_repair_and_what_it_has_left(family, plan, small_batches):
    plan, samples = plan(family), random_samples()
    seen = sequential(plan, samples, perturbed)
    groups: dict[int, list[str]] = {}
    for name, event in seen.items():
        groups.setdefault(id(event.statistics.hessian), []).append(name)
    blocks = sorted({block_of(name) for name in seen})
    clean, model = Trace(stock(plan), [*seen, *blocks], samples), stock(plan)
    drifts = []
    for number, group in enumerate(groups.values()):
        now = Trace(model, [*seen, *blocks], samples)  # all layers of the groups in front are repaired
        for name in group:
            statistics, block = seen[name].statistics, block_of(name)
            assert_close(statistics.hessian, now.hessian(name), 1e-3)
            if number == 0:
                assert statistics.drift is None
                continue
            left = clean.outputs[name] - now.outputs[name]
            if written(family, name) == "input":
                left = left + clean.inputs[block] - now.inputs[block]
            elif written(family, name) not in (None, "output"):
                reader = f"{block}.{written(family, name)}"
                left = left + clean.inputs[reader] - now.inputs[reader]
            if written(family, name) == "output":
                left = clean.outputs[block] - now.outputs[block]
            expected = second_moment(left, now.inputs[name])
            drifts.append(float(expected.abs().max()))
            assert_close(statistics.drift, expected, 2e-3)
        with torch.no_grad():
            for name in group:
                weight = oriented(perturbed(name, seen[name].weight.clone()), seen[name].layer)
                model.get_submodule(name).weight.copy_(weight)
    # Where attention and MLP are parallel, the MLP of the first block has nothing repaired in front of it; nor has a
    # decoder's first attention, which does not look at the encoder.
    clean_ones = {"gpt_neox": 1, "t5": 3, "bart": 3}.get(family, 0)
    assert sum(drift > 1e-5 for drift in drifts) >= len(drifts) - clean_ones


@pytest.mark.parametrize("family", ALL)
def test_what_a_layer_writes_to_is_found_out(family, plan):
    walked = Walk(plan(family), random_samples(), CPU, "sequential")
    for event in walked.visit():
        if isinstance(event, Seen):
            event.repair(event.layer, event.weight)
    config = plan(family).checkpoint.config
    width = next(config[key] for key in ("hidden_size", "n_embd", "d_model") if key in config)
    found = {inner: kind for (*_, inner), kind in walked.kinds.known.items()}
    assert found == {inner: written(family, "x." + inner) for inner in found}
    for end in WRITES[family]:
        assert any(("." + inner).endswith("." + end) for inner in found)
    for layer in plan(family).quantized:
        if layer.target.name in OUTSIDE:
            continue
        inner = layer.target.name.removeprefix(block_of(layer.target.name) + ".")
        assert (inner in found) is (layer.target.module.out_features == width)


@pytest.mark.parametrize(
    ("family", "groups"),
    [
        ("llama", [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]),
        ("phi3", [{"qkv_proj"}, {"o_proj"}, {"gate_up_proj"}, {"down_proj"}]),
        ("gpt_neox", [{"query_key_value"}, {"dense"}, {"dense_h_to_4h"}, {"dense_4h_to_h"}]),
    ],
)
@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_layers_that_read_the_same_share_their_statistics(family, groups, mode, plan):
    seen = (parallel if mode == "parallel" else sequential)(plan(family), random_samples())
    shared: dict[int, list[str]] = {}
    for name, event in seen.items():
        shared.setdefault(id(event.statistics.hessian), []).append(name)
    found = [{name.rsplit(".", 1)[-1] for name in members} for members in shared.values()]
    assert found == groups * 2
    assert all(len({block_of(name) for name in members}) == 1 for members in shared.values())


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_events_name_the_layers_before_they_are_measured(mode, plan):
    announced: list[str] = []
    blocks = []
    for event in Walk(plan("llama"), random_samples(), CPU, mode).visit():
        if isinstance(event, Measuring):
            assert not announced
            announced = list(event.layers)
            blocks.append((event.block, event.blocks))
        elif isinstance(event, Seen):
            announced.remove(event.layer.target.name)
    assert not announced
    assert blocks == [(block, 2) for block in range(2) for _ in range(1 if mode == "parallel" else 4)]


class TestPadding:
    lengths = (12, 5, 9, 12, 2, 7, 8)

    @pytest.mark.parametrize("mode", ["parallel", "sequential"])
    @pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gemma2", "bert", "bart"])
    def test_it_changes_nothing(self, family, mode, plan, small_batches):
        plan, samples = plan(family), padded(random_samples(), list(self.lengths))
        other = padded(random_samples(), list(self.lengths), padding=77)
        run = (lambda s: parallel(plan, s)) if mode == "parallel" else (lambda s: sequential(plan, s, perturbed))
        seen, again = run(samples), run(other)
        for name, event in seen.items():
            assert event.statistics.tokens == sum(self.lengths)
            assert_close(again[name].statistics.hessian, event.statistics.hessian)
            if event.statistics.drift is not None:
                assert_close(again[name].statistics.drift, event.statistics.drift, 1e-3)

    @pytest.mark.parametrize("family", ["llama", "opt", "bert"])
    def test_layers_see_what_they_see_when_every_sample_runs_alone(self, family, plan, small_batches):
        plan, whole = plan(family), random_samples()
        seen = parallel(plan, padded(whole, list(self.lengths)))
        model = stock(plan)
        traces = []
        for row, length in zip(whole.tokens, self.lengths, strict=True):
            alone = type(whole)(row[None, :length], None, "")
            traces.append(Trace(model, list(seen), alone))
        for name, event in seen.items():
            x = torch.cat([trace.inputs[name] for trace in traces])
            assert_close(event.statistics.hessian, second_moment(x, x))


class TestMemory:
    def test_one_block_at_a_time_is_in_memory(self, plan):
        walked = Walk(plan("llama"), random_samples(), CPU, "sequential")
        model = walked.blocks.model
        assert all(parameter.is_meta for parameter in model.parameters())
        for event in walked.visit():
            here = {name for name, parameter in model.named_parameters() if not parameter.is_meta}
            block = int(event.layer.target.name.split(".")[2]) if isinstance(event, Seen) else event.block
            prefix = walked.rows[0].prefix(block)
            needed = {name for name, _ in model.named_parameters() if name.startswith(prefix)}
            last = f"{prefix}mlp.down_proj"  # what is in front of it is behind the text by then
            is_last = isinstance(event, Seen) and event.layer.target.name == last
            assert here == ({f"{last}.weight"} if is_last else needed)
            if isinstance(event, Seen):
                event.repair(event.layer, event.weight)
        assert all(parameter.is_meta for parameter in model.parameters())

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_the_repaired_block_holds_what_is_repaired_and_no_more(self, family, plan, tmp_path):
        walked = Walk(plan(family), random_samples(), CPU, "sequential")
        (row,) = walked.rows
        original, states = row.load(0), SimpleNamespace(row=row, index=0, first=0)
        walked.directory = tmp_path
        block = OpenBlock(walked, original, repairable(original, row.prefix(0), walked.layers.values()), states)
        kept = {name: parameter.clone() for name, parameter in original.named_parameters()}
        repaired = [layer for name, layer in walked.layers.items() if name in block.names][:2]
        for layer in repaired:
            block.repair(layer, block._weight(layer) + 1)
        changed = {layer.target.module.parameter.removeprefix(block.prefix) for layer in repaired}
        for name, parameter in original.named_parameters():
            assert torch.equal(parameter, kept[name])
            other = block.repaired.get_parameter(name)
            assert (other.data_ptr() == parameter.data_ptr()) is (name not in changed)
            assert torch.equal(other, kept[name] + (name in changed))

    def test_a_walk_that_ends_early_gives_its_memory_back(self, plan, tmp_path):
        walked = Walk(plan("llama"), random_samples(), CPU, "sequential", scratch=tmp_path)
        events = walked.visit()
        next(events)
        events.close()
        assert all(parameter.is_meta for parameter in walked.blocks.model.parameters())
        assert not list(tmp_path.iterdir())
        assert torch.is_grad_enabled()

    @pytest.mark.parametrize("mode", ["parallel", "sequential"])
    def test_states_on_disk_give_the_same_bytes(self, mode, plan, tmp_path, monkeypatch, small_batches):
        run = (
            (lambda: parallel(plan("llama"), random_samples(), scratch=tmp_path))
            if mode == "parallel"
            else (lambda: sequential(plan("llama"), random_samples(), perturbed, scratch=tmp_path))
        )
        expected = run()
        monkeypatch.setattr(carried, "CARRIED_SHARE", 0)
        files = []
        from_file = torch.from_file
        monkeypatch.setattr(torch, "from_file", lambda name, **rest: files.append(name) or from_file(name, **rest))
        found = run()
        states = {Path(name).name for name in files if Path(name).parent.name != "shelf"}
        assert states == ({"original-0"} if mode == "parallel" else {"original-0", "repaired-0", "ahead-0"})
        assert any(Path(name).parent.name == "shelf" for name in files) is (mode == "sequential")
        assert all(name.startswith(str(tmp_path)) for name in files)
        assert not list(tmp_path.iterdir())
        for name, event in expected.items():
            assert torch.equal(found[name].statistics.hessian, event.statistics.hessian)
            if event.statistics.drift is not None:
                assert torch.equal(found[name].statistics.drift, event.statistics.drift)

    def test_how_many_samples_run_at_once_changes_nothing(self, plan, monkeypatch):
        expected = sequential(plan("llama"), random_samples(), perturbed)
        monkeypatch.setattr(module, "batch_size", lambda plan, samples, device: 2)
        for name, event in sequential(plan("llama"), random_samples(), perturbed).items():
            assert_close(event.statistics.hessian, expected[name].statistics.hessian)


class TestLayersThatAreNotVisited:
    def test_layers_that_are_not_chosen_are_neither_seen_nor_repaired(self, plan, small_batches):
        plan = calibrated_plan(plan("llama").checkpoint.directory, target_modules="o_proj,down_proj")
        seen = sequential(plan, random_samples())
        assert {name.rsplit(".", 1)[-1] for name in seen} == {"o_proj", "down_proj"}
        trace = Trace(stock(plan), list(seen), random_samples())
        assert all(assert_close(e.statistics.hessian, trace.hessian(n)) is None for n, e in seen.items())

    def test_blocks_without_a_layer_are_passed_through(self, plan):
        plan = calibrated_plan(plan("llama").checkpoint.directory, target_modules=r"model\.layers\.1\..*")
        seen = parallel(plan, random_samples())
        assert len(seen) == 7
        trace = Trace(stock(plan), list(seen), random_samples())
        assert all(assert_close(e.statistics.hessian, trace.hessian(n)) is None for n, e in seen.items())

    def test_layers_outside_of_the_row_of_blocks_are_left_out(self, plan):
        names = [layer.target.name for layer in plan("bert").quantized]
        seen = parallel(plan("bert"), random_samples())
        assert set(names) - set(seen) == {"cls.predictions.transform.dense"}


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
class TestOverflow:
    """The checkpoint itself is finite."""

    def source(self, directory, family, name, rows, value):
        source = make_float32(directory / "source", family)
        tensors = load_file(source / "model.safetensors")
        tensors[name][rows] = value
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        return source

    def test_it_is_said_at_which_layer(self, mode, tmp_path, small_batches):
        weight = "model.layers.1.mlp.up_proj.weight"
        source = self.source(tmp_path, "llama", weight, 5, 3e38)
        with pytest.raises(
            CalibrationError, match=r"^model\.layers\.1\.mlp\.down_proj: NaN or Inf at its input in samp"
        ):
            list(Walk(calibrated_plan(source), random_samples(), CPU, mode).visit())

    @pytest.mark.parametrize("sample", [0, 4])
    def test_it_is_said_in_which_sample(self, mode, sample, tmp_path, small_batches):
        source = self.source(tmp_path, "gpt2", "transformer.wte.weight", 251, 3e38)
        samples = random_samples()
        samples.tokens[sample, -1] = 251
        with pytest.raises(CalibrationError, match=rf"h\.0\.attn\.c_attn: .* in sample {sample} of .*\(a test\)"):
            list(Walk(calibrated_plan(source), samples, CPU, mode).visit())


class TestPasses:
    """How often each layer runs over the text: the original block once, the repaired one as far as each group."""

    @pytest.fixture
    def counts(self, monkeypatch):
        """How many batches linear layers of each shape [out, in] have run on."""
        found: dict[torch.Size, int] = {}
        forward = torch.nn.Linear.forward

        def counting(linear, x):
            if len(x) > 1:  # what layers write to is tried on one sample
                found[linear.weight.shape] = found.get(linear.weight.shape, 0) + 1
            return forward(linear, x)

        monkeypatch.setattr(torch.nn.Linear, "forward", counting)
        return found

    def test_a_block_runs_less_than_three_times(self, plan, counts):
        plan = plan("llama")
        sequential(plan, random_samples(), perturbed)
        q, k, o, gate, down = 4, 4, 3, 2, 2  # the original, and every group of the repaired one from here on
        blocks, width, inner, kv = 2, 64, 128, 32
        assert counts == {
            (width, width): blocks * (q + o),
            (kv, width): blocks * (k + k),
            (inner, width): blocks * (gate + gate),
            (width, inner): blocks * down,
        }
        run = sum(count * shape.numel() for shape, count in counts.items())
        assert run < 3 * sum(layer.weights for layer in plan.quantized)

    def test_a_block_that_was_finished_before_runs_once_in_each_model(self, plan, counts):
        plan = plan("llama")
        seen = sequential(plan, random_samples(), perturbed)
        repaired = {name: perturbed(name, event.weight.clone()) for name, event in seen.items()}
        first = [name for name in seen if ".layers.0." in name]
        counts.clear()
        again = sequential(
            plan,
            random_samples(),
            perturbed,
            finished=first,
            weight_of=lambda layer: repaired[layer.target.name],
        )
        assert counts[64, 128] == 2 + 2
        for name, event in again.items():
            assert torch.equal(event.statistics.hessian, seen[name].statistics.hessian)
            assert event.statistics.drift is None or torch.equal(event.statistics.drift, seen[name].statistics.drift)
