"""A file that was loaded back: how far its logits are from the student's on real images, and how fast it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mimkd_ray.export.deployed import Deployed
from mimkd_ray.export.images import Images
from mimkd_ray.export.runners import Runner, latency_ms, logits_of_all

TOLERANCE = 1e-3
"""Largest difference of a logit between the student and a file at float32."""

SMALLER = 3.0
"""How many times smaller int8 is to be than float32."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What was measured of one file, or of the student itself."""

    bytes: int
    max_logit_difference: float
    agreement: float
    """Percent of the images with the student's top-1."""
    top1: float | None
    """Percent, by the labels; None without any."""
    latency_ms: dict[str, float]
    """Median of a call, by batch size."""
    right_N: Tensor = field(repr=False, compare=False)
    """Which images have the right top-1; without labels, the student's."""

    @property
    def right(self) -> float:
        """Percent of the images with the right top-1."""
        return _percent(self.right_N)

    def as_json(self) -> dict[str, Any]:
        """Return the figures without those of each image."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "right_N"}


@dataclass(frozen=True, eq=False)
class Comparison:
    """The student's answers on the held-out images, with which files are compared."""

    network: Deployed
    images: Images
    logits_NC: Tensor
    threads: int

    @classmethod
    def of(cls, network: Deployed, images: Images, threads: int) -> Comparison:
        """Run the student on all images."""
        return cls(network, images, logits_of_all(network, images.batches(network)), threads)

    def student(self, size: int) -> Figures:
        """Return the figures of the student itself, whose weights take `size` bytes."""
        return self._figures(self.network, self.logits_NC, size)

    def examine(self, run: Runner, path: Path) -> Figures:
        """Return the figures of a file that `run` was loaded from."""
        return self._figures(run, logits_of_all(run, self.images.batches(self.network)), bytes_at(path))

    def _figures(self, run: Runner, logits_NC: Tensor, size: int) -> Figures:
        best_N, own_N, labels_N = logits_NC.argmax(1), self.logits_NC.argmax(1), self.images.labels_N
        judged = bool((labels_N >= 0).any())
        right_N = best_N == (labels_N if judged else own_N)
        few = self.network.inputs(self.images.pixels_NCHW[:32])
        return Figures(
            bytes=size,
            max_logit_difference=float((logits_NC - self.logits_NC).abs().max()),
            agreement=_percent(best_N == own_N),
            top1=_percent(right_N) if judged else None,
            latency_ms=latency_ms(run, few, self.threads),
            right_N=right_N,
        )


def top1_text(figures: Mapping[str, Any]) -> str:
    """Return the top-1 in percent of figures as export.json has them; "-" where it is not known."""
    return "-" if figures["top1"] is None else f"{figures['top1']:.2f}"


def bytes_at(path: Path) -> int:
    """Return the size of a file, or of all files of a folder."""
    return sum(each.stat().st_size for each in (path, *path.rglob("*")) if each.is_file())


def fault_at_float32(figures: Figures) -> str:
    """Return what is wrong with a file that is to give the student's own logits; "" for nothing."""
    if figures.max_logit_difference <= TOLERANCE and figures.agreement == 100:  # NaN is not
        return ""
    return (
        f"its logits differ from the student's by up to {figures.max_logit_difference:.3g} (at most {TOLERANCE:g} is "
        f"allowed) and its top-1 agrees on {figures.agreement:.2f} % of the images"
    )


def fault_of_int8(figures: Figures, student: Figures, allowed: float) -> str:
    """Return what is wrong with an int8 file; "" for nothing."""
    lost = student.right - figures.right
    if lost <= allowed:
        return ""
    what = "its top-1 is" if figures.top1 is not None else "without labels, it agrees with the student on"
    return (
        f"{what} {figures.right:.2f} % on these images, {lost:.2f} points below the student's {student.right:.2f} "
        f"% ({allowed:g} are allowed): calibrate on more images with --calibration, or allow more with --int8-drop"
    )


def no_better_than_chance(figures: Figures, classes: int) -> str:
    """Return that the top-1 is within two standard errors of chance, or below; "" if it is above or not known."""
    count, chance = len(figures.right_N), 1 / classes
    expected = count * chance
    above = int(figures.right_N.sum()) > expected + 2 * math.sqrt(expected * (1 - chance))
    if figures.top1 is None or above or classes == 1:  # one class is always right
        return ""
    return (
        f"the student's top-1, {figures.top1:.2f} % of {count:,} images, is that of chance ({100 * chance:.2f} % with "
        f"{classes:,} classes): its weights are untrained, or its classes are others or in another order"
    )


def too_little_of_int8(figures: Figures, student: Figures, float32_ms: float) -> str:
    """Return in what an int8 file gains too little over float32; "" for nothing."""
    milliseconds, smaller = figures.latency_ms["1"], student.bytes / figures.bytes
    found = []
    if smaller < SMALLER:
        size = f"{smaller:.1f} times smaller than" if smaller >= 1 else f"{1 / smaller:.1f} times as large as"
        found.append(f"is {size} the weights at float32, not {SMALLER:g} times smaller")
    if milliseconds > float32_ms:
        found.append(f"takes {milliseconds:.2f} ms at batch 1, float32 {float32_ms:.2f} ms")
    return " and ".join(found)


def best_int8(candidates: dict[str, Figures], least: float) -> str:
    """Return the name of the one that holds top-1 best; of those that reach ``least`` percent and are within two
    standard errors of the difference to it on these images, the fastest at batch 1."""
    best = max(candidates.values(), key=lambda figures: figures.right)
    reached = {name: figures for name, figures in candidates.items() if figures.right >= least} or candidates

    def is_equal(other: Figures) -> bool:
        behind = int(best.right_N.sum() - other.right_N.sum())
        differ = int((best.right_N != other.right_N).sum())
        return behind <= 2 * math.sqrt(differ)

    equal = [name for name, figures in reached.items() if is_equal(figures)]
    return min(equal, key=lambda name: candidates[name].latency_ms["1"])


def multiply_adds(network: Deployed, image_size: int) -> int:
    """Return the multiplications with an addition (MACs) of convolutions and matrix products for one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, image_size, image_size))
    return int(counter.get_total_flops()) // 2


def _percent(hit_N: Tensor) -> float:
    return 100 * int(hit_N.sum()) / len(hit_N)
