"""Seeds for torch's generators: a stable function, and any 64-bit seed trains."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_run import run_tiny, tiny_config

from mimkd_ray.config import CompareConfig
from mimkd_ray.errors import UserError
from mimkd_ray.seeds import SEEDS, derive


def test_a_derived_seed_is_a_digest_of_its_arguments_for_ever() -> None:
    """Checked against a digest that is packed otherwise, and against numbers that were written down."""
    packed = b"lane\0" + struct.pack("<3Q", 2**64 - 1, 7, 3)
    expected = int(hashlib.blake2b(packed, digest_size=8).digest()[::-1].hex(), 16) // 2
    assert derive(2**64 - 1, "lane", 7, 3) == expected
    assert [derive(0, "student"), derive(0, "lane", 1, 0), derive(2**63, "teacher")] == [
        8488285459457098395,
        6374638614484383711,
        3635939768864121029,
    ]


def test_seeds_purposes_and_places_give_unrelated_numbers() -> None:
    """Neighbouring arguments share no number, and none of the low 32 bits that torch's CPU generator uses."""
    found = [
        derive(seed, purpose, *where)
        for seed in (0, 1, 2, 2**32, 2**63)
        for purpose in ("lane", "student", "critics")
        for where in ((), (0,), (1,), (0, 0), (0, 1), (1, 0), (2**32, 0), (0, 2**32))
    ]
    assert all(0 <= number < 2**63 for number in found)
    assert len({number % 2**32 for number in found}) == len(found) == 120
    share = sum(bin(number).count("1") for number in found) / (63 * len(found))
    assert share == pytest.approx(0.5, abs=0.03)  # six standard deviations


@pytest.mark.parametrize("number", [-1, SEEDS])
def test_what_is_no_64_bit_number_is_refused(number: int) -> None:
    with pytest.raises(OverflowError):
        derive(number, "lane", 0)
    with pytest.raises(OverflowError):
        derive(0, "lane", number)
    with pytest.raises(UserError, match=rf"train\.seed is {number}: give a number from 0 to 18446744073709551615"):
        tiny_config(train={"seed": number})


def test_a_comparison_that_counts_past_the_last_seed_is_refused() -> None:
    last = replace(tiny_config(train={"seed": SEEDS - 2}), compare=CompareConfig(seeds=2))
    with pytest.raises(UserError, match=r"compare\.seeds 3 counts up from train\.seed 18446744073709551614"):
        replace(last, compare=CompareConfig(seeds=3))


@pytest.mark.parametrize("seed", [5_000_000_000, 2**63, SEEDS - 1])
def test_any_64_bit_seed_trains(tmp_path: Path, seed: int) -> None:
    """Two steps with views, mixing and all terms of the loss."""
    result = run_tiny(
        tmp_path,
        data={"pipeline": "cifar", "views": 2},
        mix={"mixup_alpha": 0.2, "cutmix_alpha": 1.0},
        train={"seed": seed, "max_steps": 2, "ema_decay": 0.9},
    )
    assert (result["seed"], result["steps"]) == (seed, 2)
    assert (tmp_path / "student.safetensors").stat().st_size > 1000
