"""The packages: all folders of qinit/ are found; cli/, the demo model and the adapter configurations are installed
under names of their own, which `packages.find` in pyproject.toml cannot give."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["qinit", "qinit.*"]), "qinit_cli", "qinit_demo", "qinit_templates"])
