import pickle

import torch

from qinit.files.scaled import ScaledTensor
from qinit.files.tensors import read_header


def test_rows_and_columns_are_scaled_as_it_is_read_and_nothing_is_rounded(tmp_path):
    from safetensors.torch import save_file

    value = torch.randn(4, 6).bfloat16()
    save_file({"x": value}, tmp_path / "x.safetensors")
    stored = read_header(tmp_path / "x.safetensors")["x"]
    rows, columns = torch.rand(4, 1), torch.rand(1, 6)
    scaled = ScaledTensor.of(ScaledTensor.of(stored, rows), columns)
    assert torch.equal(scaled.read(), value.float() * rows * columns)
    assert (scaled.name, scaled.dtype, scaled.nbytes) == ("x", torch.bfloat16, stored.nbytes)
    again = torch.cat(list(scaled.chunks(8))).view(torch.bfloat16).reshape(4, 6)
    assert torch.equal(again, scaled.read().bfloat16())
    assert pickle.loads(pickle.dumps(scaled)) == scaled
