"""The rivals of MIMKD, built by name. What each reads and weighs is told in methods.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mimkd_ray.losses.methods.at import AT
from mimkd_ray.losses.methods.base import Rival, RivalTaps
from mimkd_ray.losses.methods.cc import CC
from mimkd_ray.losses.methods.crd import CRD, TrainingRows
from mimkd_ray.losses.methods.dist import DIST
from mimkd_ray.losses.methods.dkd import DKD
from mimkd_ray.losses.methods.fitnet import FitNet
from mimkd_ray.losses.methods.pkt import PKT
from mimkd_ray.losses.methods.registry import Method
from mimkd_ray.losses.methods.review import ReviewKD
from mimkd_ray.losses.methods.rkd import RKD
from mimkd_ray.losses.methods.sp import SP
from mimkd_ray.losses.methods.vid import VID


class RivalPlan(NamedTuple):
    """A rival and the taps that it reads."""

    method: Method
    taps: RivalTaps


_BUILDERS: dict[Method, Callable[[RivalTaps], Rival]] = {
    "fitnet": FitNet,
    "at": AT,
    "sp": SP,
    "cc": CC,
    "vid": VID,
    "rkd": RKD,
    "pkt": PKT,
    "dkd": DKD,
    "dist": DIST,
    "review": ReviewKD,
}


def build_rival(plan: RivalPlan, rows: TrainingRows | None = None) -> Rival:
    """Build the loss of a plan. Its parameters are drawn from torch's generator. ``rows``: of the training set, for a
    rival with a bank."""
    if plan.method == "crd":
        assert rows is not None, "CRD's banks need the ids and labels of the training images"
        return CRD(plan.taps, rows)
    return _BUILDERS[plan.method](plan.taps)
