import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub_stand_in import WRITER
from tests.models import make_checkpoint

MODEL, REPO = "someone/secret", "me/tiny"
# What a token could be cut or encoded to; the part is long enough to be nothing else.
FORMS = [WRITER.encode(), WRITER.removeprefix("hf_").encode()]


@pytest.fixture
def source(hub, tmp_path):
    """A private model, so that reading needs the token as pushing does."""
    hub.repos[MODEL] = make_checkpoint(tmp_path / "repo")
    hub.make_private(MODEL)
    return MODEL


@pytest.fixture
def place(tmp_path):
    """The working directory, with the caches, the settings and the temporary files inside it."""
    (tmp_path / "place/temporary").mkdir(parents=True)
    return tmp_path / "place"


def start(hub, place, monkeypatch, *arguments):
    """Run `qinit ARGUMENTS` with everything that could be written in `place`; returns exit code, output and titles."""
    for name in ("HF_HUB_CACHE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        **{"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(place / "home"), "HOME": str(place)},
        **{"TMPDIR": str(place / "temporary"), "XDG_CACHE_HOME": str(place / "cache"), "HF_DEBUG": "1"},
    }.items():
        monkeypatch.setenv(name, value)
    titles, answer = set(), hub.answer

    def looking(*request):
        titles.add(Path(f"/proc/{process.pid}/cmdline").read_bytes())
        return answer(*request)

    hub.answer = looking
    process = subprocess.Popen(
        [sys.executable, "-m", "qinit_cli.main", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=place,
    )
    output, _ = process.communicate()
    return process.returncode, output, titles


def require_nowhere(place, *texts):
    files = [path for path in place.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        texts += (path.read_bytes(), str(path).encode())
    assert not [text for text in texts for form in FORMS if form in text]


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="reads the title of a process in /proc")
def test_a_token_of_the_command_line_is_in_no_file_output_or_process_title(hub, source, place, monkeypatch):
    arguments = ("--rank", 4, "--iter", 1, "--calibration", "none", "--format", "dense", "--out", "out", "--debug")
    code, output, titles = start(
        hub, place, monkeypatch, "eqft", source, *arguments, "--push-to-hub", REPO, "--token", WRITER
    )
    assert code == 0, output
    assert b"Send: curl" in output  # all of huggingface_hub's debugging
    assert {token for _, token in hub.requests} >= {f"Bearer {WRITER}"}
    assert len(titles) == 1
    assert b"--token\0(hidden)" in titles.pop()
    assert b"--token $HF_TOKEN" in (place / "out/qinit.json").read_bytes()
    require_nowhere(place, output, *hub.files(REPO).values())


def test_a_token_of_the_environment_that_the_hub_repeats_in_its_error_is_nowhere_either(
    hub, finished, command, monkeypatch, caplog
):
    monkeypatch.setattr("huggingface_hub.constants.HF_DEBUG", True)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    caplog.set_level("DEBUG", "huggingface_hub")
    hub.fail("commit", 403, message=f"{WRITER} may not commit")
    shutil.copytree(finished, "out")
    code, out, err = command("push", "out", REPO, "--debug")
    assert code == 2, err
    assert "Send: curl" in caplog.text
    assert "Traceback" in err
    assert "status 403 (*** may not commit); check HF_TOKEN" in err
    require_nowhere(Path.cwd(), *(text.encode() for text in (out, err, caplog.text)))
