import pytest

from qinit.errors import RecipeError
from qinit.grids import GRIDS
from qinit.solver.methods import METHODS, get_method


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
        assert (row.grid, row.search, row.svd, row.iterations_fixed) == ("nf", "absmax", "full", True)
        assert "arXiv" in row.source
        assert not row.keep_best  # the papers use the last iterate
    assert (loftq.start, loftq.iterations, loftq.refit) == ("quantize", 5, True)
    assert (qpissa.start, qpissa.iterations, qpissa.refit) == ("low-rank", 1, False)
    assert (qlora.start, qlora.refit) == ("none", False)


def test_the_calibrated_rows_say_what_their_papers_say():
    axes = {
        name: (row.grid, row.search, row.rounding, row.metric, row.split)
        for name, row in METHODS.items()
        if row.metric != "weight" and "arXiv" in row.source
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
    assert all(METHODS[name].iterations_fixed and not METHODS[name].keep_best for name in axes)


def test_eqft_keeps_its_best_iterate_and_takes_its_iterations_from_the_recipe():
    row = METHODS["eqft"]
    assert row.keep_best
    assert row.svd == "subspace"
    assert not row.iterations_fixed


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


def test_an_unknown_method_is_answered_with_the_nearest_name():
    with pytest.raises(RecipeError, match=r"no 'loftqq' \(did you mean 'loftq'\?\).*eqft"):
        get_method("loftqq")
