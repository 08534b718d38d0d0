"""Forward passes of an evaluation as CUDA graphs, beside the captured steps of training (engine/engines.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mimkd_ray.taps.tapped_model import TappedModel
from mimkd_ray.train.cuda_graphs import WARM, record, run_warm
from mimkd_ray.train.distributed import Context
from mimkd_ray.train.records.progress import say


@dataclass
class _Pass:
    """The forward pass of a network. Its graph reads the parameters where they were when it was recorded."""

    addresses: list[int]
    warm: int = 0
    is_recorded: bool = False
    graph: torch.cuda.CUDAGraph | None = None
    logits_BC: Tensor | None = None


class RecordedForwards:
    """Forward passes of the networks of a process, in evaluation mode, each recorded once and replayed.

    A batch of ``rows`` images is copied to one place, which all graphs read, and the graphs share their working memory:
    the logits of one are to be read before the next is replayed. Smaller batches run without a graph. Training and a
    load change weights in place; a network whose weights have moved to other memory is recorded anew.

    On a CPU there are no graphs, and the same code is called for every batch. Memory: of one forward pass, and it is
    kept between evaluations.
    """

    def __init__(self, context: Context, rows: int) -> None:
        self.context, self.rows = context, rows
        on_gpu = context.device.type == "cuda"
        self.stream = torch.cuda.Stream(context.device) if on_gpu else None
        self.pool = torch.cuda.graph_pool_handle() if on_gpu else None
        self.images_BCHW: Tensor | None = None
        self.passes: WeakKeyDictionary[TappedModel, _Pass] = WeakKeyDictionary()
        self.gave_up = False

    def of(self, network: TappedModel) -> Callable[[Tensor], Tensor]:
        """Return what gives a network's logits of normalised images, for one evaluation."""
        addresses = [tensor.data_ptr() for tensor in chain(network.parameters(), network.buffers())]
        known = self.passes.get(network)
        if known is None or known.addresses != addresses:
            known = self.passes[network] = _Pass(addresses)
        return partial(self._logits, network, known)

    def _logits(self, network: TappedModel, known: _Pass, images_BCHW: Tensor) -> Tensor:
        if self.gave_up or len(images_BCHW) != self.rows:
            return network(images_BCHW)[0]
        if self.images_BCHW is None:
            self.images_BCHW = torch.empty_like(images_BCHW)
        self.images_BCHW.copy_(images_BCHW)
        work = partial(logits_of, network, self.images_BCHW)
        if not known.is_recorded and known.warm >= WARM:
            self._record(known, work)
        if not known.is_recorded:
            return self._warm(known, work)
        if known.graph is None:
            return work()
        assert known.logits_BC is not None
        known.graph.replay()
        return known.logits_BC

    def _warm(self, known: _Pass, work: Callable[[], Tensor]) -> Tensor:
        known.warm += 1
        if self.stream is None:
            return work()
        logits_BC, waits = run_warm(work, self.stream)
        if waits and known.warm == WARM:
            self._give_up(f"a network waits for the device ({waits[0]})")
        return logits_BC

    def _record(self, known: _Pass, work: Callable[[], Tensor]) -> None:
        if self.stream is not None:
            try:
                known.graph, known.logits_BC = record(work, self.stream, self.pool)
            except RuntimeError as error:
                self._give_up(str(error).partition("\n")[0])
                return
        known.is_recorded = True

    def _give_up(self, why: str) -> None:
        self.gave_up = True
        self.passes.clear()
        say(self.context, f"evaluations are not captured, and run operation by operation: {why}")


def logits_of(network: TappedModel, images_BCHW: Tensor) -> Tensor:
    """Return a network's logits, without its taps."""
    return network(images_BCHW)[0]
