"""Run every benchmark, keep its results in benchmarks/results/, and refresh the table of its README.md.

A benchmark is a script of this folder that ends with one line of JSON (see report.py). On a machine with a CUDA device
its results are kept under a separate name, so that those of a CPU stay.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from report import met, refresh

NAMES = (
    *("mi_bounds", "loss", "ray_overhead", "loader", "data_wait", "jump", "checkpoint", "lanes", "layout", "cache"),
    *("cache_effect", "search", "memory_bank", "epoch", "scaling", "job_start", "autoscale", "node_loss", "evaluate"),
    *("threads", "pages"),
)

FOLDER = Path(__file__).resolve().parent
README = FOLDER / "README.md"


def run(script: Path) -> tuple[int, dict[str, Any] | None]:
    """Run a script, passing its output on; return its exit status, and its last line if that is a report."""
    if not script.is_file():
        print(f"{script.name} is not in {script.parent.name}/: write it, or take it off NAMES in run_all.py")
        return 1, None
    last = ""
    with subprocess.Popen([sys.executable, "-u", str(script)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    try:
        report = json.loads(last)
    except json.JSONDecodeError:
        report = None
    if not isinstance(report, dict) or not {"name", "figures", "targets", "machine"} <= report.keys():
        print(f"{script.name} ended with {process.returncode} and without its line of JSON")
        return process.returncode or 1, None
    return process.returncode, report


def result_file(results: Path, report: dict[str, Any]) -> Path:
    """Return NAME.json, or NAME-<gpu>.json if there was a GPU."""
    gpu = report["machine"].get("gpu")
    suffix = "-" + re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") if gpu else ""
    return results / f"{report['name']}{suffix}.json"


def markdown(results: Path) -> str:
    """Return the table of every figure that has a target, and the machines of the results."""
    every = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    reports = [report for report in every if "targets" in report]  # studies of accuracy have pages of their own
    order = {name: position for position, name in enumerate(NAMES)}
    reports.sort(key=lambda report: (order.get(report["name"], len(NAMES)), report["machine"].get("gpu") or ""))
    lines = ["| benchmark | figure | measured | target | met |", "|---|---|---|---|---|"]
    machines: list[str] = []
    for report in reports:
        machine, gpu = report["machine"], report["machine"].get("gpu")
        text = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB" + (f", {gpu}" if gpu else "")
        if text not in machines:
            machines.append(text)
        for figure, (sign, limit) in report["targets"].items():
            value = report["figures"].get(figure)
            shown = "not finite" if value is None else f"{value:.4g}"
            label = report["name"] + (f" ({gpu})" if gpu else "")
            verdict = "yes" if met(value, (sign, limit)) else "**no**"
            lines.append(f"| {label} | {figure} | {shown} | {sign} {limit:g} | {verdict} |")
    return "\n".join([*lines, "", f"Measured on: {'; '.join(machines) or 'nothing yet'}."])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=NAMES, action="append", metavar="NAME", help=f"one of {', '.join(NAMES)}")
    names = parser.parse_args().only or NAMES
    results = FOLDER / "results"
    results.mkdir(exist_ok=True)
    failed = []
    for name in names:
        print(f"== {name}", flush=True)
        status, report = run(FOLDER / f"{name}.py")
        if report is not None:
            result_file(results, report).write_text(json.dumps(report, indent=2) + "\n")
        if status != 0 or report is None:
            failed.append(name)
    refresh(README, "benchmarks", markdown(results))
    print(f"failed: {', '.join(failed)}" if failed else "every benchmark met its targets")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
