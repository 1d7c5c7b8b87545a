import torch
from safetensors.torch import save_file

from qinit.adapters.changes import BiasAdded, LowRankAdded, Replaced, Rows
from qinit.files.tensors import read_header
from tests.helpers import gauss


def test_each_is_what_its_formula_says_in_the_parameter_s_own_layout(tmp_path):
    A, B, m, W = gauss(2, 6), gauss(4, 2, seed=1), gauss(4, seed=2).abs(), gauss(4, 6, seed=3)
    save_file({"A": A, "B": B, "m": m, "b": m.bfloat16()}, tmp_path / "a.safetensors")
    stored = read_header(tmp_path / "a.safetensors")
    expected = W + 1.5 * B @ A
    added = LowRankAdded(stored["A"], stored["B"], 1.5)
    torch.testing.assert_close(added.made(W.clone()), expected)
    turned = LowRankAdded(stored["A"], stored["B"], 1.5, transposed=True)
    torch.testing.assert_close(turned.made(W.T.clone()), expected.T)
    scaled = LowRankAdded(stored["A"], stored["B"], 1.5, stored["m"])
    torch.testing.assert_close(scaled.made(W.clone()).norm(dim=1), m)
    torch.testing.assert_close(scaled.made(W.clone()), expected * (m / expected.norm(dim=1))[:, None])
    assert (added.words, scaled.words) == ("LoRA, rank 2, scale 1.5", "DoRA, rank 2, scale 1.5")
    assert torch.equal(BiasAdded(stored["b"], 2.0).made(torch.ones(4)), 1 + 2 * m.bfloat16().float())
    assert torch.equal(Replaced(stored["A"]).made(W), A)
    found = Rows([3, 0], stored["A"]).made(W.clone())
    assert torch.equal(found[[3, 0]], A)
    assert torch.equal(found[1:3], W[1:3])
