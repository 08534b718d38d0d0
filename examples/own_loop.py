"""A loop of your own, with a Dataset and networks of your own: handwritten digits, half a minute on a CPU.

python examples/own_loop.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

import mimkd_ray


class Digits(Dataset):
    """(image (3, 8, 8), label, number of the image)."""

    def __init__(self) -> None:
        digits = load_digits()
        self.images = torch.tensor(digits.images, dtype=torch.float32).div(8).sub(1).unsqueeze(1).expand(-1, 3, -1, -1)
        self.labels = torch.tensor(digits.target)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, int]:
        return self.images[number], self.labels[number], number


class Network(nn.Module):
    """Two convolutions and a classifier; `distill` finds what it may read by itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.coarse = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(2 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.pool(self.coarse(self.fine(images))).flatten(1))


def main(epochs: int = 8) -> tuple[float, float]:
    """Train a teacher with labels, then a student that learns from it. Returns their top-1 in percent."""
    torch.manual_seed(0)
    digits = Digits()
    train = DataLoader(Subset(digits, range(1400)), batch_size=50, shuffle=True, drop_last=True)
    held_out = DataLoader(Subset(digits, range(1400, len(digits))), batch_size=100)

    teacher = Network(width=32)
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.1, momentum=0.9)
    for _ in range(epochs):
        for images, labels, _ids in train:
            optimizer.zero_grad()
            nn.functional.cross_entropy(teacher(images), labels).backward()
            optimizer.step()

    student = Network(width=8)
    # The default weights are for larger students: 10 and 3.
    weights = mimkd_ray.LossConfig(global_weight=1.0, feature_weight=0.3)
    distiller = mimkd_ray.distill(teacher, student, image_size=8, loss=weights)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05, momentum=0.9)
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
