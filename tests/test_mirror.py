"""Every module of qinit and of the command line has a test file of its own, or stands here with the reason."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ELSEWHERE = {
    "cli/draw_compare.py": "what it draws is seen in tests/cli/test_compare.py",
    "cli/draw_eval.py": "what it draws is seen in tests/cli/test_eval.py",
    "cli/hush.py": "every command of tests/cli would show what it let through",
    "cli/options.py": "options that commands share; tests/cli gives them to the commands",
    "qinit/adapters/base.py": "an abstract class; tests/docs/test_extend.py adds a row to it",
    "qinit/compare/forecast.py": "one dry run of the command says it all: tests/cli/test_compare.py",
    "qinit/compare/measure.py": "loads and trains real starts, once for all tests of tests/cli/test_compare.py",
    "qinit/doctor/probes.py": "each probe is a part of tests/qinit/doctor/test_examine.py",
    "qinit/events.py": "data alone",
    "qinit/exports/base.py": "an abstract class; tests/docs/test_extend.py adds a row to it",
    **{
        f"qinit/exports/{name}.py": "what it writes is read back in tests/qinit/exports/gguf/test_export.py"
        for name in ("lora", "gguf/families", "gguf/layout", "gguf/vocabulary")
    },
    "qinit/grids/integer/block.py": "data alone",
    "qinit/plan/limits.py": "data alone",
    "qinit/solver/statistics.py": "data alone",
    "qinit/trial/asked.py": "data alone",
    "qinit/stages/base.py": "an abstract class; tests/docs/test_extend.py adds a row to it",
    **{
        f"qinit/trainers/{name}.py": "tests/docs/test_trainers.py reads what it writes, tests/compat/trainers runs it"
        for name in ("axolotl", "llama_factory", "ms_swift", "transformers", "trl", "unsloth")
    },
    "qinit/trainers/mlx_lm.py": "data alone",
    "qinit/trainers/torchtune.py": "data alone",
}


def modules() -> list[str]:
    """Return the modules that do something, as paths from the root."""
    paths = (path for package in ("qinit", "cli") for path in (ROOT / package).rglob("*.py"))
    return sorted(path.relative_to(ROOT).as_posix() for path in paths if path.name != "__init__.py")


@pytest.mark.parametrize("module", modules())
def test_a_module_has_its_tests(module):
    path = Path(module)
    mirrored = (ROOT / "tests" / path.parent / f"test_{path.name}").exists()
    assert mirrored != (module in ELSEWHERE), f"{module}: its tests belong into tests/{path.parent}/test_{path.name}"


def test_what_has_its_tests_elsewhere_exists():
    assert set(ELSEWHERE) <= set(modules())
