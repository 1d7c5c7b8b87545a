import json
import subprocess
import sys

import pytest

from qinit.report.report import LayerRow, Report
from tests.helpers import quantize


@pytest.fixture
def run(tmp_path):
    """A run's directory with a report of two module types in two layers, and a head that was kept."""
    rows = [
        LayerRow(f"model.layers.{n}.{kind}", (8, 16), bits, 64, 4, 9, 9, 0.5, 0.25, (), 0.1, None, 0.6, 0.125)
        for n, bits in enumerate((2, 4))
        for kind in ("q_proj", "up_proj")
    ]
    rows.append(LayerRow("lm_head", (8, 16), None, None, 4, 9, 9, None, None, (), 0.1, "tied"))
    directory = tmp_path / "run"
    directory.mkdir()
    recipe = {"method": "eqft", "rank": 4, "bits": 2}
    Report("[b]odd[/b]", "qinit eqft", recipe, {}, {}, {"bits_per_weight": 3.4}, (), tuple(rows)).write(directory)
    return directory


def test_the_table_has_a_line_for_each_module_type_and_the_totals(command, run):
    code, out, err = command("report", run)
    assert (code, err) == (0, "")
    lines = [line.rstrip() for line in out.splitlines()]
    assert lines[1].split() == ["q_proj", "2", "2", "to", "4,", "mean", "3.00", "0.5000", "0.2500", "0.6000", "0.1250"]
    assert lines[3].split() == ["lm_head", "1", "kept", "-", "-", "-", "-"]
    assert lines[4] == "[b]odd[/b]: 3.400 bits per weight as stored, rank 4, eqft"
    assert " layers           4 (+ 1 kept)" in lines
    assert " relative error   0.5000 base alone -> 0.2500 with the adapter" in lines
    assert lines[-2] == "note: no losses were predicted in this run, so there is no Pareto front"
    assert lines[-1] == f"written to {run / 'report.png'} and {run / 'report.html'}"
    assert (run / "report.png").read_bytes()[1:4] == b"PNG"
    assert "<title>[b]odd[/b]: 3.400" in (run / "report.html").read_text()


def test_json_has_the_paths_and_the_totals_alone(command, run, tmp_path):
    code, out, err = command("report", run, "--json", "--out", tmp_path / "other")
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "png": str(tmp_path / "other/report.png"),
        "html": str(tmp_path / "other/report.html"),
        "totals": {"bits_per_weight": 3.4},
    }
    assert {path.name for path in run.iterdir()} == {"qinit.json"}


def test_what_a_real_run_wrote_can_be_drawn(command, tiny_llama, tmp_path):
    quantize(tiny_llama, tmp_path / "out")
    code, out, err = command("report", tmp_path / "out")
    assert (code, err) == (0, "")
    assert len([line for line in out.splitlines() if line.startswith(("self_attn.", "mlp."))]) == 7


def test_a_directory_without_a_report_is_one_line_and_2(command, tmp_path):
    code, out, err = command("report", tmp_path)
    assert (code, out) == (2, "")
    assert err == f"error: {tmp_path}/qinit.json: no such file; pass the directory that `qinit eqft` wrote\n"
    assert command("report")[0] == 2


def test_without_the_extra_the_table_is_shown_and_the_error_says_what_to_install(command, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    code, out, err = command("report", run)
    assert code == 2
    assert out.startswith("module type")
    assert err == 'error: the pictures need plotly, which is not installed; pip install "qinit[report]"\n'
    assert {path.name for path in run.iterdir()} == {"qinit.json"}


def test_a_report_needs_no_torch(run):
    script = (
        f"import sys; from qinit_cli import main; sys.argv = ['qinit', 'report', {str(run)!r}, '--json']\n"
        "main.app(standalone_mode=False); sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_what_would_steer_the_terminal_is_drawn_as_an_escape(command, run):
    report = json.loads((run / "qinit.json").read_text())
    report["model"] = "m\x1b]0;owned\x07"
    report["layers"][0]["name"] = "model.layers.0.q\x1b[2J\u202e"
    report["totals"]["evaluations"] = [{"text": "t\x9b", "perplexity": 2.0}]
    (run / "qinit.json").write_text(json.dumps(report))
    code, out, err = command("report", run)
    assert (code, err) == (0, "")
    assert not set("\x1b\x07\x9b\u202e") & set(out)
    assert "q\\x1b[2J\\u202e" in out
    assert "m\\x1b]0;owned\\x07: " in out
    assert "perplexity on t\\x9b" in out
