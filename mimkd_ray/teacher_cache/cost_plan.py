"""Cost and benefit of a cache: sizes, bandwidth, and the epochs after which its building time is recovered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from mimkd_ray.errors import count
from mimkd_ray.teacher_cache.keys import LOGITS, Entry
from mimkd_ray.teacher_cache.pixel_digests import PIXELS


class Sized(NamedTuple):
    """An entry, its bytes per image, and `used`: True if the planned run reads it with every batch."""

    entry: Entry
    row_bytes: int
    used: bool


class Measured(NamedTuple):
    """Seconds per image, measured on a few batches on this machine."""

    teacher: float
    """Forward pass of the teacher."""
    student: float
    """Training step of the student, with the features given."""
    load: float
    """Reading, decoding and augmenting by the loader processes of one worker."""


@dataclass(frozen=True)
class Plan:
    """Cost and benefit of building and using a cache for one run."""

    root: str
    rows: int
    views: int
    epochs: int
    sizes: tuple[Sized, ...]
    measured: Measured
    device: str
    column_bytes: int = 0
    """Bytes of the vectors that loss.negatives `cache` keeps on each node."""

    @property
    def row_bytes(self) -> int:
        """Bytes of an image in one view, all entries together."""
        return sum(sized.row_bytes for sized in self.sizes)

    @property
    def read_bytes(self) -> int:
        """Bytes that the run reads for an image."""
        return sum(sized.row_bytes for sized in self.sizes if sized.used)

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole cache, ids included."""
        return (self.row_bytes + 8 * len(self.sizes)) * self.rows * self.views

    @property
    def live(self) -> float:
        """Seconds per image in training with a live teacher."""
        return max(self.measured.teacher + self.measured.student, self.measured.load)

    @property
    def cached(self) -> float:
        """Seconds per image in training from the cache."""
        return max(self.measured.student, self.measured.load)

    @property
    def build(self) -> float:
        """Seconds per image and view of building."""
        return max(self.measured.teacher, self.measured.load)

    @property
    def payback(self) -> float:
        """Epochs after which the cache has saved as much time as its building took; infinite if it saves none."""
        saved = self.live - self.cached
        return self.build * self.views / saved if saved > 0.01 * self.live else float("inf")

    def text(self) -> str:
        """Return the plan in a few lines."""
        lines = [f"cache of {count(self.rows, 'image')} x {count(self.views, 'view')} in {self.root}"]
        for sized in self.sizes:
            shape = sized.entry.shape
            size = f"{shape.channels}x{shape.height}x{shape.width}" if shape.is_map else f"{shape.channels}"
            read = "" if sized.used else ", not read by this run"
            spec = "digest and fingerprint" if sized.entry.tap == PIXELS else sized.entry.spec
            kind = "" if sized.entry.tap in (PIXELS, LOGITS) else f" ({sized.entry.kind} {size})"
            lines.append(f"  {sized.entry.tap}{kind}: {spec}, {sized.row_bytes:,} bytes an image{read}")
        rate = 1 / self.cached
        lines += [
            f"  together {self.row_bytes:,} bytes an image and view, {_size(self.total_bytes)} in all",
            f"  training reads {self.read_bytes:,} bytes an image: at {rate:,.0f} images/s "
            f"{_size(self.read_bytes * rate)}/s a worker ({8e-9 * self.read_bytes * rate:.2g} Gbit/s)",
        ]
        if self.column_bytes:
            lines.append(f"  negatives from the cache keep {_size(self.column_bytes)} on each node")
        m = self.measured
        lines += [
            f"measured on {self.device}: teacher {1 / m.teacher:,.0f} images/s, student's step {1 / m.student:,.0f}, "
            f"loader {1 / m.load:,.0f}; training does {1 / self.live:,.0f} with a live teacher and {rate:,.0f} cached",
            f"building takes {_time(self.build * self.rows * self.views)} on one such device; {self._verdict()}",
        ]
        return "\n".join(lines)

    def _verdict(self) -> str:
        if self.payback == float("inf"):
            return (
                "WARNING: the cache never pays for itself: training waits for the loader or the student, whatever the "
                "teacher costs"
            )
        said = f"the cache has paid for itself after {self.payback:.1f} epochs"
        if self.payback > self.epochs:
            runs = -(-self.payback // self.epochs)
            return f"WARNING: {said}, and a run has {self.epochs}: build it for {runs:.0f} runs, or for fewer views"
        return f"{said} of {self.epochs}"


def _size(count: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count:.0f} bytes"


def _time(seconds: float) -> str:
    if seconds >= 7200:
        return f"{seconds / 3600:,.1f} hours"
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.{0 if seconds >= 10 else 1}f} seconds"
