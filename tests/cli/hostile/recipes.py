"""Recipes."""

from __future__ import annotations

from tests.cli.hostile.world import EQFT, PLAN, add, at, device, fifo, folder, loop, text

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
)


MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 30))


WITH_RECIPE = ("--recipe", "recipe.yaml")


for name, content, says in (
    ("Python tag", b"!!python/object/apply:os.system ['touch ran']", "not valid YAML (could not determine a construct"),
    ("Python tag in a value", b"model: !!python/name:os.system", "not valid YAML (could not determine a construct"),
    ("a billion laughs", LAUGHS.encode(), "line 1: 'a0' is an anchor or alias; write the value itself"),
    ("a billion merges", MERGES.encode(), "line 1: 'a0' is an anchor or alias"),
    ("holds itself", b"bits: &a [*a]", "line 1: 'a' is an anchor or alias"),
    ("a key twice", b"bits: 2\nbits: 3\n", "'bits' stands there twice"),
    ("deep nesting", b"bits: " + b"[" * 5_000, "nested too deeply"),
    ("a date", b"revision: 2024-01-02", "revision: input should be a valid string"),
    ("a date that is none", b"revision: 2024-13-45", "not valid YAML (month must be in 1..12)"),
    ("a tag that does not fit", b"act_order: !!bool maybe", "not valid YAML (a value does not fit its tag)"),
    ("keys that are numbers", b"1: 2", "unknown recipe key '1'"),
    ("keys that are lists", b"? [a]\n: 1\n", "not valid YAML (while constructing a mapping"),
    ("two documents", b"bits: 2\n---\nbits: 3\n", "not valid YAML (expected a single document"),
    ("a list", b"- bits", "expected `option: value` lines, found list"),
    ("empty", b"", "expected `option: value` lines, found NoneType"),
    ("not UTF-8", b"model: \xff", "not valid YAML ('utf-8' codec can't decode"),
    ("NUL", b"model: \0", "not valid YAML (unacceptable character #x0000"),
    ("number of 5000 digits", b"rank: " + b"9" * 5000, "not valid YAML (Exceeds the limit (4300 digits)"),
    ("rank of 10^30", b"rank: " + b"1" + b"0" * 30, "rank: input should be less than or equal to 16777216"),
    ("seed of 10^30", b"seed: " + b"1" + b"0" * 30, "seed: input should be less than 9223372036854775808"),
    ("samples of 10^12", b"calibration: random\ncalibration_samples: 1" + b"0" * 12, "calibration_samples: input shou"),
    ("samples of 10^7", b"calibration: random\ncalibration_samples: 10000000", "5120000000 tokens in all, at most"),
    ("lora_alpha of 1e-300", b"lora_alpha: 1.0e-300", "lora_alpha: expected at least 1e-9"),
    ("lora_alpha NaN", b"lora_alpha: .nan", "lora_alpha: input should be a finite number"),
    ("bits true", b"bits: true", "bits: "),
    ("a very long value", b"format: " + b"x" * 200_000, "format: no 'xxxx"),
    ("a value that clears the screen", b'format: "\\e[2J"', "format: no '\\x1b[2J'"),
    ("a very long key", b"x" * 100 + b": 1\n? " + b"y" * 200_000 + b"\n: 1", "unknown recipe key 'xxx"),
    ("trusts code", b"trust_remote_code: true", "so only the command line can give it, as --trust-remote-code"),
    ("shard of 0", b"max_shard_size: 0GB", "max_shard_size: expected a size like 5GB"),
    ("device of a path", b"device: ../../dev/null", "device: expected auto, cpu, cuda or cuda:N"),
    ("expression without end", b"target_modules: '('", "no valid regular expression"),
    ("300 kB", b"# " + b"x" * 300_000, "has 0.3 MB, at most 0.3 MB are read"),
    ("text with a NUL in its name", b'calibration: "a\\0b"', "no such file"),
):  # fmt: skip
    add(f"recipe: {name}", says, text("recipe.yaml", content), (*PLAN, *WITH_RECIPE), (*EQFT, *WITH_RECIPE))


for name, make, says in (
    ("pipe", fifo, "recipe.yaml: cannot be read (not a regular file)"),
    ("folder", folder, "recipe.yaml: cannot be read (Is a directory)"),
    ("link to itself", loop, "recipe.yaml: cannot be read (Too many levels of symbolic links)"),
    ("endless device", device, "recipe.yaml: cannot be read (not a regular file)"),
):
    add(f"recipe: {name}", says, at("recipe.yaml", make), (*PLAN, *WITH_RECIPE), (*EQFT, *WITH_RECIPE))


for name, model, says in (
    ("NUL", '"a\\0b"', "no such directory, and no Hub id"),
    ("device", "/dev/zero", "no such directory, and no Hub id"),
    ("escape", '"\\e]0;owned\\a"', "\\x1b]0;owned\\x07: no such directory"),
    ("10000 characters", "x" * 10_000, "cannot be looked at (File name too long)"),
    ("traversal", "../../x", "no such directory, and no Hub id"),
):
    add(
        *(f"model: {name}", says, text("recipe.yaml", f"model: {model}".encode())),
        *(("plan", *WITH_RECIPE), ("eqft", *WITH_RECIPE, "--out", "out")),
    )


add("model: revision that leaves", "no branch, tag or commit is named so", text("x", b""),
    ("plan", "someone/model", "--revision", "../../../x"),
    ("eqft", "someone/model", "--revision", "../../../x", "--out", "out"))  # fmt: skip
