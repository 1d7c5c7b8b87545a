import json
import os
import shutil
import stat
import subprocess
import sys
import time
from math import prod
from pathlib import Path

import pytest
import safetensors
import torch
import transformers

from qinit.errors import CheckpointError, HubError
from qinit.files.tensors import INDEX_NAME, write_header_only
from qinit.hub import download as hub_module
from qinit.hub.download import header_directory, local_directory
from qinit.planner.memory import working_bytes
from qinit.runner.run import run
from qinit.source.checkpoint import Checkpoint
from tests.helpers import plan_of
from tests.models import make_checkpoint, make_reader, words

MODEL = "someone/tiny"
RANGE = 100_001  # what huggingface_hub fetches of a file for its header


@pytest.fixture(scope="module", params=["5GB", "1MB"])
def made(tmp_path_factory, request):
    """A model of one file or of several, not to be changed."""
    place, sizes = tmp_path_factory.mktemp("made"), {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 2000}
    return make_checkpoint(place / "repo", max_shard_size=request.param, **sizes)


@pytest.fixture
def repo(made, tmp_path, hub):
    hub.repos[MODEL] = Path(shutil.copytree(made, tmp_path / "repo"))
    return hub.repos[MODEL]


@pytest.fixture
def no_leftovers(monkeypatch):
    """The temporary directories of the process's end, removed at the test's."""
    kept = []
    monkeypatch.setattr(hub_module, "_temporary", kept)
    yield
    for directory in kept:
        directory.cleanup()


pytestmark = pytest.mark.usefixtures("no_leftovers")


def put(repo, header):
    """Make the weights a single file with this header (bytes, or an object)."""
    for file in [*repo.glob("*.safetensors"), *repo.glob("*.index.json")]:
        file.unlink()
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (repo / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)


def served(hub):
    return {name: count for name, count in hub.served.items() if name.endswith(".safetensors") and count}


def test_a_directory_is_taken_as_it_is_without_asking_the_hub(tiny_llama, hub):
    assert header_directory(str(tiny_llama)) == tiny_llama
    assert hub.requests == []


def test_the_plan_is_that_of_the_whole_download_and_only_headers_are_fetched(hub, repo):
    plan, whole = plan_of(header_directory(MODEL)), plan_of(repo)
    files = {file.name: file.stat().st_size for file in repo.glob("*.safetensors")}
    assert served(hub) == {name: min(RANGE, size) for name, size in files.items()}
    assert sum(served(hub).values()) < sum(files.values()) / 3
    assert plan.base_specs == whole.base_specs
    assert plan.adapter_specs == whole.adapter_specs
    assert (plan.bytes_before, plan.base_bytes, plan.adapter_bytes, working_bytes(plan)) == (
        *(whole.bytes_before, whole.base_bytes, whole.adapter_bytes, working_bytes(whole)),
    )
    assert [(x.target.module, x.bits, x.rank, x.kept) for x in plan.layers] == [
        (x.target.module, x.bits, x.rank, x.kept) for x in whole.layers
    ]


def test_a_header_longer_than_the_first_range_is_fetched_whole(hub, repo):
    names = [f"{'x' * 400}.{i}" for i in range(400)]
    header = {name: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i, name in enumerate(names)}
    put(repo, header)
    with (repo / "model.safetensors").open("ab") as handle:
        handle.write(bytes(400))
    length = (repo / "model.safetensors").stat().st_size - 400 - 8
    assert list(Checkpoint.open(header_directory(MODEL)).tensors) == names
    assert served(hub) == {"model.safetensors": RANGE + length}


def test_a_plan_with_calibration_on_text_finds_the_tokenizer(hub, repo, tmp_path):
    hub.repos[MODEL] = make_reader(tmp_path / "reader")
    (tmp_path / "a.txt").write_text(words(4, 5))
    for calibration in ("self", str(tmp_path / "a.txt")):
        assert len(plan_of(header_directory(MODEL), calibration=calibration).quantized) == 14


def test_what_no_plan_needs_is_not_fetched(hub, repo):
    for name in ("pytorch_model.bin", "onnx/model.onnx", "checkpoints/trainer_state.json", "adapter.safetensors"):
        (repo / name).parent.mkdir(exist_ok=True)
        (repo / name).write_text("x")
    (repo / "tokenizer.json").write_text("{}")
    directory = header_directory(MODEL)
    weights = {file.name for file in repo.glob("model*")}
    assert hub.fetched() == weights | {"config.json", "generation_config.json", "tokenizer.json"}
    assert {path.name for path in directory.iterdir()} == hub.fetched()


def test_no_tensor_can_be_read_by_qinit_or_by_a_stock_loader(hub, repo, tmp_path):
    directory = header_directory(MODEL)
    checkpoint = Checkpoint.open(directory)
    for tensor in checkpoint.tensors.values():
        with pytest.raises(CheckpointError, match="holds a header only"):
            tensor.read()
        with pytest.raises(CheckpointError, match="holds a header only"):
            next(tensor.chunks())
    with pytest.raises(CheckpointError, match="holds a header only"):
        list(run(plan_of(directory), tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(safetensors.SafetensorError):
        safetensors.safe_open(next(directory.glob("*.safetensors")), "pt").keys()
    with pytest.raises(safetensors.SafetensorError):
        transformers.AutoModelForCausalLM.from_pretrained(directory)


def test_a_real_run_afterwards_gets_the_weights(hub, repo):
    header_directory(MODEL)
    ours, theirs = Checkpoint.open(local_directory(MODEL)), Checkpoint.open(repo)
    assert all(torch.equal(tensor.read(), theirs.tensors[name].read()) for name, tensor in ours.tensors.items())


def test_what_is_whole_in_the_cache_is_taken_from_there(hub, repo, monkeypatch):
    whole = local_directory(MODEL)
    hub.served.clear()
    assert header_directory(MODEL) == whole
    assert served(hub) == {}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert header_directory(MODEL) == whole


def test_of_a_cache_that_is_not_whole_what_is_there_is_used(hub, repo):
    whole = local_directory(MODEL)
    first = min(whole.glob("*.safetensors"))
    first.unlink()
    hub.served.clear()
    plan = plan_of(header_directory(MODEL))
    assert set(served(hub)) == {first.name}
    assert plan.base_specs == plan_of(repo).base_specs


@pytest.mark.parametrize("made", ["1MB"], indirect=True)
def test_the_directory_goes_with_the_process_and_the_files_take_no_room(hub, repo, tmp_path):
    directory = header_directory(MODEL)
    for file in directory.glob("*.safetensors"):
        assert stat.S_ISREG(file.lstat().st_mode)
        assert file.stat().st_size < 5000
    assert not list((tmp_path / "hub-cache").rglob("*.safetensors"))
    code = (
        "import sys; from huggingface_hub import constants; constants.HF_HUB_OFFLINE = False\n"
        "from qinit.hub.download import header_directory; print(header_directory(sys.argv[1]))"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "other-cache")}
    environment["TMPDIR"] = str(tmp_path / "temporary")
    (tmp_path / "temporary").mkdir()
    command = [sys.executable, "-c", code, MODEL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(tmp_path / "temporary/qinit-headers-someone--tiny-"))
    assert not list((tmp_path / "temporary").iterdir())


def test_the_revision_is_what_is_fetched(hub, repo):
    hub.revisions.append("v2")
    header_directory(MODEL, revision="v2")
    assert any(path.endswith("/revision/v2") for path, _ in hub.requests)
    ranges = [path for path, _ in hub.requests if path.endswith(".safetensors")]
    assert ranges
    assert all(f"/resolve/{hub.COMMIT}/" in path for path in ranges)


def test_the_token_goes_to_the_hub_and_nowhere_else(hub, repo, tmp_path):
    directory = header_directory(MODEL, token=" hf_secret\n")
    assert {token for _, token in hub.requests} == {"Bearer hf_secret"}
    for place in (directory, tmp_path):
        assert not [path for path in place.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]


@pytest.mark.parametrize(
    ("status", "message"),
    [
        ((404, "RepoNotFound"), "no such directory here and no such model on the Hub"),
        ((404, "RevisionNotFound"), "the Hub has no revision 'v9' of it"),
        ((403, "GatedRepo"), "access is gated"),
        ((401, ""), "status 401; check HF_TOKEN"),
        ((403, ""), "status 403; check HF_TOKEN"),
        ((400, ""), "status 400; try again later"),
    ],
)
@pytest.mark.parametrize("when", ["first", "for the headers"])
def test_what_the_hub_refuses_is_named(hub, repo, status, message, when):
    hub.revisions.append("v9")
    hub.fail("" if when == "first" else r"\.safetensors$", *status)
    with pytest.raises(HubError, match=message) as caught:
        header_directory(MODEL, revision="v9", token="hf_secret")
    assert MODEL in str(caught.value)
    assert "hf_secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_connection_that_is_cut_in_a_header_is_an_error(hub, repo):
    hub.fail(min(repo.glob("*.safetensors")).name, cut=True)
    with pytest.raises(HubError, match=r"someone/tiny: the download failed \(") as caught:
        header_directory(MODEL)
    assert "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_an_error(hub, repo, monkeypatch):
    hub.close()
    with pytest.raises(HubError, match=r"not in the local cache, and the Hub cannot be reached"):
        header_directory(MODEL)


def test_offline_the_configuration_alone_is_not_enough(hub, repo, monkeypatch):
    header_directory(MODEL)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for get in (header_directory, local_directory):
        with pytest.raises(HubError, match=r"not in the local cache, and the Hub cannot be reached"):
            get(MODEL)


def test_a_model_with_pickle_weights_only_says_how_to_convert(hub, repo):
    for file in repo.glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match=r"no safetensors weights.*save_pretrained"):
        header_directory(MODEL)


def test_a_shard_that_the_hub_lacks_is_an_error(hub, tmp_path):
    hub.repos[MODEL] = make_checkpoint(tmp_path / "repo", max_shard_size="50KB")
    gone = min(hub.repos[MODEL].glob("*.safetensors"))
    gone.unlink()
    with pytest.raises(CheckpointError, match=rf"{gone.name}: missing, but model\.safetensors\.index\.json places"):
        Checkpoint.open(header_directory(MODEL))


@pytest.mark.parametrize(
    "header",
    [b"{", b"[]", b"7", {"x": 7}, {"x": {"dtype": "F32"}}, b"[" * 100_000, b'{"x": ' + b"9" * 5000 + b"}"],
    ids=["cut", "list", "number", "entry", "incomplete", "deep", "digits"],
)
def test_a_header_that_is_none_is_an_error(hub, repo, header):
    put(repo, header)
    with pytest.raises(CheckpointError, match=r"someone/tiny: model\.safetensors on the Hub has no header") as caught:
        header_directory(MODEL)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [100_000_001, 2**63])
def test_an_absurd_header_is_refused_after_one_range(hub, repo, length):
    put(repo, {})
    (repo / "model.safetensors").write_bytes(length.to_bytes(8, "little") + bytes(10**6))
    with pytest.raises(CheckpointError, match="header is too big"):
        header_directory(MODEL)
    assert served(hub) == {"model.safetensors": RANGE}


def test_what_a_header_says_of_its_tensors_is_checked_as_in_a_whole_file(hub, repo):
    put(repo, {"x": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}})
    with pytest.raises(CheckpointError, match="overlaps another or leaves a gap"):
        Checkpoint.open(header_directory(MODEL))


def make_70b(directory, layers=80, hidden=8192, intermediate=28672, vocabulary=128256, kv=1024, shards=30):
    """Write the configuration and the headers of Llama 3 70B."""
    directory.mkdir()
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=vocabulary,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(directory)
    block = {
        **{"self_attn.q_proj": [hidden, hidden], "self_attn.k_proj": [kv, hidden], "self_attn.v_proj": [kv, hidden]},
        **{"self_attn.o_proj": [hidden, hidden], "mlp.gate_proj": [intermediate, hidden]},
        **{"mlp.up_proj": [intermediate, hidden], "mlp.down_proj": [hidden, intermediate]},
        **{"input_layernorm": [hidden], "post_attention_layernorm": [hidden]},
    }
    shapes = {"model.embed_tokens": [vocabulary, hidden], "lm_head": [vocabulary, hidden], "model.norm": [hidden]}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in block.items()}
    headers, ends, weight_map = [{} for _ in range(shards)], [0] * shards, {}
    for i, (name, shape) in enumerate(shapes.items()):
        shard = i * shards // len(shapes)
        start, ends[shard] = ends[shard], ends[shard] + 2 * prod(shape)
        headers[shard][name + ".weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, ends[shard]]}
        weight_map[name + ".weight"] = f"model-{shard}.safetensors"
    for shard, header in enumerate(headers):
        write_header_only(directory / f"model-{shard}.safetensors", header)
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return directory


def test_the_plan_of_a_70b_model_takes_seconds(tmp_path, tiny_llama):
    directory = make_70b(tmp_path / "70b")
    plan_of(tiny_llama)  # imports
    started = time.process_time()  # of other processes' work it knows nothing
    plan = plan_of(directory, rank=16)
    sizes = plan.base_bytes, plan.adapter_bytes, working_bytes(plan)
    assert time.process_time() - started < 10  # most of it PEFT, which is tried on the model without weights
    assert plan.notes == ()
    assert len(plan.quantized) == 560
    assert plan.bytes_before == 141_107_412_992  # two for each of Llama 3 70B's 70 553 706 496 parameters
    assert all(2e8 < size < 3e10 for size in sizes)
