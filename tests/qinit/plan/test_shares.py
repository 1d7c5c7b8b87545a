"""What stays as it is, in weights and bytes."""

from qinit.plan.shares import EMBEDDINGS, EXPERTS, LINEAR, Share, weight_words
from tests.helpers import plan_of
from tests.models import make_checkpoint


def test_all_weights_are_quantized_or_in_a_share(tmp_path):
    source = make_checkpoint(tmp_path / "m", "mixtral")
    for options in ({"format": "gptq", "group_size": 32}, {"format": "dense", "exclude": "experts,q_proj"}):
        plan = plan_of(source, **options)
        quantized = sum(layer.weights for layer in plan.quantized)
        assert quantized + sum(share.weights for share in plan.shares) == plan.checkpoint.parameters
        first = plan.shares[0]
        assert (first.what, first.weights, first.nbytes) == (EXPERTS, 2 * 4 * 3 * 64 * 128, 2 * 2 * 4 * 3 * 64 * 128)
    by_kind = {share.what: share.weights for share in plan.shares}
    assert by_kind[EMBEDDINGS] == 2 * 256 * 64
    assert by_kind[LINEAR] == 2 * 64 * 64
    dense = plan_of(source, format="dense")
    assert EXPERTS not in {share.what for share in dense.shares}


def test_the_plan_says_what_becomes_of_experts(tmp_path):
    source = make_checkpoint(tmp_path / "m", "llama4")
    gptq = plan_of(source, format="gptq", group_size=32)
    (note,) = (note for note in gptq.notes if note.startswith("experts: "))
    assert note.startswith("experts: 1.97e5 weights, 0.39 MB, ")
    assert "% of the model stay in 16 bits: format gptq packs linear layers" in note
    assert note.endswith("--format dense quantizes them")
    assert "2 linear layers that choose among experts, or weigh them, stay as they are" in gptq.notes
    some = plan_of(source, format="dense", target_modules="experts.down_proj,q_proj")
    assert any(note.startswith("8 matrices of experts get no adapter") for note in some.notes)
    assert {layer.rank for layer in some.layers} == {0, 4}


def test_a_share_is_said_with_its_part_of_the_model():
    share = Share(EXPERTS, 1_200_000_000, 2_400_000_000)
    assert weight_words(228_000_000, 1_428_000_000, [share.to_json()]) == {
        "weights": "2.28e8 of 1.43e9 quantized, 16 %",
        "stays in 16 bits": "experts: 1.2e9 weights, 2.4 GB, 84 % of the model",
    }
    assert list(weight_words(1, 1, [])) == ["weights"]
