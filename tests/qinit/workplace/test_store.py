import shutil
from dataclasses import asdict

import pytest
import torch

from qinit.events import Done
from qinit.files.tensors import read_header
from qinit.files.writer import SafetensorsWriter
from qinit.formats import FORMATS
from qinit.grids import GRIDS
from qinit.workplace.journal import Journal
from qinit.workplace.place import partial_of
from tests.broken_off import RANDOM, RUNS, break_off, finish, result_in, undisturbed
from tests.helpers import plan_of
from tests.jobs import CPU, crashing, job_at, solved
from tests.mixed import mixed_plan
from tests.models import make_checkpoint


@pytest.fixture(params=["gptq", "dense", "kept"])
def plan(request, llama, tmp_path):
    """A packed run, a dense one in shards, and one that keeps some layers as they are."""
    if request.param == "kept":
        return plan_of(make_checkpoint(tmp_path / "m", intermediate_size=80), iter=1)
    return plan_of(llama, iter=1, format=request.param, max_shard_size="60KB", use_rslora=True, lora_alpha=9.0)


def fill(store, plan):
    """Write everything; returns what was put in for each layer."""
    tensors = {}
    layers = {layer.target.tensor.name: layer for layer in plan.layers}
    for piece in plan.pieces:
        layer = layers.get(piece.name)
        if layer is None:
            store.copy(piece.name, piece.chunks())
            continue
        if layer.kept:
            store.copy_weight(layer, piece.chunks())
        tensors[layer.target.name], row = solved(plan, layer)
        assert store.put(layer, tensors[layer.target.name], row) is row
    return tensors


def test_what_was_finished_is_there_after_a_crash(plan, tmp_path):
    with crashing(plan, tmp_path / "out") as job:
        fill(job.store, plan)
        rows, copied = dict(job.store.rows), set(job.store.copied)
    assert rows.keys() == {layer.target.name for layer in plan.layers}
    with job_at(plan, tmp_path / "out") as job:
        assert job.store.rows == rows
        assert job.store.copied == copied
        job.store.close()  # every tensor is there


def test_a_finished_layer_is_read_as_loaders_read_it(plan, tmp_path):
    with job_at(plan, tmp_path / "out") as job:
        store, tensors = job.store, fill(job.store, plan)
        for layer in plan.quantized:
            put, module = tensors[layer.target.name], layer.target.module
            base = FORMATS[plan.recipe.format].decode(layer.target, put, layer.bits, layer.group_size)
            low_rank = plan.adapter.decode(module, put, plan.recipe.lora_scale)
            assert torch.equal(store.quantized(layer), base)
            assert torch.equal(store.low_rank(layer).B, low_rank.B)
            assert torch.equal(store.low_rank(layer).A, low_rank.A)
            torch.testing.assert_close(store.weight(layer, CPU), base + low_rank.B @ low_rank.A)


class TestCodes:
    @pytest.fixture
    def mixed(self, llama, tmp_path):
        """A packed job of layers of 2, 3, 4 and 8 bits, all written."""
        plan = mixed_plan(llama, "gptq")
        with job_at(plan, tmp_path / "out") as job:
            yield job, fill(job.store, plan)

    def test_they_are_those_of_each_layer_s_width(self, mixed):
        job, tensors = mixed
        for layer in job.plan.quantized:
            codes = job.store.codes(layer)
            assert codes.bits == layer.bits
            again = FORMATS["gptq"].encode(layer.target, codes, GRIDS["int"])
            assert all(torch.equal(again[spec.name], tensors[layer.target.name][spec.name]) for spec in layer.specs)
            assert torch.equal(GRIDS["int"].dequantize(codes), job.store.quantized(layer))
        assert {layer.bits for layer in job.plan.quantized} == {2, 3, 4, 8}

    def test_what_q_would_be_with_other_scales_is_what_it_is_with_them(self, mixed):
        job, _ = mixed
        for layer in job.plan.quantized:
            before = job.store.quantized(layer)
            changed = FORMATS["gptq"].scales(layer.target, job.store.codes(layer).scales * 1.01)
            would_be = job.store.quantized(layer, changed)
            assert torch.equal(job.store.quantized(layer), before)  # nothing was written
            for name, tensor in changed.items():
                assert job.store.replace(name, tensor) == job.store.base.checksum(name)
            assert torch.equal(job.store.quantized(layer), would_be)
            assert not torch.equal(would_be, before)

    def test_factors_are_replaced_too(self, mixed):
        job, tensors = mixed
        layer = job.plan.quantized[0]
        name = job.plan.adapter.names(layer.target.module)[0]
        other = tensors[layer.target.name][name] + 1
        assert job.store.replace(name, other) == job.store.factors.checksum(name)
        assert torch.equal(job.store.factors.read(name), other)

    def test_a_format_without_codes_has_none(self, llama, tmp_path):
        plan = plan_of(llama, iter=1, format="dense")
        with job_at(plan, tmp_path / "out") as job:
            fill(job.store, plan)
            assert {job.store.codes(layer) for layer in plan.quantized} == {None}


def test_a_tensor_that_never_came_is_an_error_at_the_end(plan, tmp_path):
    missing = plan.copied[-1].name
    with job_at(plan, tmp_path / "out") as job:
        for piece in plan.copied[:-1]:
            job.store.copy(piece.name, piece.chunks())
        for layer in plan.layers:
            if not layer.kept:
                job.store.put(layer, *solved(plan, layer))
        with pytest.raises(ValueError, match=missing):
            job.store.close()


@pytest.mark.parametrize("part", ["base", "factors"])
def test_a_layer_with_another_byte_is_done_again_and_no_other(llama, tmp_path, part):
    plan = plan_of(llama, iter=1, target_modules="q_proj,up_proj")
    layer = plan.layers[2]
    with crashing(plan, tmp_path / "out") as job:
        fill(job.store, plan)
        writer, name = (
            (job.store.base, layer.specs[0].name)
            if part == "base"
            else (job.store.factors, plan.adapter.names(layer.target.module)[0])
        )
        writer.write(name, writer.read(name) + 1)
    with job_at(plan, tmp_path / "out") as job:
        assert {each.target.name for each in plan.layers} - job.store.rows.keys() == {layer.target.name}
        assert len(job.store.copied) == len(plan.copied)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "model.layers.9.mlp.up_proj"},
        {"rank": 8},
        {"bits": 3},
        {"shape": [64, 32]},
        {"kept": "a whim"},
        {"error": "small"},
    ],
)
def test_a_row_that_does_not_fit_the_plan_is_not_believed(llama, tmp_path, change):
    """A journal is checked line by line, so such a row is what an older or a broken qinit wrote."""
    plan = plan_of(llama, iter=1, target_modules="q_proj,up_proj")
    layer = plan.layers[0]
    with crashing(plan, tmp_path / "out") as job:
        fill(job.store, plan)
        records = [record for record in job.journal.records if record["kind"] == "layer"]
        header = job.journal.header
    file = partial_of(tmp_path / "out") / "journal"
    journal = Journal.create(file, {key: value for key, value in header.items() if key != "kind"})
    for record in records:
        mine = record["row"]["name"] == layer.target.name
        row = {**record["row"], **change} if mine else record["row"]
        journal.append({"kind": "layer", "row": row, "sums": record["sums"]})
    journal.close()
    with job_at(plan, tmp_path / "out") as job:
        assert job.store.rows.keys() == {each.target.name for each in plan.layers[1:]}


@pytest.mark.parametrize("sums", [[], ["0"], [0] * 99])
def test_without_all_of_its_sums_a_layer_is_done_again(llama, tmp_path, sums):
    plan = plan_of(llama, iter=1, target_modules="q_proj,up_proj")
    with crashing(plan, tmp_path / "out") as job:
        tensors, row = solved(plan, plan.layers[0])
        job.store.put(plan.layers[0], tensors, row)
        _, other = solved(plan, plan.layers[1])
        job.journal.append({"kind": "layer", "row": asdict(other), "sums": sums})
    with job_at(plan, tmp_path / "out") as job:
        assert list(job.store.rows) == [plan.layers[0].target.name]


def test_tensors_are_on_the_disk_before_the_journal_says_so(llama, tmp_path, monkeypatch):
    plan, order = plan_of(llama, iter=1, target_modules="q_proj"), []
    for owner, name in ((SafetensorsWriter, "sync"), (Journal, "sync")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda self, real=real: order.append(type(self).__name__) or real(self))
    with job_at(plan, tmp_path / "out") as job:
        fill(job.store, plan)
        order.clear()
        job.store.sync()
    assert order == ["SafetensorsWriter", "SafetensorsWriter", "Journal"]


def test_bytes_that_are_not_those_of_the_journal_are_made_again(strong_llama, place):
    options = RUNS["sequential"]
    wanted = undisturbed(strong_llama, place, **options)
    break_off(strong_llama, place / "out", 9, **options)
    file = partial_of(place / "out") / "run/model.safetensors"
    place_of = read_header(file)["model.layers.0.mlp.up_proj.scales"].offset
    raw = bytearray(file.read_bytes())
    raw[place_of] ^= 1
    file.write_bytes(raw)
    done = [event for event in finish(strong_llama, place / "out", **options) if isinstance(event, Done) and event.row]
    assert len(done) == 6  # five were left, one was damaged
    assert result_in(place / "out") == wanted


@pytest.mark.parametrize("gone", ["run/model.safetensors", "run/eqft_init/adapter_model.safetensors", "run", "."])
def test_files_that_are_gone_are_made_again(strong_llama, place, gone):
    wanted = undisturbed(strong_llama, place, **RANDOM)
    break_off(strong_llama, place / "out", 9, **RANDOM)
    path = partial_of(place / "out") / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    finish(strong_llama, place / "out", **RANDOM)
    assert result_in(place / "out") == wanted
