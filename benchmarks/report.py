"""The report at the end of every benchmark: one line of JSON with figures, targets, machine and versions."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from mimkd_ray.versions import cpu_model

Figures = Mapping[str, float]
Targets = Mapping[str, tuple[Literal[">=", "<="], float]]

PACKAGES = ("torch", "torchvision", "ray", "numpy", "mimkd-ray")


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return the options that all benchmark scripts share."""
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the line of JSON to this file")
    made.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of PyTorch (default: all)")
    return made


def met(value: float | None, target: tuple[str, float] | list[Any]) -> bool:
    """Return whether a figure reaches its target. A missing or not finite one does not."""
    sign, limit = target
    if value is None or not math.isfinite(value):
        return False
    return value >= limit if sign == ">=" else value <= limit


def gpu_name() -> str | None:
    """Return the name of the first CUDA device, or None."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def machine() -> dict[str, str | int | float | None]:
    """Return processor, cores, memory and GPU of this machine; nothing that identifies the machine itself."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count() or 1,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": gpu_name(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a figure may depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return columns of equal width; the first is aligned left and the others right. Floats show four digits."""
    cells = [[str(cell) for cell in header]]
    cells += [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def finish(name: str, figures: Figures, targets: Targets, file: Path | None = None) -> int:
    """Print whether the targets were met, then the line of JSON; return 0 if all were met, and 1 otherwise."""
    unknown = sorted(set(targets) - set(figures))
    if unknown:
        raise KeyError(f"targets without a figure: {', '.join(unknown)}")
    # JSON has no NaN: a figure without a finite value is null, and misses its target.
    finite = {key: float(value) if math.isfinite(value) else None for key, value in figures.items()}
    verdicts = {key: met(finite[key], target) for key, target in targets.items()}
    rows = [
        [key, float(figures[key]), f"{sign} {limit:g}", "yes" if verdicts[key] else "NO"]
        for key, (sign, limit) in targets.items()
    ]
    print("\n" + table(["target", "measured", "wanted", "met"], rows), flush=True)
    line = json.dumps(
        {
            "name": name,
            "figures": finite,
            "targets": {key: list(target) for key, target in targets.items()},
            "machine": machine(),
            "versions": versions(),
        },
        allow_nan=False,
    )
    if file is not None:
        file.write_text(line + "\n")
    print(line, flush=True)
    return 0 if all(verdicts.values()) else 1


def refresh(readme: Path, name: str, table: str) -> None:
    """Put a table between its two markers in a README."""
    start_line, end_line = f"<!-- {name} -->", f"<!-- /{name} -->"
    text = readme.read_text()
    start, end = text.find(start_line), text.find(end_line)
    if text.count(start_line) != 1 or text.count(end_line) != 1 or end < start:
        raise SystemExit(
            f"{readme.name} needs one line '{start_line}' and, below it, one line '{end_line}': "
            "put both where the table belongs and run this again (results are kept)"
        )
    readme.write_text(f"{text[: start + len(start_line)]}\n{table}\n{text[end:]}")
