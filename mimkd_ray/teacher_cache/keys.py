"""Cache keys: digests of everything that a cached feature depends on.

Each tap has its own key, so that taps, codecs and views can be added without changing existing ones, and a run reads
only the taps that it uses. The key is a digest of named parts, which are stored in plain text beside the features: if
no cache fits, a run reports the parts that differ from the nearest one.

    ROOT/<key>/key.json                          the parts
    ROOT/<key>/view-00003/...                    features and commit records of a view (feature_manifest.py)
    ROOT/<key>/view-00003.manifest.json          selects among them; written last, create-once
    ROOT/calibrations/<key>.safetensors          the fitted values of codecs (calibration.py), create-once
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mimkd_ray import storage
from mimkd_ray.config.form.codec_spec import CodecSpec, parse_logits
from mimkd_ray.errors import DamagedDataError, UserError
from mimkd_ray.json_files import parse
from mimkd_ray.teacher_cache.codec import VERSION as CODEC_VERSION
from mimkd_ray.teacher_cache.codec import Shape, row_bytes
from mimkd_ray.teacher_cache.pixel_digests import PIXELS

FORMAT = 1
"""Version of the format of files and manifests."""

LOGITS = "logits"
THREADS = 16
CALIBRATIONS = "calibrations"

EntryKind = Literal["map", "vector", "logits", "pixels"]


@dataclass(frozen=True)
class Entry:
    """A quantity that is cached of every image and view: a tap as map or as vector, the logits, or the pixels."""

    tap: str
    kind: EntryKind
    shape: Shape
    spec: CodecSpec

    @property
    def label(self) -> str:
        """Name such as "layer3:map", "fc:vector", "logits" or "pixels", unique within a run."""
        return f"{self.tap}:{self.kind}" if self.kind in ("map", "vector") else self.tap

    @property
    def row_bytes(self) -> int:
        """Bytes of a stored row."""
        return row_bytes(self.spec, self.shape)


def logits_entry(classes: int, stored: str) -> Entry:
    """Return the entry of the teacher's logits, stored as `cache.logits` says. Raises UserError if it keeps all of
    them."""
    spec = parse_logits(stored)
    if spec.top >= classes:
        raise UserError(
            f"cache.logits is {spec}, and there are {classes} classes: keep fewer, such as --cache.logits "
            f"top{max(1, classes // 4)}, or all of them, --cache.logits fp16"
        )
    return Entry(LOGITS, "logits", Shape(classes), spec)


def pixels_entry(bytes_of_row: int) -> Entry:
    """Return the entry of the digests of the views' pixels; no teacher is in its key."""
    return Entry(PIXELS, "pixels", Shape(bytes_of_row), CodecSpec("uint8"))


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The parts of a key that are not the tap: the teacher and the pixels that it saw."""

    teacher: str
    """Name of the teacher."""
    weights: str
    """sha256 of the teacher's weights."""
    precision: str
    """float32, bf16 (autocast) or float64."""
    pipeline: str
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    view_seed: int
    data: str
    """Digest of the training set as opened."""
    exif: Literal["", "apply"] = ""
    """Whether photographs are turned upright. Empty where they are not, and for images that have no tags: keys are then
    what they were before there was the choice."""
    resized: str = ""
    """The size to which the teacher's images are resized, and how, such as "384 bicubic"; empty where they are not."""


def parts_of(entry: Entry, origin: Origin, calibration: str = "") -> dict[str, Any]:
    """Return the named parts of an entry's key; `calibration` is the digest of its codec's fitted values."""
    seen = asdict(origin)
    if entry.kind == "pixels":
        seen = {name: seen[name] for name in ("pipeline", "image_size", "view_seed", "data", "exif")}
    seen = {name: value for name, value in seen.items() if value or name not in _ABSENT}
    tap = {"tap": entry.tap, "kind": entry.kind, "shape": list(entry.shape)}
    codec = {"codec": str(entry.spec), "codec_version": CODEC_VERSION, "calibration": calibration}
    return json.loads(json.dumps({"format": FORMAT, **tap, **codec, **seen}))


def key_of(parts: Mapping[str, Any]) -> str:
    """Return the key of these parts: 24 hex digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def calibration_url(root: str, entry: Entry, origin: Origin, rows: int) -> str:
    """Return the URL of the fitted values of an entry's codec, fitted on `rows` images of the training set."""
    return storage.join(root, CALIBRATIONS, key_of({**parts_of(entry, origin), "rows": rows}) + ".safetensors")


def publish_key(root: str, parts: Mapping[str, Any]) -> str:
    """Write the parts in plain text beside the features, if they are not there; return the key."""
    key = key_of(parts)
    url = storage.join(root, key, "key.json")
    if not storage.exists(url):
        storage.create_once(url, (json.dumps(parts, indent=1) + "\n").encode())
    return key


def read_keys(root: str, damaged: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Return {key: parts} of every cache below `root`. One request each. Those whose key.json is damaged are left out,
    and what is wrong with them is added to `damaged`; without it the first one raises DamagedDataError."""

    def read(folder: str) -> dict[str, Any] | None:
        url = storage.join(folder, "key.json")
        try:
            parts = parse(storage.read_bytes(url, small=True), url, remedy="remove its folder, and build it again")
            if key_of(parts) != folder.rpartition("/")[2]:
                raise DamagedDataError(f"{url} does not belong to its folder: remove the folder, and build it again")
            return parts
        except FileNotFoundError:
            return None  # not a cache, or just begun
        except DamagedDataError as error:
            if damaged is None:
                raise
            damaged.append(str(error))
            return None

    folders = [url for url in storage.list_dirs(root) if url.rpartition("/")[2] != CALIBRATIONS]
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(read, folders))
    return {url.rpartition("/")[2]: parts for url, parts in zip(folders, found, strict=True) if parts is not None}


_WORDS = {
    "format": "format",
    "shape": "shape of the tap",
    "codec": "codec (--cache.codecs)",
    "codec_version": "version of the codec",
    "calibration": "calibration of the codec (--cache.calibration-rows)",
    "teacher": "teacher (--teacher.name)",
    "weights": "teacher's weights (--teacher.weights)",
    "precision": "teacher's precision (--cache.precision)",
    "pipeline": "view pipeline (--data.pipeline)",
    "image_size": "image size (--data.image-size)",
    "resized": "size of the teacher's images (--teacher.input, --teacher.image-size)",
    "mean": "mean (--data.mean, or --teacher.input and --teacher.mean)",
    "std": "deviation (--data.std, or --teacher.input and --teacher.std)",
    "view_seed": "seed of the views (--data.view-seed)",
    "data": "data set (--data.root, its split, holdout or subset)",
    "exif": "orientation tags (--data.exif)",
}
_ABSENT = {"exif": "ignore", "resized": "as the student's"}
"""What it means that a key lacks a part."""


def difference(wanted: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """Return "the part that differs: its value there, not the wanted one" for each. A calibration that differs only
    because another part does is not listed."""
    differing = [name for name in _WORDS if wanted.get(name) != there.get(name)]
    if len(differing) > 1 and "calibration" in differing:
        differing.remove("calibration")
    words = {**_WORDS, "codec": "codec (--cache.logits)"} if wanted.get("kind") == "logits" else _WORDS
    return [
        f"{words[name]}: {_short(there.get(name, _ABSENT.get(name)))}, {_not(wanted.get(name, _ABSENT.get(name)))}"
        for name in differing
    ]


def nearest_key(wanted: Mapping[str, Any], keys: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the key of the same tap and kind with the fewest differing parts; None if the tap is not cached."""
    same = {key: p for key, p in keys.items() if (p.get("tap"), p.get("kind")) == (wanted["tap"], wanted["kind"])}
    return min(same, key=lambda key: (len(difference(wanted, same[key])), key), default=None)


def _not(value: Any) -> str:
    return f"not {_short(value)}" if value != "" else "and this run's has not been fitted there"


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else text
