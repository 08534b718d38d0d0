"""Packs that are refused before the first step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_packed import LABELS, members, pack, quick
from tiny_cache import cached_config
from tiny_run import cpu, tiny_config

from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.errors import UserError
from mimkd_ray.train.packed import Member, train_pack

REFUSED: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "lanes": ({"train": {"lanes": 4}}, r"train\.lanes: 2 -> 4 \(members 0 -> 1, 2\)"),
    "seed": ({"train": {"seed": 3}}, r"train\.seed: 0 -> 3"),
    "data": ({"data": {"subset": 80}}, r"data\.subset: 60 -> 80"),
    "size": ({"data": {"image_size": 16}}, r"data\.image_size: 8 -> 16"),
    "mix": ({"mix": {"mixup_alpha": 0.2}}, r"mix\.mixup_alpha: 0\.0 -> 0\.2"),
    "teacher": ({"teacher": {"name": "cifar/resnet20"}}, r"teacher\.name: cifar/resnet8 -> cifar/resnet20"),
    "rhythm": ({"run": {"checkpoint_steps": 5}}, r"run\.checkpoint_steps: 0 -> 5"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_members_that_do_not_go_together_are_refused(tmp_path: Path, what: str) -> None:
    sections, message = REFUSED[what]
    other = tiny_config(**sections)
    with pytest.raises(UserError, match=message):
        pack([tiny_config(), other, other], tmp_path)


def test_a_cache_that_lacks_taps_names_what_builds_those_of_all_members(tmp_path: Path) -> None:
    config = cached_config(tmp_path / "cache")
    other = replace(config, loss=replace(config.loss, feature_pairs=("stage2:stage2",)))
    message = r"stage3:map, stage2:map, .*-pairs stage3:stage3 .*&& python .*-pairs stage2:stage2( |$)"
    with pytest.raises(UserError, match=message):
        pack([config, other, config], tmp_path)


def test_other_refusals(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    step, drawn = (cached_config(root, loss={"negatives": kind}) for kind in ("step", "cache"))
    with pytest.raises(UserError, match=r"step for members 0 of the pack and cache for members 1"):
        pack([step, drawn], tmp_path)
    config = tiny_config()
    with pytest.raises(UserError, match="one directory"):
        train_pack([Member(config, str(tmp_path))] * 2, open_data(config.data), None, cpu())
    with pytest.raises(UserError, match="no members"):
        train_pack([], open_data(config.data), None, cpu())
    context = cpu()
    context.world_size = 2
    with pytest.raises(UserError, match="trained by one worker, and there are 2"):
        train_pack([Member(config, str(tmp_path))], open_data(config.data), None, context)
    train_pack(members(quick(loss=LABELS), tmp_path), open_data(config.data), None, cpu(), lambda _, figures: figures)
    with pytest.raises(UserError, match=r"optim\.lr: 0\.05 -> 0\.01"):
        pack(quick(loss=LABELS)[1:], tmp_path)
