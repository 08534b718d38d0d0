"""The rivals of MIMKD, built by name. What each reads and weighs is told in methods.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mimkd_ray.losses.at import AT
from mimkd_ray.losses.cc import CC
from mimkd_ray.losses.config import LossConfig
from mimkd_ray.losses.crd import CRD, TrainingRows
from mimkd_ray.losses.dist import DIST
from mimkd_ray.losses.dkd import DKD
from mimkd_ray.losses.fitnet import FitNet
from mimkd_ray.losses.methods import Method
from mimkd_ray.losses.pkt import PKT
from mimkd_ray.losses.review import ReviewKD
from mimkd_ray.losses.rival import Rival, RivalTaps
from mimkd_ray.losses.rkd import RKD
from mimkd_ray.losses.sp import SP
from mimkd_ray.losses.vid import VID


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
    "review": ReviewKD,
}


def build_rival(plan: RivalPlan, config: LossConfig, rows: TrainingRows | None = None) -> Rival:
    """Build the loss of a plan with the constants of ``config``. Its parameters are drawn from torch's generator.
    ``rows``: of the training set, for a rival with a bank."""
    if plan.method == "crd":
        assert rows is not None, "CRD's banks need the ids and labels of the training images"
        return CRD(plan.taps, rows)
    if plan.method == "dkd":
        return DKD(plan.taps, config.dkd_beta, config.dkd_temperature)
    if plan.method == "dist":
        return DIST(plan.taps, config.dist_temperature)
    return _BUILDERS[plan.method](plan.taps)
