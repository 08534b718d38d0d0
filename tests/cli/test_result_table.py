"""The table at the end of a job."""

from __future__ import annotations

import math
from typing import Any

from mimkd_ray.cli.result_table import result_table
from mimkd_ray.errors import count
from mimkd_ray.train.compare import paired


def single(**changes: Any) -> dict[str, Any]:
    return {
        "teacher": {"name": "resnet34", "top1": 73.314, "top5": 91.42},
        "student": {"name": "resnet18", "top1": 71.236, "top5": 90.0, "rows": 50000},
        "nats": {"feature/layer4-layer4": {"nats": 2.5, "ceiling": 4.159}},
        "images_per_second": 1234.4,
    } | changes


def comparison(alone: list[float], **arms: list[float]) -> dict[str, Any]:
    def arm(top1: list[float]) -> dict[str, Any]:
        mean = sum(top1) / len(top1)
        sd = (sum((x - mean) ** 2 for x in top1) / (len(top1) - 1)) ** 0.5 if len(top1) > 1 else None
        own = {"top1": top1, "mean": mean, "sd": sd, "images_per_second": 100.0, "nats": {}}
        if top1 is not alone:
            own["against_alone"] = paired([a - b for a, b in zip(top1, alone, strict=True)])
        return own

    return {
        "recipe": "demo",
        "teacher": {"name": "cifar/resnet20", "top1": 98.0, "top5": 100.0},
        "student": {"name": "cifar/resnet8_w4"},
        "compare": {name: arm(values) for name, values in {"alone": alone, **arms}.items()},
        "seeds": len(alone),
        "workers": 2,
        "train_rows": 200,
        "held_out_rows": 450,
    }


def cells(table: str, label: str) -> list[str]:
    """The words after the label of its row."""
    (row,) = [line for line in table.splitlines() if line.startswith(label)]
    return row.removeprefix(label).split()


def test_single_run() -> None:
    table = result_table(single())
    assert cells(table, "teacher resnet34") == ["73.31", "91.42"]
    assert cells(table, "student resnet18") == ["71.24", "-2.08", "90.00", "1234"]
    assert "feature/layer4-layer4: 2.500 of at most 4.16 nats" in table


def test_a_head_that_learned_without_labels_is_not_held_against_the_teacher() -> None:
    table = result_table(single(student={"name": "resnet18", "top1": 0.7, "top5": 4.25, "rows": 500, "knn": 17.1}))
    assert cells(table, "student resnet18") == ["0.70", "4.25", "1234"]
    assert cells(table, "student by k-NN") == ["17.10"]


def test_a_head_that_nothing_has_trained_has_no_figure() -> None:
    student = {"name": "resnet18", "top1": 0.2, "top5": 1.0, "rows": 500, "knn": 17.1, "head_learns": False}
    table = result_table(single(student=student))
    assert cells(table, "student resnet18 by k-NN") == ["17.10", "1234"]
    assert table.count("student") == 1


def test_bounds_without_a_ceiling_are_estimates() -> None:
    """DV, JSD and SMILE read too much in small batches. JSON has None for their infinite ceiling."""
    for ceiling in (None, math.inf):
        table = result_table(single(nats={"global/pool-pool": {"nats": 11.2, "ceiling": ceiling}}))
        assert "global/pool-pool: 11.200 nats (estimate)" in table
        assert "at most" not in table


def test_columns_are_aligned() -> None:
    head, rule, *rows = result_table(single(nats={})).splitlines()
    assert len(head) == len(rule) == len(rows[-1])
    assert set(rule) == {"-"}
    end = head.index("top-1 %") + len("top-1 %")
    assert [row[:end].split()[-1] for row in rows] == ["73.31", "71.24"]


def test_single_run_without_teacher_and_information() -> None:
    table = result_table(single(teacher=None, nats={}))
    assert "teacher" not in table
    assert "mutual information" not in table
    assert cells(table, "student resnet18") == ["71.24", "90.00", "1234"]


def test_nothing_is_won_or_lost_where_nothing_has_a_label() -> None:
    student = {"name": "resnet18", "top1": math.nan, "top5": None, "knn": 60.5}
    table = result_table(single(student=student))
    assert cells(table, "student resnet18") == ["-", "-", "1234"]
    assert cells(table, "student by k-NN") == ["60.50"]


def test_a_reading_that_is_not_valid_says_so() -> None:
    nats = {"global/pool-pool": {"nats": None, "ceiling": None}}
    table = result_table(single(nats=nats))
    assert "global/pool-pool: no valid reading" in table
    assert "at most" not in table


def test_winning_comparison() -> None:
    # Differences 3, 5, 4: mean 4, standard error 1 / sqrt(3).
    table = result_table(comparison([80.0, 81.0, 82.0], kd=[80.5, 80.5, 82.5], mimkd=[83.0, 86.0, 86.0]))
    assert cells(table, "student alone") == ["81.00", "±", "1.00", "100"]
    assert cells(table, "student, MIMKD") == ["85.00", "±", "1.73", "+4.00", "±", "0.58", "3", "of", "3", "100"]
    assert cells(table, "teacher cifar/resnet20") == ["98.00"]
    assert "200 training images, 450 held out, 3 seeds, 2 workers" in table
    assert "\nMIMKD helps the student.\n" in table
    assert "Hinton KD makes no clear difference to the student." in table
    assert "The higher mean is MIMKD's." in table


def test_losing_comparison_says_so() -> None:
    table = result_table(comparison([80.0, 81.0, 82.0], kd=[81.0, 82.5, 83.5], mimkd=[77.0, 78.5, 78.5]))
    assert cells(table, "student, MIMKD")[3:] == ["-3.00", "±", "0.29", "0", "of", "3", "100"]
    assert "\nMIMKD harms the student.\n" in table
    assert "MIMKD helps" not in table
    assert "The higher mean is Hinton KD's." in table


def test_a_difference_within_two_standard_errors_is_no_verdict() -> None:
    # Differences 2, -1, 2: mean 1, standard error 1.
    table = result_table(comparison([80.0, 80.0, 80.0], mimkd=[82.0, 79.0, 82.0]))
    assert cells(table, "student, MIMKD")[3:6] == ["+1.00", "±", "1.00"]
    assert "MIMKD makes no clear difference to the student." in table
    assert "higher mean" not in table, "nothing to compare MIMKD with"


def test_equal_top1_in_every_seed_is_no_harm() -> None:
    table = result_table(comparison([10.0, 10.0, 10.0], kd=[10.0, 10.0, 10.0]))
    assert table.endswith("\nHinton KD makes no clear difference to the student.")


def test_one_seed_has_no_spread_and_no_verdict() -> None:
    table = result_table(comparison([80.0], kd=[81.0], mimkd=[90.0]))
    assert cells(table, "student, MIMKD") == ["90.00", "+10.00", "1", "of", "1", "100"]
    assert table.endswith("\nOne seed is too few to say who helps and who harms: pass --compare.seeds 3 or more.")


def test_a_rival_as_an_arm() -> None:
    said = result_table(comparison([90.0, 91.0], dkd=[92.0, 93.5]))
    assert "student, dkd" in said


def test_two_seeds_are_no_verdict() -> None:
    table = result_table(comparison([80.0, 81.0], kd=[77.0, 78.01], mimkd=[83.0, 84.01]))
    assert "harms" not in table.replace("who harms", "")
    assert "Two seeds are too few" in table


def test_one_is_no_plural() -> None:
    assert [count(n, "class", "classes") for n in (0, 1, 1000)] == ["0 classes", "1 class", "1,000 classes"]
    assert [count(n, "CPU") for n in (1.0, 0.5)] == ["1 CPU", "0.5 CPUs"]
    assert "450 held out, 1 seed, 1 worker\n" in result_table(comparison([90.0]) | {"workers": 1})
