"""The rivals of MIMKD, built by name. What each reads and weighs is told in methods.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mimkd_ray.losses.cc import CC
from mimkd_ray.losses.dist import DIST
from mimkd_ray.losses.dkd import DKD
from mimkd_ray.losses.methods import Method
from mimkd_ray.losses.pkt import PKT
from mimkd_ray.losses.rival import Rival, RivalTaps
from mimkd_ray.losses.rkd import RKD


class RivalPlan(NamedTuple):
    """A rival and the taps that it reads."""

    method: Method
    taps: RivalTaps


_BUILDERS: dict[Method, Callable[[RivalTaps], Rival]] = {
    "cc": CC,
    "rkd": RKD,
    "pkt": PKT,
    "dkd": DKD,
    "dist": DIST,
}


def build_rival(plan: RivalPlan) -> Rival:
    """Build the loss of a plan. Its parameters are drawn from torch's generator."""
    return _BUILDERS[plan.method](plan.taps)
