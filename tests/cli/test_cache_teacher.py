"""The commands of jobs/cache_teacher.py, and its errors, without Ray. tests/one_ray has it under Ray, and killed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_cache import files

from mimkd_ray import storage
from mimkd_ray.cli.cache_teacher import main
from mimkd_ray.config import Config

FLAGS = [
    *("custom", "--data.views", "3", "--teacher.name", "cifar/resnet8", "--loss.feature-pairs", "stage3:stage3"),
    *("--cache.shard-rows", "64", "--cache.batch", "16", "--cache.calibration-rows", "200"),
    *("--launch.cpus-per-worker", "1", "--cache.workers", "1"),
]
RECIPES = {"custom": Config}


def local(root: Path, *more: str) -> list[str]:
    small = ["--launch.backend", "local", "--data.subset", "100", "--cache.batch", "20"]
    return [*more, *FLAGS, *small, "--cache.root", str(root)]


def _said(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, without what a slow machine says in between."""
    lines = capsys.readouterr().out.splitlines(keepends=True)
    return "".join(line for line in lines if ": goes on" not in line)


def test_plan_build_and_look_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "cache"
    assert main(RECIPES, local(root, "plan")) == 0
    begun, _, plan = _said(capsys).partition("\n")
    assert begun == "measuring what the cache costs"
    assert not root.exists(), "a plan writes nothing"
    assert plan.startswith(f"cache of 100 images x 3 views in {root}\n")
    assert "stage3 (map 64x2x2): pool4,pca256,uint8, 256 bytes an image\n" in plan
    assert "logits: fp16, 20 bytes an image, not read by this run" in plan
    assert "together 484 bytes an image and view, 154.8 kB in all" in plan
    assert "training reads 384 bytes an image: at " in plan
    assert main(RECIPES, local(root)) == 0
    built = _said(capsys)
    assert built.startswith(f"{begun}\n{plan.splitlines()[0]}")
    assert "caching features (6 of 6 units to do)" in built
    assert f"{root}: 100 images x 3 views, " in built
    admin = ["--cache.root", str(root)]
    assert main(RECIPES, ["ls", *admin]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 5
    assert re.search(
        r"stage3 \(map, pool4,pca256,uint8\): 3 views of 100 images, .* MB, relative error 0\.0\d+, 0 hours old; "
        r"cifar/resnet8, weights [0-9a-f]{8}, float32; pipeline digits at 8 pixels, view seed 0, data ",
        listed[3],
    )
    assert re.search(r"  logits \(fp16\): 3 views", listed[0])
    assert re.search(r"  pixels: 3 views of 100 images, .* MB, 0 hours old; pipeline digits", listed[1])
    assert main(RECIPES, [*local(root, "plan"), "--cache.logits", "top2"]) == 0
    assert "logits: top2, 10 bytes an image" in capsys.readouterr().out
    assert main(RECIPES, ["verify", *admin]) == 0
    assert "24 objects, " in capsys.readouterr().out
    assert main(RECIPES, ["gc", *admin]) == 0
    assert capsys.readouterr().out == "0 objects, 0.0 MB that no manifest lists\n"


def test_damage_is_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "cache"
    assert main(RECIPES, local(root)) == 0
    whole = files(root)
    flipped, cut, gone, beside = sorted(root.glob("*/view-00001/*.parquet"))[:4]
    data = bytearray(flipped.read_bytes())
    data[len(data) // 4] ^= 4
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:-9])
    gone.unlink()
    data = bytearray(beside.read_bytes())
    data[-20] ^= 4
    beside.write_bytes(data)
    admin = ["--cache.root", str(root)]
    capsys.readouterr()
    assert main(RECIPES, ["verify", *admin]) == 1
    said = capsys.readouterr().out
    assert re.search(rf"{flipped} is damaged: the sha256 of row group \d+ is not the one in its manifest", said)
    assert re.search(rf"{cut} has [\d,]+ bytes, and its manifest says [\d,]+", said)
    assert f"{gone} is gone" in said
    assert f"{beside} is damaged: the sha256 of its row groups is right" in said
    assert said.endswith("4 damaged or gone; --mend true removes them, and a build makes them anew\n")
    assert main(RECIPES, ["verify", *admin, "--mend", "true"]) == 0
    said = capsys.readouterr().out
    assert "removed" in said
    assert said.endswith("4 damaged or gone; give the build command again\n")
    assert main(RECIPES, local(root)) == 0
    assert "caching features (2 of 6 units to do)" in capsys.readouterr().out, "two units had the four objects"
    assert files(root) == whole
    assert main(RECIPES, ["verify", *admin]) == 0


def test_garbage_is_nothing_that_no_build_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "cache"
    assert main(RECIPES, local(root)) == 0
    key = next(path.parent for path in root.glob("*/view-00000.manifest.json"))
    (root / "calibrations").mkdir(exist_ok=True)
    (key / "plots").mkdir()
    mine = [
        "notes.txt",
        "plots/a.png",
        "view-00000/train-0.parquet",
        "../calibrations/mine.safetensors",
        "../x.parquet",
    ]
    for name in mine:
        (key / name).write_bytes(b"mine")
    assert main(RECIPES, ["gc", "--cache.root", str(root), "--hours", "0", "--delete", "true"]) == 0
    assert "0 objects" in capsys.readouterr().out.splitlines()[-1]
    assert [name for name in mine if not (key / name).exists()] == []


def test_garbage_is_what_no_manifest_lists(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "cache"
    assert main(RECIPES, local(root)) == 0
    whole = files(root)
    key = next(path.parent for path in root.glob("*/view-00000.manifest.json"))
    (key / "view-00000" / "0000000000-0000000064-ffffffffffffffff.parquet").write_bytes(b"of a late builder")
    (key / ".view-00000.manifest.json.77-abc.tmp").write_bytes(b"of a killed one")
    (key / ".view-00001.manifest.json.88-abc.tmp").write_bytes(b"of one at work, which renames it soon")
    modified = storage.modified

    def renamed(url: str) -> float:
        if url.endswith(".88-abc.tmp"):
            Path(url).unlink()
        return modified(url)

    monkeypatch.setattr(storage, "modified", renamed)
    (key / "view-00007").mkdir()
    (key / "view-00007" / "0000000000-0000000064-ffffffffffffffff.parquet").write_bytes(b"of a build in progress")
    capsys.readouterr()
    assert main(RECIPES, ["gc", "--cache.root", str(root)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("not needed: ")
    assert "view-00000" in said[0]
    assert said[-1] == "1 objects, 0.0 MB that no manifest lists; --delete true removes them"
    assert main(RECIPES, ["gc", "--cache.root", str(root), "--hours", "0", "--delete", "true"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("3 objects")
    assert files(root) == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ls", "--cache.root", "/nowhere"], "--cache.root '/nowhere' does not exist"),
        (["verify"], "--cache.root '' does not exist"),
        (["build", "custom", "--data.views", "0", "--cache.root", "x"], "data.views is 0"),
        (["build", "costum"], "unknown recipe 'costum'; did you mean 'custom'?"),
        (["custom", "--cache.rot", "x"], "Unrecognized"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(RECIPES, arguments) == 2
    assert message in capsys.readouterr().err
