"""As much as long use brings: memory and work are bounded by what is needed, not by what is there."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from some_trials import point, trial

from mimkd_ray.config import RunConfig
from mimkd_ray.data.sources.folders import list_classes
from mimkd_ray.search.report import study
from mimkd_ray.train.records.run_dir import MetricsLog, read_metrics

MEGABYTE = 1 << 20


def peak(work: Callable[[], Any]) -> tuple[Any, int]:
    """What it returns, and the most bytes that it held."""
    tracemalloc.start()
    try:
        return work(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_many_lines_of_metrics_are_never_in_memory_at_once(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    with file.open("w") as out:
        for step in range(1, 60_001):
            kind = "eval" if step % 10_000 == 0 else "train"
            out.write(json.dumps({"kind": kind, "step": step, "loss": 1 / step, "note": "x" * 100}) + "\n")
    assert file.stat().st_size > 8 * MEGABYTE
    found, most = peak(lambda: read_metrics(str(tmp_path), "eval"))
    assert [line["step"] for line in found] == list(range(10_000, 60_001, 10_000))
    assert most < 3 * MEGABYTE
    log, most = peak(lambda: MetricsLog(str(tmp_path), 45_000, RunConfig(tensorboard=False)))
    log.close()
    assert most < 3 * MEGABYTE
    assert file.read_bytes().count(b"\n") == 45_000


@pytest.fixture(scope="module")
def many() -> study.Study:
    """A search of 2,000 ended trials: its report took five minutes."""
    curve = (point(1, 50.0),)
    lr = {n: {"optim.lr": 0.1 / (n + 1)} for n in range(2000)}
    return study.Study([trial(n, score=n / 10, params=lr[n], curve=curve) for n in lr], "top1")


@pytest.mark.parametrize(
    ("figure", "drawn_by", "most"),
    [
        ("importances", "plot_param_importances", 200),
        ("parallel", "plot_parallel_coordinate", 100),
        ("curves", "plot_intermediate_values", 100),
    ],
)
def test_what_takes_long_is_drawn_of_some_of_many_trials(
    figure: str, drawn_by: str, most: int, many: study.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def draws(of: Any, **_: Any) -> None:
        drawn.extend(each.number for each in of.get_trials(states=(study.TrialState.COMPLETE,)))
        raise InterruptedError

    monkeypatch.setattr(study, drawn_by, draws)
    with pytest.raises(InterruptedError):
        getattr(many, figure)()
    assert len(set(drawn)) == most
    best_first = range(1999, -1, -1)
    assert set(drawn) == set(best_first[::10] if figure == "importances" else best_first[:most])


def test_the_work_of_listing_class_folders_grows_with_their_number(tmp_path: Path) -> None:
    """Of this process's own time, as other programs run beside; quadratic work would take a hundred times as much."""
    seconds = []
    for number in (200, 2000):
        for name in range(number):
            folder = tmp_path / str(number) / f"class{name:05d}"
            folder.mkdir(parents=True)
            (folder / "a.png").write_bytes(b"x")
        began = time.process_time()
        assert len(list_classes(str(tmp_path / str(number)), None).classes) == number
        seconds.append(time.process_time() - began)
    assert seconds[1] < 30 * max(seconds[0], 0.01)
