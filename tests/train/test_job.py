from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import cpu, run_tiny, tiny_config

from mimkd_ray.cli.preflight import preflight
from mimkd_ray.config import CompareConfig, TeacherConfig
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.errors import UserError
from mimkd_ray.models.build_model import build_model
from mimkd_ray.train import job
from mimkd_ray.train.compare import arm_config, paired, summarise
from mimkd_ray.train.job import measure, obtain_teacher, run_job
from mimkd_ray.train.networks.teacher_check import chance_limit, check_accuracy
from mimkd_ray.train.records.run_dir import jsonable


def test_a_teacher_below_expectation_stops_the_run_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reaches \d+\.\d\d % top-1 on 450 .* 95\.00 % was expected"):
        run_tiny(tmp_path, teacher={"expect_top1": 95.0})
    assert not (tmp_path / "metrics.jsonl").exists()
    own = TeacherConfig(train=True, expect_top1=95.0)
    check_accuracy(own, 60.0, 450, 10)  # a recipe's figure is that of published weights


def test_a_teacher_that_guesses_is_refused_unless_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has random weights, and nothing to teach: pass --teacher.weights published"):
        run_tiny(tmp_path / "run", teacher={"allow_chance": False})
    with pytest.raises(UserError, match=r"has random weights"):
        preflight(tiny_config(teacher={"allow_chance": False}))
    preflight(arm_config(tiny_config(teacher={"allow_chance": False}), "alone", 0))  # nobody teaches
    torch.manual_seed(1)
    save_file(build_model("cifar/resnet8", 10).state_dict(), tmp_path / "guesses.safetensors")
    weights = str(tmp_path / "guesses.safetensors")
    with pytest.raises(UserError, match=r"on 450 held-out images of 10 classes; chance is 10.00 %, and below 14.24 %"):
        run_tiny(tmp_path / "run", teacher={"weights": weights, "allow_chance": False})
    guesses = {"train": True, "epochs": 1, "lr": 1e-9, "allow_chance": False}
    with pytest.raises(UserError, match=r"train it longer \(--teacher.epochs"):
        run_tiny(tmp_path / "trained", teacher=guesses, train={"lane_batch": 30})
    assert not list(tmp_path.glob("*/metrics.jsonl"))


@pytest.mark.parametrize(("classes", "rows"), [(2, 4), (10, 30), (10, 450), (100, 10_000)])
def test_chance_is_told_from_knowledge(classes: int, rows: int) -> None:
    """By counting the guesses of 20,000 networks."""
    rng = np.random.default_rng(0)
    guessed = 100 * rng.binomial(rows, 1 / classes, size=20_000) / rows
    assert np.mean(guessed >= chance_limit(classes, rows)) < (0.35 if rows < 10 else 0.01)  # few images cannot tell
    assert chance_limit(classes, rows) <= 50 + 50 / classes


def test_weights_from_a_file_are_the_teacher(tmp_path: Path) -> None:
    network = build_model("cifar/resnet8", 10)
    save_file(network.state_dict(), tmp_path / "teacher.safetensors")
    config = tiny_config(teacher={"weights": str(tmp_path / "teacher.safetensors")})
    model, facts = obtain_teacher(config, open_data(config.data), cpu(), str(tmp_path / "run"))
    assert model is not None
    for name, value in load_file(tmp_path / "teacher.safetensors").items():
        assert torch.equal(model.state_dict()[name], value)
    assert len(facts["teacher"]["sha256"]) == 64


def test_a_teacher_is_measured_once_for_its_weights_and_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By runs beside each other."""
    measured: list[int] = []

    def counted(*arguments: Any) -> dict[str, Any]:
        found = measure(*arguments)
        measured.append(found["rows"])
        return found

    monkeypatch.setattr(job, "measure", counted)
    runs = iter("abcdef")

    def look(rows: int = 20, **data: int) -> None:
        config = tiny_config(teacher={"weights": str(file)}, data={"val_rows": rows, **data})
        facts = obtain_teacher(config, open_data(config.data), cpu(), str(tmp_path / next(runs)))[1]
        assert facts["teacher"]["rows"] == rows == measured[-1]

    for number in range(2):
        file = tmp_path / f"{number}.safetensors"
        torch.manual_seed(number)
        save_file(build_model("cifar/resnet8", 10).state_dict(), file)
        look()
        look(subset_seed=1)  # other training images
        assert measured == [20] * (number + 1)
    look(30)
    assert measured == [20, 20, 30]


def test_held_out_images_are_limited(tmp_path: Path) -> None:
    result = run_tiny(tmp_path / "run", data={"val_rows": 20}, train={"max_steps": 1})
    assert result["student"]["rows"] == 20 == result["teacher"]["rows"]


def test_a_random_teacher_is_the_same_after_a_restart(tmp_path: Path) -> None:
    config = tiny_config()
    data = open_data(config.data)
    digests = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        digests.append(obtain_teacher(config, data, cpu(), str(tmp_path))[1]["teacher"]["sha256"])
    assert digests[0] == digests[1]


def test_a_comparison_is_the_same_of_fresh_and_of_read_results() -> None:
    """JSON has null for what is no number."""
    fresh = [
        {"student": {"top1": 50.0}, "images_per_second": 1.0, "nats": {"t": {"nats": nats, "ceiling": np.inf}}}
        for nats in (np.nan, 0.5)
    ]
    assert jsonable(summarise(fresh, None)) == summarise(jsonable(fresh), None)


def test_a_comparison_pairs_its_arms_and_can_be_taken_up_again(tmp_path: Path) -> None:
    short = tiny_config(train={"epochs": 1})
    config = replace(short, compare=CompareConfig(seeds=2, arms=("alone", "kd", "mimkd")))
    result = run_job(config, cpu(), str(tmp_path))
    tops = {
        arm: [
            json.loads((tmp_path / f"{arm}-seed{seed:02d}/result.json").read_text())["student"]["top1"]
            for seed in (0, 1)
        ]
        for arm in ("alone", "kd", "mimkd")
    }
    for arm, value in result["compare"].items():
        assert value["top1"] == tops[arm]
        assert value["mean"] == pytest.approx(statistics.fmean(tops[arm]))
    a, b = (m - n for m, n in zip(tops["mimkd"], tops["alone"], strict=True))
    against = result["compare"]["mimkd"]["against_alone"]
    assert against["mean"] == pytest.approx((a + b) / 2)
    assert against["standard_error"] == pytest.approx(abs(a - b) / 2)  # sd / sqrt(2) of two differences
    assert "against_alone" not in result["compare"]["alone"]
    assert set(result["compare"]["mimkd"]["nats"]) >= {"feature/stage3-stage3"}

    # Killed before its end: one run and the summary are missing; the others are not trained again.
    (tmp_path / "result.json").unlink()
    (tmp_path / "mimkd-seed01/result.json").unlink()
    kept = (tmp_path / "alone-seed00/student.safetensors").stat().st_mtime_ns
    again = run_job(config, cpu(), str(tmp_path))
    assert again["compare"]["mimkd"]["top1"] == result["compare"]["mimkd"]["top1"]
    assert (tmp_path / "alone-seed00/student.safetensors").stat().st_mtime_ns == kept


def test_arms_of_a_seed_differ_in_their_loss_alone() -> None:
    config = replace(tiny_config(), compare=CompareConfig(seeds=3, kd_weight=0.7))
    alone, kd, mimkd = (arm_config(config, arm, 2) for arm in ("alone", "kd", "mimkd"))
    assert not alone.loss.uses_teacher
    assert (kd.loss.kd_weight, kd.loss.uses_features) == (0.7, False)
    assert mimkd.loss == config.loss
    rkd = arm_config(config, "rkd", 2)
    assert rkd.loss == replace(config.loss, name=("rkd",))
    assert alone.data == kd.data == mimkd.data
    assert alone.train == kd.train == mimkd.train
    assert alone.data.subset_seed == 2
    assert alone.data.split_seed == config.data.split_seed
    own = replace(config, loss=replace(config.loss, ce_weight=0.0))
    assert arm_config(own, "alone", 0).loss.resolved_ce_weight == 1.0, "whatever the others have beside their terms"
    assert arm_config(own, "kd", 0).loss.resolved_ce_weight == 0.0


def test_paired_statistics() -> None:
    value = paired([1.0, 3.0, -1.0, 1.0])
    assert value["mean"] == pytest.approx(1.0)
    assert value["standard_error"] == pytest.approx((8 / 3) ** 0.5 / 2)
    assert (value["wins"], value["of"]) == (3, 4)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"root": "no/such/folder"}}, "no/such/folder"),
        ({"teacher": {"weights": "no/such.safetensors"}}, r"no weights file no/such\.safetensors"),
        ({"teacher": {"name": "resnet999"}}, "resnet999"),
        ({"loss": {"feature_pairs": ("stage4:stage3",)}}, "'stage4' not found"),
        ({"train": {"lane_batch": 50}}, "60 rows, and one step needs 100"),
    ],
)
def test_preflight_finds_it_before_any_worker(sections: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        preflight(tiny_config(**sections))


def test_preflight_finds_weights_of_another_class_count(tmp_path: Path) -> None:
    save_file(build_model("cifar/resnet8", 100).state_dict(), tmp_path / "hundred.safetensors")
    with pytest.raises(UserError, match=r"100 classes.*10"):
        preflight(tiny_config(teacher={"weights": str(tmp_path / "hundred.safetensors")}))


def test_preflight_passes_a_good_config() -> None:
    preflight(tiny_config())
