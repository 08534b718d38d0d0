"""What the examples share: batches of handwritten digits, a small network, and training with labels alone."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split


def batches(image_size: int = 8) -> tuple[DataLoader, DataLoader]:
    """Return batches (images_BCHW, labels, numbers of the images): to train on, and held out."""
    digits = load_digits()
    small = torch.tensor(digits.images, dtype=torch.float32).div(8).sub(1).unsqueeze(1).expand(-1, 3, -1, -1)
    images = nn.functional.interpolate(small, size=image_size, mode="bilinear")
    rows = TensorDataset(images, torch.tensor(digits.target), torch.arange(len(images)))
    train, held_out = random_split(rows, [1400, len(rows) - 1400], torch.Generator().manual_seed(0))
    return DataLoader(train, batch_size=50, shuffle=True, drop_last=True), DataLoader(held_out, batch_size=100)


class Network(nn.Module):
    """Two convolutions and a classifier; `distill` finds by itself what it may read."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.coarse = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(2 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.pool(self.coarse(self.fine(images))).flatten(1))


def train_with_labels(network: nn.Module, optimizer: torch.optim.Optimizer, train: DataLoader, epochs: int) -> None:
    """Make a teacher."""
    for _ in range(epochs):
        for images, labels, _ids in train:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
