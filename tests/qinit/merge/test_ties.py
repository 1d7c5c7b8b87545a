from qinit.exports.finished import open_base
from qinit.merge.ties import ties, untied
from tests.helpers import quantize
from tests.models import make_checkpoint


def test_parameters_of_one_tensor_are_found_and_those_with_one_each_are_not(tmp_path):
    for name, tied in (("tied", True), ("apart", False)):
        quantize(make_checkpoint(tmp_path / name, tie_word_embeddings=tied), tmp_path / f"{name}-run", format="dense")
    found = ties(open_base(tmp_path / "tied-run")[0])
    assert [sorted(name for group in tie for name in group) for tie in found] == [
        ["lm_head.weight", "model.embed_tokens.weight"]
    ]
    assert all(len(group) == 1 for group in found[0])
    assert ties(open_base(tmp_path / "apart-run")[0]) == []


def test_a_configuration_without_ties_has_none_in_its_parts_either():
    config = {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True}, "model_type": "x"}
    assert untied(config) == {
        "tie_word_embeddings": False,
        "text_config": {"tie_word_embeddings": False},
        "model_type": "x",
    }
