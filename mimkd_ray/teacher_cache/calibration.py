"""Fitting of a codec's values on a sample of the training set, and their storage for every run and builder.

One pass over the sample sums mean and covariance in float64, batch by batch, and keeps a bounded number of locations.
The covariance's eigenvectors become the components, and the kept locations determine the stored range of each channel:
the one with the least error of rounding and clipping together.

A calibration is one safetensors file with its facts in the header. It is created only once, under a key of everything
that it depends on; later writers use the existing one. Its digest is part of the key of the features.
"""

from __future__ import annotations

import hashlib
import json

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mimkd_ray import storage
from mimkd_ray.config.form.codec_spec import CodecSpec
from mimkd_ray.errors import DamagedDataError
from mimkd_ray.teacher_cache.codec import Calibration, Shape, channels_last, coded_shape, pool, projects

KEPT_VALUES = 2**24
"""Most values kept for the choice of ranges: 64 MiB."""

TAILS = (0.0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
"""Shares of a channel's values that may be clipped on either side; each channel takes the best one."""


class Moments:
    """Mean and scatter matrix of rows that arrive in batches, in float64 (Chan's update: no cancellation)."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.count = 0
        self.mean_C = torch.zeros(channels, dtype=torch.float64, device=device)
        self.scatter_CC = torch.zeros(channels, channels, dtype=torch.float64, device=device)

    def add(self, rows_NC: Tensor) -> None:
        """Add more rows. Time O(N C^2)."""
        rows = rows_NC.double()
        mean = rows.mean(0)
        centred, shift = rows - mean, mean - self.mean_C
        total = self.count + len(rows)
        self.scatter_CC += centred.T @ centred
        self.scatter_CC += torch.outer(shift, shift) * (self.count * len(rows) / total)
        self.mean_C += shift * (len(rows) / total)
        self.count = total


class Fitter:
    """The fit of one tap's calibration on about `images` images. Memory: O(C^2) in float64 and KEPT_VALUES values."""

    def __init__(self, spec: CodecSpec, shape: Shape, images: int, device: torch.device) -> None:
        self.spec, self.shape, self.coded = spec, shape, coded_shape(spec, shape)
        self.moments = Moments(shape.channels, device) if projects(spec, shape) else None
        locations = images * self.coded.locations
        self.every = max(1, -(-locations * shape.channels // KEPT_VALUES))
        self.asked, self.seen, self.images = images, 0, 0
        self.finite = torch.tensor(True, device=device)
        self.kept: list[Tensor] = []

    def add(self, feature: Tensor) -> None:
        """Add the taps of a batch, (B, C, H, W) or (B, C), which may be empty: where all its images were damaged."""
        if not len(feature):
            return
        rows_NC = channels_last(pool(feature.float(), self.coded)).reshape(-1, self.shape.channels)
        self.finite = self.finite & rows_NC.isfinite().all()
        if self.moments is not None:
            self.moments.add(rows_NC)
        if self.spec.kind == "uint8":
            first = -self.seen % self.every
            self.kept.append(rows_NC[first :: self.every].clone())
        self.seen += len(rows_NC)
        self.images += len(feature)

    def finish(self) -> Calibration:
        """Return the calibration. Time O(C^3). Raises DamagedDataError if no image was added."""
        if not self.images:
            raise DamagedDataError(
                f"none of the {self.asked:,} images on which the codecs are fitted can be decoded: repair the data, or "
                "fit them on more with --cache.calibration-rows"
            )
        mean_C = components_KC = low_K = step_K = None
        retained = 1.0
        if self.moments is not None:
            mean_C = self.moments.mean_C.cpu()
            components_KC, retained = principal(self.moments.scatter_CC.cpu(), self.coded.channels)
        if self.kept:
            values_NC = torch.cat(self.kept)
            if mean_C is not None and components_KC is not None:
                values_NC = (values_NC.double() - mean_C.to(values_NC.device)) @ components_KC.T.to(values_NC.device)
            low_K, step_K = (t.cpu() for t in ranges(values_NC.float()))
        return Calibration(
            None if mean_C is None else mean_C.float(),
            None if components_KC is None else components_KC.float(),
            low_K,
            step_K,
            retained,
            self.images,
        )


def principal(scatter_CC: Tensor, count: int) -> tuple[Tensor, float]:
    """Return the `count` eigenvectors of the largest eigenvalues as rows (float64), and their share of the trace.

    Signs are fixed (the entry of largest magnitude is positive), so that a repeated fit gives the same rows.
    """
    values, vectors = torch.linalg.eigh(scatter_CC)  # ascending
    components_KC = vectors[:, -count:].flip(1).T.contiguous()
    places = components_KC.abs().argmax(1, keepdim=True)
    components_KC *= components_KC.gather(1, places).sign()
    total = float(values.clamp(min=0).sum())
    return components_KC, float(values[-count:].clamp(min=0).sum()) / total if total > 0 else 1.0


def ranges(values_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return (low_K, step_K) of uint8 storage: the range between quantiles q and 1 - q that has the least squared
    error.

    A channel that never changes has step 1 and is decoded exactly.
    """
    ordered_NK = values_NK.sort(0).values
    last = len(values_NK) - 1
    best_K = torch.full_like(ordered_NK[0], torch.inf)
    low_K, step_K = ordered_NK[0].clone(), torch.ones_like(best_K)
    for tail in TAILS:
        cut = round(tail * last)
        low, high = ordered_NK[cut], ordered_NK[last - cut]
        step = (high - low) / 255
        step = torch.where(step > 0, step, 1.0)
        back_NK = torch.addcmul(low, ((values_NK - low) / step).round_().clamp_(0, 255), step)
        cost_K = (back_NK - values_NK).square_().sum(0)
        better_K = cost_K < best_K
        best_K, low_K, step_K = (
            torch.where(better_K, new, old) for new, old in ((cost_K, best_K), (low, low_K), (step, step_K))
        )
    return low_K, step_K


_NAMES = ("mean_C", "components_KC", "low_K", "step_K")


def to_bytes(calibration: Calibration) -> bytes:
    """Return the calibration as a safetensors file."""
    tensors = {name: value for name in _NAMES if (value := getattr(calibration, name)) is not None}
    facts = {"retained": calibration.retained, "rows": calibration.rows}
    return save(tensors, {"calibration": json.dumps(facts, sort_keys=True)})


def from_bytes(data: bytes, url: str) -> Calibration:
    """Return the calibration in a safetensors file. Raises DamagedDataError, naming `url`."""
    try:
        length = int.from_bytes(data[:8], "little")
        facts = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["calibration"])
        tensors = load(data)
        mean_C, components_KC, low_K, step_K = (tensors.get(name) for name in _NAMES)
        return Calibration(mean_C, components_KC, low_K, step_K, float(facts["retained"]), int(facts["rows"]))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedDataError(
            f"{url} ({len(data):,} bytes) is no calibration of a codec: {error}; put it back from a copy, or remove it "
            "and build the cache again"
        ) from error


def digest(data: bytes) -> str:
    """Return the identity of a calibration's bytes, 16 hex digits."""
    return hashlib.sha256(data).hexdigest()[:16]


def read(url: str) -> bytes | None:
    """Return the calibration's bytes at `url`; None if there is no file."""
    try:
        return storage.read_bytes(url, small=True)
    except FileNotFoundError:
        return None


def publish(url: str, data: bytes) -> bytes:
    """Write a calibration unless there is one, and return the one that is in effect."""
    if storage.create_once(url, data):
        return data
    found = read(url)
    assert found is not None, f"{url} was there, and is gone"
    return found
