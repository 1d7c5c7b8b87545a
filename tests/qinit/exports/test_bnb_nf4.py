import json

import pytest
import torch

from qinit.errors import RecipeError
from qinit.exports import EXPORTS, FinishedRun
from qinit.exports.bnb_nf4 import nf4_codes
from qinit.exports.write import export
from qinit.formats.bitsandbytes import NF4
from qinit.grids import GRIDS
from qinit.report.report import Report
from tests.helpers import edit_tensors, gauss, quantize
from tests.models import make_checkpoint
from tests.stock import load


@pytest.mark.parametrize("search", ["absmax", "mse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_and_absmax_are_found_again(dtype, search):
    weight = gauss(64, 256, scale=0.02)
    grid = GRIDS["nf"]
    quantized, _ = grid.quantize(weight, weight, bits=4, group_size=64, search=search)
    values = grid.dequantize(quantized).to(dtype).view(-1, 64)
    codes, absmax, exact = nf4_codes(values)
    assert exact.all()
    assert torch.equal((torch.tensor(NF4)[codes.int()] * absmax[:, None]).to(dtype), values)


def test_what_no_absmax_gives_is_told_and_goes_to_the_nearest_level():
    values = gauss(3, 64)
    values[1] = torch.tensor(NF4)[torch.arange(64) % 16] * 0.5
    codes, absmax, exact = nf4_codes(values)
    assert exact.tolist() == [False, True, False]
    distance = (torch.tensor(NF4)[codes.int()] * absmax[:, None] - values).abs()
    assert (distance <= 0.16 * absmax[:, None]).all()  # half of the widest gap between levels


@pytest.mark.parametrize("method", ["loftq", "qlora"])
def test_the_stock_loader_has_the_run_to_the_last_bit(method, tmp_path):
    pytest.importorskip("bitsandbytes")
    quantize(make_checkpoint(tmp_path / "source"), tmp_path / "run", format="dense", method=method, bits=4, iter=None)
    run = FinishedRun.open(tmp_path / "run")
    assert export(run, "bnb-nf4", tmp_path / "out") is None
    skipped = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert skipped == ["lm_head"]
    packed, plain = (load(tmp_path / name, dtype=torch.bfloat16).eval() for name in ("out", "run"))
    for name, module in packed.named_modules():
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            from bitsandbytes.functional import dequantize_4bit

            found = dequantize_4bit(module.weight.data, state)
            assert torch.equal(found, plain.get_submodule(name).weight.data)
    ids = torch.arange(5, 37)[None]
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, plain(ids).logits, rtol=2e-2, atol=2e-2)


def test_what_is_found_to_be_lost_while_it_is_written_stops_it_and_is_said(tmp_path):
    quantize(make_checkpoint(tmp_path / "source"), tmp_path / "run", format="dense", method="loftq", bits=4, iter=None)
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(tmp_path / "run/model.safetensors", lambda tensors: tensors[name].view(-1)[:64].add_(0.011))
    run = FinishedRun.open(tmp_path / "run")
    with pytest.raises(RecipeError, match=r"1 of \d+ groups are no levels of bitsandbytes .*; --requantize writes it"):
        export(run, "bnb-nf4", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "source"]
    assert export(run, "bnb-nf4", tmp_path / "out", requantize=True) == Report.read(tmp_path / "out").export.lost


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "holds NF4's levels alone, and method eqft"), ({"method": "loftq", "bits": 3}, "has 3 in groups of 64")],
)
def test_other_grids_are_refused(options, message, llama, tmp_path):
    quantize(llama, tmp_path / "run", **{"format": "dense", "bits": 4, **options})
    assert message in EXPORTS["bnb-nf4"].cannot_hold(FinishedRun.open(tmp_path / "run"))
