"""Keys: every part counts, what differs is said, and what lies there is read back."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mimkd_ray.config import CacheConfig
from mimkd_ray.config.cache import check_rules, codec_of
from mimkd_ray.config.form.codec_spec import CodecSpec, parse_spec
from mimkd_ray.errors import DamagedDataError, UserError
from mimkd_ray.teacher_cache.codec import Shape
from mimkd_ray.teacher_cache.keys import (
    Entry,
    Origin,
    calibration_url,
    difference,
    key_of,
    nearest_key,
    parts_of,
    pixels_entry,
    publish_key,
    read_keys,
)

ORIGIN = Origin(
    teacher="resnet34",
    weights="a" * 64,
    precision="float32",
    pipeline="imagenet",
    image_size=224,
    mean=(0.1, 0.2, 0.3),
    std=(1.0, 1.0, 1.0),
    view_seed=0,
    data="d1",
)
MAP = Entry("layer3", "map", Shape(256, 14, 14), parse_spec("pool4,pca256,uint8"))
CHANGED: dict[str, Any] = {
    "teacher": "resnet50",
    "weights": "b" * 64,
    "precision": "bf16",
    "pipeline": "cifar",
    "image_size": 225,
    "mean": (0.1, 0.2, 0.4),
    "std": (1.0, 1.0, 2.0),
    "view_seed": 1,
    "data": "d2",
    "exif": "apply",
}
OF_PIXELS = ("pipeline", "image_size", "view_seed", "data", "exif")


def test_images_as_stored_have_the_keys_of_before_there_was_a_choice() -> None:
    assert "exif" not in parts_of(MAP, ORIGIN, "c")
    applied = parts_of(MAP, replace(ORIGIN, exif="apply"), "c")
    assert difference(parts_of(MAP, ORIGIN, "c"), applied) == ["orientation tags (--data.exif): apply, not ignore"]
    assert difference(applied, parts_of(MAP, ORIGIN, "c")) == ["orientation tags (--data.exif): ignore, not apply"]


@pytest.mark.parametrize("name", CHANGED)
def test_every_part_of_the_origin_counts(name: str) -> None:
    other = replace(ORIGIN, **{name: CHANGED[name]})
    plain, changed = parts_of(MAP, ORIGIN, "c"), parts_of(MAP, other, "c")
    assert key_of(plain) != key_of(changed)
    (said,) = difference(changed, plain)
    assert name in changed
    assert "not" in said
    pixels = pixels_entry(80)
    same = key_of(parts_of(pixels, ORIGIN)) == key_of(parts_of(pixels, other))
    assert same == (name not in OF_PIXELS), "no teacher in the key of the pixels"


def test_tap_kind_codec_and_calibration_count() -> None:
    entries = [
        MAP,
        replace(MAP, tap="layer4"),
        replace(MAP, tap="layer3@input"),
        replace(MAP, kind="vector"),
        replace(MAP, shape=Shape(256, 7, 7)),
        replace(MAP, spec=CodecSpec("fp16")),
    ]
    keys = {key_of(parts_of(entry, ORIGIN, "c")) for entry in entries} | {key_of(parts_of(MAP, ORIGIN, "d"))}
    assert len(keys) == 7
    assert all(re.fullmatch("[0-9a-f]{24}", key) for key in keys), "in file names: no character of a tap's name"
    urls = {calibration_url("r", MAP, ORIGIN, rows) for rows in (1, 2)}
    assert len(urls) == 2, "a calibration depends on how many images it was fitted on"


def test_the_nearest_cache_has_the_same_tap_and_the_fewest_differences(tmp_path: Path) -> None:
    root = str(tmp_path)
    far = replace(ORIGIN, weights="b" * 64, data="d2")
    near = replace(ORIGIN, view_seed=5)
    keys = {
        name: publish_key(root, parts_of(entry, origin, calibration))
        for name, entry, origin, calibration in (
            ("far", MAP, far, "1"),
            ("near", MAP, near, "2"),
            ("other tap", replace(MAP, tap="layer4"), ORIGIN, "3"),
        )
    }
    (tmp_path / "calibrations").mkdir()
    (tmp_path / "something else").mkdir()
    found = read_keys(root)
    assert set(found) == set(keys.values())
    wanted = parts_of(MAP, ORIGIN, "4")
    assert nearest_key(wanted, found) == keys["near"]
    assert difference(wanted, found[keys["near"]]) == ["seed of the views (--data.view-seed): 5, not 0"], (
        "the calibration differs because the seed does"
    )
    first, second = difference(wanted, found[keys["far"]])
    assert first == "teacher's weights (--teacher.weights): bbbbbbbbbbbb..., not aaaaaaaaaaaa..."
    assert second.endswith(": d2, not d1")
    assert nearest_key(replace_tap(wanted, "layer1"), found) is None


def replace_tap(parts: dict[str, Any], tap: str) -> dict[str, Any]:
    return {**parts, "tap": tap}


def test_keys_that_are_damaged(tmp_path: Path) -> None:
    key = publish_key(str(tmp_path), parts_of(MAP, ORIGIN))
    path = tmp_path / key / "key.json"
    path.write_text(path.read_text().replace("layer3", "layer2"))
    with pytest.raises(DamagedDataError, match="does not belong to its folder"):
        read_keys(str(tmp_path))
    path.write_text("{")
    with pytest.raises(DamagedDataError, match=r"key\.json \(1 bytes\) is damaged"):
        read_keys(str(tmp_path))
    other = publish_key(str(tmp_path), parts_of(MAP, ORIGIN, "another"))
    bad: list[str] = []
    assert list(read_keys(str(tmp_path), bad)) == [other], "one bad file does not hide the others"
    assert len(bad) == 1


def test_rules_from_the_most_special_to_the_default() -> None:
    config = CacheConfig(codecs=("maps=fp32", "a=pool2,uint8", "b:vector=bf16", "c=fp16"))
    assert str(codec_of(config, "a", True)) == "pool2,uint8"
    assert str(codec_of(config, "a", False)) == "fp16", "a rule that pools is for maps"
    assert str(codec_of(config, "b", True)) == "fp32"
    assert str(codec_of(config, "b", False)) == "bf16"
    assert str(codec_of(config, "c", False)) == "fp16"
    assert str(codec_of(CacheConfig(), "a", True)) == "pool4,pca256,uint8"
    check_rules(config, ["a", "b", "c"])
    with pytest.raises(
        UserError, match=r"there is no tap 'b:vector'.*there are a, c, maps, vectors, and --cache.taps adds"
    ):
        check_rules(config, ["a", "c"])
