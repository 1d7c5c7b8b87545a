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
from qinit.files.tensors import DTYPES, TensorSpec, read_header
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


@examples(30)
@given(st.binary(max_size=80) | st.binary(max_size=80).map(lambda raw: len(raw).to_bytes(8, "little") + raw))
def test_fuzz_arbitrary_bytes_are_read_or_refused(raw):
    assert_safe(raw)


@examples(50)
@given(changes)
def test_fuzz_a_good_file_with_bytes_changed_is_read_or_refused(edits):
    assert_safe(changed(good_file(), edits))


@examples(50)
@given(st.integers(0, 10**6), json_values | st.lists(st.integers(-1, 16), max_size=3))
def test_fuzz_a_good_header_with_a_value_replaced_is_read_or_refused(path, value):
    assert_safe(good_file(with_value(GOOD_HEADER, path, value)))


@examples(50)
@given(st.dictionaries(st.text(max_size=5), entries | json_values, max_size=3) | json_values, st.binary(max_size=16))
def test_fuzz_any_header_is_read_or_refused(header, data):
    raw = json.dumps(header).encode()
    assert_safe(len(raw).to_bytes(8, "little") + raw + data)
