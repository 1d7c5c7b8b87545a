import json
import tempfile
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qinit.files.tensors import INDEX_NAME, TensorSpec, read_header
from qinit.files.writer import SafetensorsWriter
from tests.qinit.files.test_tensors import random_tensor, raw_bytes, tensor_sets, write_all


@settings(max_examples=40, deadline=None)
@given(tensor_sets)
def test_what_is_written_is_what_the_safetensors_package_reads(layout):
    tensors = {name: random_tensor(dtype, shape, i) for i, (name, (dtype, shape)) in enumerate(layout.items())}
    with tempfile.TemporaryDirectory() as directory:
        write_all(Path(directory), tensors)
        theirs = safetensors.torch.load_file(Path(directory) / "model.safetensors")
        assert theirs.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert theirs[name].dtype == tensor.dtype
            assert theirs[name].shape == tensor.shape
            assert torch.equal(raw_bytes(theirs[name]), raw_bytes(tensor))


@settings(max_examples=25, deadline=None)
@given(tensor_sets, st.integers(1, 300))
def test_shards_stay_below_their_size_and_the_index_finds_every_tensor(layout, max_bytes):
    tensors = {name: random_tensor(dtype, shape, i) for i, (name, (dtype, shape)) in enumerate(layout.items())}
    with tempfile.TemporaryDirectory() as directory:
        write_all(Path(directory), tensors, max_bytes=max_bytes)
        files = sorted(Path(directory).glob("*.safetensors"))
        for file in files:
            sizes = [tensor.nbytes for tensor in read_header(file).values()]
            assert sum(sizes) <= max_bytes or sum(size > 0 for size in sizes) == 1
        index_file = Path(directory) / INDEX_NAME
        assert index_file.exists() == (len(files) > 1)
        if len(files) > 1:
            index = json.loads(index_file.read_text())
            assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
            assert index["weight_map"].keys() == tensors.keys()
            for name, file_name in index["weight_map"].items():
                assert torch.equal(
                    raw_bytes(safetensors.torch.load_file(Path(directory) / file_name)[name]), raw_bytes(tensors[name])
                )


def test_the_index_is_written_last(tmp_path):
    writer = SafetensorsWriter(tmp_path, [TensorSpec(n, torch.float32, (8,)) for n in "ab"], max_bytes=32)
    writer.write("a", torch.ones(8))
    writer.write("b", torch.ones(8))
    assert not (tmp_path / INDEX_NAME).exists()
    writer.close()
    assert (tmp_path / INDEX_NAME).exists()


def test_closing_refuses_when_a_tensor_was_not_written(tmp_path):
    writer = SafetensorsWriter(tmp_path, [TensorSpec(n, torch.float32, (8,)) for n in "ab"], max_bytes=32)
    writer.write("a", torch.ones(8))
    with pytest.raises(ValueError, match="'b'"):
        writer.close()
    assert not (tmp_path / INDEX_NAME).exists()


@pytest.mark.parametrize("tensor", [torch.ones(4), torch.ones(8, dtype=torch.float16)])
def test_a_tensor_of_another_shape_or_dtype_than_announced_is_refused(tmp_path, tensor):
    writer = SafetensorsWriter(tmp_path, [TensorSpec("a", torch.float32, (8,))])
    with pytest.raises(ValueError, match="announced"):
        writer.write("a", tensor)


def test_too_few_bytes_for_a_tensor_are_refused(tmp_path):
    writer = SafetensorsWriter(tmp_path, [TensorSpec("a", torch.float32, (8,))])
    with pytest.raises(ValueError, match="announced as 32 bytes, got 31"):
        writer.write_chunks("a", [torch.zeros(31, dtype=torch.uint8)])


class TestGoingOn:
    SPECS = (TensorSpec("a", torch.float32, (4,)), TensorSpec("b", torch.int32, (2, 3)))

    def test_a_file_of_the_same_layout_is_gone_on_with(self, tmp_path):
        first = SafetensorsWriter(tmp_path, self.SPECS)
        checksum = first.write("a", torch.arange(4.0))
        again = SafetensorsWriter(tmp_path, self.SPECS)
        assert again.checksum("a") == checksum
        assert torch.equal(again.read("a"), torch.arange(4.0))
        again.keep("a")
        again.write("b", torch.ones((2, 3), dtype=torch.int32))
        again.close()
        assert torch.equal(safetensors.torch.load_file(tmp_path / "model.safetensors")["a"], torch.arange(4.0))

    @pytest.mark.parametrize(
        "damage", [lambda raw: raw[:-1], lambda raw: raw.replace(b'"a"', b'"c"', 1), lambda _: b""]
    )
    def test_any_other_file_is_made_anew(self, tmp_path, damage):
        SafetensorsWriter(tmp_path, self.SPECS).write("a", torch.arange(4.0))
        file = tmp_path / "model.safetensors"
        file.write_bytes(damage(file.read_bytes()))
        again = SafetensorsWriter(tmp_path, self.SPECS)
        assert not again.read("a").any()
        with pytest.raises(ValueError, match="not written"):
            again.close()


def in_slices(tensors):
    """Have the experts come slice by slice."""
    parts = [part for name, t in tensors.items() for part in (t.slices() if name == "experts" else [t])]
    return {part.name: part for part in parts}


@pytest.mark.parametrize("max_bytes", [1 << 40, 100])
def test_a_tensor_may_come_slice_by_slice_and_in_any_order(tmp_path, max_bytes):
    whole, plain = torch.arange(24.0).reshape(3, 2, 4), torch.ones(5)
    specs = [TensorSpec("experts", torch.float32, (3, 2, 4)), TensorSpec("norm", torch.float32, (5,))]
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    writer = SafetensorsWriter(tmp_path / "one", specs, max_bytes=max_bytes)
    writer.write("experts", whole)
    writer.write("norm", plain)
    writer.close()
    writer = SafetensorsWriter(tmp_path / "other", specs, max_bytes=max_bytes, split=in_slices)
    writer.write("experts[2]", whole[2])
    writer.write("norm", plain)
    with pytest.raises(ValueError, match=r"not written: \['experts\[0\]', 'experts\[1\]'\]"):
        writer.close()
    writer.write("experts[0]", whole[0])
    writer.write_chunks("experts[1]", [raw_bytes(whole[1])])
    assert torch.equal(writer.read("experts[1]"), whole[1])
    writer.close()
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("one", "other")]
    assert files[0] == files[1]
    for name in files[0]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_a_tensor_may_come_in_blocks_of_rows_and_in_strands_of_a_row(tmp_path):
    specs = [TensorSpec("A", torch.float32, (6, 4)), TensorSpec("B", torch.float32, (5, 6))]

    def split(tensors):
        parts = [*tensors["A"].blocks(3), *tensors["B"].strands(3)]
        return {part.name: part for part in parts}

    writer = SafetensorsWriter(tmp_path, specs, split=split)
    A, B = torch.randn(3, 2, 4), torch.randn(5, 2, 3)
    for index in (2, 0, 1):
        assert writer.write(f"A[{index}]", A[index]) == writer.checksum(f"A[{index}]")
        sum_of = writer.write(f"B[{index}]", B[..., index])
        assert sum_of == writer.checksum(f"B[{index}]")
        assert torch.equal(writer.read(f"B[{index}]"), B[..., index])
    with pytest.raises(ValueError, match=r"B\[0\]: announced as 40 bytes, got 8"):
        writer.write_chunks("B[0]", [torch.zeros(8, dtype=torch.uint8)])
    writer.close()
    found = load_file(tmp_path / "model.safetensors")
    assert torch.equal(found["A"], A.reshape(6, 4))
    assert torch.equal(found["B"], B.reshape(5, 6))
