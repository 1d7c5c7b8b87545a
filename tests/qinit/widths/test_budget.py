"""Plans and runs with mixed widths: what each layer gets, what it costs, and that it is what is written and loaded."""

import json
from itertools import product

import pytest
import safetensors.torch
import torch
import yaml

import qinit
from qinit.errors import RecipeError
from qinit.events import Allotted, Sampling
from qinit.plan.allocation import Option, Sensitivity
from qinit.planner.make import make_plan
from qinit.recipe import make_recipe
from qinit.runner.run import run
from qinit.verification.findings import Finding
from qinit.verification.verify import verify
from qinit.widths import budget as mixed
from qinit.widths.budget import allotted, budget, items, options
from qinit.widths.knapsack import Choice
from qinit.widths.validity import conditions
from tests.helpers import plan_of, quantize, weights_of
from tests.mixed import gptq_only
from tests.models import make_checkpoint
from tests.stock import delta, dense_weight, load, lora_modules, relative

BITS = {2: 2 + 18 / 32, 3: 3 + 19 / 32, 4: 4 + 20 / 32, 8: 8 + 24 / 32}  # with scales and zeros, group size 32
SMALL = {"rank": 4, "iter": 1, "group_size": 32, "calibration": "none", "device": "cpu"}
FEW = {"calibration": "random", "calibration_samples": 4, "calibration_length": 16}


def small_plan(source, **options):
    return plan_of(source, **{**SMALL, **options})


def sensitivity_of(plan, nats):
    """A measurement in which `nats` is a function of name, bits and rank."""
    own = options(plan)
    return Sensitivity(conditions(plan), "a test", {n: {o: nats(n, o.bits, o.rank) for o in own[n]} for n in own})


def file_of(plan, tmp_path, nats):
    sensitivity_of(plan, nats).write(tmp_path / "s.json")
    return str(tmp_path / "s.json")


def widths(plan):
    return {layer.target.name: layer.bits for layer in plan.quantized}


def own_choice(_name, bits, rank):
    return 1 / bits / rank


class TestItems:
    def test_every_layer_may_have_every_width_at_its_rank(self, strong_llama):
        plan = small_plan(strong_llama, target_bits=4, rank=16)
        assert list(options(plan)) == [layer.target.name for layer in plan.quantized]
        assert {tuple(pairs) for pairs in options(plan).values()} == {
            ((2, 32, 16), (3, 32, 16), (4, 32, 16), (8, 32, 16))
        }
        assert {tuple(p) for p in options(small_plan(strong_llama, ratio=0, bits_low=3, bits_high=8)).values()} == {
            ((3, 32, 4), (8, 32, 4))
        }

    def test_with_a_rank_budget_also_a_quarter_to_four_times_the_rank_as_far_as_shapes_allow(self, strong_llama):
        plan = small_plan(strong_llama, ratio=0.5, rank=16, rank_budget="1MB")
        found = options(plan)
        assert found["model.layers.0.mlp.up_proj"] == list(product((2, 3), (32,), (4, 8, 16, 32, 64)))
        assert found["model.layers.0.self_attn.k_proj"] == list(product((2, 3), (32,), (4, 8, 16, 32, 32)))
        assert options(small_plan(strong_llama, ratio=0.5, rank=1, rank_budget="1MB"))[
            "model.layers.0.mlp.up_proj"
        ] == list(product((2, 3), (32,), (1, 1, 1, 2, 4)))

    @pytest.mark.parametrize("form", ["dense", "gptq"])
    def test_bits_are_those_of_a_packed_file(self, strong_llama, form):
        plan = small_plan(strong_llama, target_bits=4, format=form, tie="none")
        for item, layer in zip(items(plan, None), plan.quantized, strict=True):
            rows, columns = layer.target.module.out_features, layer.target.module.in_features
            for choice in item.totals:
                indices = 32 * columns if form == "gptq" else 0  # g_idx
                assert choice.stored_bits == rows * columns * BITS[choice.option.bits] + indices
                assert choice.adapter_bytes == 4 * choice.option.rank * (rows + columns)
                assert choice.nats == 0

    def test_those_of_gptq_are_the_bytes_that_are_written(self, strong_llama, tmp_path):
        plan = small_plan(strong_llama, ratio=0.5, format="gptq", allocation="random", tie="none")
        list(run(plan, tmp_path / "out"))
        tensors = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
        for item in items(plan, None):
            (name,) = item.names
            nbytes = sum(t.numel() * t.element_size() for key, t in tensors.items() if key.startswith(name + "."))
            assert {c.option.bits: c.stored_bits for c in item.totals}[widths(plan)[name]] == 8 * nbytes

    def test_fused_layers_are_one(self, strong_llama):
        plan = small_plan(strong_llama, ratio=0.5, tie="fused")
        nats = sensitivity_of(plan, lambda name, bits, rank: len(name) / bits).nats
        made = items(plan, nats)
        assert [len(item.names) for item in made] == [3, 1, 2, 1] * 2
        assert made[0].weights == 64 * 64 + 2 * 32 * 64
        assert made[0].totals[0] == Choice(
            Option(2, 32, 4),
            made[0].weights * BITS[2],
            4 * 4 * (128 + 96 + 96),
            sum(len(name) for name in made[0].names) / 2,
        )


class TestBudget:
    def test_a_ratio_lies_between_the_widths(self, strong_llama):
        for ratio in (0, 0.25, 1):
            plan = small_plan(strong_llama, ratio=ratio)
            weights = sum(layer.weights for layer in plan.quantized)
            expected = BITS[2] + ratio * (BITS[3] - BITS[2])
            assert budget(plan, items(plan, None)) / weights == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("form", "allocation", "target"),
        [("dense", "sensitivity", 3.1), ("gptq", "uniform", 3.5), ("dense", "random", 7.0), ("gptq", "random", 3.1)],
    )
    def test_target_bits_are_those_of_the_plan(self, strong_llama, form, allocation, target):
        plan = small_plan(strong_llama, target_bits=target, format=form, allocation=allocation)
        assert plan.pending is (allocation == "sensitivity")
        found = plan.bits_per_weight if form == "gptq" else plan.grid_bits_per_weight
        assert target - 0.7 < found <= target

    @pytest.mark.parametrize(
        ("choices", "group", "low", "message"),
        [
            ("2,3,4", 32, True, r"2.5 bits .* widths 2, 3, 4 and their .* the least is (\S+)"),
            ("3,8", 64, True, r"2.5 bits .* widths 3, 8 and .* the least is (\S+)"),
            ("2,3", 64, False, r"9.5 bits .* the most is (\S+)"),
            ("2,3", 32, False, r"9.5 bits .* the most is (\S+)"),
        ],
    )
    @pytest.mark.parametrize("form", ["dense", "gptq"])
    def test_what_cannot_be_had_is_said_with_what_can(self, strong_llama, choices, group, low, message, form):
        asked = {"bits_choices": choices, "group_size": group, "format": form}
        with pytest.raises(RecipeError, match="target_bits: " + message) as caught:
            small_plan(strong_llama, target_bits=2.5 if low else 9.5, **asked)
        said = float(str(caught.value).rsplit(" ", 1)[1])
        plan = small_plan(strong_llama, target_bits=said, **asked)  # what it says can be had can be had
        assert int(choices[0 if low else -1]) in widths(plan).values()
        with pytest.raises(RecipeError, match="cannot be had"):
            small_plan(strong_llama, target_bits=said + (-1e-3 if low else 1e-3), **asked)


class TestAllocation:
    def test_the_layers_that_lose_most_get_more(self, strong_llama, tmp_path):
        def nats(name, bits, _rank):
            return (9.0 if "down_proj" in name or "k_proj" in name else 1.0) / bits

        file = file_of(small_plan(strong_llama, ratio=0.5), tmp_path, nats)
        plan = small_plan(strong_llama, ratio=0.25, sensitivity=file)
        assert {name.rsplit(".", 1)[1] for name, bits in widths(plan).items() if bits == 3} >= {"down_proj", "k_proj"}
        assert not plan.pending
        found = plan.allocation
        weights = sum(layer.weights for layer in plan.quantized)
        assert found.how == "sensitivity"
        assert found.chosen == (
            pytest.approx(plan.grid_bits_per_weight),
            pytest.approx(sum(nats(name, bits, 4) for name, bits in widths(plan).items())),
        )
        assert found.uniform == tuple(
            (pytest.approx(BITS[bits]), pytest.approx(sum(nats(name, bits, 4) for name in widths(plan))))
            for bits in (2, 3)
        )
        assert found.front[0] == found.uniform[0]
        assert found.front[-1] == found.uniform[1]
        assert found.chosen[0] * weights <= budget(plan, items(plan, None))

    def test_of_fused_layers_all_get_one_width(self, strong_llama, tmp_path):
        file = file_of(small_plan(strong_llama, ratio=0.5), tmp_path, lambda name, bits, _rank: hash(name) % 97 / bits)
        for options_ in ({"sensitivity": file}, {"allocation": "random"}, {}):
            given = widths(small_plan(strong_llama, ratio=0.4, tie="fused", **options_))
            for i in range(2):
                attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
                assert len({given[attention + end] for end in ("q_proj", "k_proj", "v_proj")}) == 1
                assert given[mlp + "gate_proj"] == given[mlp + "up_proj"]

    @pytest.mark.parametrize(("rule", "raised"), [("first", range(7)), ("last", range(7, 14))])
    def test_a_rule_measures_nothing(self, strong_llama, tmp_path, rule, raised):
        plan = small_plan(strong_llama, ratio=0.5, allocation=rule)
        assert {i for i, bits in enumerate(widths(plan).values()) if bits == 3} == set(raised)
        events = list(run(plan, tmp_path / "out"))
        assert not any(isinstance(event, Allotted | Sampling) for event in events)
        assert events[-1].report.totals["allocation"] == {
            "allocation": rule,
            "metric": "by a rule; nothing was measured",
        }
        assert not (tmp_path / "out" / "sensitivity.json").exists()

    def test_kept_layers_stay(self, tmp_path):
        source = make_checkpoint(tmp_path / "m", intermediate_size=88)  # down_proj's inputs do not divide by 32
        report = quantize(source, tmp_path / "out", ratio=0.5, format="gptq", group_size=32, allocation="uniform")
        assert {row.name.rsplit(".", 1)[1] for row in report.layers if row.kept} == {
            *("gate_proj", "up_proj", "down_proj"),
        }
        assert all(row.bits is None for row in report.layers if row.kept)
        assert {row.bits for row in report.layers if not row.kept} == {2, 3}


class TestRankBudget:
    @pytest.mark.parametrize("size", ["40KB", "62KB", "100KB", "1MB"])
    def test_the_adapter_takes_no_more(self, strong_llama, tmp_path, size):
        asked = {"ratio": 0.5, "rank": 8, "rank_budget": size}
        file = file_of(small_plan(strong_llama, **asked), tmp_path, own_choice)
        plan = small_plan(strong_llama, **asked, sensitivity=file)
        room = int(size[:-2]) * (1000 if size.endswith("KB") else 10**6)
        assert min(0.9 * room, small_plan(strong_llama, rank=32).adapter_bytes) <= plan.adapter_bytes <= room
        assert plan.grid_bits_per_weight <= (BITS[2] + BITS[3]) / 2

    def test_adapters_of_kept_layers_count(self, tmp_path):
        source = make_checkpoint(tmp_path / "m", intermediate_size=88)
        asked = {"ratio": 0.5, "rank": 8, "rank_budget": "60KB", "format": "gptq"}
        plan = small_plan(source, **asked)
        plan = small_plan(source, **asked, sensitivity=file_of(plan, tmp_path, own_choice))
        assert any(layer.kept for layer in plan.layers)
        assert 0.9 * 60000 < plan.adapter_bytes <= 60000

    def test_one_that_is_too_small_is_said_before_anything_is_measured(self, strong_llama):
        least = small_plan(strong_llama, rank=2).adapter_bytes
        with pytest.raises(RecipeError, match=f"rank_budget: 1KB are too few; .* from 2, the adapter takes {least} b"):
            small_plan(strong_llama, ratio=0.5, rank=8, rank_budget="1KB")

    def test_ranks_are_written_as_peft_reads_them(self, strong_llama, tmp_path):
        asked = {"ratio": 0.5, "rank": 8, "rank_budget": "62KB", "lora_alpha": 12.0, "use_rslora": True}
        report = quantize(strong_llama, tmp_path / "out", **{**SMALL, **asked})
        ranks = {row.name: row.rank for row in report.layers}
        config = json.loads((tmp_path / "out/eqft_init/adapter_config.json").read_text())
        assert len(set(ranks.values())) > 1
        assert config["r"] == 8
        assert config["rank_pattern"] == {name: rank for name, rank in ranks.items() if rank != 8}
        assert config["alpha_pattern"] == {
            name: pytest.approx(12 * (rank / 8) ** 0.5) for name, rank in config["rank_pattern"].items()
        }
        assert_loads(strong_llama, tmp_path / "out", report)
        assert report.totals["adapter_bytes"] <= 62000


class TestOneBudget:
    """For base and adapter: widths, group sizes and ranks are chosen at once."""

    def test_group_sizes_and_ranks_are_there_to_choose(self, strong_llama):
        found = options(small_plan(strong_llama, target_size="1MB", bits_choices="2,3", rank=8))
        assert found["model.layers.0.mlp.up_proj"] == list(product((2, 3), (16, 32, 64), (2, 4, 8, 16, 32)))
        assert found["model.layers.0.mlp.down_proj"][:11:5] == [(2, 16, 2), (2, 32, 2), (2, 64, 2)]
        packed = options(small_plan(strong_llama, target_size="1MB", format="gptq", group_size=64))
        assert {option.group_size for option in packed["model.layers.0.mlp.up_proj"]} == {32, 64}  # 64 inputs

    @pytest.mark.parametrize(("form", "size"), [("dense", "150KB"), ("gptq", "200KB")])
    def test_the_files_of_base_and_adapter_take_no_more_than_the_size(self, strong_llama, tmp_path, form, size):
        if form == "gptq":
            gptq_only()
        asked = {"target_size": size, "rank": 8, "format": form, "group_size": 32}
        report = quantize(strong_llama, tmp_path / "out", **{**SMALL, **asked})
        assert len({(row.bits, row.group_size, row.rank) for row in report.layers}) > 1
        assert_loads(strong_llama, tmp_path / "out", report, loaded=qinit.load if form == "gptq" else load)
        totals, room = report.totals, 1000 * int(size[:-2])
        files = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*.safetensors"))
        if form == "dense":  # it counts as it would be packed
            files -= totals["quantized_weights"] * (totals["bits_per_weight"] - totals["grid_bits_per_weight"]) / 8
        assert 0.9 * room < files <= room + 1e-6
        assert totals["allocation"]["nats_per_megabyte"].keys() == {"bits", "group_size", "rank"}
        assert not [finding for finding in verify(tmp_path / "out") if isinstance(finding, Finding)]

    def test_the_adapter_counts_in_target_bits_where_that_is_asked(self, strong_llama):
        asked = {"target_bits": 6.0, "rank": 8, "count_adapter": True, "bits_choices": "2,3,4"}
        plan = small_plan(strong_llama, **asked)
        weights = sum(layer.weights for layer in plan.quantized)
        plan = allotted(plan, sensitivity_of(plan, own_choice))
        assert 5.7 < plan.grid_bits_per_weight + 8 * plan.adapter_bytes / weights <= 6
        assert plan.allocation.chosen[0] == pytest.approx(
            plan.grid_bits_per_weight + 8 * plan.adapter_bytes / weights, abs=1e-9
        )

    def test_what_cannot_be_had_is_said_with_what_can(self, strong_llama):
        with pytest.raises(
            RecipeError, match=r"target_size: 40KB cannot be had; what is not .* the least is \d+KB"
        ) as caught:
            small_plan(strong_llama, target_size="40KB", format="gptq")
        least = str(caught.value).rsplit(" ", 1)[1]
        plan = small_plan(strong_llama, target_size=least, format="gptq")
        assert plan.base_bytes + plan.adapter_bytes <= int(least[:-2]) * 1000
        assert {layer.bits for layer in plan.quantized} == {2}
        everything = small_plan(strong_llama, target_size="1GB")
        everything = allotted(everything, sensitivity_of(everything, own_choice))
        assert {layer.bits for layer in everything.quantized} == {8}


@torch.no_grad()
def assert_loads(source, out, report, loaded=load):
    """The stock loaders, or qinit's, get Q + s B A with the errors that the report states."""
    modules = lora_modules(loaded(out))
    weights = safetensors.torch.load_file(source / "model.safetensors")
    assert len(modules) == len(report.layers)
    for row in report.layers:
        weight, base = weights[row.name + ".weight"].float(), dense_weight(modules[row.name].base_layer)
        assert modules[row.name].r["default"] == row.rank
        assert relative(base, weight) == pytest.approx(row.error_start, rel=2e-3)
        assert relative(base + delta(modules[row.name]), weight) == pytest.approx(row.error, rel=2e-3, abs=1e-6)


class TestRuns:
    @pytest.mark.parametrize(("form", "calibration"), [("gptq", {}), ("dense", FEW)])
    def test_all_low_and_all_high_are_eqft_to_the_byte(self, strong_llama, tmp_path, form, calibration):
        for ratio, bits in ((0, 2), (1, 3)):
            asked = {**SMALL, **calibration, "format": form}
            quantize(strong_llama, tmp_path / f"mixed-{bits}", ratio=ratio, **asked)
            quantize(strong_llama, tmp_path / f"eqft-{bits}", bits=bits, **asked)
            found = weights_of(tmp_path / f"mixed-{bits}")
            assert len(found) == 2
            assert found == weights_of(tmp_path / f"eqft-{bits}")

    @pytest.mark.parametrize("calibration", [{}, FEW])
    def test_with_its_file_nothing_is_measured_and_the_bytes_are_the_same(self, strong_llama, tmp_path, calibration):
        asked = {**SMALL, **calibration, "ratio": 0.4}
        events = list(run(small_plan(strong_llama, **asked), tmp_path / "one"))
        assert sum(isinstance(event, Allotted) for event in events) == 1
        file = tmp_path / "one" / "sensitivity.json"
        plan = small_plan(strong_llama, **asked, sensitivity=str(file))
        assert not plan.pending
        again = list(run(plan, tmp_path / "two"))
        assert not any(isinstance(event, Allotted) for event in again)
        assert weights_of(tmp_path / "two") == weights_of(tmp_path / "one")
        assert (tmp_path / "two" / "sensitivity.json").read_bytes() == file.read_bytes()
        assert again[-1].report.totals["allocation"] == events[-1].report.totals["allocation"]
        assert {row.bits for row in again[-1].report.layers} == {2, 3}

    def test_dense_loads_as_stock_and_is_what_the_report_says(self, strong_llama, tmp_path):
        report = quantize(strong_llama, tmp_path / "out", **{**SMALL, "target_bits": 3.5})
        assert report.recipe["format"] == "dense"
        assert len({row.bits for row in report.layers}) > 1
        assert_loads(strong_llama, tmp_path / "out", report)

    def test_the_report_has_the_front_what_was_chosen_and_each_width_alone(self, strong_llama, tmp_path):
        report = quantize(strong_llama, tmp_path / "out", **{**SMALL, "target_bits": 3.5})
        written = json.loads((tmp_path / "out/qinit.json").read_text())["totals"]
        found = written["allocation"]
        assert found["allocation"] == "sensitivity"
        assert found["metric"].startswith("Fisher information on ")
        assert found["chosen"][0] == pytest.approx(written["grid_bits_per_weight"], abs=1e-4)
        assert found["chosen"][0] <= 3.5
        assert [bits for bits, _ in found["uniform"]] == pytest.approx(list(BITS.values()))
        alone = dict(found["uniform"])
        assert found["chosen"][1] < alone[BITS[2]]
        assert found["front"] == sorted(found["front"])
        assert len(found["front"]) <= 17
        assert report.totals["allocation"]["front"][0] == pytest.approx(found["front"][0])

    @pytest.mark.parametrize("where", ["qinit.json", "README.md"])
    def test_its_recipe_can_be_given_again(self, strong_llama, tmp_path, where):
        asked = {**SMALL, "target_bits": 3.5, "bits_choices": "2,3,8", "tie": "fused", "allocation": "random"}
        asked |= {"check": False, "polish": 0}
        quantize(strong_llama, tmp_path / "one", **asked)
        text = (tmp_path / "one" / where).read_text()
        recipe = json.loads(text)["recipe"] if where == "qinit.json" else text.split("```yaml\n")[1].split("```")[0]
        (tmp_path / "again.yaml").write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe))
        again = make_recipe(tmp_path / "again.yaml")
        assert again == make_recipe(model=str(strong_llama), **asked)
        list(run(make_plan(again, strong_llama, "tiny"), tmp_path / "two"))
        assert weights_of(tmp_path / "two") == weights_of(tmp_path / "one")

    def test_before_measuring_all_ranks_are_the_recipes(self, strong_llama):
        plan = small_plan(strong_llama, ratio=0.5, rank_budget="1MB")
        assert mixed._plain(plan, items(plan, None))[0].totals[0].option.rank == 4
        assert {layer.rank for layer in plan.quantized} == {4}
