"""The methods that `loss.name` may name: the one place to register one, beside its file in this folder.

An entry has the inputs of the method and its published weight. This module imports nothing of the package, so that a
config can be checked without any loss.

Weights are those of the benchmark by the authors of CRD (arXiv 1910.10699), on which published CIFAR-100 tables are
based, and of the method's own paper if it is newer (DKD, DIST, ReviewKD). CC's weight is from neither: the benchmark
has another formula under its name. The cross-entropy has weight 1 beside all of them except KD, which has 0.1. Values
that were published for a data set or a pair of networks (DKD's beta, temperatures, warm-up) are fields of LossConfig,
which the recipes set. Each loss's own file has its formula, its source and its differences from the source. Formulae
and constants of DKD and ReviewKD were compared with their authors' code, DIST's formula too, CC's formula and constants
with re-implementations. CC's weight and DIST's values for CIFAR-100 (2, 2 and temperature 4) were written from memory
and not checked against a source.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Method = Literal["mimkd", "kd", "fitnet", "at", "sp", "cc", "vid", "rkd", "pkt", "crd", "dkd", "dist", "review"]


@dataclass(frozen=True, kw_only=True)
class Published:
    """Properties of a rival that do not depend on the networks."""

    loss: str
    """File in this folder and class in it. KD's is a function and has no taps."""
    fields: tuple[str, ...] = ()
    """Fields of LossConfig that the class takes after the taps."""
    weight: float
    """Published weight; `loss.rival_weight` multiplies it."""
    logits: bool = False
    """True if it reads the teacher's logits."""
    vectors: bool = False
    """True if it reads the pooled vectors of both networks."""
    maps: Literal["none", "second", "deepest", "all"] = "none"
    """Stages that it reads as maps, of those that both networks have, paired from the deepest up."""
    warms_up: bool = False
    """True if its weight rises over the first epochs (`loss.rival_warmup`)."""
    one_class: bool = False
    """True if it needs images of one class each and so cannot be used with mixing."""
    fewest_classes: int = 1
    """Smallest number of classes of the data; with fewer it compares nothing."""
    bank: bool = False
    """True if it keeps data of every training image from step to step; it then needs a single lane."""


KD_CE_WEIGHT = 0.1
"""Weight of the cross-entropy beside KD alone."""

RIVALS: dict[Method, Published] = {
    "kd": Published(loss="kd:kd_loss", weight=0.9, logits=True),
    "fitnet": Published(loss="fitnet:FitNet", weight=100.0, maps="second"),
    "at": Published(loss="at:AT", weight=1000.0, maps="all"),
    "sp": Published(loss="sp:SP", weight=3000.0, maps="deepest"),
    "cc": Published(loss="cc:CC", weight=100.0, vectors=True),
    "vid": Published(loss="vid:VID", weight=1.0, maps="all"),
    "rkd": Published(loss="rkd:RKD", weight=1.0, vectors=True),
    "pkt": Published(loss="pkt:PKT", weight=30_000.0, vectors=True),
    "crd": Published(loss="crd:CRD", weight=0.8, vectors=True, one_class=True, bank=True),
    "dkd": Published(
        loss="dkd:DKD",
        fields=("dkd_beta", "dkd_temperature"),
        weight=1.0,
        logits=True,
        warms_up=True,
        one_class=True,
        fewest_classes=2,
    ),
    "dist": Published(loss="dist:DIST", fields=("dist_temperature",), weight=1.0, logits=True),
    "review": Published(loss="review:ReviewKD", weight=1.0, vectors=True, maps="all", warms_up=True),
}
"""Rivals in the order in which their losses are added."""
