import runpy

import pytest


def test_python_m_qinit_is_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["qinit", "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("qinit", run_name="__main__")
    assert not stop.value.code
    assert capsys.readouterr().out.strip()
