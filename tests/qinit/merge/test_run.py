import json
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file

from qinit.errors import CheckpointError, OutputError
from qinit.events import Done, Resumed
from qinit.exports import FinishedRun
from qinit.merge.plan import plan_merge
from qinit.merge.run import merge
from tests.helpers import edit_tensors, names, quantize, weights_of
from tests.models import make_checkpoint, make_float32
from tests.peft_adapters import load_base, make_adapter, put_on

IDS = torch.arange(3, 43).view(2, 20)
# Every kind that PEFT can merge: family, what LoraConfig is given.
KINDS = {
    "ranks and alphas by module, rslora": (
        "llama",
        {
            "target_modules": r".*\.(q|o|up)_proj",
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, r".*\.up_proj": 7},
            "alpha_pattern": {"o_proj": 3.0},
            "use_rslora": True,
        },
    ),
    "dora": ("llama", {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "use_dora": True}),
    "dora, transposed": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "use_dora": True, "fan_in_fan_out": True}),
    "whole modules and biases": (
        "qwen2",
        {
            "target_modules": ["q_proj", "k_proj"],
            "modules_to_save": ["lm_head", "input_layernorm"],
            "bias": "all",
            "lora_bias": True,
        },
    ),
    "an embedding, and a matrix as a parameter": (
        "llama",
        {"target_modules": ["embed_tokens"], "target_parameters": ["up_proj.weight"], "alpha_pattern": {"weight": 3}},
    ),
    "experts": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "one parameter of experts that says it is turned": (
        "gpt_oss",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"], "alpha_pattern": {"down_proj": 5.0}},
    ),
    "tied: an embedding trained whole": ("tied", {"target_modules": ["k_proj"], "modules_to_save": ["embed_tokens"]}),
    "tied: a head": ("tied", {"target_modules": ["lm_head", "k_proj"]}),
    "tied: rows": ("tied", {"target_modules": ["k_proj"], "trainable_token_indices": [3, 9, 200]}),
}


def merged(run, out, adapter=None, **options):
    *_, last = merge(plan_merge(run, adapter, **options), out, command="qinit merge")
    return last.report


def weights_in(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Return a function that gives a dense run in float32 of a family, each made once."""
    made = {}

    def base(family):
        if family not in made:
            place = tmp_path_factory.mktemp(family)
            options = {"initializer_range": 0.1} | ({"tie_word_embeddings": True} if family == "tied" else {})
            source = make_float32(place / "source", "llama" if family == "tied" else family, **options)
            quantize(source, place / "run", format="dense", group_size=32)
            made[family] = place / "run"
        return made[family]

    return base


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_the_trained_model_predicts_and_what_peft_merges(bases, tmp_path, kind):
    family, settings = KINDS[kind]
    run = bases(family)
    adapter = make_adapter(run, tmp_path / "adapter", **settings)
    report = merged(run, tmp_path / "out", adapter)
    assert report.merged
    assert all(row.change > 0.001 for row in report.merged)
    trained, out = put_on(run, adapter).eval(), load_base(tmp_path / "out")
    with torch.no_grad():
        expected, found, plain = (model(input_ids=IDS).logits for model in (trained, out, load_base(run)))
    assert (expected - plain).norm() > 0.01 * plain.norm()  # else nothing would be shown
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    if family == "tied" and "rows" not in kind:
        return  # PEFT's own merge changes the head with the embedding, though the head was not trained
    theirs = trained.merge_and_unload().state_dict()
    for name, tensor in out.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)


class TestLayout:
    def test_a_packed_run_gets_its_source_s_names_types_and_files_and_holds_q_and_the_low_rank(self, tmp_path):
        source = make_checkpoint(tmp_path / "source", "phi3", "bfloat16")
        edit_tensors(
            source / "model.safetensors", lambda t: t.update({name: t[name].float() for name in t if "o_proj" in name})
        )
        (source / "chat_template.jinja").write_text("{{ messages }}")
        quantize(source, tmp_path / "run", bits=3)
        (tmp_path / "run/notes.txt").write_text("mine")
        (tmp_path / "run/report.png").write_bytes(b"a picture")
        report = merged(tmp_path / "run", tmp_path / "out", max_shard_size="100KB")
        before, after = weights_in(source), weights_in(tmp_path / "out")
        assert {name: (t.dtype, t.shape) for name, t in after.items()} == {
            n: (t.dtype, t.shape) for n, t in before.items()
        }
        assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
        assert names(tmp_path / "out")[:2] == ["README.md", "SHA256SUMS"]
        assert {"chat_template.jinja", "qinit.json"} <= set(names(tmp_path / "out"))
        assert not {"notes.txt", "report.png", "eqft_init"} & set(names(tmp_path / "out"))
        assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
        run = FinishedRun.open(tmp_path / "run")
        for row in run.report.layers:
            Q = run.weights.read(f"{row.name}.weight", torch.device("cpu"))
            W = Q + run.adapter.change(row.name, torch.device("cpu"))
            assert torch.equal(after[f"{row.name}.weight"], W.to(before[f"{row.name}.weight"].dtype))
            original = before[f"{row.name}.weight"].float()
            assert (W - original).norm() / original.norm() == pytest.approx(row.error, rel=1e-3)
        assert report.dtype is None
        assert 1e-4 < report.totals["rounding"] < 4e-3

    def test_one_type_for_all(self, bases, tmp_path):
        report = merged(bases("llama"), tmp_path / "out", dtype="float16")
        assert {tensor.dtype for tensor in weights_in(tmp_path / "out").values()} == {torch.float16}
        assert (report.dtype, report.totals["dtypes"]) == ("float16", ["float16"])
        assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float16"

    def test_what_a_type_does_not_hold_is_named_and_nothing_is_left(self, bases, tmp_path):
        adapter = make_adapter(bases("llama"), tmp_path / "adapter", target_modules=["q_proj"])
        weights = adapter / "adapter_model.safetensors"
        edit_tensors(weights, lambda tensors: [tensor.mul_(3e4) for tensor in tensors.values()])
        with pytest.raises(CheckpointError, match=r"q_proj.weight' merged has \d+ values that float16 does not hold"):
            merged(bases("llama"), tmp_path / "out", adapter, dtype="float16")
        assert names(tmp_path) == ["adapter"]


class TestResuming:
    def test_one_that_was_broken_off_goes_on_and_ends_with_the_same_bytes(self, bases, tmp_path):
        plan, out = plan_merge(bases("llama"), max_shard_size="60KB"), tmp_path / "out"
        whole = merged(bases("llama"), out, max_shard_size="60KB")
        expected = weights_of(out)
        shutil.rmtree(out)
        events = merge(plan, out)
        for event in events:
            if isinstance(event, Done) and "layers.1" in event.name:
                events.close()
        assert names(tmp_path) == [".out.partial"]
        with pytest.raises(
            OutputError, match=r"an unfinished run or merge of something else lies there, .* dtype was not"
        ):
            merged(bases("llama"), out, max_shard_size="60KB", dtype="float16")
        first, *_, last = merge(plan, out)
        assert isinstance(first, Resumed)
        assert 0 < first.layers < first.total == len(plan.layout.steps)
        assert weights_of(out) == expected
        assert last.report.merged == whole.merged
        assert names(tmp_path) == ["out"]

    def test_what_was_damaged_in_between_is_made_again(self, bases, tmp_path):
        out = tmp_path / "out"
        merged(bases("llama"), out)
        expected = weights_of(out)
        shutil.rmtree(out)
        events = merge(plan_merge(bases("llama")), out)
        for _ in range(12):
            next(events)
        events.close()
        file = tmp_path / ".out.partial/run/model.safetensors"
        raw = bytearray(file.read_bytes())
        raw[len(raw) - 4 : len(raw)] = raw[8000:8040] = b"\x00" * 4
        file.write_bytes(bytes(raw[: file.stat().st_size]))
        merged(bases("llama"), out)
        assert weights_of(out) == expected


class TestBadPlaces:
    def test_places_that_are_taken_are_read_from_or_are_too_small(self, bases, tmp_path, monkeypatch):
        run = bases("llama")
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken/thesis.tex").write_text("x")
        with pytest.raises(OutputError, match="exists; remove it, or choose another place"):
            merged(run, tmp_path / "taken")
        for place in (run, run / "merged", run.parent):
            with pytest.raises(OutputError, match=r"is, holds or lies in .* which is read"):
                merged(run, place)
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0, 1000))
        with pytest.raises(OutputError, match=r"needs 0\.00 GB, but only 0\.00 GB are free there"):
            merged(run, tmp_path / "out")
        assert names(tmp_path) == ["taken"]
