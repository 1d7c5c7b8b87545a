import pytest

from qinit.errors import CheckpointError, HubError
from qinit.hub.download import local_directory
from qinit.source.checkpoint import Checkpoint
from tests.hub_stand_in import READER
from tests.models import make_checkpoint

MODEL = "someone/tiny"


@pytest.fixture
def repo(tmp_path, hub):
    directory = make_checkpoint(tmp_path / "repo", max_shard_size="50KB")
    hub.repos[MODEL] = directory
    return directory


def test_a_directory_is_taken_as_it_is_without_asking_the_hub(tiny_llama, hub):
    assert local_directory(str(tiny_llama)) == tiny_llama
    assert hub.requests == []


def test_a_directory_wins_over_a_hub_id_of_the_same_name(tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / MODEL).mkdir(parents=True)
    assert str(local_directory(MODEL)) == MODEL
    assert hub.requests == []


def test_a_sharded_model_is_downloaded_whole_but_not_other_forms_of_its_weights(hub, repo):
    left = [
        "pytorch_model.bin",
        "flax_model.msgpack",
        "onnx/model.onnx_data",
        "original/x.pth",
        "consolidated.safetensors",
    ]
    for name in [*left, "tokenizer.json", "templates/tool.jinja"]:
        (repo / name).parent.mkdir(exist_ok=True)
        (repo / name).write_text("x")
    directory = local_directory(MODEL)
    carried = {str(path.relative_to(repo)) for path in repo.rglob("*") if path.is_file()} - set(left)
    assert hub.fetched() == carried
    assert {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()} == carried
    ours, theirs = Checkpoint.open(directory), Checkpoint.open(repo)
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert len({tensor.file for tensor in ours.tensors.values()}) > 1
    assert set(map(str, ours.companions())) >= {"tokenizer.json", "templates/tool.jinja"}


def test_the_revision_is_what_is_downloaded(hub, repo):
    hub.revisions.append("v2")
    assert local_directory(MODEL, revision="v2").name == hub.COMMIT
    assert any(path.endswith("/revision/v2") for path, _ in hub.requests)


def test_what_is_in_the_cache_needs_no_hub(hub, repo, monkeypatch):
    first = local_directory(MODEL)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert local_directory(MODEL) == first


def test_the_token_goes_to_the_hub(hub, repo):
    local_directory(MODEL, token="hf_secret")
    assert {token for _, token in hub.requests} == {"Bearer hf_secret"}


def test_a_model_with_pickle_weights_only_says_how_to_convert(hub, repo):
    for file in repo.glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match=r"no safetensors weights.*save_pretrained"):
        local_directory(MODEL)
    assert not any(name.endswith(".bin") for name in hub.fetched())


@pytest.mark.parametrize(
    ("status", "message"),
    [
        ((404, "RepoNotFound"), "no such directory here and no such model on the Hub"),
        ((404, "RevisionNotFound"), "the Hub has no revision 'v9' of it"),
        ((403, "GatedRepo"), "access is gated"),
        ((401, ""), "status 401; check HF_TOKEN"),
        ((403, ""), "status 403; check HF_TOKEN"),
        ((418, ""), "status 418; try again later"),
        ((404, ""), "status 404; try again later"),
        ((409, ""), "status 409; something else changed it meanwhile; try again"),
        ((429, ""), "status 429; too many requests; try again later"),
        ((500, ""), "status 500; try again later"),
        ((503, ""), "status 503; try again later"),
    ],
)
def test_what_the_hub_refuses_is_named(hub, repo, status, message):
    hub.fail(status=status[0], code=status[1])
    with pytest.raises(HubError, match=message) as caught:
        local_directory(MODEL, revision="v9", token="hf_secret")
    assert MODEL in str(caught.value)
    assert "hf_secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"status": 401}, "status 401; check HF_TOKEN"),
        ({"status": 403, "message": "no longer yours"}, r"status 403 \(no longer yours\); check HF_TOKEN"),
        ({"status": 404, "code": "EntryNotFound"}, "status 404"),
        ({"status": 409}, "status 409"),
        ({"status": 429, "retry_after": 9}, "status 429; too many requests; try again in 9 s"),
        ({"status": 503}, "status 503; try again later"),
        ({"cut": True}, r"the download failed \("),
    ],
)
def test_what_goes_wrong_with_one_file_is_one_line_and_the_rest_need_not_come_again(
    hub, repo, no_waiting, fault, message
):
    last = max(repo.glob("*.safetensors")).name
    hub.fail(last, **fault)
    with pytest.raises(HubError, match=f"^{MODEL}: .*{message}") as caught:
        local_directory(MODEL)
    assert "\n" not in str(caught.value)
    hub.faults.clear()
    hub.requests.clear()
    assert Checkpoint.open(local_directory(MODEL)).tensors.keys() == Checkpoint.open(repo).tensors.keys()
    assert hub.fetched() <= {last, "config.json", "generation_config.json", "model.safetensors.index.json"}


@pytest.mark.parametrize("fault", [{"status": 429, "retry_after": 0}, {"cut": True}])  # not a 5xx: that is the line
def test_what_fails_for_a_while_is_tried_again(hub, repo, no_waiting, fault):
    hub.fail(r"GET .*\.safetensors$", **fault, times=3)
    assert Checkpoint.open(local_directory(MODEL)).tensors.keys() == Checkpoint.open(repo).tensors.keys()


def test_a_private_model_needs_the_token(hub, repo):
    hub.make_private(MODEL)
    with pytest.raises(HubError, match="no such model on the Hub"):
        local_directory(MODEL)
    assert (local_directory(MODEL, token=READER) / "config.json").is_file()


def test_an_unknown_model_and_an_unknown_revision_are_told_apart(hub, repo):
    with pytest.raises(HubError, match="someone/tiyn: no such directory here and no such model"):
        local_directory("someone/tiyn")
    with pytest.raises(HubError, match=r"someone/tiny: the Hub has no revision 'v9'"):
        local_directory(MODEL, revision="v9")


def test_a_hub_that_cannot_be_reached_is_an_error(hub, repo):
    hub.close()
    with pytest.raises(HubError, match=r"not in the local cache, and the Hub cannot be reached"):
        local_directory(MODEL)


def test_offline_and_not_in_the_cache_is_an_error(hub, repo, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"not in the local cache, and the Hub cannot be reached"):
        local_directory(MODEL)
    assert hub.requests == []


def test_a_download_that_fails_midway_is_an_error_without_the_token(hub, repo, monkeypatch):
    def fail(*_, **__):
        raise OSError("No space left on device while sending Bearer hf_secret")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(HubError, match=r"someone/tiny: the download failed \(OSError: No space left") as caught:
        local_directory(MODEL, token="hf_secret")
    assert "hf_secret" not in str(caught.value)


@pytest.mark.parametrize(
    "model", ["./gone", "/gone/model", "~/model", "a/b/c", "two words", "org/na--me", "org/x.git", "-x"]
)
def test_what_is_neither_a_directory_nor_an_id_never_reaches_the_hub(hub, model):
    with pytest.raises(CheckpointError, match="no such directory, and no Hub id"):
        local_directory(model)
    assert hub.requests == []


def test_a_name_that_no_file_system_takes_is_an_error(hub):
    with pytest.raises(CheckpointError, match=r"cannot be looked at .*too long"):
        local_directory("x" * 300)


def test_a_file_is_not_a_model(hub, tiny_llama):
    with pytest.raises(CheckpointError, match="is a file; give the directory"):
        local_directory(str(tiny_llama / "model.safetensors"))


def test_a_local_directory_has_no_revisions(tmp_path):
    with pytest.raises(CheckpointError, match="no revision 'v2'"):
        local_directory(str(tmp_path), revision="v2")


@pytest.mark.parametrize("revision", ["../../../x", "a/../b", "a b", "a\nb", "\x1b[2J"])
def test_a_revision_that_is_no_name_never_reaches_the_hub(hub, revision):
    with pytest.raises(HubError, match="someone/tiny: no branch, tag or commit is named so: '"):
        local_directory("someone/tiny", revision)
    assert not hub.requests


def test_a_commit_that_leads_out_of_the_cache_is_not_followed(hub, repo, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: f"{tmp_path}/snapshots/../private")
    with pytest.raises(HubError, match="the Hub's answer cannot be used"):
        local_directory("someone/tiny")
