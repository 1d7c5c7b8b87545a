import platform

from qinit.machine import machine


def test_it_names_the_processor_and_the_cores_and_no_host():
    found = machine()
    assert set(found) == {"cpu", "cores", "gpu"}
    assert found["cores"] >= 1
    assert platform.node() not in str(found["cpu"])
