"""What pyproject.toml asks for, against a made-up installation."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from qinit import requirements
from qinit.requirements import core, package, packages, pip_command


@pytest.fixture
def installed(monkeypatch):
    """Return the dictionary of what is installed, to be filled."""
    versions: dict[str, str] = {}

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(requirements.metadata, "version", version)
    return versions


def test_the_ranges_are_those_of_pyproject():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    known = {each.name: each for each in packages()}
    for extra, lines in {"": project["dependencies"], **project["optional-dependencies"]}.items():
        for requirement in map(Requirement, lines if extra != "dev" else ()):
            again = extra and requirement.name in core()  # an extra may need a later one
            if requirement.name in known and not again:  # what was installed may be older than the file
                assert Requirement(f"{requirement.name}{known[requirement.name].required}") == requirement
                assert known[requirement.name].extra == extra
    assert {"torch", "peft", "typer"} < set(core())
    assert not {"gptqmodel", "pytest", "matplotlib"} & set(core())
    assert "pytest" not in known


@pytest.mark.parametrize(
    ("version", "met"), [("7.5.9", False), ("7.6.0", True), ("7.6.1rc1", True), ("7.7", False), (None, False)]
)
def test_a_version_is_held_against_the_range(installed, version, met):
    if version:
        installed["gptqmodel"] = version
    found = package("gptqmodel")
    assert (found.required, found.extra, found.installed, found.met) == (">=7.6,<7.7", "gptq", version, met)


def test_what_only_the_tests_pin_may_have_any_version(installed):
    installed["bitsandbytes"] = "0.1"
    found = package("bitsandbytes")
    assert (found.required, found.extra, found.met) == ("", None, True)


def test_others_come_last_and_once(installed):
    names = [each.name for each in packages(["trl", "optimum", "trl"])]
    assert names[-1] == "trl"
    assert names.count("optimum") == names.count("trl") == 1


def test_the_command_has_the_ranges_each_package_once():
    command = pip_command(["gptqmodel", "optimum", "gptqmodel", "trl"])
    assert command == 'pip install "gptqmodel>=7.6,<7.7" "optimum>=2.3" "trl"'
