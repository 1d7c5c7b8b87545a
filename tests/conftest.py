"""A setting in which no test reaches the network, and the fixtures that tests in many folders use."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import time
from collections.abc import Generator, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.forking import Forks
from tests.helpers import quantize
from tests.hub_stand_in import StandInHub
from tests.models import make_checkpoint, make_own_code, make_reader

# Read by huggingface_hub when it is imported; a test that talks to a local stand-in lifts it for itself.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# gptqmodel compiles each layer's dequantize; PyTorch's own switch saves a minute of compiler.
os.environ["TORCHDYNAMO_DISABLE"] = "1"
# Threads that wait for others sleep: spinning makes tiny matrices 100 times slower where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# The stand-in for the Hub keeps LFS objects; huggingface_hub would send to Xet whatever the server says.
os.environ["HF_HUB_DISABLE_XET"] = "1"
for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
    os.environ.pop(variable, None)


FORKS = pytest.StashKey[Forks]()


@pytest.fixture(scope="session", autouse=True)
def no_power_failure() -> Iterator[None]:
    """Let nobody wait for the disk: what a run writes is synced twenty times, and a killed process loses none of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def pytest_collection_finish(session: pytest.Session) -> None:
    """Take what the imports have left, millions of objects, out of the garbage collector's sight: gptqmodel calls it
    whenever it loads. And fork while nothing but imports has happened."""
    gc.collect()
    gc.freeze()
    if any("forks" in item.fixturenames for item in session.items if isinstance(item, pytest.Function)):
        session.config.stash[FORKS] = Forks()


@pytest.fixture(scope="session")
def forks(pytestconfig: pytest.Config, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Forks:
    """Runs of the command line in processes of their own, forked from one that has loaded what they need."""
    found = pytestconfig.stash[FORKS]
    text = ["--calibration", "random", "--calibration-samples", 128, "--calibration-length", 32]
    options = ["--rank", 4, "--calibration-mode", "parallel", "--polish", 5, "--no-check"]
    found.warm_up("eqft", llama, "--out", tmp_path_factory.mktemp("warm") / "out", *text, *options)
    return found


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers, width 64, bfloat16, one safetensors file; not to be changed."""
    return make_checkpoint(tmp_path_factory.mktemp("llama") / "llama")


@pytest.fixture(scope="session")
def strong_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with weights larger than usual: otherwise the layers hardly change what the embeddings say. Not to be
    changed."""
    return make_checkpoint(tmp_path_factory.mktemp("strong-llama") / "llama", initializer_range=0.1)


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with the word tokenizer; not to be changed."""
    return make_reader(tmp_path_factory.mktemp("reader") / "llama")


@pytest.fixture(scope="session")
def strong_reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Llama whose layers count, with the word tokenizer; not to be changed."""
    return make_reader(tmp_path_factory.mktemp("strong-reader") / "llama", initializer_range=0.1)


@pytest.fixture
def tiny_llama(llama: Path, tmp_path: Path) -> Path:
    """A copy of `llama`, for tests that may change it or name it."""
    return Path(shutil.copytree(llama, tmp_path / "tiny-llama"))


@pytest.fixture
def tiny_reader(reader: Path, tmp_path: Path) -> Path:
    """A copy of `reader`, for tests that may change it or name it."""
    return Path(shutil.copytree(reader, tmp_path / "tiny-reader"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty directory, in which only what a run writes may appear."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense run of three shards with its SHA256SUMS, not to be changed."""
    from qinit.files.manifest import write_manifest

    place = tmp_path_factory.mktemp("finished")
    quantize(make_checkpoint(place / "source"), place / "run", format="dense", max_shard_size="100KB")
    write_manifest(place / "run")
    return place / "run"


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Llama whose class is code in its directory; what transformers copies of it goes to a place of the test's."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])

    def forget() -> None:  # the package that transformers makes of that place
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    forget()
    yield make_own_code(tmp_path / "own")
    forget()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    """A local stand-in for the Hub, which huggingface_hub talks to as if it were the real one."""
    from huggingface_hub import constants

    stand_in = StandInHub()
    monkeypatch.setattr(constants, "ENDPOINT", stand_in.endpoint)
    template = stand_in.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    yield stand_in
    stand_in.close()


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Shorten what huggingface_hub waits before it tries again (1, 2, 4, 8 and 8 s); returns what it would have."""
    waited, sleep = [], time.sleep

    def short(seconds: float) -> None:
        waited.append(seconds)
        sleep(min(seconds, 0.001))

    monkeypatch.setattr(time, "sleep", short)
    return waited


def _no_check(job: Any) -> Generator[Any, None, None]:
    return
    yield


@pytest.fixture(scope="session")
def tree() -> Any:
    """Return a function that makes typer's commands of an app, once: it takes longer than most commands run."""
    import typer.main

    return cache(typer.main.get_command)


@pytest.fixture
def command(tree: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs `qinit ARGUMENTS` in an empty directory: (exit code, stdout, stderr).

    Calibration `auto` is none there, and fast, no run is measured at its end, and `qinit verify` loads none, for which
    it would start a process; `qinit.planner.make.choose`, `qinit.runner.run.check` and
    `qinit.verification.loading.check_loading` are what a test may put back. How long a run will take is said from one
    call of an operation, and not from a second and a half of them.
    """
    from qinit_cli import main

    from qinit.planner.auto import Choice

    directory = tmp_path / "cwd"
    directory.mkdir()
    monkeypatch.chdir(directory)
    monkeypatch.setattr("qinit.planner.make.choose", lambda plan, device: Choice("none", ""))
    monkeypatch.setattr("qinit.runner.run.check", _no_check)
    monkeypatch.setattr("typer.main.get_command", tree)
    monkeypatch.setattr("qinit.planner.operations.LEAST_SECONDS", 0.0)
    monkeypatch.setattr("qinit.planner.operations.MOST_SECONDS", 0.0)
    monkeypatch.setattr("qinit.verification.loading.check_loading", lambda *_, **__: iter(()))

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["qinit", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main.main()
        return (int(stop.value.code or 0), *capsys.readouterr())

    return call
