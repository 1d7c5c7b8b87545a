"""On PYTHONPATH: the packages in QINIT_TEST_HIDDEN look as if they were not installed, here and in child processes."""

import os
import sys
from importlib import metadata

hidden = set(os.environ["QINIT_TEST_HIDDEN"].split(","))


class Hiding:
    """A finder that does not find them."""

    def __init__(self, finder):
        self._finder = finder

    def __getattr__(self, name):
        return getattr(self._finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in hidden else self._finder.find_spec(name, path, target)


def from_name(name, found=metadata.Distribution.from_name):
    if name in hidden:
        raise metadata.PackageNotFoundError(name)
    return found(name)


sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
metadata.Distribution.from_name = staticmethod(from_name)
