"""ExecuTorch programs (.pte) for phones: the operations that XNNPACK has are its own, the others ExecuTorch's."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from mimkd_ray.export.runners import Runner, quiet


def write_executorch(network: nn.Module, example_BCHW: Tensor, path: Path) -> None:
    """Write the network at float32 for one image at a time: a program's memory is that of its largest batch."""
    with quiet(), torch.no_grad():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        program = torch.export.export(network, (example_BCHW[:1],))
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        path.write_bytes(lowered.to_executorch().buffer)


def executorch_runner(path: Path) -> Runner:
    """Load the file into ExecuTorch's runtime. The threads are its own."""
    with quiet():
        from executorch.runtime import Runtime

        program = Runtime.get().load_program(path)

    def run(images_BCHW: Tensor) -> Tensor:
        method = program.load_method("forward")  # the program loads it once and keeps it
        assert method is not None
        images = images_BCHW.contiguous().split(1)  # it reads the memory as it lies
        return torch.cat([method.execute([image])[0] for image in images])

    return run
