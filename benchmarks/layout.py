"""Memory layouts: a step and an inference of networks with channels last against channels first, float32.

Channels last is the default of `train.channels_last`, on a CPU too; this benchmark is the reason. A step is forward and
backward in training mode, without an optimiser. Arms take turns; figures are medians of the rounds' ratios, above 1 if
channels last is faster.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from report import finish, parser, table
from torch import Tensor, nn

from mimkd_ray.models.build_model import build_model

NETWORKS = {  # name: images' side
    "resnet18": 224,
    "mobilenet_v2": 224,
    "shufflenet_v2_x1_0": 224,
    "cifar/resnet8x4": 32,
    "cifar/resnet32x4": 32,
    "cifar/resnet20": 32,
    "cifar/wrn_16_2": 32,
    "cifar/vgg8": 32,
    "cifar/shufflenet_v2": 32,
}
LAYOUTS = {"first": torch.contiguous_format, "last": torch.channels_last}


def step(model: nn.Module, images_BCHW: Tensor) -> None:
    """Run forward and backward in training mode."""
    model.train()
    model.zero_grad()
    model(images_BCHW).sum().backward()


@torch.no_grad()
def inference(model: nn.Module, images_BCHW: Tensor) -> None:
    """Run forward in evaluation mode."""
    model.eval()
    model(images_BCHW)


WORK: dict[str, Callable[[nn.Module, Tensor], None]] = {"step": step, "inference": inference}


def compare(name: str, side: int, batch: int, rounds: int, device: torch.device) -> dict[str, dict[str, list[float]]]:
    """Return the seconds by work and layout, round by round."""
    arms = {}
    for layout, memory_format in LAYOUTS.items():
        model = build_model(name, 100, image_size=side).to(device).to(memory_format=memory_format)
        images_BCHW = torch.randn(batch, 3, side, side, device=device).to(memory_format=memory_format)
        arms[layout] = (model, images_BCHW)
    times: dict[str, dict[str, list[float]]] = {work: {layout: [] for layout in LAYOUTS} for work in WORK}
    for count in range(rounds + 1):  # the first one prepares kernels
        for layout in list(LAYOUTS)[:: 1 if count % 2 else -1]:
            for work, run in WORK.items():
                began = time.perf_counter()
                run(*arms[layout])
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if count:
                    times[work][layout].append(time.perf_counter() - began)
    return times


def main() -> int:
    options = parser(__doc__)
    cuda = torch.cuda.is_available()
    options.add_argument("--batch", type=int, default=256 if cuda else 16, help="images of 224 px; of 32 px four times")
    options.add_argument("--rounds", type=int, default=9, help="rounds of both layouts")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if cuda else "cpu")
    figures: dict[str, float] = {}
    rows: list[list[object]] = []
    for name, side in NETWORKS.items():
        times = compare(name, side, args.batch * (4 if side == 32 else 1), args.rounds, device)
        ratios = {
            work: statistics.median(first / last for first, last in zip(by["first"], by["last"], strict=True))
            for work, by in times.items()
        }
        figures |= {f"{name}/{work}_first_over_last": ratio for work, ratio in ratios.items()}
        rows.append(
            [name, *(cell for work in WORK for cell in (1e3 * statistics.median(times[work]["last"]), ratios[work]))]
        )
    print(table(["network", "ms a step, last", "first / last", "ms an inference, last", "first / last"], rows))
    return finish("layout", figures, {}, args.json)


if __name__ == "__main__":
    sys.exit(main())
