"""The codecs of a run's taps, between the teacher's features and those that the loss reads, live or from the cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mimkd_ray.config import CacheConfig
from mimkd_ray.config.cache import codec_of
from mimkd_ray.losses.features import Features
from mimkd_ray.losses.terms import LOGITS as LOGITS_TAP
from mimkd_ray.losses.terms import Term
from mimkd_ray.taps.tapped_model import TapShape
from mimkd_ray.teacher_cache.codec import Calibration, Shape, coded_shape, make_codec
from mimkd_ray.teacher_cache.keys import LOGITS, Entry


def tap_entry(tap: str, shape: TapShape, is_map: bool, cache: CacheConfig) -> Entry:
    """Return the cache entry of a teacher's layer that is read as a map or as a vector."""
    size = Shape(shape.channels, shape.height, shape.width) if is_map else Shape(shape.channels)
    return Entry(tap, "map" if is_map else "vector", size, codec_of(cache, tap, is_map))


def tap_entries(
    shapes: Mapping[str, TapShape], vectors: Iterable[str], maps: Iterable[str], cache: CacheConfig
) -> list[Entry]:
    """Return the entries of the taps that are read as vectors, and as maps."""
    return [tap_entry(tap, shapes[tap], False, cache) for tap in vectors] + [
        tap_entry(tap, shapes[tap], True, cache) for tap in maps
    ]


def coded_term(term: Term, shape: TapShape, cache: CacheConfig) -> Term:
    """Return the term with the number of teacher channels that the codec of its tap leaves; logits keep theirs."""
    if term.teacher == LOGITS_TAP:
        return term
    entry = tap_entry(term.teacher, shape, term.kind == "feature", cache)
    return replace(term, teacher_channels=coded_shape(entry.spec, entry.shape).channels)


class Coding:
    """The codecs of some entries, on one device."""

    def __init__(
        self,
        entries: Iterable[Entry],
        calibrations: Mapping[str, Calibration],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Build the codecs. `calibrations` are by label, for codecs that have one. `dtype` is that of decoded
        features."""
        self.entries = {entry.label: entry for entry in entries}
        self.codecs = {
            label: make_codec(entry.spec, entry.shape, calibrations.get(label), device)
            for label, entry in self.entries.items()
        }
        self.dtype = dtype

    def apply(self, raw: Features) -> Features:
        """Return a teacher's features as the loss reads them: pooled and projected, not rounded. Logits without an
        entry are unchanged."""
        logits = self.codecs.get(LOGITS)
        return raw._replace(
            logits_BC=raw.logits_BC if logits is None else logits.apply(raw.logits_BC),
            vectors={tap: self.codecs[f"{tap}:vector"].apply(value) for tap, value in raw.vectors.items()},
            maps={tap: self.codecs[f"{tap}:map"].apply(value) for tap, value in raw.maps.items()},
        )

    def decode(self, rows: Mapping[str, Tensor]) -> Features:
        """Return the features of cached rows (B, row_bytes), uint8. If logits are not cached, they have no columns."""
        decoded = {label: self.codecs[label].decode(value, self.dtype) for label, value in rows.items()}
        kinds = {label: (entry.tap, entry.kind) for label, entry in self.entries.items()}
        some = next(iter(decoded.values()))
        return Features(
            decoded.get(LOGITS, some.new_zeros(len(some), 0)),
            {kinds[label][0]: value for label, value in decoded.items() if kinds[label][1] == "vector"},
            {kinds[label][0]: value for label, value in decoded.items() if kinds[label][1] == "map"},
        )


def by_label(features: Features) -> dict[str, Tensor]:
    """Return features by the labels of their entries."""
    return {
        LOGITS: features.logits_BC,
        **{f"{tap}:vector": value for tap, value in features.vectors.items()},
        **{f"{tap}:map": value for tap, value in features.maps.items()},
    }
