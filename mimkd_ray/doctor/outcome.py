"""Result of a check, as a line for people and as JSON for programs."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Literal

Status = Literal["pass", "warn", "fail"]

_SECRET_NAME = re.compile("SECRET|TOKEN|PASSWORD|CREDENTIAL", re.IGNORECASE)
_SECRET_LENGTH = 8  # shorter values are not secrets and may be parts of ordinary words
_USER_INFO = re.compile(r"(?<=://)[^/@\s]+@")
_SIGNATURE = re.compile(r"(?i)(signature|credential|security-token)=[^&\s\"']+")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One check on one node, or of all nodes together."""

    check: str
    """Name of the check: versions, gpus, all-reduce, storage, disk, decode, memory, clock, authentication, links,
    nodes."""
    status: Status
    """warn: the job would run, slower or less safely; fail: it would not run, or not as requested."""
    text: str
    """Findings with their figures."""
    node: str = ""
    """The node's address; empty for a check of all nodes together."""
    remedy: str = ""
    """Remedy; empty for a pass."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """The figures of `text`, by name and unit."""
    speed: float = 0.0
    """Number that orders nodes, the slowest first."""

    def line(self) -> str:
        """Return the line "fail  disk [10.0.0.1]: 0.5 GB free; remedy", without secrets."""
        where = f" [{self.node}]" if self.node else ""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.status}  {self.check}{where}: {' '.join(redacted(self.text + remedy).split())}"


def lines(outcomes: Sequence[Outcome]) -> list[str]:
    """Return one line per check: nodes that pass share a line with the figures of the slowest; every other node has its
    own."""
    shown = []
    for _, group in groupby(outcomes, key=lambda outcome: outcome.check):
        found = list(group)
        passed = [outcome for outcome in found if outcome.status == "pass"]
        if len(passed) > 1:
            slowest = min(passed, key=lambda outcome: outcome.speed)
            text = f"{len(passed)} times; the slowest, {slowest.node}: {slowest.text}"
            passed = [replace(slowest, node="", text=text)]
        shown += [outcome.line() for outcome in [*passed, *(one for one in found if one.status != "pass")]]
    return shown


def redacted(text: str) -> str:
    """Return `text` without secrets of this process's environment and without passwords and signatures in URLs."""
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= _SECRET_LENGTH:
            text = text.replace(value, "***")
    return _SIGNATURE.sub(r"\1=***", _USER_INFO.sub("***@", text))
