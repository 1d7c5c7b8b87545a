"""The wheel that users install holds every module and all data."""

from __future__ import annotations

import importlib.util
import os
import pkgutil
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("qinit", "cli", "model_zoo/demo", "model_zoo/adapters", "pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what the packages are built from: a build leaves files behind."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("pip install setuptools")
    place = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        copy, original = place / name, ROOT / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if original.is_dir():
            shutil.copytree(original, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(original, copy)
    return place


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    place = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(place), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (found,) = place.glob("*.whl")
    return found


def modules_of(package, folder):
    files = (file.relative_to(ROOT / folder) for file in (ROOT / folder).rglob("*.py"))
    parts = ((package, *file.with_suffix("").parts) for file in files)
    return {".".join(part for part in names if part != "__init__") for names in parts}


def imported(place):
    """Import every module from `place` in this process, which has others of these names; return their names.

    The demo's scripts are part of the package, and need what only its makers have.
    """
    here = ("qinit", "qinit_cli", "qinit_demo", "tests", "benchmarks")
    for name in [name for name in sys.modules if name.partition(".")[0] in here]:
        del sys.modules[name]
    sys.path[:] = [place, *(entry for entry in sys.path if "site-packages" in entry or "/lib/python" in entry)]
    os.chdir(place)
    found = []
    for package in map(importlib.import_module, ("qinit", "qinit_cli", "qinit_demo")):
        assert package.__file__.startswith(place), package.__file__
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not module.name.startswith("qinit_demo."):
                assert importlib.import_module(module.name).__file__.startswith(place)
                found.append(module.name)
    return found


def test_every_module_of_the_source_is_imported_from_it(wheel, tmp_path, forks):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    expected = (modules_of("qinit", "qinit") | modules_of("qinit_cli", "cli")) - {"qinit", "qinit_cli"}
    assert set(forks.call(imported, str(tmp_path))) == expected


def test_the_demo_model_is_in_it(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("qinit_demo/")}
    data = {"config.json", "model.safetensors", "tokenizer.json", "heldout.txt"}
    assert {f"qinit_demo/{name}" for name in data} <= names


def test_the_kinds_of_devices_that_were_measured_are_in_it(wheel):
    kinds = {file.relative_to(ROOT).as_posix() for file in (ROOT / "qinit/planner/kinds").iterdir()}
    assert "qinit/planner/kinds/h100.json" in kinds
    assert kinds <= set(zipfile.ZipFile(wheel).namelist())


def test_the_adapter_configurations_are_in_it(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("qinit_templates/")}
    assert {f"qinit_templates/{file.name}" for file in (ROOT / "model_zoo/adapters").glob("*.json")} <= names


def test_the_text_to_calibrate_on_is_in_wheel_and_source_distribution(wheel, source, tmp_path):
    folder = ROOT / "qinit/text/bundled"
    data = {file.relative_to(ROOT).as_posix() for file in folder.rglob("*.*") if file.suffix in (".txt", ".md")}
    assert {f"qinit/text/bundled/{name}" for name in ("books.txt", "SOURCES.md", "licenses/click.txt")} <= data
    assert data <= set(zipfile.ZipFile(wheel).namelist())
    command = [
        sys.executable,
        "-c",
        "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])",
    ]
    subprocess.run([*command, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (found,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(found) as archive:
        assert data <= {name.partition("/")[2] for name in archive.getnames()}
