"""Hashes: every file, every flipped bit."""

from __future__ import annotations

import random

import pytest

from qinit.files.manifest import MANIFEST_NAME, listed, refresh
from qinit.verification.files import check_files
from qinit.verification.findings import Finding
from tests.qinit.verification.runs import KINDS, problems

EACH_BYTE = 240  # of files up to this size every byte is hit, of larger ones so many places / 4
FLIPS = EACH_BYTE // 4


def places(size: int, rng: random.Random) -> list[int]:
    return list(range(size)) if size <= EACH_BYTE else [0, size - 1, *(rng.randrange(size) for _ in range(FLIPS))]


def grave(directory):
    return [each for each in check_files(directory) if isinstance(each, Finding) and each.grave]


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_flipped_bit_in_any_file_is_found_and_the_file_named(kind, copy_of):
    _, run = copy_of(kind)
    rng, tried = random.Random(kind), 0
    for name in [*listed(run), MANIFEST_NAME]:
        file = run / name
        sound = file.read_bytes()
        for place in places(len(sound), rng):
            bit = 1 << rng.randrange(8)
            with file.open("r+b") as handle:
                handle.seek(place)
                handle.write(bytes([sound[place] ^ bit]))
            assert [each.file for each in grave(run)] == [name], f"{name}: byte {place}, bit {bit}"
            with file.open("r+b") as handle:
                handle.seek(place)
                handle.write(sound[place : place + 1])
            tried += 1
    assert tried > 300
    assert not grave(run)


def test_every_bit_of_every_byte_of_the_list_is_watched(copy_of):
    _, run = copy_of("gptq")
    file = run / MANIFEST_NAME
    sound = file.read_bytes()
    for place in random.Random(0).sample(range(len(sound)), 60):
        for bit in range(8):
            file.write_bytes(sound[:place] + bytes([sound[place] ^ 1 << bit]) + sound[place + 1 :])
            assert [each.file for each in grave(run)] == [MANIFEST_NAME], (place, bit)


def test_a_file_that_is_missing_is_named_and_one_that_is_not_listed_too(copy_of):
    _, run = copy_of("gptq")
    (run / "README.md").unlink()
    (run / "eqft_init" / "stray.txt").write_text("hello")
    (run / ".hidden").write_text("not ours")
    found = [each for each in check_files(run) if isinstance(each, Finding)]
    assert [(each.file, each.grave) for each in found] == [("README.md", True), ("eqft_init/stray.txt", False)]
    assert str(found[0]) == f"README.md: is missing, but {MANIFEST_NAME} lists it"


def test_without_a_list_the_rest_is_checked_all_the_same(copy_of):
    source, run = copy_of("gptq")
    (run / MANIFEST_NAME).unlink()
    (found,) = check_files(run)
    assert not found.grave
    assert "no hash can be checked" in str(found)
    assert not problems(run, source)


def test_a_list_that_leads_out_of_the_directory_is_not_followed(copy_of, tmp_path):
    _, run = copy_of("gptq")
    (tmp_path / "secret").write_text("x")
    refresh(run, ["../secret"])
    (found,) = grave(run)
    assert found.file in ("../secret", MANIFEST_NAME)
    assert "SHA-256" not in str(found)
