"""Hostile files as a user meets them: each is one line and exit code 2, soon, in bounded memory; nothing is left."""

import json
import re
import resource
import shutil
import signal
import stat
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest

from qinit.files.reading import UNPRINTABLE
from tests.cli.hostile import CASES, HUB_CASES, SECRET, World, edit_config
from tests.models import make_reader

COUNT = 266  # of cases: docs/promises.md has this figure
SECONDS = 60  # per command, on a machine that is busy with other things; a refusal takes a tenth of one
MEMORY = 400 << 20  # bytes that a command's resident memory may grow by
ADDRESSES = 4 << 30  # and its address space, so that a bomb ends the test and not the machine
OPTIONS = ("--iter", "1")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return make_reader(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture
def world(tmp_path, good, command):
    """A good model with a tokenizer, a directory with a secret beside it, and the working directory."""
    made = World(tmp_path / "model", tmp_path / "outside", tmp_path / "cwd")
    shutil.copytree(good, made.model)
    made.outside.mkdir()
    (made.outside / "secret").write_text(SECRET)
    return made


def snapshot(root):
    """What lies below a directory: each path with its type, what it links to and, of files, the size and time."""
    found = {}
    for path in root.rglob("*"):
        state = path.lstat()
        link = path.readlink() if path.is_symlink() else None
        found[path] = (state.st_mode, link, None if stat.S_ISDIR(state.st_mode) else (state.st_size, state.st_mtime_ns))
    return found


@contextmanager
def bounded():
    """Limit the time and the address space, and see to it that resident memory stays within MEMORY of what it was."""

    def late(*_):
        raise TimeoutError(f"still running after {SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, late)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start = peak()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert peak() - start < MEMORY


def peak():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def filled(arguments, world):
    words = [word.format(model=world.model) for word in arguments]
    return words if words[0] == "report" else [*words, *OPTIONS]


def assert_refused(code, out, err, says):
    assert re.fullmatch(r"error: [^\n]*\n", err), err
    assert says in err
    assert "inside qinit" not in err
    assert code == 2
    assert len(err) < 2100
    assert not UNPRINTABLE.search(err.replace("\n", ""))
    assert "Traceback" not in out
    assert "Load it" not in out
    assert SECRET not in out + err


def test_the_cases_are_as_many_as_is_promised():
    assert len(CASES) + len(HUB_CASES) == COUNT
    groups = Counter(name.split(":")[0] for name in CASES)
    assert min(groups.values()) >= 2
    assert len(groups) == 14


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux has it")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_hostile_input_is_one_line_and_2_soon_and_leaves_nothing(command, world, monkeypatch, case):
    case.damage(world)
    (world.here.parent / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(world.here.parent / "tmp"))
    before = snapshot(world.here.parent)
    for arguments in case.commands:
        with bounded():
            code, out, err = command(*filled(arguments, world))
        assert_refused(code, out, err, case.says)
        assert snapshot(world.here.parent) == before


@pytest.mark.parametrize(("change", "says"), HUB_CASES.values(), ids=HUB_CASES.keys())
def test_a_hostile_answer_of_a_hub_is_one_line_and_2_and_leaves_nothing(command, hub, world, tmp_path, change, says):
    hub.repos["a/b"] = world.model
    answer = hub.answer

    def hostile(method, path, token, sent):
        if "evil" in path:
            return 200, {}, b"{}"
        status, headers, body = answer(method, path, token, sent)
        return status, headers, body if "/resolve/" in path else json.dumps(change(path, json.loads(body))).encode()

    hub.answer = hostile
    before = snapshot(tmp_path)
    with bounded():
        assert_refused(*command("eqft", "a/b", "--out", "out"), says)
    cache = tmp_path / "hub-cache"
    assert {path: state for path, state in snapshot(tmp_path).items() if not path.is_relative_to(cache)} == before
    assert not list(tmp_path.rglob("*evil*"))


def test_hostile_input_to_a_process(world, tmp_path_factory, tmp_path, forks):
    case = CASES["index: shard: pipe"]
    case.damage(world)
    before, log = snapshot(tmp_path), tmp_path_factory.mktemp("log") / "log"
    code, _ = forks.run(log, *filled(case.commands[-1], world), directory=world.here)
    assert_refused(code, "", log.read_text(), case.says)
    assert snapshot(tmp_path) == before


def test_the_model_that_the_cases_damage_is_good(command, world):
    assert command(*filled(("plan", "{model}"), world))[0] == 0
    code, _, err = command(*filled(("eqft", "{model}", "--out", "out"), world))
    assert (code, err) == (0, "")
    assert (world.here / "out/qinit.json").is_file()


def test_links_within_the_directory_and_into_the_blobs_of_the_hubs_cache_are_files(command, world):
    repo = world.outside / "models--a--b"
    (repo / "blobs").mkdir(parents=True)
    snapshot_of_it = repo / "snapshots" / ("0" * 40)
    snapshot_of_it.mkdir(parents=True)
    for file in world.model.iterdir():
        shutil.copyfile(file, repo / "blobs" / file.name)
        (snapshot_of_it / file.name).symlink_to(f"../../blobs/{file.name}")
    (snapshot_of_it / "LICENSE").symlink_to("tokenizer.json")
    code, _, err = command(*filled(("eqft", str(snapshot_of_it), "--out", "out"), world))
    assert (code, err) == (0, "")
    assert not any(path.is_symlink() for path in (world.here / "out").rglob("*"))
    assert (world.here / "out/LICENSE").read_bytes() == (world.model / "tokenizer.json").read_bytes()
    (snapshot_of_it / "notes.txt").symlink_to(world.outside / "secret")
    code, out, err = command(*filled(("eqft", str(snapshot_of_it), "--out", "other"), world))
    assert_refused(code, out, err, "notes.txt: a link that leads out of the directory")


def test_what_an_earlier_run_has_written_about_itself_is_not_carried_along(command, world):
    (world.model / "eqft_init").mkdir()
    for name in ("eqft_init/notes.txt", "SHA256SUMS", "sensitivity.json"):
        (world.model / name).write_text("old")
    assert command(*filled(("eqft", "{model}", "--out", "out"), world))[0] == 0
    assert sorted(path.name for path in (world.here / "out/eqft_init").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert "old" not in {
        path.read_bytes()[:3].decode("latin-1") for path in (world.here / "out").glob("*") if path.is_file()
    }


OWN = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path({marker!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


class TestCodeInTheCheckpoint:
    @pytest.fixture
    def own(self, world, tmp_path, monkeypatch):
        """A model whose code lies in its directory and leaves a mark when it runs; returns the mark."""
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
        monkeypatch.setattr("sys.path", [*sys.path])
        monkeypatch.setattr("builtins.input", lambda _: "y")
        marker = tmp_path / "ran"
        (world.model / "own.py").write_text(OWN.format(marker=str(marker)))
        edit_config(
            model_type="own",
            architectures=["OwnForCausalLM"],
            auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
        )(world)
        (world.model / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}})
        )
        (world.here / "text.txt").write_text("w5 w6 w7 " * 200)
        return marker

    @pytest.mark.parametrize("calibration", ["none", "text.txt", "self"])
    def test_it_is_not_run(self, command, world, own, calibration):
        for words in (("plan", "{model}"), ("eqft", "{model}", "--out", "out")):
            code, out, err = command(*filled((*words, "--calibration", calibration), world))
            assert_refused(code, out, err, "read it, then pass --trust-remote-code to run it")
        assert not own.exists()

    def test_nor_is_a_tokenizers(self, command, world, own):
        edit_config(model_type="llama", architectures=["LlamaForCausalLM"])(world)
        short = ("--calibration", "text.txt", "--calibration-samples", "2", "--calibration-length", "8")
        code, out, err = command(*filled(("eqft", "{model}", "--out", "out", *short), world))
        assert_refused(code, out, err, "tokenizer_config.json: needs code that the checkpoint brings")
        assert not own.exists()

    def test_a_model_that_transformers_knows_needs_none_of_it(self, command, world, own):
        edit_config(model_type="llama", architectures=["LlamaForCausalLM"])(world)
        code, _, err = command(*filled(("eqft", "{model}", "--out", "out"), world))
        assert (code, err) == (0, "")
        assert not own.exists()
        assert json.loads((world.here / "out/qinit.json").read_text())["recipe"]["trust_remote_code"] is False

    @pytest.mark.parametrize("calibration", ["text.txt", "self"])
    def test_asked_for_it_is_run_and_the_report_and_the_card_say_so(
        self, command, world, own, calibration, monkeypatch
    ):
        import qinit
        from qinit.runner.checked import check

        monkeypatch.setattr("qinit.runner.run.check", check)
        short = ("--calibration", calibration, "--calibration-samples", "4", "--calibration-length", "8")
        words = ("eqft", "{model}", "--out", "out", "--trust-remote-code", "--format", "dense", "--polish", "1", *short)
        code, out, err = command(*filled(words, world))
        assert (code, err) == (0, "")
        assert own.exists()
        report = json.loads((world.here / "out/qinit.json").read_text())
        assert report["recipe"]["trust_remote_code"] is True
        assert report["totals"]["check"]["kl"] >= 0  # the model is run for that, too
        assert 'from_pretrained("out", dtype="auto", trust_remote_code=True)' in out
        assert (world.here / "out/own.py").is_file()
        with pytest.raises(qinit.errors.CheckpointError, match="read it and pass trust_remote_code=True"):
            qinit.load("out")
        assert type(qinit.load("out", adapter=False, trust_remote_code=True)).__name__ == "OwnForCausalLM"
