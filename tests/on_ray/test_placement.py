"""The number of workers requested from a cluster, with resources given by the test."""

from __future__ import annotations

import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from jobs_here import TAKES_LONG
from ray.train import ScalingConfig

from mimkd_ray.cli import prepare_data
from mimkd_ray.config import Config, SearchConfig
from mimkd_ray.config.form.json_form import from_dict, to_dict
from mimkd_ray.config.jobs.search import search_job
from mimkd_ray.errors import Interrupted, UserError
from mimkd_ray.on_ray import cache_actors, driver_console, run_work_units
from mimkd_ray.on_ray.nodes import node_capacity, placement, resource_holders
from mimkd_ray.on_ray.nodes.cluster import connect
from mimkd_ray.on_ray.nodes.node_capacity import Capacity
from mimkd_ray.on_ray.nodes.placement import LossWatch, fewest, scaling
from mimkd_ray.on_ray.nodes.resource_holders import Held
from mimkd_ray.on_ray.search import tune_search
from mimkd_ray.recipes import IMAGENET_RECIPES


def _config(lanes: int = 8, **launch: Any) -> Config:
    base = IMAGENET_RECIPES["demo"]()
    return replace(
        base, train=replace(base.train, lanes=lanes), launch=replace(base.launch, **{"workers": 0, **launch})
    )


@pytest.fixture
def resources(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Replace the cluster's resources by a dictionary that a test can change."""
    has: dict[str, float] = {"CPU": 16}
    monkeypatch.setattr(placement.ray, "cluster_resources", lambda: dict(has))
    monkeypatch.setattr(placement.resource_holders, "held_by_others", list)
    node = {"Alive": True, "Resources": has, "NodeID": "n"}
    monkeypatch.setattr(node_capacity.ray, "nodes", lambda: [node, {"Alive": False, "Resources": {"CPU": 99.0}}])
    return has


def test_by_default_as_many_as_there_are_lanes_or_cpus(resources: dict[str, float]) -> None:
    assert scaling(_config(), own=True).num_workers == 8
    assert scaling(_config(), own=True).resources_per_worker == {"CPU": 2}
    resources["CPU"] = 3
    assert scaling(_config(), own=False).num_workers == 3


def test_a_gpu_each_and_its_share_of_the_cpus(resources: dict[str, float]) -> None:
    resources["GPU"] = 4
    made = scaling(_config(), own=False)
    assert (made.num_workers, made.use_gpu, made.resources_per_worker) == (4, True, {"CPU": 4, "GPU": 1})


def test_a_range_is_elastic_in_a_cluster_and_the_most_that_fit_at_home(resources: dict[str, float]) -> None:
    made = scaling(_config(workers="2..8", resize_seconds=7), own=False)
    assert made.num_workers == (2, 8)
    assert made.elastic_resize_monitor_interval_s == 7
    assert scaling(_config(workers="2..8"), own=True).num_workers == 8
    resources["CPU"] = 5
    assert scaling(_config(workers="2..8"), own=True).num_workers == 5
    assert scaling(_config(workers="2..8"), own=False).num_workers == (2, 8), "the others may still come"
    resources["CPU"] = 1
    with pytest.raises(
        UserError, match="2 workers with 1 CPU each do not fit: the cluster has 1 CPU and 0 GPUs on 1 node"
    ):
        scaling(_config(workers="2..8"), own=False)


def nodes_of(monkeypatch: pytest.MonkeyPatch, *nodes: tuple[int, int]) -> None:
    monkeypatch.setattr(placement.Capacity, "of_cluster", classmethod(lambda *_: Capacity(nodes)))
    monkeypatch.setattr(placement.resource_holders, "held_by_others", list)


def test_a_worker_has_no_more_cpus_than_a_node_has(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes_of(monkeypatch, (0, 0), (2, 0), (6, 0))
    assert scaling(_config(workers=2), own=False).resources_per_worker == {"CPU": 3}, "both on the larger"
    assert scaling(_config(workers=4), own=False).resources_per_worker == {"CPU": 2}
    nodes_of(monkeypatch, (3, 0), (3, 0))
    with pytest.raises(UserError, match=r"3 workers with 2 CPUs each do not fit.* 6 CPUs .*on 2 nodes.*workers 2,"):
        scaling(_config(workers=3, cpus_per_worker=2), own=False)


def test_cpus_of_nodes_without_gpus_are_not_for_workers_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes_of(monkeypatch, (4, 1), (8, 1), (64, 0))
    made = scaling(_config(), own=False)
    assert (made.num_workers, made.resources_per_worker) == (2, {"CPU": 4, "GPU": 1})


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpu", "room"),
    [
        (((1, 0), (1, 0), (1, 0)), 2, 0, 0),
        (((5, 0), (4, 0)), 2, 0, 4),
        (((8, 2), (8, 0)), 2, 1, 2),
        (((8, 2),), 0.5, 0.3, 6),
        (((16, 3), (16, 1)), 1, 2, 1),
        (((1, 0),), 0.1, 0, 10),
    ],
)
def test_room_is_counted_by_node(nodes: tuple[tuple[int, int], ...], cpus: float, gpu: float, room: int) -> None:
    assert Capacity(nodes).room(cpus, gpu) == room


@pytest.mark.parametrize("workers", ["8..2", "0..4", "-1", "two", "1..2..3", "2.."])
def test_senseless_numbers_of_workers(workers: str) -> None:
    with pytest.raises(UserError, match="give a number, or a range such as"):
        _config(workers=workers)


def test_a_range_needs_a_lane_for_its_largest_number() -> None:
    with pytest.raises(UserError, match=r"pass --train\.lanes 9"):
        _config(workers="2..9")


def test_a_range_survives_json() -> None:
    for workers in (3, "2..8"):
        assert from_dict(Config, to_dict(_config(workers=workers))).launch.workers == workers


def test_waiting_for_an_autoscaler_ends_when_nodes_come(
    resources: dict[str, float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resources["CPU"] = 0
    groups: list[Any] = []
    monkeypatch.setattr(placement, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(placement, "placement_group", lambda bundles: groups.append(bundles) or bundles)
    monkeypatch.setattr(placement, "remove_placement_group", groups.remove)
    seen: list[Any] = []
    threading.Timer(0.2, lambda: (seen.extend(groups), resources.update(CPU=4))).start()
    assert scaling(_config(workers="2", wait_minutes=1), own=False).num_workers == 2
    assert seen == [[{"CPU": 1}] * 2], "asked for once, while it waits"
    assert not groups, "and no longer"
    assert "waiting up to 1 more minutes for nodes: 2 workers" in capsys.readouterr().out


def wait_long() -> None:
    """Ten seconds; an interrupt is seen at the end of a sleep."""
    for _ in range(1000):
        time.sleep(0.01)


def test_a_wait_that_was_in_vain_asks_for_nothing_any_more(
    resources: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[Any] = []
    monkeypatch.setattr(placement, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(placement, "placement_group", lambda bundles: groups.append(bundles) or bundles)
    monkeypatch.setattr(placement, "remove_placement_group", groups.remove)
    resources["CPU"] = 0
    with pytest.raises(UserError, match="2 workers with 1 CPU each do not fit"):
        scaling(_config(workers="2", wait_minutes=0.1 / 60), own=False)
    assert not groups


def test_nodes_that_stay_away_end_the_job_with_numbers(
    resources: dict[str, float], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(placement, "LOOK_SECONDS", 0.02)
    # As Ray Train does. A shell starts what it puts in the background with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    needed = fewest(ScalingConfig(num_workers=(2, 8), resources_per_worker={"CPU": 2}))
    resources["CPU"] = 3
    with pytest.raises(KeyboardInterrupt), LossWatch(*needed, 0.3 / 60, ": add some") as watch:
        wait_long()
    assert "had only {'CPU': 3} of the {'CPU': 4} that 2 workers need: add some" in watch.gave_up
    resources["CPU"] = 4
    with LossWatch(*needed, 0.1 / 60) as watch:
        time.sleep(0.5)
    assert not watch.gave_up


def test_a_search_without_nodes_ends_and_can_go_on(
    resources: dict[str, float], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(placement, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(tune_search, "OWN_MINUTES", 0.3 / 60)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    job, shape = search_job(_config()), tune_search.Shape(2, 1.5, 0, 4)
    with tune_search.while_nodes_last(job, shape, own=True):
        time.sleep(0.5)
    with pytest.raises(KeyboardInterrupt), tune_search.while_nodes_last(job, shape, own=True):
        signal.raise_signal(signal.SIGINT)
    del resources["CPU"]
    lost = r"only \{'CPU': 0\} of the \{'CPU': 3.0\} that a trial needs$"
    with pytest.raises(Interrupted, match=lost), tune_search.while_nodes_last(job, shape, own=True):
        wait_long()
    with tune_search.while_nodes_last(job, shape, own=False):
        time.sleep(0.5)


@pytest.fixture
def busy(resources: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> list[Held]:
    """What another job holds of the cluster's four CPUs; a test may change it."""
    resources["CPU"] = 4
    held = [Held("n", "02", {"CPU": 2.0}), Held("n", "02", {"CPU": 1.0}), Held("elsewhere", "03", {"CPU": 9.0})]
    monkeypatch.setattr(placement.resource_holders, "held_by_others", lambda: list(held))
    monkeypatch.setattr(placement.resource_holders, "named", lambda held, kind: "3 by job 02 (python other.py)")
    monkeypatch.setattr(placement, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(placement, "SETTLE_SECONDS", 0.2)
    return held


def test_cpus_that_others_hold_are_not_free(busy: list[Held], capsys: pytest.CaptureFixture[str]) -> None:
    """Ray would wait for ever, and without a word."""
    with pytest.raises(
        UserError,
        match=r"no room for 2 workers with 1 CPU each: other jobs hold \d+ of the cluster's 4 CPUs \(3 by job 02 "
        r"\(python other\.py\)\): wait for them with --launch\.wait-minutes 60, or stop them, or pass fewer "
        r"--launch\.workers or --launch\.cpus-per-worker \(there is room for 1 now\)",
    ):
        scaling(_config(workers=2, cpus_per_worker=1), own=False)
    assert "more minutes (--launch.wait-minutes): there is no room for 2 workers" in capsys.readouterr().out
    assert scaling(_config(workers=1, cpus_per_worker=1), own=False).num_workers == 1
    assert scaling(_config(workers="1..3", cpus_per_worker=1), own=False).num_workers == (1, 3)
    assert scaling(_config(workers=2), own=True).num_workers == 2


def test_a_number_of_workers_that_nobody_named_is_what_fits_beside_others(busy: list[Held]) -> None:
    assert scaling(_config(cpus_per_worker=1), own=False).num_workers == 1
    busy[:] = [Held("n", "02", {"CPU": 1.5})]
    made = scaling(_config(workers=2), own=False)
    assert (made.num_workers, made.resources_per_worker) == (2, {"CPU": 1}), "CPUs that nobody named are fewer"
    busy[:] = [Held("n", "02", {"CPU": 4.0})]
    with pytest.raises(UserError, match=r"no room for 1 unit with 0\.5 CPUs each"):
        placement.wait_for_room(1, 0.5, 0, 0, "unit")
    with pytest.raises(UserError, match=r"no room for [14] workers? with \d CPU"):
        scaling(_config(), own=False)


def test_a_search_does_not_wait_for_ever_for_others(busy: list[Held]) -> None:
    job = search_job(_config(), search=SearchConfig(workers=2))
    with pytest.raises(UserError, match=r"no room for 2 trial workers with 1 CPU each.*fewer --search\.workers"):
        tune_search.wait_for_others(job, tune_search.Shape(2, 1, 0, 2))
    tune_search.wait_for_others(job, tune_search.Shape(1, 1, 0, 4))
    tune_search.wait_for_others(job, tune_search.Shape(8, 1, 0, 1))  # the cluster grows when asked
    busy.clear()
    tune_search.wait_for_others(job, tune_search.Shape(2, 1, 0, 2))


def test_a_preparation_does_not_wait_for_ever_for_others(
    busy: list[Held], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy[:] = [Held("n", "02", {"CPU": 4.0})]
    monkeypatch.setattr(driver_console, "connect", lambda *_, **__: False)
    monkeypatch.setattr(run_work_units, "run_units", lambda *_: pytest.fail("began"))
    monkeypatch.setattr(prepare_data, "prepare", lambda _, run: list(run([], "units")))
    job = prepare_data.PrepareJob(source=str(tmp_path / "a"), target=str(tmp_path / "b"))
    with pytest.raises(
        UserError, match=r"no room for 1 unit with 1 CPU each.*: wait for them with --wait-minutes 60, or"
    ):
        prepare_data.prepare_with_ray(job)


def test_gpus_that_others_hold_are_seen_though_all_cpus_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor takes no CPU by default."""
    there = {"CPU": 8.0, "GPU": 1.0}
    held = [Held("n", "02", {"GPU": 1.0}), Held("n", "01", {"GPU": 0.0})]
    here = SimpleNamespace(gcs_address="", get_job_id=lambda: "01")
    monkeypatch.setattr(resource_holders.ray, "get_runtime_context", lambda: here)
    monkeypatch.setattr(resource_holders.ray, "cluster_resources", lambda: there)
    monkeypatch.setattr(resource_holders, "all_held", lambda _: held)
    monkeypatch.setattr(resource_holders.ray, "available_resources", lambda: {"CPU": 8.0})
    assert resource_holders.held_by_others() == held[:1]
    monkeypatch.setattr(resource_holders.ray, "available_resources", lambda: dict(there))
    assert resource_holders.held_by_others() == []


@pytest.mark.parametrize("job", ["cache", "search"])
def test_caches_and_searches_wait_for_nodes_too(
    job: str, resources: dict[str, float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resources["CPU"] = 1
    groups: list[Any] = []
    monkeypatch.setattr(placement, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(placement, "placement_group", lambda bundles: groups.append(bundles) or bundles)
    monkeypatch.setattr(placement, "remove_placement_group", lambda _: None)
    threading.Timer(0.1, lambda: resources.update(CPU=8)).start()
    config = _config(wait_minutes=1, cpus_per_worker=2, gpu="off")
    if job == "cache":
        made = cache_actors.Cluster(replace(config, cache=replace(config.cache, workers=3)), own=False)
        assert (made.fewest, made.most, made.cpus) == (3, 3, 2)
    else:
        assert tune_search.shape_there(search_job(config, search=SearchConfig(workers=3)), own=False).concurrent == 1
    assert groups == [[{"CPU": 2}] * 3]
    assert "waiting up to 1 more minutes for nodes: " in capsys.readouterr().out


def test_it_is_waited_for_others(busy: list[Held]) -> None:
    threading.Timer(0.5, busy.clear).start()
    began = time.monotonic()
    assert scaling(_config(workers=4, wait_minutes=1), own=False).num_workers == 4
    assert time.monotonic() - began >= 0.4


@TAKES_LONG
@pytest.mark.ray
@pytest.mark.slow
def test_who_holds_a_cluster_is_told_by_its_state_api(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # as the other Rays of this process: it is read once
    assert connect("", "--launch.address", state_api=True, num_cpus=4, _node_ip_address="127.0.0.1")
    try:

        class Holder:
            def ping(self) -> None:
                """Answer."""

        holder = ray.remote(num_cpus=2)(Holder).remote()
        ray.get(holder.ping.remote())
        ray.get(ray.util.placement_group([{"CPU": 1}]).ready())
        assert resource_holders.held_by_others() == [], "what this job holds is its own"
        context = ray.get_runtime_context()
        found = resource_holders.all_held(context.gcs_address)
        assert sorted(held.amounts["CPU"] for held in found) == [1.0, 2.0]
        assert Capacity.of_cluster(found).nodes == ((1, 0),)
        assert resource_holders.named(found, "CPU").startswith(f"3 by job {context.get_job_id()} (")
    finally:
        ray.shutdown()
