"""`qinit doctor`: what is installed, on what machine, and what of qinit works there."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from qinit_cli.options import DEBUG

if TYPE_CHECKING:
    from qinit_cli.draw import Screen

    from qinit.doctor.devices import Device
    from qinit.doctor.examine import Row
    from qinit.doctor.hardware import Hardware
    from qinit.doctor.trainers import Misfit
    from qinit.requirements import Package

BROKEN = 1  # the exit code when qinit itself does not work


def doctor(
    json_output: Annotated[bool, typer.Option("--json", help="Everything as JSON on stdout, nothing else.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Nothing but the exit code.")] = False,
    debug: DEBUG = False,
) -> None:
    """Show versions and hardware, try every way of using qinit on a tiny model, and say how to get the rest.

    Takes about a minute. Exit code 0: qinit works, if not with everything. 1: it does not.
    """
    from qinit_cli.draw import Screen

    from qinit.doctor.hardware import hardware
    from qinit.doctor.probes import PROBES
    from qinit.requirements import packages, pip_command

    screen = Screen(quiet=quiet or json_output)
    here = hardware()
    installed = packages(need for probe in PROBES.values() for need in probe.needs)
    _draw(screen, here, installed)
    found = _devices(screen)
    trainers = _misfits()
    for each in trainers:
        screen.say(f"{each.trainer} {each.version} {'; '.join(each.problems)}")
        screen.say(f"  it trains from a run in an environment of its own: {'; '.join(each.commands)}")
    rows = _examined(screen)
    works = all(row.state == "works" for row in rows if row.core)
    unmet = [package.name for package in installed if not package.met]
    command = pip_command(unmet) if unmet else None
    if command:
        screen.say(f"to get all of it: {command}")
    screen.say("qinit works here" if works else "qinit does not work here")
    if json_output:
        value = {
            **{"python": platform.python_version(), "works": works, "pip": command, "machine": asdict(here)},
            "devices": [asdict(device) for device in found],
            "packages": [asdict(package) for package in installed],
            "trainers": [asdict(each) for each in trainers],
            "probes": [asdict(row) for row in rows],
        }
        sys.stdout.write(json.dumps(value) + "\n")
    if not works:
        raise typer.Exit(BROKEN)


def _devices(screen: Screen) -> list[Device]:
    """Draw the devices that torch sees, and return them; none where qinit cannot be imported."""
    from qinit_cli.draw import size

    if not _is_whole():
        return []
    from qinit.doctor.devices import devices, process_words

    found = devices()
    for device in found:
        taken = "; a run takes it" if device.used else ""
        screen.say(f"device {device.device}: {device.name}, {size(device.free)} of {size(device.memory)} free{taken}")
    screen.say(f"processes: {process_words(found)}")
    return found


def _is_whole() -> bool:
    from qinit.requirements import core, package

    return all(package(name).installed is not None for name in core())


def _misfits() -> list[Misfit]:
    """Return the trainers that do not fit what is here; none where qinit, which knows them, cannot be imported."""
    if not _is_whole():
        return []
    from qinit.doctor.trainers import misfits

    return misfits()


def _draw(screen: Screen, here: Hardware, installed: list[Package]) -> None:
    from qinit_cli.draw import size

    from qinit import __version__

    memory = {"": here.memory, " available": here.memory_available, " at most in this container": here.memory_limit}
    rows = [
        ("qinit", f"{__version__}, Python {platform.python_version()}, {here.system}"),
        ("processor", f"{here.cpu}, {here.cores} cores, {' '.join(here.features) or 'no features known'}"),
        ("memory", ", ".join(f"{size(value)}{what}" for what, value in memory.items() if value is not None)),
        *(("disk", f"{size(place.free)} free for {place.what} ({place.path})") for place in here.disks),
    ]
    screen.table("", "", rows=rows)
    screen.table("package", "installed", "asked for", "", rows=map(_package_words, installed))


def _package_words(package: Package) -> tuple[str, str, str, str]:
    remark = "not installed" if package.installed is None else "" if package.met else "out of range"
    purpose = f"for {package.extra}" if package.extra else "" if package.extra is not None else "optional"
    words = ", ".join(filter(None, (remark, purpose)))
    return package.name, package.installed or "-", package.required or "any", words


def _examined(screen: Screen) -> list[Row]:
    """Try everything, with a line for each as it comes; returns them in the order of the probes."""
    from qinit.doctor.examine import Row, examine
    from qinit.doctor.probes import PROBES

    rows: list[Row] = []
    width = max(len(probe.title) for probe in PROBES.values())
    with screen.progress(count=True) as progress:
        task = progress.add_task("starting", total=len(PROBES))
        for event in examine():
            if not isinstance(event, Row):
                progress.update(task, description=event.title)
                continue
            rows.append(event)
            progress.advance(task)
            line = f"{event.state:<6}  {event.title:<{width}}  {event.detail}"
            line += f", {event.seconds:.1f} s" if event.seconds else ""
            screen.say(f"{line}; {event.pip}" if event.pip else line)
    names = list(PROBES)
    return sorted(rows, key=lambda row: names.index(row.name))
