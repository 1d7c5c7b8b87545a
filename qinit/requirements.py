"""What pyproject.toml requires, read from the installed metadata, and what of it is there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import metadata

from packaging.requirements import Requirement

DEVELOPMENT = "dev"  # the extra that pins versions for the tests; it asks nothing of a user


@dataclass(frozen=True)
class Package:
    """A package that qinit uses: the range that it asks for ("": any), for which extra ("": qinit itself; None: none of
    them, it only is tried), the version that is installed, and whether that is in the range."""

    name: str
    required: str
    extra: str | None
    installed: str | None
    met: bool


def package(name: str) -> Package:
    """Look one package up."""
    found = _requirements().get(name)
    extra = found[0] if found else None
    clauses = found[1].specifier if found and extra != DEVELOPMENT else Requirement(name).specifier
    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:
        installed = None
    met = installed is not None and clauses.contains(installed, prereleases=True)
    required = ",".join(sorted(map(str, clauses), reverse=True))  # >= before <
    return Package(name, required, None if extra == DEVELOPMENT else extra, installed, met)


def packages(others: Iterable[str] = ()) -> list[Package]:
    """Return what qinit and its extras require, then `others`."""
    mine = [name for name, (extra, _) in _requirements().items() if extra != DEVELOPMENT]
    return [package(name) for name in dict.fromkeys((*mine, *others))]


def core() -> tuple[str, ...]:
    """Return the names of the packages that qinit cannot do without."""
    return tuple(name for name, (extra, _) in _requirements().items() if not extra)


def pip_command(names: Iterable[str]) -> str:
    """Return the command that installs these packages in the ranges that are asked for."""
    wanted = [package(name) for name in dict.fromkeys(names)]
    return " ".join(["pip install", *(f'"{each.name}{each.required}"' for each in wanted)])


@cache
def _requirements() -> dict[str, tuple[str, Requirement]]:
    """Return each required package with the extra that asks for it; the development extra only where no other does."""
    found: dict[str, tuple[str, Requirement]] = {}
    for line in metadata.requires("qinit") or ():
        requirement = Requirement(line)
        extra = str(requirement.marker).partition('extra == "')[2].partition('"')[0]
        if requirement.name not in found or found[requirement.name][0] == DEVELOPMENT:
            found[requirement.name] = (extra, requirement)
    return found
