"""Section `cache`: the cached layers, their codecs, and the checks of the cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mimkd_ray.config.form.codec_spec import DEFAULT_MAP, DEFAULT_VECTOR, CodecSpec, parse_logits, parse_spec
from mimkd_ray.config.form.values import FROM_1, check_values, worker_range
from mimkd_ray.errors import UserError, nearest
from mimkd_ray.secret_urls import hide

MAPS, VECTORS = "maps", "vectors"
"""Names in `codecs` that stand for all maps and all vectors."""
ALL_LOGITS = "fp16"


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The cache of the teacher's features."""

    root: str = ""
    """Folder or URL of the cache; unset: no cache, the teacher runs in every step."""
    live: bool = False
    """Run the teacher although `root` is set; only the codecs' calibrations are read from the cache."""
    codecs: tuple[str, ...] = ()
    """Codec of each tap, TAP=[poolSIDE,][pcaCHANNELS,]TYPE with TYPE uint8, fp16, bf16 or fp32, such as
    layer3=pool4,pca256,uint8. TAP may end in :map or :vector, or be `maps` or `vectors` for all others. Unset: maps
    pool4,pca256,uint8, vectors fp16. If codecs are set, the features of a live teacher go through them as well."""
    logits: str = ALL_LOGITS
    """Storage of the logits: all of them as fp16, bf16 or fp32; or topK, such as top32: the K largest, and the
    probability mass of the others, spread evenly over them (exact only at loss.kd_temperature 1). With topK the logits
    of a live teacher go through it as well."""
    taps: tuple[str, ...] = ()
    """Teacher layers to cache in addition to those that the loss reads: LAYER, LAYER:map or LAYER:vector."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Autocast of the teacher; auto: train.precision. Part of the cache's key."""
    calibration_rows: int = 2048
    """Training images on which ranges and components are fitted; a smaller set gives several views of each image."""
    shard_rows: int = 4096
    """Images in a unit of building (whole blocks of the data set); each unit gives one feature file per tap."""
    batch: int = 64
    """Images in a batch of the teacher during building."""
    workers: int | str = 0
    """Teachers that build at the same time; 0: one per GPU of the cluster, else one per two CPUs; 1..8: any number in
    that range, as nodes join and leave."""
    canary: float = 0.001
    """Share of the training images whose features are also computed live in each epoch and compared, at least one
    batch; 0: no comparison."""
    tolerance: float = 0.02
    """Relative error that the comparison allows on top of the codec's own error."""
    negatives: int = 1024
    """Random images whose cached teacher vectors are negatives of each lane, with loss.negatives `cache`."""

    def __post_init__(self) -> None:
        counts = {"calibration_rows": FROM_1, "shard_rows": FROM_1, "batch": (1, 10**6), "negatives": (1, 10**6)}
        check_values(self, "cache", canary=(0, 1), **counts)
        hide(self, "root")
        for text in self.codecs:
            parse_rule(text)
        parse_logits(self.logits)
        if not 0 < self.tolerance < 1:
            raise UserError(f"cache.tolerance is {self.tolerance}: give a relative error between 0 and 1")
        worker_range("cache.workers", self.workers)

    @property
    def worker_range(self) -> tuple[int, int]:
        """Fewest and most builders; (0, 0) if the launcher chooses."""
        return worker_range("cache.workers", self.workers)

    @property
    def reads(self) -> bool:
        """True if training reads cached features instead of running the teacher."""
        return bool(self.root) and not self.live

    @property
    def codes(self) -> bool:
        """True if the loss reads features that went through their codecs, cached or live."""
        return bool(self.root or self.codecs) or self.logits != ALL_LOGITS


def parse_rule(text: str) -> tuple[str, CodecSpec]:
    """Parse "layer3=pool4,pca256,uint8" to the tap's name and its codec. Raises UserError."""
    name, equals, spec = text.partition("=")
    if not name or not equals:
        raise UserError(f"cache.codecs {text!r} is not TAP=CODEC, such as layer3=pool4,pca256,uint8")
    return name, parse_spec(spec)


def codec_of(config: CacheConfig, tap: str, is_map: bool) -> CodecSpec:
    """Return the codec of a tap that is read as a map or as a vector, from the most specific rule that names it.

    A rule that pools and has no `:map` or `:vector` applies to maps only.
    """
    rules = dict(map(parse_rule, config.codecs))
    kind = "map" if is_map else "vector"
    plain = rules.get(tap)
    if plain is not None and plain.pool and not is_map:
        plain = None
    default = DEFAULT_MAP if is_map else DEFAULT_VECTOR
    return rules.get(f"{tap}:{kind}") or plain or rules.get(MAPS if is_map else VECTORS) or default


def check_rules(config: CacheConfig, taps: Iterable[str]) -> None:
    """Raise UserError for a rule that names a tap which this run does not have."""
    known = {MAPS, VECTORS} | {name for tap in taps for name in (tap, f"{tap}:map", f"{tap}:vector")}
    for name, spec in map(parse_rule, config.codecs):
        if name not in known:
            names = sorted(n for n in known if ":" not in n)
            raise UserError(
                f"cache.codecs {name}={spec}: there is no tap {name!r}{nearest(name, names)}; there are "
                f"{', '.join(names)}, and --cache.taps adds more (logits have --cache.logits)"
            )
