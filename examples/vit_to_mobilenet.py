"""A vision transformer teaches a MobileNet: tokens are compared with maps, location by location. A minute on a CPU.

python examples/vit_to_mobilenet.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.vision_transformer import VisionTransformer

import mimkd_ray


def digits() -> tuple[DataLoader, DataLoader]:
    """Return batches (images_BCHW, labels, ids) of handwritten digits at 32 pixels: to train on, and held out."""
    found = load_digits()
    small = torch.tensor(found.images, dtype=torch.float32).div(8).sub(1).unsqueeze(1).expand(-1, 3, -1, -1)
    images = nn.functional.interpolate(small, size=32, mode="bilinear")
    rows = TensorDataset(images, torch.tensor(found.target), torch.arange(len(images)))
    train, held_out = torch.utils.data.random_split(rows, [1400, len(rows) - 1400], torch.Generator().manual_seed(0))
    return DataLoader(train, batch_size=50, shuffle=True, drop_last=True), DataLoader(held_out, batch_size=100)


def main(epochs: int = 8) -> tuple[float, float]:
    """Train the transformer with labels, then the MobileNet with labels and its features. Returns their top-1 (%)."""
    torch.manual_seed(0)
    train, held_out = digits()
    teacher = VisionTransformer(
        image_size=32, patch_size=8, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10
    )
    first = torch.optim.AdamW(teacher.parameters(), lr=2e-3)
    for _ in range(epochs):
        for images, labels, _ids in train:
            first.zero_grad()
            nn.functional.cross_entropy(teacher(images), labels).backward()
            first.step()

    student = mimkd_ray.build_model("cifar/mobilenet_v2", 10)
    # The layers are found: the class token and the patch tokens of the transformer, a map of 4x4 of the student.
    distiller = mimkd_ray.distill(teacher, student, image_size=32)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.02, momentum=0.9)
    for epoch in range(epochs):
        for images, labels, ids in train:
            loss = distiller(images, labels, ids)
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()
            distiller.after_step()
        nats = {name: round(float(value), 2) for name, value in loss.log.items() if name.endswith("/nats")}
        print(f"epoch {epoch + 1}: loss {float(loss.total.detach()):.2f}, {nats}")

    distiller.release()
    of_teacher, of_student = (mimkd_ray.evaluate(network, held_out).top1 for network in (teacher, student))
    print(f"top-1: teacher {of_teacher:.1f} %, student {of_student:.1f} %")
    return of_teacher, of_student


if __name__ == "__main__":
    main()
