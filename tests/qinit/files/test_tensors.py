import json
import os
import tempfile
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qinit.errors import CheckpointError
from qinit.files.tensors import DTYPES, INDEX_NAME, TensorSpec, read_header
from qinit.files.writer import SafetensorsWriter
from tests.fuzz import changed, changes, examples, file_of, json_values, only_qinit_errors, with_value


def random_tensor(dtype, shape, seed=0):
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(dtype).reshape(shape)  # only bytes 0 and 1: valid in every dtype, bool too


tensor_sets = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 4), max_size=3)),
    min_size=1,
    max_size=6,
)


def write_all(directory, tensors, **options):
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    writer = SafetensorsWriter(directory, specs, **options)
    for name in reversed(tensors):  # any order will do
        writer.write(name, tensors[name])
    writer.close()


def raw_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def write_file(file: Path, header: bytes | dict, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return file


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


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


@settings(max_examples=40, deadline=None)
@given(tensor_sets)
def test_what_the_safetensors_package_writes_is_what_is_read(layout):
    tensors = {name: random_tensor(dtype, shape, i) for i, (name, (dtype, shape)) in enumerate(layout.items())}
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "x.safetensors"
        safetensors.torch.save_file(tensors, file)
        stored = read_header(file)
        assert stored.keys() == tensors.keys()
        for name, tensor in tensors.items():
            read = stored[name].read()
            assert read.dtype == tensor.dtype
            assert read.shape == tensor.shape
            assert torch.equal(raw_bytes(read), raw_bytes(tensor))


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


def test_chunks_together_are_the_tensor(tmp_path):
    tensor = torch.arange(1000, dtype=torch.float32)
    safetensors.torch.save_file({"x": tensor}, tmp_path / "x.safetensors")
    chunks = list(read_header(tmp_path / "x.safetensors")["x"].chunks(size=256))
    assert max(len(chunk) for chunk in chunks) == 256
    assert torch.equal(torch.cat(chunks).view(torch.float32), tensor)


def test_reading_a_header_or_one_tensor_reads_no_other_tensor(tmp_path):
    # A hole of 1 TB: no machine reads all of it.
    file = tmp_path / "x.safetensors"
    size = 1 << 40
    header = {"hole": entry(0, size, (size,), "U8"), "x": entry(size, size + 16, (4,))}
    write_file(file, header)
    with file.open("r+b") as handle:
        handle.seek(0, os.SEEK_END)
        handle.truncate(handle.tell() + size + 16)
    assert read_header(file)["x"].read().tolist() == [0, 0, 0, 0]


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


DAMAGED = {
    "empty file": (b"", None, "not a whole safetensors file"),
    "length larger than the file": ({}, 1 << 40, "header of 1099511627776 bytes"),
    "bad JSON": (b"{'a': 1}", None, "corrupt safetensors header"),
    "bad UTF-8": (b'{"\xff": 1}', None, "corrupt safetensors header"),
    "deep nesting": (b"[" * 100_000, None, "corrupt safetensors header"),
    "no object": (b"[]", None, "expected an object"),
    "no dtype": ({"x": {"shape": [2], "data_offsets": [0, 8]}}, None, "'x' lacks dtype"),
    "entry is a number": ({"x": 3}, None, "'x' lacks dtype"),
    "unknown dtype": ({"x": entry(0, 8, dtype="F99")}, None, "'x' has dtype 'F99'"),
    "dtype is a list": ({"x": entry(0, 8, dtype=["F32"])}, None, "'x' has dtype"),
    "negative offset": ({"x": entry(-8, 0)}, None, "'x' has a shape or offset that is no count"),
    "negative shape": ({"x": entry(0, 8, (-2,))}, None, "'x' has a shape or offset that is no count"),
    "shape of true": ({"x": entry(0, 8, (True,))}, None, "'x' has a shape or offset that is no count"),
    "huge shape": ({"x": entry(0, 8, (2**59, 2**59))}, None, "'x' of shape"),
    "size mismatch": ({"x": entry(0, 8, (3,))}, None, "'x' of shape [3] takes 12 bytes, not 8"),
    "overlap": ({"x": entry(0, 8), "y": entry(4, 12)}, None, "'y' overlaps another"),
    "gap": ({"x": entry(0, 8), "y": entry(12, 20)}, None, "'y' overlaps another or leaves a gap"),
    "duplicate name": (
        b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        None,
        "'x' stands there twice",
    ),
    "more data than described": ({"x": entry(0, 4, (1,))}, None, "describes"),
}


@pytest.mark.parametrize(("header", "length", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_header_is_an_error_that_names_the_file(tmp_path, header, length, message):
    file = write_file(tmp_path / "bad.safetensors", header, data=b"\0" * 8, length=length)
    if header == b"":
        file.write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    assert str(file) in str(caught.value)
    assert message in str(caught.value)


def test_a_truncated_file_is_an_error(tmp_path):
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"x": torch.ones(64)}, file)
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"truncated or damaged"):
        read_header(file)


def test_a_file_that_shrinks_after_its_header_was_read_is_an_error(tmp_path):
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"x": torch.ones(64)}, file)
    tensor = read_header(file)["x"]
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="ends inside tensor 'x'"):
        tensor.read()


def test_a_file_that_vanishes_is_an_error_about_the_source(tmp_path):
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"x": torch.ones(64)}, file)
    tensor = read_header(file)["x"]
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        tensor.read()


entries = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "U8"]) | json_values},
    optional={"shape": st.lists(st.integers(-1, 5)) | json_values, "data_offsets": st.lists(st.integers(-1, 20))},
)


GOOD_HEADER = {
    "__metadata__": {"format": "pt"},
    "a": entry(0, 8),
    "b": entry(8, 14, (3,), "F16"),
    "none": entry(14, 14, (0, 7), "BF16"),
}


def good_file(header=GOOD_HEADER):
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(14)


def assert_safe(raw):
    with file_of(raw, "x.safetensors") as file, only_qinit_errors():
        for tensor in read_header(file).values():
            assert tensor.offset + tensor.nbytes <= len(raw)
            assert tensor.read().shape == tensor.shape


@examples(100)
@given(st.binary(max_size=80) | st.binary(max_size=80).map(lambda raw: len(raw).to_bytes(8, "little") + raw))
def test_fuzz_arbitrary_bytes_are_read_or_refused(raw):
    assert_safe(raw)


@examples(150)
@given(changes)
def test_fuzz_a_good_file_with_bytes_changed_is_read_or_refused(edits):
    assert_safe(changed(good_file(), edits))


@examples(150)
@given(st.integers(0, 10**6), json_values | st.lists(st.integers(-1, 16), max_size=3))
def test_fuzz_a_good_header_with_a_value_replaced_is_read_or_refused(path, value):
    assert_safe(good_file(with_value(GOOD_HEADER, path, value)))


@examples(150)
@given(st.dictionaries(st.text(max_size=5), entries | json_values, max_size=3) | json_values, st.binary(max_size=16))
def test_fuzz_any_header_is_read_or_refused(header, data):
    raw = json.dumps(header).encode()
    assert_safe(len(raw).to_bytes(8, "little") + raw + data)


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
