"""The methods that `loss.name` may name: the one place to add one, with its file in this folder.

An entry tells what the method reads of the two networks, and the weight of its publication. Nothing is imported here,
so that a config can be checked without any loss.

Weights are those of the benchmark by the authors of CRD (arXiv 1910.10699), which the field's CIFAR-100 tables go back
to, and of the method's own paper where it is newer (DKD, DIST, ReviewKD). CC's is neither: the benchmark has another
formula under its name. The cross-entropy has weight 1 beside all of them but KD, which has 0.1. What was published for
a data set or a pair of networks (DKD's beta, temperatures, warm-up) are fields of LossConfig, which the recipes set.
Formulae, sources and what differs from them are told in each loss's own file. Formulae and constants of DKD and
ReviewKD were compared with their authors' code, DIST's formula too, CC's formula and constants with
re-implementations. Written from memory, and not checked against a source: CC's weight, and what DIST has for CIFAR-100
(2, 2 and temperature 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Method = Literal["mimkd", "kd", "fitnet", "at", "sp", "cc", "vid", "rkd", "pkt", "crd", "dkd", "dist", "review"]


@dataclass(frozen=True, kw_only=True)
class Published:
    """What is known of a rival before any network is."""

    loss: str
    """Its file in this folder and its class there. KD's is a function, and has no taps of its own."""
    fields: tuple[str, ...] = ()
    """Fields of LossConfig that its class takes, after the taps."""
    weight: float
    """Of its publication; `loss.rival_weight` multiplies it."""
    logits: bool = False
    """Reads the teacher's logits."""
    vectors: bool = False
    """Reads the pooled vectors of both networks."""
    maps: Literal["none", "second", "deepest", "all"] = "none"
    """Which stages it reads as maps, of those that both networks have, paired deepest with deepest."""
    warms_up: bool = False
    """Rises to its weight over the first epochs (`loss.rival_warmup`)."""
    one_class: bool = False
    """Needs images of one class each: it cannot be had with mixing."""
    fewest_classes: int = 1
    """Of the data; with fewer it compares nothing."""
    bank: bool = False
    """Keeps something of every training image from step to step: one lane only."""


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
"""In the order in which losses are added."""
