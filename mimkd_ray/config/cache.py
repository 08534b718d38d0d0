"""What is cached, how it is stored, and how far it is trusted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mimkd_ray.config.codec_spec import DEFAULT_MAP, DEFAULT_VECTOR, CodecSpec, parse_logits, parse_spec
from mimkd_ray.errors import UserError, nearest
from mimkd_ray.secret_urls import hide

MAPS, VECTORS = "maps", "vectors"
"""Names in `codecs` for all maps and all vectors."""
ALL_LOGITS = "fp16"


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The teacher's features at rest."""

    root: str = ""
    """Folder or URL of the cache; unset: the teacher runs live."""
    live: bool = False
    """Run the teacher although there is a root: only the codecs' calibrations are taken from it."""
    codecs: tuple[str, ...] = ()
    """How taps are stored, TAP=[poolSIDE,][pcaCHANNELS,]TYPE with uint8, fp16, bf16 or fp32: layer3=pool4,pca256,uint8.
    TAP may end in :map or :vector, or be `maps` or `vectors` for all others. Unset: maps pool4,pca256,uint8, vectors
    fp16. Pooling and components belong to the run: with codecs set, a live teacher goes through them as well."""
    logits: str = ALL_LOGITS
    """How logits are stored: all of them as fp16, bf16 or fp32, or topK, such as top32: the K largest, and the mass of
    the others, which then share it evenly (exact at loss.kd_temperature 1 alone). With topK set, the logits of a live
    teacher go through it as well."""
    taps: tuple[str, ...] = ()
    """Teacher layers to cache beside those that the loss reads; LAYER, LAYER:map or LAYER:vector."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Autocast of the teacher; auto: train.precision. Part of the cache's key."""
    calibration_rows: int = 2048
    """Training images that ranges and components are fitted on; of a smaller set, several views of each."""
    shard_rows: int = 4096
    """Images of a unit of building, whose features are one file for each tap (whole blocks of the data set)."""
    batch: int = 64
    """Images in a batch of the teacher while building."""
    workers: int | str = 0
    """Teachers that build at a time; 0: one for each GPU of the cluster, else for each two CPUs; 1..8: any number in
    that range, as nodes come and go."""
    canary: float = 0.001
    """Share of the training images that is computed live each epoch and compared, at least one batch; 0: none."""
    tolerance: float = 0.02
    """Relative error beyond the codec's own that the comparison allows."""
    negatives: int = 1024
    """With loss.negatives `cache`: teacher vectors of so many random images are negatives of each lane."""

    def __post_init__(self) -> None:
        hide(self, "root")
        for text in self.codecs:
            parse_rule(text)
        parse_logits(self.logits)
        for name in ("calibration_rows", "shard_rows", "batch", "negatives"):
            if getattr(self, name) < 1:
                raise UserError(f"cache.{name} is {getattr(self, name)}; give 1 or more")
        if not 0 <= self.canary <= 1 or not 0 < self.tolerance < 1:
            raise UserError(
                f"cache.canary is {self.canary} and cache.tolerance {self.tolerance}: give a share of the images from "
                "0 to 1, and a relative error between 0 and 1"
            )
        fewest, most = self.worker_range
        if not 0 <= fewest <= most or (fewest == 0 and most > 0):
            raise UserError(f"cache.workers is {self.workers!r}: give a number, or a range such as 1..8")

    @property
    def worker_range(self) -> tuple[int, int]:
        """Fewest and most builders; (0, 0) where the launcher chooses."""
        parts = str(self.workers).split("..")
        if len(parts) > 2 or not all(part.strip().isdecimal() for part in parts):
            raise UserError(f"cache.workers is {self.workers!r}: give a number, or a range such as 1..8")
        return int(parts[0]), int(parts[-1])

    @property
    def reads(self) -> bool:
        """Whether training reads features instead of running the teacher."""
        return bool(self.root) and not self.live

    @property
    def codes(self) -> bool:
        """Whether the loss reads features that went through their codecs, cached or live."""
        return bool(self.root or self.codecs) or self.logits != ALL_LOGITS


def parse_rule(text: str) -> tuple[str, CodecSpec]:
    """Parse "layer3=pool4,pca256,uint8" to the tap's name and its codec. Raises UserError."""
    name, equals, spec = text.partition("=")
    if not name or not equals:
        raise UserError(f"cache.codecs {text!r} is not TAP=CODEC, such as layer3=pool4,pca256,uint8")
    return name, parse_spec(spec)


def codec_of(config: CacheConfig, tap: str, is_map: bool) -> CodecSpec:
    """Return the codec of a tap that is read as a map or as a vector: the most special rule that names it.

    A rule without `:map` or `:vector` that pools is for maps alone.
    """
    rules = dict(map(parse_rule, config.codecs))
    kind = "map" if is_map else "vector"
    plain = rules.get(tap)
    if plain is not None and plain.pool and not is_map:
        plain = None
    default = DEFAULT_MAP if is_map else DEFAULT_VECTOR
    return rules.get(f"{tap}:{kind}") or plain or rules.get(MAPS if is_map else VECTORS) or default


def check_rules(config: CacheConfig, taps: Iterable[str]) -> None:
    """Raise UserError for a rule that names no tap of this run."""
    known = {MAPS, VECTORS} | {name for tap in taps for name in (tap, f"{tap}:map", f"{tap}:vector")}
    for name, spec in map(parse_rule, config.codecs):
        if name not in known:
            names = sorted(n for n in known if ":" not in n)
            raise UserError(
                f"cache.codecs {name}={spec}: there is no tap {name!r}{nearest(name, names)}; there are "
                f"{', '.join(names)}, and --cache.taps adds more (logits have --cache.logits)"
            )
