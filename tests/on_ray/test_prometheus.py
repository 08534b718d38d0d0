"""The metrics that a run exports to Prometheus: through a real Ray's endpoint, and in the dashboard."""

from __future__ import annotations

import json
import re
import socket
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import ray
from jobs_here import TAKES_LONG

from mimkd_ray.on_ray import prometheus
from mimkd_ray.on_ray.prometheus import OF_A_RUN, OF_A_TERM, LiveMetrics

DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana-dashboard.json"


class _FakeGauge:
    set_to: dict[tuple[str, ...], float]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.name, self.tag_keys = name, tag_keys

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert tuple(tags) == self.tag_keys
        self.set_to[self.name, *tags.values()] = value


def test_figures_go_to_the_gauges_of_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_FakeGauge, "set_to", {}, raising=False)
    monkeypatch.setattr(prometheus, "Gauge", _FakeGauge)
    line = {"step": 50, "loss": 2.5, "ce": 1.5, "layer4:stage4/loss": 3.0, "layer4:stage4/nats": 0.4}
    LiveMetrics().show("r1", {**line, "data_wait": float("nan"), "layer4:stage4/ceiling": 4.0, "unheard": 1.0})
    assert _FakeGauge.set_to == {
        ("mimkd_step", "r1"): 50,
        ("mimkd_loss", "r1"): 2.5,
        ("mimkd_term_loss", "r1", "ce"): 1.5,
        ("mimkd_term_loss", "r1", "layer4:stage4"): 3.0,
        ("mimkd_term_nats", "r1", "layer4:stage4"): 0.4,
    }


def test_the_dashboard_shows_what_is_exported_and_nothing_else() -> None:
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text())
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = [variable["query"] for variable in dashboard["templating"]["list"]]
    named = {name for text in [*shown, *asked] for name in re.findall(r"\bray_\w+", text)}
    assert named == {f"ray_{name}" for name, _ in (*OF_A_RUN.values(), *OF_A_TERM.values())}
    assert all('run=~"$run"' in expression for expression in shown)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


@TAKES_LONG
@pytest.mark.ray
@pytest.mark.slow
def test_prometheus_can_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_enable_metrics_collection", "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        _metrics_export_port=port,
        _system_config={"metrics_report_interval_ms": 500},
    )
    try:

        @ray.remote(num_cpus=0)
        class Worker:
            def show(self) -> None:
                self.live = LiveMetrics()
                self.live.show("r1", {"images_per_second": 123.5, "layer4:stage4/nats": 0.25})

        worker = Worker.remote()
        ray.get(worker.show.remote(), timeout=60)
        deadline, text = time.monotonic() + 60, ""
        while "ray_mimkd_term_nats{" not in text:
            assert time.monotonic() < deadline, text[-2000:]
            time.sleep(0.5)
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                    text = answer.read().decode()
            except OSError:
                continue  # the agent that answers is still starting
    finally:
        ray.shutdown()
    (rate,) = re.findall(r"^ray_mimkd_images_per_second\{.*\} (\S+)$", text, re.MULTILINE)
    assert float(rate) == 123.5
    (labels, nats) = re.findall(r"^ray_mimkd_term_nats\{(.*)\} (\S+)$", text, re.MULTILINE)[0]
    assert float(nats) == 0.25
    assert 'run="r1"' in labels
    assert 'term="layer4:stage4"' in labels
