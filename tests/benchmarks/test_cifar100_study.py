"""The plan of the CIFAR-100 study: what is trained, in which order, and what is chosen."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from report import refresh
from study_arms import ABLATIONS, FACTORS, METHODS
from study_plan import SHORT, TUNING_SEED, Plan, by_protocol, short
from study_table import Study


def plan(root: Path, **changes: Any) -> Plan:
    base = {SHORT: short("cifar100", root, 0, 5000)}
    given = {"methods": ("alone", "crd", "mimkd"), "ablations": ("jsd",), "seeds": 2, "tuning": 3} | changes
    return Plan(base, root=root, **given)


def finish(place: Path, top1: float) -> None:
    """Leave what a finished run leaves."""
    place.mkdir(parents=True)
    result = {
        "student": {"top1": top1},
        "nats": {},
        "images_per_second": 500.0,
        "steps": 20,
        "lanes": 1,
        "lane_batch": 50,
        "epochs": 2.0,
    }
    (place / "result.json").write_text(json.dumps(result))


def test_every_method_gets_the_same_trials_and_the_teacher_comes_first(tmp_path: Path) -> None:
    own = plan(tmp_path)
    names = []
    for what, _, place in own.runs():
        names.append(what)
        finish(place, 50.0)
    assert len(names) == own.total() == 1 + 3 * 3 + 2 * (3 + 1)
    assert names[0] == f"{SHORT}: teacher cifar/resnet20"
    assert [n for n in names if "crd, tuning" in n] == [f"{SHORT}: crd, tuning, x {f:.2f}" for f in FACTORS[:3]]
    assert names[10:14] == [f"{SHORT}: {m}, seed 0" for m in ("alone", "crd", "mimkd", "jsd")]


def test_the_best_trial_on_held_out_rows_is_taken(tmp_path: Path) -> None:
    own = plan(tmp_path)
    for factor, (config, place) in own.trials(SHORT, "mimkd").items():
        assert config.data.holdout == 0.1
        assert config.train.seed == TUNING_SEED
        finish(place, {1.0: 20.0, 1 / 3: 30.0, 3.0: 10.0}[factor])
    assert own.factor(SHORT, "mimkd") == 1 / 3
    config, _ = own.final(SHORT, "mimkd", 1)
    assert (config.data.holdout, config.train.seed) == (0.0, 1), "students are measured on the test set"
    assert config.loss.feature_weight == pytest.approx(1 / 3)
    ablated, _ = own.final(SHORT, "jsd", 1)
    assert ablated.loss.feature_weight == pytest.approx(1 / 3), "an ablation has its method's tuned weights"
    assert ablated.loss.resolved_bound == "jsd"


def test_without_trials_weights_are_as_published(tmp_path: Path) -> None:
    config, _ = plan(tmp_path, tuning=0).final(SHORT, "crd", 0)
    assert config.loss.name == ("crd",)
    assert config.loss.weight_of("crd") == 0.8


def test_a_seed_has_the_same_rows_and_start_for_every_method(tmp_path: Path) -> None:
    own = plan(tmp_path, tuning=0)
    configs = [own.final(SHORT, method, 1)[0] for method in own.methods]
    assert len({(c.data.subset_seed, c.train.seed, c.optim, c.teacher) for c in configs}) == 1


def test_every_method_and_ablation_is_a_loss_of_its_own(tmp_path: Path) -> None:
    own = plan(tmp_path, methods=tuple(METHODS), ablations=tuple(ABLATIONS), tuning=0)
    losses = [own.final(SHORT, method, 0)[0].loss for method in (*METHODS, *ABLATIONS)]
    assert len(set(losses)) == len(losses)


def test_a_shorter_protocol_keeps_its_proportions(tmp_path: Path) -> None:
    config = by_protocol("resnet32x4_resnet8x4", "cifar100", tmp_path, 24)
    assert (config.train.epochs, config.optim.milestones, config.loss.rival_warmup) == (24, (15, 18, 21), 2.0)
    assert by_protocol("resnet32x4_resnet8x4", "cifar100", tmp_path, 0).optim.milestones == (150, 180, 210)


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    own = plan(tmp_path, tuning=0)
    found = {"alone": (20.0, 30.0), "crd": (21.0, 33.0), "mimkd": (25.0, 35.0), "jsd": (24.0, 36.0)}
    for method, values in found.items():
        for seed, top1 in enumerate(values):
            finish(tmp_path / SHORT / method / f"x1.00-seed{seed:02d}", top1)
    methods = Study.read(own).pairs[SHORT]
    assert methods["mimkd"]["against_alone"]["mean"] == 5.0
    assert methods["mimkd"]["against_alone"]["standard_error"] == 0.0
    assert methods["mimkd"]["against_crd"]["mean"] == 3.0  # 4 and 2
    assert methods["mimkd"]["against_crd"]["standard_error"] == pytest.approx(1.0)
    assert methods["jsd"]["against_mimkd"]["mean"] == 0.0  # an ablation: -1 and 1
    assert methods["jsd"]["against_mimkd"]["standard_error"] == pytest.approx(1.0)
    assert "against_mimkd" not in methods["crd"]
    assert methods["alone"]["seconds_per_epoch"] == pytest.approx(1.0)  # 500 images an epoch


def test_half_a_study_is_told_of(tmp_path: Path) -> None:
    own = plan(tmp_path, tuning=0)
    finish(tmp_path / SHORT / "mimkd" / "x1.00-seed01", 25.0)
    study = Study.read(own)
    assert "25.00" in study.text()
    assert list(study.pairs[SHORT]) == ["mimkd"]
    study.write(tmp_path / "study.json", complete=False)
    assert json.loads((tmp_path / "study.json").read_text())["complete"] is False


def test_the_table_goes_between_its_markers_and_nothing_else_changes(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- cifar100 -->\nold\n<!-- /cifar100 -->\nb\n")
    refresh(readme, "cifar100", "| new |")
    assert readme.read_text() == "a\n<!-- cifar100 -->\n| new |\n<!-- /cifar100 -->\nb\n"
    with pytest.raises(SystemExit, match="needs one line '<!-- other -->'"):
        refresh(readme, "other", "| new |")
