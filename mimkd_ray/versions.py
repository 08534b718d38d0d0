"""Versions of the software, and the machine, for result files."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PACKAGES = ("mimkd-ray", "torch", "torchvision", "ray", "pyarrow", "numpy")


def versions(more: Iterable[str] = ()) -> dict[str, str]:
    """Return the versions of Python and of the packages that affect a result, and of `more`, from package metadata
    without importing them."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine(device: torch.device) -> dict[str, str]:
    """Return the names of a device, of the processor and of the system; nothing that identifies the machine itself."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name, "processor": cpu_model(), "system": platform.platform()}


def cpu_model() -> str:
    """Return the name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
