"""Seeds for random generators: a pure function of (seed, purpose, where), the same in every process.

Each use of random numbers has a purpose of its own, so that no two of them meet: the student's start and the dropout of
some step never draw from one stream, whatever the seeds of two runs.

Order, splits, mixing (data/keyed.py) and views (data/views.py, data/batch_views.py) have formulae of their own, which
are older and stay: with another one, caches and orders that exist would no longer be those of their runs.
"""

from __future__ import annotations

import hashlib

from mimkd_ray.errors import UserError

SEEDS = 2**64
"""A seed is a number from 0 to SEEDS - 1."""


def derive(seed: int, purpose: str, *where: int) -> int:
    """Return a 63-bit seed: a BLAKE2b digest of the purpose and the numbers, fixed for ever. About 1.5 us.

    Its low 32 bits are as well mixed as the others; torch's CPU generator uses only those. Raises OverflowError for a
    number outside 0..SEEDS - 1.
    """
    numbers = b"".join(number.to_bytes(8, "little") for number in (seed, *where))
    digest = hashlib.blake2b(purpose.encode() + b"\0" + numbers, digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def check_seed(name: str, seed: int) -> None:
    """Raise UserError if ``seed``, the value of the config field ``name``, is not a 64-bit number."""
    if not 0 <= seed < SEEDS:
        raise UserError(f"{name} is {seed}: give a number from 0 to {SEEDS - 1}")
