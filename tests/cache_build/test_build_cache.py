"""Building a cache in one process: its content against the teacher, kills between any two writes, two builders."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from ranks import start_ranks
from tiny_cache import CPU, build_here, cached_config, files

from mimkd_ray import console, storage
from mimkd_ray.cache_build import build_setup, build_units, measured_plan
from mimkd_ray.cache_build.build_cache import build
from mimkd_ray.cache_build.build_setup import Setup, shards_of
from mimkd_ray.cache_build.build_units import in_process
from mimkd_ray.data.augment.batch_views import view_key
from mimkd_ray.data.augment.pipelines import make_pipeline
from mimkd_ray.data.augment.views import View
from mimkd_ray.data.loading.batches import Key, LaneBatch
from mimkd_ray.data.order.blocks import Blocks
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.errors import DamagedDataError, UserError
from mimkd_ray.losses.features import Features
from mimkd_ray.models.build_model import build_model
from mimkd_ray.seeds import derive
from mimkd_ray.teacher_cache.feature_manifest import read_manifest, views_there
from mimkd_ray.teacher_cache.keys import read_keys
from mimkd_ray.train.from_cache.fit_codecs import Sight

LABELS = ["pool:vector", "stage3:map", "logits", "pixels"]


def read_all(root: Path, key: str, view: int) -> dict[int, bytes]:
    """{id: row} of a view, by pyarrow alone."""
    manifest = read_manifest(str(root), key, view)
    assert manifest is not None
    rows: dict[int, bytes] = {}
    for shard in manifest.shards:
        table = pq.read_table(root / key / f"view-{view:05d}" / shard.file)
        found = dict(zip(table.column("id").to_pylist(), table.column("feature").to_pylist(), strict=True))
        assert not rows.keys() & found.keys(), "a row stands twice"
        rows |= found
    return rows


def test_features_are_the_teachers(tmp_path: Path) -> None:
    """Every row of every view, computed here image by image with the plain network, as fp32."""
    config = cached_config(tmp_path, cache={"codecs": ("maps=fp32", "vectors=fp32")})
    built = build_here(config)
    assert list(built.keys) == LABELS
    assert (built.rows, built.views, built.damaged) == (60, 2, 0)
    torch.manual_seed(derive(config.train.seed, "teacher"))
    network = build_model("cifar/resnet8_w4", 10).eval()
    taps: dict[str, torch.Tensor] = {}
    modules = dict(network.named_modules())
    for name in ("stage3", "pool"):
        modules[name].register_forward_hook(lambda m, i, out, name=name: taps.__setitem__(name, out))
    source = open_data(config.data).train
    pipeline = make_pipeline("digits", 8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.data.mean, config.data.std))
    for view in range(2):
        rows = {label: read_all(tmp_path, key, view) for label, key in built.keys.items()}
        stored = source.read(range(60))
        for label in LABELS:
            assert sorted(rows[label]) == sorted(row.id for row in stored)
        for row in stored:
            image = View(pipeline.train, config.train.seed).apply(row.image, row.id, view)
            pixels = pipeline.batch(image[None], torch.tensor([row.id]), view_key(view, config.train.seed))
            with torch.no_grad():
                logits = network((pixels / 255 - mean) / std)[0]
            got = {name: torch.frombuffer(bytearray(rows[name][row.id]), dtype=torch.float32) for name in LABELS[:2]}
            expected = taps["stage3"][0].permute(1, 2, 0).flatten()
            torch.testing.assert_close(got["stage3:map"], expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(got["pool:vector"], taps["pool"][0].flatten(), rtol=1e-5, atol=1e-5)
            half = np.frombuffer(rows["logits"][row.id], np.float16)
            np.testing.assert_allclose(half, logits, rtol=2e-3, atol=2e-3)
            digest = hashlib.blake2b(pixels[0].contiguous().numpy(), digest_size=16).digest()
            assert rows["pixels"][row.id][:16] == digest


def test_a_manifest_knows_what_storing_lost(tmp_path: Path) -> None:
    """The error of uint8, against fp32 features of the same calibration-free shapes."""
    config = cached_config(tmp_path, cache={"codecs": ("maps=uint8", "vectors=fp16")})
    key = build_here(config).keys["stage3:map"]
    exact = build_here(cached_config(tmp_path, cache={"codecs": ("maps=fp32", "vectors=fp16")})).keys["stage3:map"]
    calibration = next((tmp_path / "calibrations").glob("*"))
    from safetensors.numpy import load_file

    numbers = load_file(calibration)
    for view in range(2):
        rounded, plain = read_all(tmp_path, key, view), read_all(tmp_path, exact, view)
        ids = sorted(plain)
        true = np.stack([np.frombuffer(plain[i], np.float32) for i in ids]).astype(np.float64)
        stored = np.stack([np.frombuffer(rounded[i], np.uint8) for i in ids]).astype(np.float64)
        places = stored.shape[1] // len(numbers["low_K"])
        back = stored * np.tile(numbers["step_K"], places) + np.tile(numbers["low_K"], places)
        error = read_manifest(str(tmp_path), key, view).error
        assert error.relative == pytest.approx(np.linalg.norm(back - true) / np.linalg.norm(true), rel=1e-3)
        assert 1e-4 < error.relative < 0.05
        assert error.worst > error.relative


class Killed(BaseException):
    """What a SIGKILL is to a test: nothing catches it."""


def count_writes(monkeypatch: pytest.MonkeyPatch, last: int) -> list[str]:
    """Die in place of the write after number `last`; returns what was written."""
    written: list[str] = []
    for name in ("write_bytes", "create_once"):
        real = getattr(storage, name)

        def write(url: str, data: bytes, real: Any = real) -> Any:
            if len(written) >= last:
                raise Killed
            written.append(url)
            return real(url, data)

        monkeypatch.setattr(storage, name, write)
    return written


def test_killed_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each start comes two or three writes further: a file and its record, or a file more."""
    monkeypatch.setattr(build_units, "WRITERS", 1)  # one order of writes
    build_here(cached_config(tmp_path / "whole"))
    expected = files(tmp_path / "whole")
    setup = Setup(cached_config(tmp_path / "cut"), CPU)
    starts, finished = 0, False
    while not finished:
        starts += 1
        assert starts < len(expected), "no start is in vain"
        with monkeypatch.context() as patch:
            count_writes(patch, 2 + starts % 2)
            try:
                build(setup, in_process(setup))
                finished = True
            except Killed:
                assert len(files(tmp_path / "cut")) < len(expected)
    assert starts > len(expected) // 3
    assert files(tmp_path / "cut") == expected


def test_killed_between_two_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between every fifth two: after a file without its record, and after a record."""
    setup = Setup(cached_config(tmp_path / "whole"), CPU)
    build(setup, in_process(setup))
    expected = files(tmp_path / "whole")
    for last in range(0, len(expected), 5):
        root = tmp_path / str(last)
        own = Setup(cached_config(root), CPU)
        with monkeypatch.context() as patch:
            count_writes(patch, last)
            with pytest.raises(Killed):
                build(own, in_process(own))
        assert len(files(root)) == last if root.exists() else last == 0
        build(own, in_process(own))
        assert files(root) == expected


def _builder(rank: int, root: Path) -> None:
    torch.set_num_threads(1)
    build_here(cached_config(root))


def test_two_builders_at_once(tmp_path: Path) -> None:
    start_ranks(_builder, (tmp_path / "both",), 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    build_here(cached_config(tmp_path / "one"))
    torch.set_num_threads(threads)
    assert files(tmp_path / "both") == files(tmp_path / "one")


def test_a_finished_cache_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_here(cached_config(tmp_path))
    with monkeypatch.context() as patch:
        count_writes(patch, 0)
        assert build_here(cached_config(tmp_path)) == first


def test_a_tap_or_views_more_write_only_new_objects(tmp_path: Path) -> None:
    small = build_here(cached_config(tmp_path))
    before = files(tmp_path)
    more = build_here(cached_config(tmp_path, cache={"taps": ("stage2", "stage2:vector")}, data={"views": 3}))
    after = files(tmp_path)
    assert {name: after[name] for name in before} == before
    assert set(more.keys) - set(small.keys) == {"stage2:map", "stage2:vector"}
    assert {label: more.keys[label] for label in small.keys} == small.keys
    new = [name for name in set(after) - set(before) if name.partition("/")[0] in small.keys.values()]
    assert new
    assert all("view-00002" in name for name in new)
    assert views_there(str(tmp_path), more.keys["stage2:map"]) == {0, 1, 2}
    whole = build_here(cached_config(tmp_path / "new", cache={"taps": ("stage2", "stage2:vector")}, data={"views": 3}))
    assert whole.keys == more.keys
    assert files(tmp_path / "new") == after, "as if it had been built at once"


def test_damaged_images_have_no_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mimkd_ray.data.augment.decode import DamagedImageError
    from mimkd_ray.data.loading import batches

    real = View.replay
    source = open_data(cached_config(tmp_path).data).train
    bad = [row.id for row in source.read([7, 8, 9, 10, 11, 12, 13, 14, 15, 30])]

    def replay(self: View, image: Any, id: int, view: int, out: Any = None, how: Any = None) -> torch.Tensor:
        if id in bad:
            raise DamagedImageError("no image")
        return real(self, image, id, view, out)

    monkeypatch.setattr(batches.View, "replay", replay)
    with pytest.raises(
        DamagedDataError, match=r"10 of 60 images cannot be decoded, more than the allowed share of 0\.001"
    ):
        build_here(cached_config(tmp_path))
    built = build_here(cached_config(tmp_path, data={"max_damaged": 0.2}))
    assert built.damaged == 10
    for label, key in built.keys.items():
        manifest = read_manifest(str(tmp_path), key, 1)
        assert sorted(manifest.damaged.tolist()) == sorted(bad)
        rows = read_all(tmp_path, key, 1)
        if label != "pixels":
            assert {id for id, row in rows.items() if not any(row)} == set(bad)
    del bad[5:]
    assert build_here(cached_config(tmp_path / "few")).damaged == 5, "a handful, though 0.001 of 60 is none"


def test_features_that_are_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(cached_config(tmp_path), CPU)
    real = build_setup.Teacher.features

    def features(self: Any, images: torch.Tensor) -> Features:
        found = real(self, images)
        found.logits_BC[-1] *= 1e30
        return found

    monkeypatch.setattr(build_setup.Teacher, "features", features)
    message = r"logits: \d of \d\d images, such as \d+, have features that are not finite as fp16: .*\(--cache.logits\)"
    with pytest.raises(UserError, match=message):
        build(setup, in_process(setup))
    assert not list(tmp_path.glob("*/view-*.manifest.json"))


def test_keys_lie_in_clear(tmp_path: Path) -> None:
    config = cached_config(tmp_path)
    built = build_here(config)
    keys = read_keys(str(tmp_path))
    assert set(keys) == set(built.keys.values())
    parts = keys[built.keys["stage3:map"]]
    assert (parts["tap"], parts["kind"], parts["codec"]) == ("stage3", "map", "pool4,pca256,uint8")
    assert parts["data"] == open_data(config.data).train.digest
    assert "weights" not in keys[built.keys["pixels"]], "pixels know no teacher"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"cache": {"root": ""}}, "cache.root is not set"),
        ({"teacher": {"train": True}}, "let a run train it"),
        ({"cache": {"taps": ("stage9",)}}, "layer 'stage9' not found"),
        ({"cache": {"taps": ("pool:token",)}}, "give LAYER, LAYER:map or LAYER:vector"),
        ({"cache": {"taps": ("pool:map",)}}, "the layer returns a vector"),
        ({"cache": {"codecs": ("stge3=fp16",)}}, "there is no tap 'stge3'; did you mean 'stage3'"),
        (
            {"cache": {"logits": "top10"}},
            r"top10, and there are 10 classes: keep fewer, such as .* --cache.logits fp16",
        ),
        ({"cache": {"codecs": ("pool=pool4,fp16",), "taps": ()}}, ""),
    ],
)
def test_what_cannot_be_built(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    config = cached_config(tmp_path, **sections)
    if not message:
        Setup(config, CPU)  # a rule that pools is for maps: the vector keeps its default
        return
    with pytest.raises(UserError, match=message):
        Setup(config, CPU)


def test_shards_are_whole_blocks() -> None:
    assert shards_of(Blocks.of([10, 0, 10, 7, 30, 2]), 20) == [(0, (10, 10)), (20, (7,)), (27, (30,)), (57, (2,))]
    assert shards_of(Blocks.of([3000, 5]), 20) == [(0, (1024, 1024, 952)), (3000, (5,))]
    assert shards_of(Blocks.uniform(0, 5), 20) == []


def test_a_plan_measures_loader_processes_at_their_own_pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, simulated, that each take 40 ms for a batch of 10 images; the clock knows of nothing else."""
    real, now = Sight.batches, [0.0]

    def batches(sight: Sight, keys: Sequence[Key]) -> Iterator[LaneBatch]:
        for number, batch in enumerate(real(sight, keys)):
            if number % 2 == 0:
                now[0] += 0.04
            yield batch

    setup = Setup(cached_config(tmp_path, data={"loader_workers": 0}), CPU)
    monkeypatch.setattr(measured_plan.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(Sight, "batches", batches)
    monkeypatch.setattr(measured_plan, "resolve_loader_workers", lambda number, source: 2)
    assert measured_plan._measure(setup).load == pytest.approx(0.04 / 2 / 10)


def test_features_that_are_not_finite_fit_no_codec(tmp_path: Path) -> None:
    config = cached_config(tmp_path, cache={"codecs": ("maps=pca4,uint8", "vectors=fp16")})
    setup = Setup(config, CPU)
    with torch.no_grad():
        next(setup.network.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match=r"stage3:map: the teacher's features of the .* are not all finite"):
        build(setup, in_process(setup))


def test_progress_counts_images_of_unfinished_units(tmp_path: Path) -> None:
    """On a CPU a unit may take a minute."""
    shown: dict[str, list[str]] = {"fitting": [], "caching": []}

    class Lines(console.Nobody):
        every = 0.0

        def status(self, status: console.Status | None) -> None:
            if status is not None and status.total:
                shown[status.what.partition(" ")[0]].append(f"{status.done} of {status.total}")

    before = console.use(Lines())
    config = cached_config(tmp_path, cache={"batch": 16})
    build_here(config)
    console.use(before)
    for told in shown.values():
        seen = [int(text.partition(" ")[0]) for text in told]
        assert seen == sorted(seen), "a unit that ends takes nothing away"
    assert list(dict.fromkeys(shown["fitting"])) == ["16 of 40", "32 of 40", "40 of 40"]
    batches = [
        min(16, sum(counts) - first) for _, counts in Setup(config, CPU).shards for first in range(0, sum(counts), 16)
    ]
    assert len(batches) > len(Setup(config, CPU).shards)
    assert list(dict.fromkeys(shown["caching"])) == [f"{done} of 120" for done in itertools.accumulate(2 * batches)]
