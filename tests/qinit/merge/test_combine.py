import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from qinit.errors import CheckpointError, OutputError, RecipeError
from qinit.merge.combine import combine, plan_combine
from tests.helpers import edit_json, edit_tensors, gauss, names, quantize, weights_of
from tests.models import make_checkpoint
from tests.peft_adapters import load_base, make_adapter, put_on

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
IDS = torch.arange(3, 43).view(2, 20)
UP = "base_model.model.model.layers.1.mlp.up_proj.lora_{}.weight"


def made(adapters, weights, out, how="linear", density=None, **options):
    return combine(plan_combine(adapters, weights, how, density, **options), out, command="qinit merge")


def moved(start, to, seed):
    """What training leaves: every factor of a start a little elsewhere."""
    shutil.copytree(start, to)

    def move(tensors):
        for at, tensor in enumerate(tensors.values()):
            tensor.add_(0.05 * tensor.std() * gauss(*tensor.shape, seed=seed + at))

    edit_tensors(to / WEIGHTS, move)
    return to


@pytest.fixture
def pair(finished, tmp_path):
    """Two adapters that were trained from the start of a run."""
    return [moved(finished / "eqft_init", tmp_path / name, seed) for name, seed in (("a", 1), ("b", 100))]


def edit(adapter, **changes):
    edit_json(adapter / CONFIG, lambda config: config.update(changes))


def test_stock_peft_loads_it_on_the_base_and_finds_the_repair_once(finished, pair, tmp_path):
    report = made(pair, (0.5, 0.5), tmp_path / "out")
    assert names(tmp_path / "out") == ["README.md", CONFIG, WEIGHTS]
    start, a, b, out = (load_file(each / WEIGHTS) for each in (finished / "eqft_init", *pair, tmp_path / "out"))
    assert out.keys() == start.keys()
    for name, tensor in out.items():
        torch.testing.assert_close(tensor, (a[name] + b[name]) / 2, rtol=1e-5, atol=1e-6)
    loaded = put_on(finished, tmp_path / "out").eval()
    with torch.no_grad():
        theirs = put_on(finished, pair[0]).eval()
        theirs.load_adapter(pair[1], "b")
        theirs.base_model.add_weighted_adapter(["default", "b"], [0.5, 0.5], "naive", combination_type="linear")
        found = loaded(input_ids=IDS).logits
        expected = put_on(finished, finished / "eqft_init").eval()(input_ids=IDS).logits
        theirs.set_adapter("naive")
        naive = theirs(input_ids=IDS).logits
    assert (found - expected).norm() < 0.2 * (naive - expected).norm()
    assert (report.rank, report.matrices, report.start_size > report.parts[0].added > 0) == (4, 14, True)
    config, own = (json.loads((each / CONFIG).read_text()) for each in (tmp_path / "out", finished / "eqft_init"))
    assert config == own


def test_the_bytes_follow_from_what_is_given(pair, tmp_path):
    for name in ("one", "two"):
        made(pair, (1.0, 1.0), tmp_path / name, "dare_ties")
    assert weights_of(tmp_path / "one") == weights_of(tmp_path / "two")
    assert made(pair, (1.0, 1.0), tmp_path / "other", "dare_ties", 0.3).how == "dare_ties, density 0.3"
    assert weights_of(tmp_path / "one") != weights_of(tmp_path / "other")


def test_adapters_of_a_base_without_a_start_are_taken_whole_whatever_their_ranks_and_scales(llama, tmp_path):
    settings = {"target_modules": ["q_proj", "up_proj"], "use_rslora": True, "rank_pattern": {"up_proj": 2}}
    one, two = (make_adapter(llama, tmp_path / name, r=rank, **settings) for name, rank in (("one", 4), ("two", 3)))
    report = made([one, two], (0.7, 0.4), tmp_path / "out", "svd")
    assert (report.start, report.start_size) == (None, 0)
    assert "holds no start of qinit's" in report.notes[0]
    model = PeftModel.from_pretrained(load_base(llama), one, "one")
    model.load_adapter(two, "two")
    model.load_adapter(tmp_path / "out", "ours")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (config["r"], set(config["rank_pattern"].values())) == (4, {2})
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            total = 0.7 * module.get_delta_weight("one") + 0.4 * module.get_delta_weight("two")
            least = torch.linalg.svdvals(total)[4 if name.endswith("q_proj") else 2 :].norm()
            torch.testing.assert_close((module.get_delta_weight("ours") - total).norm(), least, rtol=1e-3, atol=1e-5)
    with pytest.raises(CheckpointError, match=r"q_proj.weight has rank 3, and rank 4 in .*; --combination svd takes"):
        plan_combine([one, two], (0.7, 0.4))


def break_modules(adapter):
    edit_tensors(adapter / WEIGHTS, lambda t: [t.pop(UP.format(part)) for part in "AB"])
    edit(adapter, target_modules=r".*(layers\.0\..*_proj|[^p]_proj)")


def start_anew(adapter):
    edit_tensors(adapter / WEIGHTS, lambda t: [each.copy_(gauss(*each.shape)) for each in t.values()])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: edit(b, peft_type="IA3"), "peft_type is 'IA3'; adapters of type LORA are combined"),
        (lambda b: edit(b, peft_type="gone"), "peft_type is 'gone'; adapters of type LORA are combined"),
        (lambda b: edit(b, use_dora=True), "has no lora_magnitude_vector, though use_dora is set"),
        (
            lambda b: edit(b, init_lora_weights="pissa"),
            "init_lora_weights is 'pissa', with which PEFT changes the base",
        ),
        (lambda b: edit(b, lora_alpha=16), r"has scale 4, and 1 in .*eqft_init, which it was to be trained from"),
        (break_modules, r"up_proj.weight is in .*eqft_init and not in .*b|up_proj.weight is in .*a and not in .*b"),
        (start_anew, r"does not hold what is in .*eqft_init, so it was trained from another start"),
        (
            lambda b: edit_tensors(b / WEIGHTS, lambda t: t[UP.format("A")].fill_(float("nan"))),
            "holds 256 NaN or Inf among 256 values",
        ),
        (lambda b: (b / WEIGHTS).unlink(), "adapter_model.safetensors: not found"),
    ],
)
def test_an_adapter_that_is_none_of_these_is_refused_and_nothing_is_left(pair, tmp_path, change, words):
    change(pair[1])
    with pytest.raises(CheckpointError, match=words):
        made(pair, (0.5, 0.5), tmp_path / "out")
    assert names(tmp_path) == ["a", "b"]


def test_more_than_factors_of_matrices_is_refused(llama, tmp_path):
    kinds = {
        "DoRA, rank 4": {"use_dora": True},
        "trained whole": {"modules_to_save": ["lm_head"]},
        "rows trained": {"trainable_token_indices": [3, 9]},
    }
    for number, (words, settings) in enumerate(kinds.items()):
        adapter = make_adapter(llama, tmp_path / str(number), target_modules=["q_proj"], **settings)
        with pytest.raises(CheckpointError, match=f"{words}.*; combined are factors of single matrices alone"):
            plan_combine([adapter, adapter], (0.5, 0.5))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((["a"], (1.0,)), r"--adapters: expected two or more, as A,B; found 1"),
        ((["a", "b"], (1.0,)), r"--weights: expected 2 numbers, one for each of --adapters; found 1"),
        ((["a", "b"], (1.0, float("inf"))), r"--weights: expected 2 numbers"),
        ((["a", "b"], ()), r"--weights: expected 2 numbers.*; found none"),
        ((["a", "b"], (1.0, 1.0), "tie"), r"--combination: no 'tie' \(did you mean 'ties'\?\); known are linear, svd"),
        ((["a", "b"], (1.0, 1.0), "svd", 0.5), r"--density: is about ties, .*; svd keeps all values"),
        ((["a", "b"], (1.0, 1.0), "ties", 1.0), r"--density: expected a share above 0 and below 1, found 1"),
    ],
)
def test_options_that_do_not_fit(arguments, words):
    adapters, *more = arguments
    with pytest.raises(RecipeError, match=words):
        plan_combine([Path(each) for each in adapters], *more)


def test_places_that_are_taken_or_read_from(pair, tmp_path):
    for place, words in ((pair[0], "is, holds or lies in"), (tmp_path / "taken", "exists; remove it")):
        (tmp_path / "taken").mkdir(exist_ok=True)
        (tmp_path / "taken/thesis.tex").write_text("x")
        with pytest.raises(OutputError, match=words):
            made(pair, (0.5, 0.5), place)


def test_another_base_is_refused_by_its_sum(pair, tmp_path):
    quantize(make_checkpoint(tmp_path / "source"), tmp_path / "other", format="dense", bits=3)
    edit(pair[1], base_model_name_or_path=str(tmp_path / "other"))
    with pytest.raises(CheckpointError, match=r"which is another model \(its weights have the sum \w{12}\.\.\., not "):
        plan_combine(pair, (0.5, 0.5))
