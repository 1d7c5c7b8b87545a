from importlib import metadata

import pytest

from qinit.doctor import trainers


@pytest.fixture
def installed(monkeypatch):
    """Return a function that makes these packages all that is installed, with what they require."""

    def install(versions, requires):
        def version(name):
            if name not in versions:
                raise metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(trainers.metadata, "version", version)
        monkeypatch.setattr(trainers.metadata, "requires", requires.get)

    return install


PINS = ["peft<=0.18.1,>=0.18.0", "numpy", 'deepspeed<0.17; extra == "deepspeed"', "transformers<=5.6.0"]


def test_a_trainer_beside_what_its_pins_exclude_is_told_with_the_commands_that_work(installed):
    here = {"llamafactory": "0.9.5", "peft": "0.21.2", "numpy": "2.2.6", "torchao": "0.18.0", "deepspeed": "0.18"}
    installed(here, {"llamafactory": PINS})
    (misfit,) = trainers.misfits()
    assert (misfit.trainer, misfit.version) == ("llamafactory", "0.9.5")
    asked, broken = misfit.problems
    assert asked == "asks for peft<=0.18.1,>=0.18.0, 0.21.2 is installed"
    assert broken.startswith("torchao 0.18.0 is installed: peft 0.18 ")
    assert misfit.commands[0] == "pip install llamafactory==0.9.5"
    assert "--no-deps gptqmodel==7.0.0 torchao==0.16.0" in misfit.commands[1]


def test_what_fits_or_is_not_there_is_not_told(installed):
    installed({"llamafactory": "0.9.5", "peft": "0.18.1", "torchao": "0.16.0"}, {"llamafactory": PINS})
    assert trainers.misfits() == []
    installed({"peft": "0.21.2"}, {"llamafactory": PINS})
    assert trainers.misfits() == []
