import pytest
from numba.core import caching

from qinit.grids.integer.compiled import compiled


@pytest.mark.parametrize("places", [caching.CacheImpl._locator_classes, []])
def test_a_kernel_works_where_numba_finds_no_place_for_its_cache(places, monkeypatch):
    """As in a read-only installation, for a user without a home that can be written."""
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", places)

    def double(x):
        return 2 * x

    kernel = compiled(double, fastmath=True)
    assert kernel(3) == 6
    assert (kernel.stats.cache_path is not None) == bool(places)
