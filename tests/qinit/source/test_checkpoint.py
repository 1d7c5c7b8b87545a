import json
import shutil

import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from qinit.errors import CheckpointError
from qinit.files.tensors import INDEX_NAME
from qinit.source.checkpoint import Checkpoint, count_nonfinite, read_json
from tests.fuzz import changed, changes, examples, file_of, json_values, only_qinit_errors, texts, with_value
from tests.models import make_checkpoint


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "50KB"])
def test_single_file_and_shards_give_the_tensors_that_transformers_saved(tmp_path, dtype, max_shard_size):
    directory = make_checkpoint(tmp_path / "m", dtype=dtype, max_shard_size=max_shard_size)
    assert (directory / INDEX_NAME).exists() == (max_shard_size == "50KB")
    state = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto").state_dict()
    checkpoint = Checkpoint.open(directory)
    assert checkpoint.tensors.keys() == state.keys()
    assert checkpoint.weight_bytes == sum(tensor.nbytes for tensor in state.values())
    for name, stored in checkpoint.tensors.items():
        assert stored.read().dtype == getattr(torch, dtype)
        assert torch.equal(stored.read(), state[name])


def test_a_single_file_is_preferred_to_an_index_as_transformers_does(tiny_llama):
    (tiny_llama / INDEX_NAME).write_text('{"weight_map": {"x": "gone.safetensors"}}')
    assert "model.norm.weight" in Checkpoint.open(tiny_llama).tensors


def test_only_the_tensors_that_the_index_names_are_taken_from_a_shard(tmp_path):
    directory = make_checkpoint(tmp_path / "m", max_shard_size="50KB")
    index = json.loads((directory / INDEX_NAME).read_text())
    del index["weight_map"]["lm_head.weight"]
    (directory / INDEX_NAME).write_text(json.dumps(index))
    assert "lm_head.weight" not in Checkpoint.open(directory).tensors


def test_a_tensor_that_is_not_in_the_shard_that_the_index_says_is_an_error(tmp_path):
    directory = make_checkpoint(tmp_path / "m", max_shard_size="50KB")
    index = json.loads((directory / INDEX_NAME).read_text())
    index["weight_map"]["ghost.weight"] = index["weight_map"]["lm_head.weight"]
    (directory / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks tensor 'ghost\.weight'"):
        Checkpoint.open(directory)


def test_companions_are_everything_but_weights_caches_and_what_is_written_anew(tiny_llama):
    carried = ["tokenizer.json", "vocab.txt", "chat_templates/tool.jinja", "original/params.json", "LICENSE"]
    left = [
        *("pytorch_model.bin", "optimizer.pt", "onnx/model.onnx", "onnx/model.onnx_data", "tf_model.h5", "m.gguf"),
        *("original/consolidated.00.pth", ".git/config", "__pycache__/x.pyc", "pytorch_model.bin.index.json"),
        *("model.safetensors.index.json", "eqft_init/adapter_model.safetensors", "eqft_init/adapter_config.json"),
        *("README.md", "qinit.json", "adapter_config.json", "modeling_own.py"),
    ]
    for name in carried + left:
        file = tiny_llama / name
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text("x")
    checkpoint = Checkpoint(tiny_llama, {}, {})
    assert sorted(map(str, checkpoint.companions())) == sorted([*carried, "generation_config.json"])


def test_python_files_travel_with_a_configuration_that_refers_to_them(tiny_llama):
    (tiny_llama / "modeling_own.py").write_text("")
    assert "modeling_own.py" in map(str, Checkpoint(tiny_llama, {"auto_map": {}}, {}).companions())


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\nlanguage: [en]\n---\n# Title\n", {"license": "mit", "language": ["en"]}),
        ("# no front matter\n", {}),
        ("---\n: [broken\n---\n", {}),
        ("text first\n---\nlicense: mit\n---\n", {}),
        ("---\njust text\n---\n", {}),
        (None, {}),
    ],
)
def test_the_sources_card_gives_its_front_matter_or_nothing(tmp_path, card, expected):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert Checkpoint(tmp_path, {}, {}).card_metadata() == expected


def test_nonfinite_values_are_counted_and_large_finite_ones_are_not():
    weight = torch.full((64, 64), 3e38)  # their sum overflows
    assert count_nonfinite(weight) == 0
    weight[0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    assert count_nonfinite(weight) == 3
    assert count_nonfinite(torch.tensor([1, 2])) == 0
    assert count_nonfinite(torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)) == 1


def test_a_checkpoint_without_tensors_is_an_error(tiny_llama):
    safetensors.torch.save_file({}, tiny_llama / "model.safetensors")
    with pytest.raises(CheckpointError, match="hold no tensors"):
        Checkpoint.open(tiny_llama)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two shards with an index, which tests change."""
    directory = tmp_path_factory.mktemp("shards")
    for name in "ab":
        safetensors.torch.save_file({name: torch.ones(2)}, directory / f"{name}.safetensors")
    (directory / "config.json").write_text("{}")
    return directory


INDEX = {"metadata": {}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}


def open_with_index(directory, raw):
    (directory / INDEX_NAME).write_bytes(raw)
    with only_qinit_errors():
        for tensor in Checkpoint.open(directory).tensors.values():
            assert tensor.file.parent == directory


@examples(20)
@given(changes)
def test_fuzz_an_index_with_bytes_changed_is_read_or_refused(shards, edits):
    open_with_index(shards, changed(json.dumps(INDEX).encode(), edits))


@examples(25)
@given(st.integers(0, 100), json_values | texts.map(lambda text: f"../{text}"))
def test_fuzz_an_index_with_a_value_replaced_is_read_or_refused(shards, path, value):
    open_with_index(shards, json.dumps(with_value(INDEX, path, value)).encode())


@examples(15)
@given(st.dictionaries(texts, texts, max_size=3))
def test_fuzz_no_index_leads_out_of_the_directory(shards, places):
    open_with_index(shards, json.dumps({"weight_map": places}).encode())


@examples(20)
@given(st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode()))
def test_fuzz_a_configuration_is_an_object_or_refused(raw):
    with file_of(raw, "config.json") as file, only_qinit_errors():
        assert isinstance(read_json(file, ""), dict)


@examples(20)
@given(st.binary(max_size=40) | st.text(st.sampled_from("-:\n ab&*!1[]{}"), max_size=30).map(str.encode))
def test_fuzz_any_front_matter_is_metadata_or_none(front):
    with file_of(b"---\n" + front + b"\n---\nText", "README.md") as file:
        assert isinstance(Checkpoint(file.parent, {}, {}).card_metadata(), dict)


def test_front_matter_that_would_grow_without_end_is_none(tmp_path):
    laughs = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 'x'}]\n" for n in range(30))
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n{laughs}---\n")
    assert Checkpoint(tmp_path, {}, {}).card_metadata() == {}


def test_a_card_that_leads_out_is_not_read(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "README.md").write_text("---\nlicense: mine\n---\n")
    (tmp_path / "model/README.md").symlink_to("../README.md")
    assert Checkpoint(tmp_path / "model", {}, {}).card_metadata() == {}


def test_pipes_and_folders_that_are_links_are_no_companions(tiny_llama, tmp_path):
    import os

    os.mkfifo(tiny_llama / "pipe.txt")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.txt").touch()
    (tiny_llama / "folder").symlink_to(tmp_path / "elsewhere")
    (tiny_llama / "gone.txt").symlink_to("nothing")
    assert [str(name) for name in Checkpoint.open(tiny_llama).companions()] == ["generation_config.json"]


def test_companions_that_are_links_within_count_with_what_they_point_to(tiny_llama):
    (tiny_llama / "a.txt").write_bytes(b"x" * 1000)
    before = Checkpoint.open(tiny_llama).companion_bytes()
    (tiny_llama / "b.txt").symlink_to("a.txt")
    assert Checkpoint.open(tiny_llama).companion_bytes() == before + 1000
    shutil.copyfile(tiny_llama / "a.txt", tiny_llama / "c.txt")
    assert Checkpoint.open(tiny_llama).companion_bytes() == before + 2000
