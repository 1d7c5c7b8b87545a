import struct
import sys

import pytest

from qinit.errors import ReportError
from qinit.report.pictures.raster import png
from tests.qinit.report.reports import ALLOCATION, SHAPES, TYPES, report, row


def picture_size(data):
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.filterwarnings("error")
def test_any_report_can_be_drawn(shape):
    width, height = picture_size(png(SHAPES[shape]))
    assert width > 1000
    assert height > 200


def test_400_layers_fit_on_a_picture_of_the_usual_size():
    deep = report([row(f"model.layers.{n}.{kind}", 2 + n % 2) for n in range(400) for kind in TYPES])
    assert picture_size(png(deep)) == picture_size(png(report()))


def test_many_module_types_make_a_long_picture_not_an_endless_one():
    assert picture_size(png(report([row(f"layer_{n}") for n in range(450)])))[1] < 2**14  # a row each would be 2**14.2


def test_the_same_report_gives_the_same_bytes():
    assert png(report(allocation=ALLOCATION)) == png(report(allocation=ALLOCATION))


def test_without_allocation_there_is_no_front_and_the_picture_is_shorter():
    assert picture_size(png(report()))[1] < picture_size(png(report(allocation=ALLOCATION)))[1]


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ReportError, match=r'need matplotlib, .*; pip install "qinit\[report\]"$'):
        png(report())
