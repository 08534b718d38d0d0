"""Each test as in a fresh process: a process keeps blocks by their content, and tests write the same content."""

from __future__ import annotations

import pytest

from mimkd_ray.data.store import block_reader


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_reader, "_blocks", block_reader._KeptBlocks())
