import subprocess
import sys
from pathlib import Path

import pytest

from qinit.errors import OutputError
from qinit.report.pictures.files import write_pictures
from qinit.report.pictures.raster import png
from tests.qinit.report.reports import report


def test_importing_the_module_needs_neither_the_extra_nor_torch():
    slow = "{'torch', 'matplotlib', 'plotly'}"
    script = f"import sys, qinit.report.pictures.files; sys.exit(bool({slow} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_both_files_are_written_and_replaced(tmp_path):
    for _ in range(2):
        found = write_pictures(report(), tmp_path / "new/place")
        assert found == (tmp_path / "new/place/report.png", tmp_path / "new/place/report.html")
    assert {path.name for path in (tmp_path / "new/place").iterdir()} == {"report.png", "report.html"}
    assert found[0].read_bytes() == png(report())


def test_a_failed_write_keeps_the_earlier_file_and_leaves_no_other(tmp_path, monkeypatch):
    write_pictures(report(), tmp_path)
    before = (tmp_path / "report.png").read_bytes()
    written = Path.write_bytes

    def full(path, data):
        written(path, data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match=r"cannot be written \(No space left on device: .*report\.png"):
        write_pictures(report(model="other"), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.png", "report.html"}
    assert (tmp_path / "report.png").read_bytes() == before


def test_a_place_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another place with --out"):
        write_pictures(report(), tmp_path / "file")
