"""Draw the curves of the headline study: held-out accuracy, nats, gradients, temperature.

    python benchmarks/headline_curves.py benchmarks/results/headline_small.json docs/headline.svg

Takes the JSON that benchmarks/headline.py wrote; of each arm the first seed. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

SHOWN = {
    "two_sided": "release 0.1 (two_sided)",
    "queue": "frozen teacher side, queue",
    "feature_3": "preset accuracy",
    "best": "preset best",
}
BASELINES = {"kd": ("KD", "grey", "-"), "alone": ("alone", "grey", ":")}


def series(curve: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Return epochs and values of a figure of the evaluations."""
    lines = [line for line in curve if key in line]
    return [line["epoch"] for line in lines], [line[key] for line in lines]


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("study", type=Path)
    options.add_argument("target", type=Path)
    args = options.parse_args()
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "headline"  # the same file from the same figures
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text: readers can search it, and the file is half as long
    from matplotlib import pyplot

    runs = json.loads(args.study.read_text())["runs"]
    figure, axes = pyplot.subplots(1, 4, figsize=(16, 3.6), constrained_layout=True)
    term = "global/pool-pool"
    for number, (arm, label) in enumerate((arm, label) for arm, label in SHOWN.items() if arm in runs):
        curve = next(iter(runs[arm].values()))["curve"]
        color = f"C{number}"
        axes[0].plot(*series(curve, "top1"), color=color, label=label)
        epochs, nats = series(curve, f"{term}/nats")
        axes[1].plot(epochs, nats, color=color, label=label)
        axes[1].plot(*series(curve, f"{term}/ceiling"), color=color, linestyle=":")
        axes[2].plot(*series(curve, f"{term}/grad_norm"), color=color, label=label)
        axes[2].plot(*series(curve, "ce/grad_norm"), color=color, linestyle="--")
        epochs, scales = series(curve, f"{term}/scale")
        axes[3].plot(epochs, [1 / scale for scale in scales], color=color)
    for arm, (label, color, line) in BASELINES.items():
        if arm in runs:
            curve = next(iter(runs[arm].values()))["curve"]
            axes[0].plot(*series(curve, "top1"), color=color, linestyle=line, label=label)
    for axis, title in zip(
        axes,
        (
            "top-1 on held-out images, %",
            "global term: held-out nats (dotted: ceiling)",
            "gradient on the student (dashed: cross-entropy)",
            "temperature of the global term",
        ),
        strict=True,
    ):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("epoch")
    axes[2].set_yscale("log")
    axes[3].set_yscale("log")
    axes[0].legend(fontsize=8)
    figure.savefig(args.target, metadata={"Date": None})


if __name__ == "__main__":
    main()
