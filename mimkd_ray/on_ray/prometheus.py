"""The metrics that a run exports to Prometheus, through Ray: gauges with the run's name and, for terms, the term's.

Ray puts `ray_` before each name. cluster/grafana-dashboard.json shows all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ray.util.metrics import Gauge

OF_A_RUN = {
    "step": ("mimkd_step", "Steps done"),
    "epoch": ("mimkd_epoch", "Epochs done"),
    "images_per_second": ("mimkd_images_per_second", "Images of all workers per second of training"),
    "data_wait": ("mimkd_data_wait_share", "Share of the time of training that the first worker waited for data"),
    "cache_hit_rate": (
        "mimkd_cache_hit_rate",
        "Share of blocks read ahead that the first worker's node had",
    ),
    "lr": ("mimkd_learning_rate", "Learning rate"),
    "loss": ("mimkd_loss", "The loss, weighted and summed over its terms"),
    "checkpoint_stall": ("mimkd_checkpoint_stall_seconds", "Seconds that training waited for the latest checkpoint"),
}
"""The gauge and its description, by the name in metrics.jsonl."""

OF_A_TERM = {
    "loss": ("mimkd_term_loss", "The loss of a term, before its weight"),
    "nats": ("mimkd_term_nats", "Mutual information of a term in nats: InfoNCE's lower bound, or an estimate"),
}
"""The gauge and its description for names such as `TERM/nats`."""

PLAIN_TERMS = ("ce", "kd")
"""Terms whose loss is logged under their bare name."""


class LiveMetrics:
    """The gauges of this process. Setting all of them takes some 50 us."""

    def __init__(self) -> None:
        self._of_a_run = {key: Gauge(name, said, ("run",)) for key, (name, said) in OF_A_RUN.items()}
        self._of_a_term = {key: Gauge(name, said, ("run", "term")) for key, (name, said) in OF_A_TERM.items()}

    def show(self, run: str, values: Mapping[str, float]) -> None:
        """Set the gauges for the figures in `values`; figures without a gauge, or not finite, are left out."""
        for key, value in values.items():
            term, _, kind = key.rpartition("/")
            if key in PLAIN_TERMS:
                term, kind = key, "loss"
            if not math.isfinite(value):
                continue
            if term and kind in self._of_a_term:
                self._of_a_term[kind].set(value, {"run": run, "term": term})
            elif key in self._of_a_run:
                self._of_a_run[key].set(value, {"run": run})
