import sys

import pytest

from qinit.errors import RecipeError
from qinit.trainers.execute import execute, require_installed
from qinit.trainers.write import Written


def written(command, distribution="peft"):
    return Written("", "file", command, distribution, "A trainer", "pip install it")


def test_a_script_runs_here_with_this_python_and_its_exit_code_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "a script.py"
    script.write_text("import sys; open('ran', 'w').write(sys.executable); sys.exit(7)")
    assert execute(written("python {file}"), script) == 7
    assert (tmp_path / "ran").read_text() == sys.executable


def test_what_is_not_installed_is_said_with_how_to_get_it():
    require_installed(written("python {file}"))
    require_installed(written("ls {file}", "no-such-trainer"))  # its program is there
    for command in ("python {file}", "sh {file}", "no-such-trainer train {file}"):
        with pytest.raises(
            RecipeError, match=r"--execute: A trainer \(no-such-trainer\) is not installed here; pip in"
        ):
            require_installed(written(command, "no-such-trainer"))
