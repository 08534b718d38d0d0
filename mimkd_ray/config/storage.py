"""Section `storage`: how long a run waits for its places."""

from __future__ import annotations

from dataclasses import dataclass

from mimkd_ray.config.form.values import FROM_0, check_values


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    """How long a run waits for its places."""

    patience_minutes: float = 10.0
    """Minutes for which calls to an object store or server that has answered before are tried again: it is away, or
    credentials have expired. A run whose directory stays away saves its state on its own machine then, and ends."""

    def __post_init__(self) -> None:
        check_values(self, "storage", patience_minutes=FROM_0)
