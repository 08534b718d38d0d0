"""The errors that a user can act on, and words of messages. Each names the thing, the numbers and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: a path, name, shape, count or flag. Entry points print it as one line and exit with 2."""


class DamagedDataError(Exception):
    """More images could not be decoded than the configuration allows. The message names some of them."""


class NonFiniteLossError(Exception):
    """The loss became NaN or infinite. The message names the step, the terms and the sample ids."""


class MemberMemoryError(Exception):
    """One student of a pack ran out of memory; the others go on. The message names the step and the allocator's
    message."""


class Interrupted(Exception):
    """The job was asked to stop, has saved its state and has ended. The message names the step; the same command
    resumes it."""


LOST_LOADER = "DataLoader worker"
"""Part of PyTorch's message, a RuntimeError, about a loader process that was killed."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Return "; did you mean 'a', 'b'?" for the closest known names, or "" when none is close."""
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(map(repr, close))}?" if close else ""


def count(number: float, noun: str, nouns: str = "") -> str:
    """Return "1 worker", "2 workers", "1,000 workers"; ``nouns`` where an s will not do."""
    many = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{many} {noun if number == 1 else nouns or noun + 's'}"


def listed(names: Iterable[str], limit: int = 3) -> str:
    """Return "a, b, c and 4 more"."""
    found = list(names)
    return ", ".join(found[:limit]) + (f" and {len(found) - limit:,} more" if len(found) > limit else "")
