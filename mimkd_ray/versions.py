"""Facts of the software and the machine for result files."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("mimkd-ray", "torch", "torchvision", "ray", "pyarrow", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a result; read from metadata, nothing is imported."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
