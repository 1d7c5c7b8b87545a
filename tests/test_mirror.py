"""Every module of qinit, command line and examples has a test file of its own, or stands here with the reason."""

from pathlib import Path

ROOT = Path(__file__).parent.parent

ELSEWHERE = {
    "cli/draw_compare.py": "what it draws is seen in tests/cli/test_compare.py",
    "cli/draw_eval.py": "what it draws is seen in tests/cli/test_eval.py",
    "cli/hush.py": "every command of tests/cli would show what it let through",
    "cli/options.py": "options that commands share; tests/cli gives them to the commands",
    "qinit/adapters/base.py": "an abstract class; tests/docs/test_extend.py adds a row to it",
    "qinit/calibration/kinds.py": "what layers write to is found out in tests/qinit/calibration/test_walk.py",
    "qinit/calibration/seen.py": "data alone",
    "qinit/compare/forecast.py": "one dry run of the command says it all: tests/cli/test_compare.py",
    "qinit/compare/measure.py": "loads and trains real starts, once for all tests of tests/cli/test_compare.py",
    "qinit/compare/stored.py": "a column of the table of tests/cli/test_compare.py",
    "qinit/doctor/probes.py": "tests/cli/test_doctor.py tries every probe",
    "qinit/events.py": "data alone",
    **{
        f"qinit/exports/{name}.py": "what is written is loaded by its readers in tests/qinit/exports/test_packed.py"
        for name in ("checkpoint", "compressed_tensors", "gptq", "words")
    },
    **{
        f"qinit/exports/{name}.py": "every form is read back in tests/qinit/verification/test_exported.py"
        for name in ("reread", "gguf/reading", "mlx/reading")
    },
    "qinit/exports/base.py": "an abstract class; tests/docs/test_extend.py adds a row to it",
    **{
        f"qinit/exports/{name}.py": "what it writes is read back in tests/qinit/exports/gguf/test_export.py"
        for name in ("lora", "gguf/families", "gguf/layout", "gguf/vocabulary")
    },
    "qinit/families/card.py": "tests/qinit/families/test_make.py carries out the lines that it gives",
    "qinit/families/table.py": "data alone; tests/qinit/families/test_make.py makes and trains every row",
    **{
        f"qinit/formats/{name}.py": "tests/qinit/formats/test_reader.py reads every form"
        for name in ("auto_round", "awq", "bitsandbytes", "compressed_tensors")
    },
    "qinit/grids/integer/block.py": "data, and memory that every search of the files beside it fills",
    "qinit/grids/integer/search_triton.py": "one process runs it and the file of test_rounding_triton.py beside it",
    "qinit/grids/integer/triton_steps.py": "runs inside of the kernels of the two files beside it, which are tested",
    "qinit/plan/limits.py": "data alone",
    "qinit/plan/parts.py": "data alone",
    **{
        f"qinit/servers/{name}.py": "data alone; tests/qinit/verification/test_serving.py holds directories against it"
        for name in ("base", "llama_cpp", "mlx", "transformers", "vllm")
    },
    **{
        f"qinit/{name}.py": "several processes carry out whole runs in tests/qinit/runner/test_several.py"
        for name in ("runner/dealt", "workplace/follower")
    },
    "qinit/workplace/decoded.py": "the store reads layers with it: tests/qinit/workplace/test_store.py",
    "qinit/solver/statistics.py": "data alone",
    "qinit/trial/asked.py": "data alone",
    "qinit/snndlft/base.py": "its errors are in test_training.py beside it, which trains on what it loads",
    "qinit/snndlft/course.py": "what a callback does: test_callback.py beside it",
    "qinit/snndlft/evaluation.py": "tests/cli/test_snndlft.py measures what it has trained",
    "qinit/stages/base.py": "an abstract class; tests/docs/test_extend.py adds a row to it",
    **{
        f"qinit/trainers/{name}.py": "tests/docs/test_trainers.py reads what it writes, tests/compat/trainers runs it"
        for name in ("axolotl", "llama_factory", "ms_swift", "transformers", "trl", "unsloth")
    },
    **{
        f"qinit/trainers/templates/{name}.py": "what it writes is read and run in test_base.py beside it"
        for name in ("axolotl", "llama_factory", "peft", "trl")
    },
    "qinit/trainers/mlx_lm.py": "data alone",
    "qinit/trainers/torchtune.py": "data alone",
}


def modules() -> list[str]:
    """Return the modules that do something, as paths from the root."""
    paths = (path for package in ("qinit", "cli", "examples") for path in (ROOT / package).rglob("*.py"))
    return sorted(path.relative_to(ROOT).as_posix() for path in paths if path.name != "__init__.py")


def has_its_tests(module: str) -> bool:
    path = Path(module)
    return (ROOT / "tests" / path.parent / f"test_{path.name}").exists()


def test_a_module_has_its_tests():
    """Those of qinit/a/b.py belong into tests/qinit/a/test_b.py."""
    assert [module for module in modules() if has_its_tests(module) == (module in ELSEWHERE)] == []


def test_what_has_its_tests_elsewhere_exists():
    assert set(ELSEWHERE) <= set(modules())
