import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qinit.errors import RecipeError
from qinit.plan.allocation import Option
from qinit.widths import knapsack as allocate
from qinit.widths.knapsack import FRONT_POINTS, Choice, Item, front, in_order, knapsack, picked, tied

TWO, THREE = Option(2, 64, 4), Option(3, 64, 4)

WIDTHS = (2, 3, 4, 8)


def item(name, *choices, weights=1):
    """Choices are (stored bits, adapter bytes, nats); widths are counted up from 2."""
    return Item((name,), weights, (tuple(Choice(Option(2 + k, 64, 4), *choice) for k, choice in enumerate(choices)),))


def layers(sizes, widths=(2, 3), nats=0.0):
    """A layer of each size, stored at its widths and half a bit for scales."""
    made = enumerate(sizes)
    return [
        Item((f"l{i}",), size, (tuple(Choice(Option(b, 64, 4), size * (b + 0.5), 8 * size, nats / b) for b in widths),))
        for i, size in made
    ]


# Few different values, so that there are ties, also of zero.
sizes = st.integers(1, 12) | st.integers(1, 10**9)
losses = st.sampled_from([0.0, 0.0, 1e-7, 0.25, 1.0, 3.0]) | st.floats(0, 10)
items_of = st.lists(
    st.lists(st.tuples(sizes.map(float), st.integers(0, 9), losses), min_size=1, max_size=4), min_size=1, max_size=5
).map(lambda rows: [item(f"l{i}", *row) for i, row in enumerate(rows)])


def total(items, picks):
    chosen = [each.totals[pick] for each, pick in zip(items, picks, strict=True)]
    return sum(c.stored_bits for c in chosen), sum(c.adapter_bytes for c in chosen), sum(c.nats for c in chosen)


def brute_force(items, bits, nbytes=None):
    """Return the least loss within the budgets, None if nothing fits."""
    every = (total(items, picks) for picks in itertools.product(*(range(len(each.totals)) for each in items)))
    fitting = (t[2] for t in every if t[0] <= bits and (nbytes is None or t[1] <= nbytes))
    return min(fitting, default=None)


class TestKnapsack:
    @settings(max_examples=40, deadline=None)
    @given(items_of, st.floats(0, 1), st.data())
    def test_it_is_the_best_of_all(self, items, share, data):
        low = sum(min(c.stored_bits for c in each.totals) for each in items)
        high = sum(max(c.stored_bits for c in each.totals) for each in items)
        # Either any budget, or one that an allocation meets exactly.
        exact = [data.draw(st.integers(0, len(each.totals) - 1)) for each in items]
        budget = data.draw(st.sampled_from([low + share * (high - low), total(items, exact)[0]]))
        picks = knapsack(items, budget)
        bits, _, nats = total(items, picks)
        assert bits <= budget
        assert nats == pytest.approx(brute_force(items, budget), rel=1e-6, abs=1e-6)

    def test_sizes_that_differ_a_millionfold(self):
        free, small = [(1.0, 0, 0.0)], [(1.0, 0, 1e-7), (1.0, 0, 1e-7), (1.0, 1, 0.0)]
        rows = [free, [*small, (2.0, 0, 0.0)], [*small, (1002.0, 0, 0.0)], [(1.0, 0, 0.25)] * 3, free]
        rows[3] = [*rows[3], (1000001.0, 0, 0.0)]
        assert knapsack([item(f"l{i}", *row) for i, row in enumerate(rows)], 1000005.0, 0)[3] == 3

    @settings(max_examples=40, deadline=None)
    @given(items_of, st.data())
    def test_with_two_budgets_too(self, items, data):
        fits = [data.draw(st.integers(0, len(each.totals) - 1)) for each in items]
        bits, nbytes, _ = total(items, fits)
        more = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
        budgets = bits + more[0], nbytes + more[1]
        picks = knapsack(items, *budgets)
        found = total(items, picks)
        assert found[0] <= budgets[0]
        assert found[1] <= budgets[1]
        assert found[2] == pytest.approx(brute_force(items, *budgets), rel=1e-6, abs=1e-6)

    @settings(max_examples=40, deadline=None)
    @given(items_of, st.floats(0, 1), st.randoms(use_true_random=False))
    def test_the_order_of_the_items_changes_no_loss_and_a_second_run_nothing(self, items, share, rng):
        low = sum(min(c.stored_bits for c in each.totals) for each in items)
        high = sum(max(c.stored_bits for c in each.totals) for each in items)
        budget = low + share * (high - low)
        picks = knapsack(items, budget)
        assert knapsack(items, budget) == picks
        shuffled = rng.sample(items, len(items))
        again = total(shuffled, knapsack(shuffled, budget))
        assert again[2] == pytest.approx(total(items, picks)[2], rel=1e-6, abs=1e-6)

    @pytest.mark.parametrize("low", [(1.0, 1, 1e-7), (1.0, 0, 0.25)])
    def test_what_exceeds_a_budget_by_less_than_the_solver_sees_is_not_taken(self, low):
        items = [item("a", (1.0, 1, 0.0), (2.0, 0, 0.0)), item("b", low, (1e6, 0, 0.0))]
        assert knapsack(items, 1e6 + 1, 1) == (0, 1)  # (1, 1) is a millionth too large

    def test_a_budget_that_can_be_met_exactly_is(self):
        items = layers([7, 13, 64, 10**9 + 7], nats=1.0)
        for count in range(5):
            budget = sum(each.totals[k < count].stored_bits for k, each in enumerate(items))
            assert total(items, knapsack(items, budget))[0] <= budget
        high = sum(each.totals[1].stored_bits for each in items)
        assert knapsack(items, high) == (1, 1, 1, 1)
        assert total(items, knapsack(items, high * (1 - 1e-11)))[0] < high

    def test_what_loses_nothing_gets_the_smallest(self):
        items = layers([5, 5, 5], WIDTHS)
        assert knapsack(items, 1e9) == (0, 0, 0)
        assert knapsack([item("a", (3.0, 5, 1.0), (3.0, 2, 1.0), (2.0, 9, 1.0))], 3.0, 5) == (1,)

    def test_a_larger_width_that_loses_more_is_not_taken(self):
        assert knapsack([item("a", (2.0, 1, 1.0), (3.0, 1, 0.5), (4.0, 1, 0.75))], 100.0) == (1,)

    @pytest.mark.parametrize("scale", [1e-300, 1e-12, 1.0, 1e12])
    def test_the_scale_of_the_losses_is_no_matter(self, scale):
        items = [
            item(f"l{i}", *((bits * size, 0, scale * loss / bits**2) for bits in WIDTHS))
            for i, (size, loss) in enumerate([(3, 1), (5, 9), (2, 4), (7, 2)])
        ]
        found = knapsack(items, 60.0)
        assert total(items, found)[2] == pytest.approx(brute_force(items, 60.0), rel=1e-9, abs=0)

    @pytest.mark.parametrize("ranks", [(16,), (4, 8, 16, 32, 64)])
    def test_layers_of_a_real_model_within_both_budgets(self, ranks, capfd):
        rng, items = random.Random(0), []
        for i, (out, width) in enumerate(4 * [(4096, 4096), (1024, 4096), (1024, 4096), (11008, 4096), (4096, 11008)]):
            loss = rng.lognormvariate(-7, 1.5)
            choices = (
                Choice(Option(b, 64, r), out * width * (b + (16 + b) / 64), 4 * r * (out + width), loss / 4**b / r**0.3)
                for b in WIDTHS
                for r in ranks
            )
            items.append(Item((str(i),), out * width, (tuple(choices),)))
        bits = 3.0 * sum(each.weights for each in items)
        nbytes = sum(next(c for c in each.totals if c.option.rank == 16).adapter_bytes for each in items)
        found = total(items, knapsack(items, bits, nbytes))
        assert 0.999 * bits < found[0] <= bits
        assert found[1] <= nbytes
        assert capfd.readouterr() == ("", "")  # what the solver prints is kept off stdout

    def test_what_the_solver_prints_is_kept_off_stdout(self, capfd):
        import ctypes

        print("before", flush=True)
        with allocate._silenced():
            ctypes.CDLL(None).printf(b"from C\n")
        print("after", flush=True)
        ctypes.CDLL(None).fflush(None)
        assert capfd.readouterr().out == "before\nafter\n"

    def test_a_solution_that_is_over_by_the_solvers_tolerance_is_stepped_down(self):
        items = layers([10, 20, 30], nats=1.0)
        assert allocate._within(items, (1, 1, 1), 210.0 - 1e-6, None) == (0, 1, 1)
        stuck = [item("a", (1.0, 9, 0.0), (9.0, 1, 0.0))]
        with pytest.raises(RecipeError, match="no allocation was found"):
            allocate._within(stuck, (0,), 5.0, 5)

    def test_budgets_that_are_too_small(self):
        items = layers([100, 200])
        with pytest.raises(RecipeError, match="target_bits: the smallest widths take 750 bits, the budget is 749"):
            knapsack(items, 749.0)
        with pytest.raises(RecipeError, match="rank_budget: the smallest ranks take 2400 bytes, the budget is 2399"):
            knapsack(items, 900.0, 2399)
        assert knapsack(items, 750.0, 2400) == (0, 0)
        apart = [item("a", (1.0, 9, 0.0), (9.0, 1, 0.0))]  # each budget can be met, both cannot
        with pytest.raises(RecipeError, match="target_bits: no allocation was found"):
            knapsack(apart, 5.0, 5)


class TestTied:
    def test_what_is_fused_is_together(self):
        block = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj"]
        names = [f"model.layers.{i}.{name}" for i in range(2) for name in [*block, "mlp.up_proj", "mlp.down_proj"]]
        expected = []
        for i in range(2):
            inside = [f"model.layers.{i}.{name}" for name in [*block, "mlp.up_proj", "mlp.down_proj"]]
            expected += [tuple(inside[:3]), (inside[3],), tuple(inside[4:6]), (inside[6],)]
        assert tied(names) == expected

    def test_only_within_one_parent(self):
        assert tied(["a.q_proj", "b.k_proj", "q", "v", "a.v_proj", "e.w1", "e.w2", "e.w3"]) == [
            *(("a.q_proj", "a.v_proj"), ("b.k_proj",), ("q", "v"), ("e.w1", "e.w3"), ("e.w2",)),
        ]

    @given(st.lists(st.sampled_from(["q_proj", "k_proj", "o_proj", "up_proj", "gate_proj", "c"]), unique=True))
    def test_every_name_is_in_one_group(self, names):
        assert sorted(name for group in tied(names) for name in group) == sorted(names)

    def test_an_item_of_several_layers_is_counted_and_picked_as_one(self):
        both = Item(("q", "k"), 30, ((Choice(TWO, 10.0, 1, 0.5), Choice(THREE, 15.0, 1, 0.25)),) * 2)
        assert both.totals == (Choice(TWO, 20.0, 2, 1.0), Choice(THREE, 30.0, 2, 0.5))
        assert {name: choice.option.bits for name, choice in picked([both], [1]).items()} == {"q": 3, "k": 3}


RULES = ("first", "last", "random", "uniform")


class TestInOrder:
    @given(
        st.lists(sizes, min_size=1, max_size=20),
        st.floats(0, 1),
        st.sampled_from(RULES),
        st.sampled_from([(2, 3), (2, 8), WIDTHS]),
    )
    def test_the_budget_holds_and_two_neighbouring_widths_are_used(self, sizes, share, how, widths):
        items = layers(sizes, widths)
        low, high = (sum(each.totals[k].stored_bits for each in items) for k in (0, -1))
        budget = low + share * (high - low)
        picks = in_order(items, budget, how, 0)
        assert total(items, picks)[0] <= budget * (1 + 1e-12)
        assert max(picks) - min(picks) <= 1

    @pytest.mark.parametrize("how", RULES)
    def test_none_and_all(self, how):
        items = layers([64, 32, 8, 1000])
        low, high = (sum(each.totals[k].stored_bits for each in items) for k in (0, 1))
        assert in_order(items, low, how, 0) == (0, 0, 0, 0)
        assert in_order(items, high, how, 0) == (1, 1, 1, 1)
        assert in_order(items, 2 * high, how, 0) == (1, 1, 1, 1)
        with pytest.raises(RecipeError, match="target_bits: 2 bits for all take 2760 bits, the budget is 2759"):
            in_order(items, low - 1, how, 0)

    def test_first_and_last(self):
        items = layers([10] * 6)
        budget = 6 * 25.0 + 2 * 10
        assert in_order(items, budget, "first", 0) == (1, 1, 0, 0, 0, 0)
        assert in_order(items, budget, "last", 0) == (0, 0, 0, 0, 1, 1)

    def test_random_depends_on_the_seed_alone(self):
        items = layers([10] * 20)
        budget = 20 * 25.0 + 10 * 10
        found = {in_order(items, budget, "random", seed) for seed in range(5)}
        assert len(found) == 5
        assert all(sum(picks) == 10 for picks in found)
        lossy = [replace(each, choices=tuple(own for own in each.choices)) for each in layers([10] * 20, nats=3.0)]
        assert in_order(lossy, budget, "random", 3) == in_order(items, budget, "random", 3)

    @given(st.integers(1, 60), st.data())
    def test_uniform_is_evenly_spread(self, count, data):
        raised = data.draw(st.integers(0, count))
        items = layers([16] * count)
        picks = in_order(items, count * 40.0 + raised * 16.0, "uniform", 0)
        assert sum(picks) == raised
        for stop in range(count + 1):  # nowhere more than one away from its share
            assert abs(sum(picks[:stop]) - stop * raised / count) <= 1

    @given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.floats(0, 1))
    def test_uniform_is_even_in_weights_too(self, sizes, share):
        items = layers(sizes)
        low, high = (sum(each.totals[k].stored_bits for each in items) for k in (0, 1))
        picks = in_order(items, low + share * (high - low), "uniform", 0)
        for stop in range(len(sizes) + 1):
            raised = sum(size for size, pick in zip(sizes[:stop], picks, strict=False) if pick)
            assert raised <= share * sum(sizes[:stop]) + max(sizes)


@settings(max_examples=20, deadline=None)
@given(items_of)
def test_the_front_falls(items):
    assume(len(items) > 1)
    points = front(items, 10)
    assert 1 <= len(points) <= FRONT_POINTS
    for (bits, nats), (more, fewer) in itertools.pairwise(points):
        assert bits < more
        assert nats > fewer
    assert points[-1][1] == pytest.approx(sum(min(c.nats for c in each.totals) for each in items), rel=1e-3, abs=1e-3)


def test_a_front_with_a_budget_for_the_adapter_starts_at_the_smallest_widths():
    ranks = (1, 2, 4)
    items = [
        Item(
            (str(i),),
            64,
            (tuple(Choice(Option(b, 64, r), 64.3 * b, 96 * r, (i + 1) / b / r) for b in (2, 3) for r in ranks),),
        )
        for i in range(6)
    ]
    points = front(items, 384, 6 * 96 * 2)
    assert points[0][0] == pytest.approx(2 * 64.3 / 64)
    assert points[-1][0] == pytest.approx(3 * 64.3 / 64)
