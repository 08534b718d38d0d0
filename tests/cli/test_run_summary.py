"""What a run says at its beginning and at its end."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_run import tiny_config

from mimkd_ray.__main__ import main
from mimkd_ray.cli.commands import COMMANDS
from mimkd_ray.cli.run_summary import closing, opening
from mimkd_ray.places import RAY_PACKAGES


def test_who_teaches_whom_on_what_and_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mimkd_ray.cli.run_summary.told", lambda _: "two threads")
    first, *rows = opening(tiny_config(train={"max_steps": 5}), "runs/one").splitlines()
    assert first == "tiny"
    assert [row.split(None, 1) for row in rows] == [
        ["teacher", "cifar/resnet8, weights random"],
        ["student", "cifar/resnet8_w4, weights random"],
        ["loss", "cross-entropy + mimkd"],
        ["data", "digits, 60 training images"],
        ["views", "digits, 8 pixels, a new one every epoch"],
        ["batch", "20 images (2 x 10), 2 epochs, at most 5 steps"],
        ["device", "GPU if there is one, else CPU, this process: two threads"],
        ["results", "runs/one"],
    ]
    own = {"name": "cifar/resnet20", "train": True, "epochs": 30}
    said = opening(tiny_config(teacher=own, data={"views": 4}, cache={"root": "s3://b/c"}), "x")
    assert "teacher  cifar/resnet20, trained first, 30 epochs of all training images\n" in said
    assert "trained first, 30 epochs\n" in opening(tiny_config(teacher=own, data={"subset": 0}), "x")
    assert "4 views of an image, teacher's features from s3://b/c\n" in said
    assert "loss     mimkd\n" in opening(tiny_config(data={"labels": "none"}), "x")
    kd = tiny_config(loss={"kd_weight": 9.0, "kd_logits": "standardised"})
    assert "loss     cross-entropy + KD 9 (standardised logits) + mimkd\n" in opening(kd, "x")


def test_a_rate_that_would_never_drop_is_said() -> None:
    steps = {"schedule": "step", "milestones": (150, 180), "lr": 0.05}
    said = "  rate     0.05 to the end: optim.milestones 150, 180 come after the last epoch\n"
    assert said in opening(tiny_config(train={"epochs": 150}, optim=steps), "x")
    assert "rate" not in opening(tiny_config(train={"epochs": 151}, optim=steps), "x")
    assert "rate" not in opening(tiny_config(train={"epochs": 150}), "x"), "a cosine falls"


def test_one_is_no_plural(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    limits = {"epochs": 1, "max_steps": 1}
    one = tiny_config(compare={"seeds": 1}, train=limits, launch={"backend": "ray", "workers": 1})
    told = opening(one, "runs/one")
    assert "mimkd: 1 seed each" in told
    assert "1 epoch, at most 1 step\n" in told
    assert ", 1 worker of Ray: 1 thread and 0 loader processes\n" in told
    assert not re.search(r"\b1 \w+s\b", told)
    ranged = tiny_config(launch={"backend": "ray", "workers": "1..2"})
    assert ", 1..2 workers of Ray: 1 thread and 0 loader processes each\n" in opening(ranged, "runs/some")


def test_the_cluster_of_the_environment_is_one_that_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    on_ray = tiny_config(launch={"backend": "ray", "workers": 2})
    assert ", 2 workers of Ray: OMP_NUM_THREADS 3 and " in opening(on_ray, "x")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")  # as where jobs are submitted, and runs shown
    assert "OMP_NUM_THREADS" not in opening(on_ray, "x"), "nodes have environments of their own"


@pytest.mark.parametrize("report", [None, "s3://b/a run/report.html"])
@pytest.mark.parametrize("seeds", [0, 3])
def test_the_end_names_the_next_commands(seeds: int, report: str | None) -> None:
    said = closing(tiny_config(compare={"seeds": seeds}), "s3://b/a run", report).splitlines()
    assert said[0] == "run directory: s3://b/a run"
    assert ([report] if report else []) == [
        line.removeprefix("report: ") for line in said if line.startswith("report:")
    ]
    student = "s3://b/a run/mimkd-seed00" if seeds else "s3://b/a run"
    commands = [line.removeprefix("  python -m mimkd_ray ") for line in said[said.index("next:") + 1 :]]
    again = [] if report else ["report 's3://b/a run'"]
    assert commands == [f"evaluate '{student}'", f"export '{student}'", *again]
    assert {command.split()[0] for command in commands} <= COMMANDS.keys()


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (("evaluate", "--student.weights", "random"), "--eval.out"),
        (("export", "--network", "cifar/resnet8", "--weights", "random", "--data.root", "digits"), "--out"),
        (("report", "one", "two"), "--out"),
    ],
)
def test_results_are_not_left_in_a_folder_that_ray_removes(
    arguments: tuple[str, ...],
    flag: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    package = tmp_path / RAY_PACKAGES.strip("/") / "_ray_pkg_ab"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    assert main(list(arguments)) == 2
    assert re.search(rf"is a temporary folder of Ray's.*pass {flag} with a folder", capsys.readouterr().err)
