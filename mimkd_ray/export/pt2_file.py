"""torch.export files (.pt2): read by torch alone, without the code of the network."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from mimkd_ray.export.runners import Runner, quiet

MOST = 65536
"""Images of the largest batch."""
NOTES = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn")
"""What torch notes of each operation: lines of source, with folders of this machine."""


def write_pt2(network: nn.Module, example_BCHW: Tensor, path: Path) -> None:
    """Write the network for any batch size."""
    program = export_any_batch(network, example_BCHW)
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                for note in NOTES:
                    node.meta.pop(note, None)
    with quiet():
        torch.export.save(program, path)


def export_any_batch(network: nn.Module, example_BCHW: Tensor) -> torch.export.ExportedProgram:
    """Trace the network with a batch size that stays open."""
    with quiet(), torch.no_grad():
        return torch.export.export(
            network, (example_BCHW,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=MOST)},)
        )


def pt2_runner(path: Path) -> Runner:
    """Load the file. The threads are torch's."""
    with quiet():
        network = torch.export.load(path).module()
    return torch.no_grad()(network)
