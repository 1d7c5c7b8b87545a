import json
import shutil
from pathlib import Path

import pytest

from qinit.errors import CheckpointError, HubError, QinitError, ReportError
from qinit.files.manifest import MANIFEST_NAME, bytes_sum, read_manifest
from qinit.hub.prepare import prepare
from qinit.hub.push import open_target, push, require_ready
from qinit.report.report import REPORT_NAME, Report
from tests.helpers import contents, quantize
from tests.hub_stand_in import READER, WRITER, Repository
from tests.models import make_checkpoint

REPO = "me/tiny"
CONFIG, CARD = "eqft_init/adapter_config.json", "README.md"
ANEW = {CONFIG, CARD, MANIFEST_NAME, REPORT_NAME}


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def staging(tmp_path, monkeypatch):
    """Where temporary directories go; nothing may be left there."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    yield
    assert list((tmp_path / "temporary").iterdir()) == []


pytestmark = [
    pytest.mark.usefixtures("staging"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # huggingface_hub's own
]


def send(run, repo_id=REPO, **options):
    return push(prepare(run, repo_id), **{"token": WRITER, **options})


def put_lines(hub):
    return [call for call in hub.calls if call.startswith("PUT")]


class TestWhatIsPushed:
    def test_all_but_four_files_are_the_runs_own_and_the_run_stays_as_it_was(self, hub, run):
        before = contents(run)
        pushed = send(run)
        assert contents(run) == before
        there = hub.files(REPO)
        assert there.keys() == before.keys() | {".gitattributes"}
        assert {name for name in before if there[name] != before[name]} == ANEW
        assert (pushed.url, pushed.revision, pushed.pull_request) == (f"{hub.endpoint}/{REPO}", None, None)
        assert not hub.pushed[REPO].private

    def test_the_adapters_base_is_the_repository_and_all_else_of_its_configuration_stays(self, hub, run):
        send(run)
        ours, theirs = json.loads((run / CONFIG).read_text()), json.loads(hub.files(REPO)[CONFIG])
        assert theirs == {**ours, "base_model_name_or_path": REPO}
        assert ours["base_model_name_or_path"] != REPO

    def test_the_list_of_sums_is_that_of_what_is_pushed(self, hub, run, tmp_path):
        send(run)
        (tmp_path / "pulled").mkdir()
        files = hub.files(REPO)
        (tmp_path / "pulled" / MANIFEST_NAME).write_bytes(files[MANIFEST_NAME])
        sums = read_manifest(tmp_path / "pulled")
        assert sums == {
            name: bytes_sum(data) for name, data in files.items() if name not in (".gitattributes", MANIFEST_NAME)
        }

    def test_a_run_without_a_list_gets_one_for_what_is_pushed(self, hub, run):
        expected = prepare(run, REPO).rewritten[MANIFEST_NAME]
        (run / MANIFEST_NAME).unlink()
        send(run)
        assert hub.files(REPO)[MANIFEST_NAME] == expected

    def test_what_the_run_did_not_write_stays_but_its_pictures_go(self, hub, run):
        for name in ("report.png", "report.html", "notes.txt", "checkpoint-10/model.safetensors", ".secret/key"):
            (run / name).parent.mkdir(exist_ok=True)
            (run / name).write_text("x")
        assert prepare(run, REPO).left_out == ("checkpoint-10/model.safetensors", "notes.txt")
        send(run)
        assert hub.files(REPO).keys() == {*contents(run), ".gitattributes"} - {
            *("notes.txt", "checkpoint-10/model.safetensors", ".secret/key")
        }

    def test_a_card_that_was_edited_is_pushed_as_it_is(self, hub, run):
        (run / CARD).write_text((run / CARD).read_text() + "\nMy own words.\n")
        send(run)
        assert hub.files(REPO)[CARD].decode().endswith("\nMy own words.\n")
        assert f'from_pretrained("{REPO}"'.encode() in hub.files(REPO)[CARD]

    def test_what_differs_is_said(self, run):
        first, *lines = prepare(run, REPO).changes
        assert (first.file, first.field, first.after) == (CONFIG, "base_model_name_or_path", REPO)
        assert lines[0].before.startswith("base_model: ")  # a directory, which is none on the Hub
        assert lines[0].after == ""
        assert {change.file for change in lines} == {CARD, REPORT_NAME}
        assert any('from_pretrained("me/tiny", ' in line.after for line in lines)

    def test_no_place_on_this_machine_is_pushed(self, hub, run):
        model = Report.read(run).recipe["model"]
        assert Path(model).is_absolute()
        send(run)
        there = hub.files(REPO)
        for name in (CARD, REPORT_NAME, CONFIG):
            assert str(Path(model).parent) not in there[name].decode()
        pushed = json.loads(there[REPORT_NAME])
        assert pushed["recipe"]["model"] == pushed["model"] == Path(model).name
        assert f"`{Path(model).name}` quantized to" in there[CARD].decode()
        ours = json.loads((run / REPORT_NAME).read_text())
        assert {key for key in ours if ours[key] != pushed[key]} <= {"model", "recipe", "source", "command", "notes"}

    def test_where_links_cannot_be_made_files_are_copied(self, hub, run, monkeypatch):
        def refuse(*_, **__):
            raise OSError("a privilege is missing")

        monkeypatch.setattr(Path, "symlink_to", refuse)
        send(run)
        assert hub.files(REPO).keys() == {*contents(run), ".gitattributes"}


class TestHowItIsSent:
    def test_large_files_go_as_lfs_objects_in_parts_and_no_token_reaches_the_storage(self, hub, run):
        hub.chunk_size = 30_000
        send(run)
        assert sum(line.count("/") == 2 for line in put_lines(hub)) == 2 + 4 + 4
        assert {token for _, token in hub.stored} == {None}
        assert {token for path, token in hub.requests if not path.endswith("/complete")} == {f"Bearer {WRITER}"}
        lfs = {name for name, blob in hub.pushed[REPO].tree("main")[1].items() if blob.is_lfs}
        assert lfs == {name for name in contents(run) if name.endswith(".safetensors")}

    def test_the_same_again_sends_nothing(self, hub, run):
        send(run)
        commits = dict(hub.pushed[REPO].commits)
        hub.calls.clear()
        send(run)
        assert put_lines(hub) == []
        assert hub.pushed[REPO].commits == commits

    def test_after_a_failure_only_what_is_missing_is_sent(self, hub, run, no_waiting):
        oid = read_manifest(run)["model-00002-of-00003.safetensors"]
        hub.fail(f"storage/{oid}", 500)
        with pytest.raises(HubError, match=r"^me/tiny: the Hub answered with status 500; try again later$"):
            send(run)
        assert hub.files(REPO).keys() == {".gitattributes"}  # nothing half-pushed
        hub.faults.clear()
        hub.calls.clear()
        send(run)
        assert put_lines(hub) == [f"PUT storage/{oid}"]
        assert hub.files(REPO).keys() == {*contents(run), ".gitattributes"}

    @pytest.mark.parametrize("fault", [{"status": 503}, {"status": 429, "retry_after": 0}, {"cut": True}])
    def test_what_fails_for_a_while_is_tried_again(self, hub, run, no_waiting, fault):
        hub.fail("PUT storage", **fault, times=3)
        send(run)
        assert hub.files(REPO).keys() == {*contents(run), ".gitattributes"}
        assert len(no_waiting) >= 3

    def test_with_xet_what_the_hub_takes_as_plain_files_goes_through_the_pipeline(self, hub, run, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
        hub.lfs = False
        send(run)
        assert hub.files(REPO).keys() == {*contents(run), ".gitattributes"}
        assert hub.stored == []

    def test_what_xet_answers_is_one_line(self, hub, run, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
        hub.fail("xet-write-token", 403)
        with pytest.raises(HubError, match=r"^me/tiny: the push failed \(\w+: .*403 Forbidden.*\)$"):
            send(run)


class TestWhere:
    def test_a_private_repository(self, hub, run):
        send(run, private=True)
        assert hub.pushed[REPO].private
        send(run, private=True)

    def test_a_public_repository_is_not_taken_for_a_private_one(self, hub, run):
        hub.pushed[REPO] = Repository(refs={"main": "0"}, commits={"0": {}})
        with pytest.raises(HubError, match=r"^me/tiny: is public already; make it private on its page"):
            send(run, private=True)
        assert hub.files(REPO) == {}

    def test_a_branch_is_made_and_used_again(self, hub, run):
        for _ in range(2):
            pushed = send(run, revision="v2")
        assert (pushed.url, pushed.revision) == (f"{hub.endpoint}/{REPO}/tree/v2", "v2")
        assert hub.files(REPO).keys() == {".gitattributes"}
        assert hub.files(REPO, "v2").keys() == {*contents(run), ".gitattributes"}
        assert prepare(run, REPO).snippet("v2")[1].endswith('.from_pretrained("me/tiny", revision="v2", dtype="auto")')

    def test_a_pull_request(self, hub, run):
        send(run)
        edited = contents(run)[CARD] + b"more\n"
        (run / CARD).write_bytes(edited)
        pushed = send(run, create_pr=True)
        assert (pushed.revision, pushed.pull_request) == ("refs/pr/1", f"{hub.endpoint}/{REPO}/discussions/1")
        assert hub.pushed[REPO].pull_requests == ["qinit: eqft, 11 files"]
        assert hub.files(REPO, "refs/pr/1")[CARD].endswith(b"more\n")
        assert not hub.files(REPO)[CARD].endswith(b"more\n")

    def test_a_pull_request_that_failed_goes_on_in_the_same_one(self, hub, run, no_waiting):
        hub.pushed[REPO] = Repository(refs={"main": "0"}, commits={"0": {}})
        hub.fail("commit", 500)
        with pytest.raises(
            HubError, match=r"status 500.*; to go on in this pull request, push with --revision refs/pr/1$"
        ):
            send(run, create_pr=True)
        hub.faults.clear()
        assert send(run, revision="refs/pr/1").pull_request is None
        assert hub.files(REPO, "refs/pr/1").keys() == set(contents(run))
        assert len(hub.pushed[REPO].pull_requests) == 1

    def test_a_pull_request_to_nothing_is_an_error(self, hub, run):
        with pytest.raises(HubError, match=r"^me/tiny: no such repository on the Hub"):
            send(run, create_pr=True)

    def test_what_an_earlier_push_left_is_replaced_and_the_rest_stays(self, hub, run, tmp_path):
        send(run)
        quantize(make_checkpoint(tmp_path / "other"), tmp_path / "single", format="dense")
        tree = hub.pushed[REPO].tree("main")[1]
        others = dict.fromkeys(("sensitivity.json", "report.png", "notes.md", "a/b.safetensors"), tree["config.json"])
        tree.update(others)
        send(tmp_path / "single")
        kept = {".gitattributes", "notes.md", "a/b.safetensors", MANIFEST_NAME}
        assert hub.files(REPO).keys() == set(contents(tmp_path / "single")) | kept

    @pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "q4.gguf"])
    def test_a_model_that_qinit_did_not_push_is_not_replaced_but_by_a_pull_request(self, hub, run, tmp_path, name):
        theirs = tmp_path / "theirs"
        theirs.mkdir()
        (theirs / name).write_text("x")
        hub.repos[REPO] = theirs
        with pytest.raises(HubError, match=rf"^me/tiny: holds {name} and no qinit.json"):
            send(run)
        send(run, create_pr=True)
        assert hub.files(REPO)[name] == b"x"


class TestRefused:
    def test_no_name_for_a_repository_is_refused(self, hub, finished):
        for name in ("tiny", "me/ti ny", "me/tiny/x", "./run", "me/-x", "me/x.git", ""):
            for refuse in (lambda name: require_ready(name, WRITER), lambda name: prepare(finished, name)):
                with pytest.raises(HubError, match=f"^{name}: "):
                    refuse(name)
        assert hub.requests == []

    def test_without_a_token_and_offline_nothing_is_asked(self, hub, monkeypatch):
        with pytest.raises(HubError, match=r"^me/tiny: a push needs a Hub token; set HF_TOKEN"):
            require_ready(REPO, None)
        with pytest.raises(HubError, match="token holds characters that no token has"):
            require_ready(REPO, "hf_ä")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(HubError, match=r"^me/tiny: HF_HUB_OFFLINE is set, so nothing can be pushed; unset it$"):
            require_ready(REPO, WRITER)
        assert hub.requests == []

    @pytest.mark.parametrize(
        ("token", "repo_id", "message"),
        [
            ("hf_unknown", REPO, "status 401 .*; check HF_TOKEN or --token, which must be allowed to write there"),
            (READER, REPO, r"status 403 \(this token may only read\); check HF_TOKEN or --token"),
            (WRITER, "else/tiny", r"status 403 \(You don't have the rights to create a model under else\)"),
        ],
    )
    def test_who_may_not_write_is_told_before_anything_is_sent(self, hub, token, repo_id, message):
        with pytest.raises(HubError, match=f"^{repo_id}: the Hub answered with {message}"):
            open_target(repo_id, token=token)

    def test_a_reader_of_what_is_there_is_refused_too(self, hub):
        open_target(REPO, token=WRITER)
        with pytest.raises(HubError, match="status 403"):
            open_target(REPO, token=READER)

    @pytest.mark.parametrize("name", ["qinit.json", CONFIG, "eqft_init/adapter_model.safetensors", "config.json"])
    @pytest.mark.parametrize("has_list", [True, False])
    def test_what_is_no_finished_run(self, run, name, has_list):
        (run / name).unlink()
        if not has_list:
            (run / MANIFEST_NAME).unlink()
        with pytest.raises(QinitError, match=rf"{name}: (no such file|missing|not found).*qinit eqft"):
            prepare(run, REPO)

    def test_a_shard_that_is_missing(self, run):
        (run / "model-00002-of-00003.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: missing"):
            prepare(run, REPO)

    @pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "config.json", "qinit.json", CONFIG])
    def test_a_flipped_bit_is_not_published(self, run, name):
        data = bytearray((run / name).read_bytes())
        data[-3] ^= 1
        (run / name).write_bytes(data)
        with pytest.raises(QinitError, match=rf"{name}: (is not what the run wrote|not)"):
            prepare(run, REPO)

    def test_a_list_that_names_what_lies_elsewhere_is_refused(self, run):
        (run.parent / "key").write_text("x")
        lines = [*(run / MANIFEST_NAME).read_text().splitlines()[:-1], f"{'0' * 64}  ../key"]
        last = bytes_sum("".join(f"{line}\n" for line in lines).encode())
        (run / MANIFEST_NAME).write_text("".join(f"{line}\n" for line in [*lines, f"# {last}"]))
        with pytest.raises(ReportError, match=r"SHA256SUMS: lists '\.\./key', which is no file below it"):
            prepare(run, REPO)


STAGES = ["repos/create", "preupload", "tree/main", "validate-yaml", "objects/batch", "PUT storage", "verify", "commit"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"status": 401}, "status 401; check HF_TOKEN or --token"),
        ({"status": 403}, "status 403; check HF_TOKEN or --token"),
        ({"status": 404}, "status 404; try again later"),
        ({"status": 404, "code": "RepoNotFound"}, "no such repository on the Hub"),
        ({"status": 409}, "status 409; something else changed it meanwhile; try again"),
        ({"status": 429, "retry_after": 7}, "status 429; too many requests; try again in 7 s"),
        ({"status": 500}, "status 500; try again later"),
        ({"status": 503, "message": "down\nfor a while"}, r"status 503 \(down.*\); try again later"),
        ({"cut": True}, r"the push failed \(\w+Error: "),
    ],
    ids=lambda value: "-".join(map(str, value.values())).replace("\n", " ") if isinstance(value, dict) else None,
)
def test_each_answer_at_each_step_is_one_line_and_the_run_can_be_pushed_later(
    hub, run, no_waiting, stage, fault, message
):
    before = contents(run)
    hub.fail(stage, **{**fault, "message": fault.get("message", "").replace("\n", " ")})
    if stage == "repos/create" and fault.get("status") == 409:
        message = "the push failed"  # huggingface_hub takes it for "is there already" and misses the address
    with pytest.raises(HubError, match=message) as caught:
        send(run)
    assert str(caught.value).startswith(f"{REPO}: ")
    assert "\n" not in str(caught.value)
    assert WRITER not in str(caught.value)
    assert contents(run) == before
    hub.faults.clear()
    send(run)
    assert hub.files(REPO).keys() == {*before, ".gitattributes"}
