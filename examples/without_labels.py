"""Distil without labels: the student learns a teacher's features from images alone. A minute on a CPU.

python examples/without_labels.py

The teacher here is a network without a classifier, as DINO's are: it maps an image to a vector. For a real one take
`build_model("timm/vit_small_patch14_dinov2.lvd142m", 384, "published")` and images of your own; or, with checkpoints,
caches and workers, run a job (docs/teachers.md):

python jobs/imagenet.py r34_r18 --data.root DIR --data.labels none --teacher.name timm/... --teacher.classes 384
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import mimkd_ray


class Tower(nn.Module):
    """Three convolutions, and the mean of their last map as the image's vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            *(self.stage(a, b) for a, b in ((3, width), (width, 2 * width), (2 * width, 4 * width)))
        )
        self.pool = nn.AdaptiveAvgPool2d(1)

    @staticmethod
    def stage(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.pool(self.stages(images_BCHW)).flatten(1)


def self_supervised(images_NCHW: Tensor, epochs: int) -> Tower:
    """Train a teacher without labels: two noisy, shifted views of an image are to be closer than those of others."""
    teacher = Tower(width=32)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows_B in torch.randperm(len(images_NCHW)).split(128):
            views = [nn.functional.normalize(teacher(view(images_NCHW[rows_B])), dim=1) for _ in range(2)]
            loss = nn.functional.cross_entropy(views[0] @ views[1].T / 0.2, torch.arange(len(rows_B)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return teacher.eval()


def view(images_BCHW: Tensor) -> Tensor:
    """Return the images shifted by up to a pixel, some brighter than others, with noise."""
    x, y = torch.randint(-1, 2, (2,)).tolist()
    gain_B = 0.7 + 0.6 * torch.rand(len(images_BCHW), 1, 1, 1)
    return images_BCHW.roll((x, y), (2, 3)) * gain_B + 0.3 * torch.randn_like(images_BCHW)


@torch.no_grad()
def neighbours(network: nn.Module, images_NCHW: Tensor, labels_N: Tensor, known: int) -> float:
    """Return the share, in percent, of the images after the first ``known`` whose nearest one of these is of their
    class. Labels are used here alone."""
    features_ND = nn.functional.normalize(network.eval()(images_NCHW), dim=1)
    nearest = (features_ND[known:] @ features_ND[:known].T).argmax(1)
    return 100 * (labels_N[nearest] == labels_N[known:]).float().mean().item()


def main(epochs: int = 20) -> tuple[float, float, float]:
    """Return the teacher's accuracy by nearest neighbours, and the student's before and after."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).div(8).sub(1).unsqueeze(1).repeat(1, 3, 1, 1)
    labels, train = torch.tensor(digits.target), images[:1400]
    teacher = self_supervised(train, epochs)
    student = Tower(width=4)
    distiller = mimkd_ray.distill(teacher, student, image_size=8, labels="none")
    with torch.no_grad():  # statistics for its batch norms, so that what it gains is from training
        for images_BCHW in train.split(50):
            student(images_BCHW)
    before = neighbours(student, images, labels, known=100)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01, momentum=0.9)
    distiller.train()
    for epoch in range(epochs):
        for rows_B in torch.randperm(len(train)).split(50):
            loss = distiller(train[rows_B], ids=rows_B)
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()
            distiller.after_step()
        if epoch % 5 == 4:
            print(f"epoch {epoch + 1}: " + ", ".join(f"{k} {v:.2f}" for k, v in loss.log.items() if "nats" in k))
    found = (neighbours(teacher, images, labels, 100), before, neighbours(student, images, labels, known=100))
    print("nearest of 100 labelled images: teacher {:.1f} %, student {:.1f} % before, {:.1f} % after".format(*found))
    return found


if __name__ == "__main__":
    main()
