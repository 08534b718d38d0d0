"""The fields of `python -m mimkd_ray doctor`."""

from __future__ import annotations

from dataclasses import dataclass

from mimkd_ray.config.data import DataConfig
from mimkd_ray.config.form.values import FROM_0, check_values
from mimkd_ray.errors import UserError
from mimkd_ray.secret_urls import hide


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Checks of a machine or a cluster before money is spent: one line a check, with its figures and the remedy."""

    address: str = ""
    """Ray cluster to check, host:port of its head or `auto`; unset: RAY_ADDRESS, else this machine only."""
    root: tuple[str, ...] = ()
    """Folders or URLs of the data, caches and runs: every node writes, reads and deletes an object there."""
    store: str = ""
    """Folder of the block store on each node, as --data.store; unset: among the temporary files."""
    store_gb: float = DataConfig().store_gb
    """Size of the block store, as --data.store-gb."""
    workers: int = 0
    """Processes that sum a tensor, spread over the nodes; 0: one per node."""
    wait_seconds: float = 180.0
    """Seconds to wait for the nodes' answers."""
    json: str = ""
    """File or URL to which the result is written as well."""

    def __post_init__(self) -> None:
        check_values(self, workers=FROM_0, store_gb=FROM_0)
        hide(self, "root", "store", "json")
        if self.wait_seconds <= 0:
            raise UserError(f"--wait-seconds is {self.wait_seconds}: give seconds above 0")
