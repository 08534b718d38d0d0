"""The distiller under Hugging Face Accelerate, which brings it to the devices and wraps it where there are several.

pip install accelerate && accelerate launch examples/with_accelerate.py
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from small_digits import Network, batches
from torch import nn

import mimkd_ray


def main(epochs: int = 8, accelerator: Accelerator | None = None) -> tuple[mimkd_ray.Distiller, nn.Module]:
    """Train a student of a random teacher. Returns the distiller, and what Accelerate made of it."""
    accelerator = accelerator or Accelerator()
    torch.manual_seed(0)
    plain = mimkd_ray.distill(teacher=Network(width=32), student=Network(width=4), image_size=8)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.02, momentum=0.9)
    distiller, optimizer, train = accelerator.prepare(plain, optimizer, batches()[0])
    for epoch in range(epochs):
        for batch in train:
            with accelerator.accumulate(distiller):
                loss = distiller(*batch)
                accelerator.backward(loss.total)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:  # a step was taken, not only a gradient added
                plain.after_step()
        accelerator.print(f"epoch {epoch + 1}: loss {float(loss.total.detach()):.2f}")
    return plain, distiller


if __name__ == "__main__":
    main()
