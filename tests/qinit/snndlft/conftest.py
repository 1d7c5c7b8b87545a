"""Where the spiking library is not installed, what spikes is not tested; --no-spiking is."""

import pytest


@pytest.fixture
def snn():
    pytest.importorskip("snntorch")
