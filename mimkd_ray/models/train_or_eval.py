"""Training and evaluation mode of networks, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_mode(training: bool, *networks: nn.Module) -> Iterator[None]:
    """A with-block in which the networks are in training mode, or in evaluation mode. Afterwards every module has the
    mode that it had: a batch norm that a user has frozen by its own ``eval()`` stays so."""
    modes = {module: module.training for network in networks for module in network.modules()}
    try:
        for network in networks:
            network.train(training)
        yield
    finally:
        for module, was in modes.items():
            module.training = was
