from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from qinit.plan.limits import GRADIENT_LENGTH, GRADIENT_SAMPLES
from qinit.planner import work as module
from qinit.planner.operations import OPERATIONS
from qinit.planner.work import Model, work_of
from qinit.text.self_text import LARGEST_BATCH
from qinit.train.polish import BATCH_TOKENS, EPOCHS
from tests.helpers import plan_of
from tests.models import make_checkpoint, make_reader

CPU = torch.device("cpu")
TEXT = {"calibration": "random", "calibration_samples": 64, "calibration_length": 64, "format": "dense"}
ATTENTION = ("q_proj", "k_proj", "v_proj")


def sums(plan, operation=None):
    """Return what each part costs: calls times the cost of their shape, of one operation or of all."""
    found = defaultdict(float)
    for work in work_of(plan, CPU):
        if operation in (None, work.operation):
            found[work.part] += work.count * OPERATIONS[work.operation].cost(work.shape)
    return found


def weights(plan, *names):
    """Return the weights of the linear layers of these names, all without any."""
    modules = (m for m in plan.architecture.linear if not names or m.name.rpartition(".")[2] in names)
    return sum(module.in_features * module.out_features for module in modules)


@pytest.fixture
def plan(tiny_llama):
    return lambda **options: plan_of(tiny_llama, **{**TEXT, **options})


class TestPasses:
    def test_a_llama_s_text_runs_through_as_many_blocks_as_the_walk_does(self, plan):
        model = Model(plan())
        for block in model.blocks.values():
            assert [layer.name.rpartition(".")[2] for layer in block[-3:]] == ["gate_proj", "up_proj", "down_proj"]
            assert model.passes(block) == [4, 4, 4, 3, 2, 2, 3]

    def test_of_square_blocks_they_make_2_7(self, tmp_path):
        # As Llama's 7B: all of attention is square, and what is behind it is 2.7 times as wide.
        square = {"hidden_size": 96, "intermediate_size": 256, "num_key_value_heads": 4}
        model = Model(plan_of(make_checkpoint(tmp_path / "m", **square), **TEXT))
        (block, _) = model.blocks.values()
        size = [layer.in_features * layer.out_features for layer in block]
        passes = sum(n * count for n, count in zip(size, model.passes(block), strict=True)) / sum(size)
        assert passes == pytest.approx(2.75, abs=0.1)

    def test_in_parallel_the_original_runs_once(self, plan):
        model = Model(plan(calibration_mode="parallel"))
        assert {count for block in model.blocks.values() for count in model.passes(block)} == {1}

    def test_without_the_last_layer_a_block_is_run_through_once_more(self, plan):
        model = Model(plan(target_modules="q_proj,k_proj,v_proj"))
        assert [model.passes(block) for block in model.blocks.values()] == [[2] * 7] * 2
        model = Model(plan(target_modules="o_proj"))
        assert model.passes(next(iter(model.blocks.values()))) == [3, 3, 3, 2, 2, 2, 2]


class TestCalibrating:
    def test_the_products_are_those_of_the_passes_and_the_statistics(self, plan):
        found = plan(method="cloq")
        tokens = 64 * 64
        passes = 4 * weights(found, *ATTENTION) + 3 * weights(found, "o_proj", "down_proj")
        passes += 2 * weights(found, "gate_proj", "up_proj")
        gaps = 2 * 3 * 64**2  # before q, before o, before gate
        own = weights(found, "o_proj", "down_proj")
        assert sums(found, "product")["calibrating"] == pytest.approx(tokens * (passes + gaps + own))
        assert sums(found, "moment")["calibrating"] == pytest.approx(tokens * 2 * (3 * 64**2 + 128**2))

    def test_in_parallel_there_is_no_gap(self, plan):
        found = plan(method="cloq", calibration_mode="parallel")
        assert sums(found, "product")["calibrating"] == pytest.approx(64 * 64 * weights(found))
        assert sums(found, "moment") == sums(plan(method="cloq"), "moment")

    def test_it_grows_with_the_tokens_but_the_pass_back_takes_a_part_of_the_text_only(self, plan):
        one, two = (sums(plan(method="cloq", calibration_samples=n))["calibrating"] for n in (128, 256))
        assert two == pytest.approx(2 * one)
        back = [
            sums(plan(calibration_samples=n))["calibrating"]
            - sums(plan(method="cloq", calibration_samples=n))["calibrating"]
            for n in (128, 256)
        ]
        assert 0 < back[0] == pytest.approx(back[1])

    def test_the_pass_back_is_three_products_and_a_head(self, plan):
        walk, whole = (sums(plan(**options), "product")["calibrating"] for options in ({"method": "cloq"}, {}))
        tokens = 64 * min(64, GRADIENT_SAMPLES)
        assert GRADIENT_LENGTH > 64
        assert whole - walk == pytest.approx(tokens * (3 * weights(plan()) + 2 * 64 * 256))
        assert sums(plan(), "directions")["calibrating"] > 0 == sums(plan(method="cloq"), "directions")["calibrating"]

    def test_only_the_chosen_layers_are_measured(self, plan):
        part = sums(plan(target_modules="q_proj"), "moment")["calibrating"]
        assert part == pytest.approx(64 * 64 * 2 * 64**2)

    def test_experts_see_a_part_of_the_tokens(self, plan):
        made = plan()
        config = {**made.checkpoint.config, "num_local_experts": 8, "num_experts_per_tok": 2}
        model = Model(replace(made, checkpoint=replace(made.checkpoint, config=config)))
        layer = made.architecture.linear[0]
        expert = type(layer)("model.layers.0.mlp.experts.3.up_proj", 64, 64, False)
        assert (model.share(layer), model.share(expert)) == (1.0, 0.25)


class TestText:
    def test_text_that_is_there_costs_nothing_to_write(self, plan):
        assert sums(plan())["text"] == 0
        assert sums(plan(calibration="self"))["text"] > 0
        assert sums(plan())["calibrating"] == sums(plan(calibration="self"))["calibrating"]

    def test_every_token_is_a_step_for_a_batch_at_once(self, plan):
        found = plan(calibration="self", calibration_samples=2 * LARGEST_BATCH["cpu"], calibration_length=17)
        steps = 2 * 16
        head = 64 * 256
        assert sums(found, "step")["text"] == pytest.approx(steps * LARGEST_BATCH["cpu"] * (weights(found) + head))
        assert sums(found, "draw")["text"] == pytest.approx(steps * LARGEST_BATCH["cpu"] * 256)
        assert sums(found, "small")["text"] == pytest.approx(steps * 3 * module.CALLS)  # two blocks, and around them
        (recall,) = (work for work in work_of(found, CPU) if work.operation == "recall")
        assert (recall.shape, recall.count) == ((LARGEST_BATCH["cpu"], 4, 2, 8, 16), steps * 2)

    def test_samples_longer_than_the_model_takes_count_as_they_will_be(self, plan):
        long, longest = (work_of(plan(calibration="self", calibration_length=n), CPU) for n in (128, 4096))
        assert long == longest


class TestPolish:
    def test_a_step_is_four_products_and_the_teacher_s_one(self, plan):
        found = plan(polish=1000)
        text = 1000 * BATCH_TOKENS // EPOCHS
        held_out = 4096 * (1 + 40)
        inside, head = weights(found), 64 * 256
        products = 4 * 1000 * BATCH_TOKENS * inside + 2 * 1000 * BATCH_TOKENS * head
        assert sums(found, "product")["polishing"] == pytest.approx(products + (text + held_out) * (inside + head))

    def test_more_steps_take_longer_and_none_nothing(self, plan):
        few, many = (sums(plan(polish=steps))["polishing"] for steps in (10, 1000))
        assert 50 < many / few < 200
        assert sums(plan())["polishing"] == 0

    def test_what_the_model_writes_for_it_counts(self, tmp_path):
        short = {**TEXT, "calibration": "self", "calibration_samples": 8, "polish": 10}
        reads, writes = (make(tmp_path / make.__name__) for make in (make_reader, make_checkpoint))
        brought, own = (plan_of(model, **short) for model in (reads, writes))
        assert (brought.polish_source, own.polish_source) == ("text", "self")
        assert sums(brought, "draw")["polishing"] == 0 < sums(own, "draw")["polishing"]


class TestOtherParts:
    def test_the_check_runs_two_models(self, plan):
        found = plan(check=True)
        inside = weights(found) + 64 * 256
        assert sums(found, "product")["checking"] == pytest.approx(2 * module.check_tokens(found) * inside)
        assert sums(plan())["checking"] == 0

    def test_widths_still_to_be_chosen_are_measured_first(self, plan):
        assert sums(plan(ratio=0.5))["allocating"] > 0
        without = plan(ratio=0.5, calibration="none")
        assert sums(without, "draw")["allocating"] > 0  # the model writes the text for it
        assert sums(plan(ratio=0.5, allocation="first"))["allocating"] == 0

    def test_each_width_is_tried_on_every_layer(self, plan):
        two, four = (sums(plan(target_bits=3, bits_choices=c), "product")["allocating"] for c in ("2,4", "2,3,4,8"))
        tokens = 64 * GRADIENT_SAMPLES
        assert four - two == pytest.approx(2 * tokens * weights(plan()))
