"""Seeds for random generators: a pure function of (seed, purpose, where), the same in every process.

Each use of random numbers has its own purpose, so that no two uses share a stream: the student's initialisation and the
dropout of a step never draw the same numbers, whatever the seeds of two runs.

Order, splits, mixing (data/order/random_numbers.py) and views (data/augment/views.py, batch_views.py) keep their own,
older formulae: changing them would invalidate existing caches and sample orders.
"""

from __future__ import annotations

import hashlib

from mimkd_ray.errors import UserError

SEEDS = 2**64
"""Number of seeds: a seed lies in 0..SEEDS - 1."""


def derive(seed: int, purpose: str, *where: int) -> int:
    """Return a 63-bit seed: a BLAKE2b digest of the purpose and the numbers, which never changes. About 1.5 us.

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
