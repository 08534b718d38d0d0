"""A teacher that was trained without labels teaches a student without labels; k-NN says what the features are worth.

The teacher stands for DINO or CLIP image towers: a small transformer whose features agree between two noisy views of an
image, and no classifier. A minute on a CPU.

python examples/without_labels.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

import mimkd_ray
from mimkd_ray.train.neighbours import knn_accuracy


def views(images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return two views of each image: moved by up to two pixels, with noise."""
    moved = [torch.roll(images_BCHW, tuple(torch.randint(-2, 3, (2,)).tolist()), (2, 3)) for _ in range(2)]
    return moved[0] + 0.2 * torch.randn_like(moved[0]), moved[1] + 0.2 * torch.randn_like(moved[1])


def self_supervised(teacher: nn.Module, images: Tensor, epochs: int) -> None:
    """Train a network so that two views of an image have similar outputs, and those of other images do not (SimCLR)."""
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(100)[:-1]:
            one, two = (nn.functional.normalize(teacher(view), dim=1) for view in views(images[rows]))
            loss = nn.functional.cross_entropy(one @ two.T / 0.2, torch.arange(len(rows)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def judged(features_NC: Tensor, labels: Tensor) -> float:
    """Return the top-1 (%) of the last 397 images by their nearest neighbours among the others."""
    return knn_accuracy(features_NC[:1400], labels[:1400], features_NC[1400:], labels[1400:])


@torch.no_grad()
def pooled(student: nn.Module, images: Tensor) -> Tensor:
    """Return the student's features before its classifier, (N, C)."""
    tapped = mimkd_ray.TappedModel(student.eval(), ["pool"])
    features_NC = tapped(images)[1]["pool"].flatten(1)
    tapped.release()
    student.train()
    return features_NC


def main(epochs: int = 8) -> tuple[float, float, float]:
    """Train both. Returns the k-NN top-1 (%) of the teacher, of the student before and of the student after."""
    torch.manual_seed(0)
    digits = load_digits()
    small = torch.tensor(digits.images, dtype=torch.float32).div(8).sub(1).unsqueeze(1).expand(-1, 3, -1, -1)
    images, labels = nn.functional.interpolate(small, size=16, mode="bilinear"), torch.tensor(digits.target)

    teacher = VisionTransformer(
        image_size=16, patch_size=4, num_layers=3, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=64
    )
    nn.init.normal_(teacher.heads.head.weight, std=0.1)  # a projection and no classifier, which would begin at zero
    self_supervised(teacher, images[:1400], 2 * epochs)

    student = mimkd_ray.build_model("cifar/resnet8", 64)
    before = judged(pooled(student, images), labels)
    loss = mimkd_ray.LossConfig(ce_weight=0.0, global_weight=1.0, feature_weight=0.3)
    distiller = mimkd_ray.distill(teacher, student, image_size=16, loss=loss, labels="none")
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05, momentum=0.9)
    nobody_knows = torch.full((50,), -1)
    for epoch in range(epochs):
        for rows in torch.randperm(1400).split(50):
            found = distiller(images[rows], nobody_knows, rows)
            optimizer.zero_grad()
            found.total.backward()
            optimizer.step()
            distiller.after_step()
        nats = {name: round(float(value), 2) for name, value in found.log.items() if name.endswith("/nats")}
        print(f"epoch {epoch + 1}: {nats}")
    distiller.release()

    after = judged(pooled(student, images), labels)
    with torch.no_grad():
        of_teacher = judged(teacher.eval()(images), labels)
    print(f"k-NN top-1: teacher {of_teacher:.1f} %, student {before:.1f} % before and {after:.1f} % after")
    return of_teacher, before, after


if __name__ == "__main__":
    main()
