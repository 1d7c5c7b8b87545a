from dataclasses import replace

import pytest
import torch

from qinit.errors import QinitError, RecipeError
from qinit.grids import GRIDS
from qinit.grids.exact import GivenGrid
from qinit.linalg.low_rank import OutputMetric
from qinit.solver.methods import CALIBRATED, METHODS, get_method, on_base
from qinit.solver.solve import solve
from qinit.solver.spec import LayerSpec
from tests.helpers import gauss
from tests.layers import COLUMNS, GROUP, RANK, ROWS, statistics, weights


@pytest.mark.parametrize("name", METHODS)
def test_every_row_names_a_grid_and_a_search_that_exist(name):
    row = get_method(name)
    assert row.name == name
    assert row.search in GRIDS[row.grid].searches
    assert row.iterations >= 1
    assert row.source
    assert row.start != "none" or not row.refit  # a plain LoRA start has nothing to fit


def test_the_published_rows_say_what_their_papers_say():
    assert {"qlora", "loftq", "qpissa", "eqft"} <= METHODS.keys()
    loftq, qpissa, qlora = METHODS["loftq"], METHODS["qpissa"], METHODS["qlora"]
    for row in (loftq, qpissa, qlora):
        assert (row.grid, row.search, row.svd, row.adjustable) == ("nf", "absmax", "full", False)
        assert "arXiv" in row.source
        assert not row.keep_best  # the papers use the last iterate
    assert (loftq.start, loftq.iterations, loftq.refit) == ("quantize", 5, True)
    assert (qpissa.start, qpissa.iterations, qpissa.refit) == ("low-rank", 1, False)
    assert (qlora.start, qlora.refit) == ("none", False)


def test_the_calibrated_rows_say_what_their_papers_say():
    axes = {
        name: (row.grid, row.search, row.rounding, row.metric, row.split)
        for name, row in METHODS.items()
        if row.needs and "arXiv" in row.source
    }
    assert axes == {
        "lqer": ("int", "minmax", "nearest", "diagonal", "B"),
        "qera": ("int", "minmax", "nearest", "activation", "B"),
        "eora": ("int", "minmax", "gptq", "activation", "balanced"),
        "cloq": ("int", "minmax", "gptq", "activation", "A"),
        "srr": ("int", "minmax", "nearest", "activation", "B"),
        "lq-lora": ("nf", "absmax", "nearest", "fisher", "balanced"),
    }
    assert [name for name in axes if METHODS[name].preserve] == ["srr"]
    assert [name for name in axes if METHODS[name].magr] == ["cloq"]
    assert {name: METHODS[name].ridge for name in axes if METHODS[name].ridge} == {"cloq": 0.01}
    assert all(not METHODS[name].adjustable and not METHODS[name].keep_best for name in axes)


def test_eqft_keeps_its_best_iterate_and_takes_its_iterations_from_the_recipe():
    row = METHODS["eqft"]
    assert row.keep_best
    assert row.svd == "subspace"
    assert row.adjustable


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_eqft_fits_the_low_rank_first_where_it_is_large_and_at_two_bits_without_text(bits):
    blind, calibrated = get_method("eqft"), get_method("eqft", calibrated=True)
    for rank, large in ((1, False), (15, False), (16, True), (64, True)):
        for shape in ((128, 128), (64, 10**6), (10**6, 64)):  # A and B: rank / out + rank / in of the weights
            assert calibrated.low_rank_first(bits, rank, shape) == large
            assert blind.low_rank_first(bits, rank, shape) == (large or bits == 2)


@pytest.mark.parametrize(("name", "first"), [("qlora", False), ("loftq", False), ("qpissa", True), ("lq-lora", True)])
def test_a_published_row_has_one_order_at_any_rank(name, first):
    assert {METHODS[name].low_rank_first(bits, rank, (64, 64)) for bits in (2, 4) for rank in (1, 64)} == {first}


@pytest.mark.parametrize("row", [*METHODS.values(), *CALIBRATED.values()], ids=lambda row: f"{row.name}-{row.solver}")
def test_on_a_base_that_exists_a_row_fits_the_low_rank_alone(row):
    found = on_base(row)
    if row.name in ("qpissa", "srr", "lq-lora"):  # they choose Q and the low rank together
        assert found is None
        return
    assert (found.grid, found.search, found.rounding, found.iterations) == (
        *("exact", "none", "nearest"),
        2 if row.solver == "calibrated" else 1,
    )
    kept = ("name", "source", "solver", "needs", "metric", "split", "ridge", "adapter", "svd", "refit")
    assert all(getattr(found, key) == getattr(row, key) for key in kept)
    weight, Q = weights(), weights().round(decimals=1)
    everything = replace(statistics(), output_metric=OutputMetric(gauss(3, ROWS), torch.ones(ROWS)))
    asked = LayerSpec(found, 3, GROUP, RANK, found.iterations, given=Q)
    solution = solve(weight, asked, 0, everything if row.needs else None)
    assert torch.equal(GivenGrid(Q).dequantize(solution.quantized), Q)
    if row.start == "none":
        assert solution.low_rank is None or not solution.low_rank.B.any()
    elif not row.needs:  # the residual's own best rank, in the norm of the weights
        S = torch.linalg.svdvals(weight - Q)
        L = solution.low_rank.B @ solution.low_rank.A
        assert float((weight - Q - L).norm() / S[RANK:].norm()) < 1.02
    else:
        assert solution.output_error < solution.quantized_output_error


def test_an_unknown_method_is_answered_with_the_nearest_name():
    with pytest.raises(RecipeError, match=r"no 'loftqq' \(did you mean 'loftq'\?\).*eqft"):
        get_method("loftqq")


@pytest.mark.parametrize("row", [*METHODS.values(), *CALIBRATED.values()], ids=lambda row: f"{row.name}-{row.solver}")
def test_a_row_looks_at_nothing_but_what_it_needs(row):
    """What it does not need is damaged, and changes nothing."""
    everything = replace(statistics(), output_metric=OutputMetric(gauss(3, ROWS), torch.ones(ROWS)))
    damaged = {
        "hessian": {"hessian": torch.full((COLUMNS, COLUMNS), torch.nan)},
        "magnitude": {"magnitude": torch.full((COLUMNS,), torch.nan)},
        "fisher": {"fisher": None},
        "output metric": {"output_metric": OutputMetric(torch.full((3, ROWS), torch.nan), torch.ones(ROWS))},
    }
    left = everything
    for part, change in damaged.items():
        left = left if part in row.needs else replace(left, **change)
    asked = LayerSpec(row, 3, GROUP, RANK, min(row.iterations, 3))
    whole, rest = (solve(weights(), asked, 0, given) for given in (everything, left))
    assert torch.equal(whole.quantized.codes, rest.quantized.codes)
    assert whole.error == rest.error
    for part in row.needs:
        if part != "hessian":  # a broken one may also end the solve
            assert solve_differs(asked, everything, damaged[part])


def solve_differs(asked, everything, change):
    """Whether damage to a part shows, as an error or in the result."""
    try:
        found = solve(weights(), asked, 0, replace(everything, **change))
    except (QinitError, RuntimeError):
        return True
    return found.error != solve(weights(), asked, 0, everything).error
