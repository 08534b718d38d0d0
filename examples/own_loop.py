"""A loop of your own: a student learns digits from a teacher, in half a minute on a CPU: python examples/own_loop.py"""

from __future__ import annotations

import torch
from small_digits import Network, batches, train_with_labels
from torch.utils.data import DataLoader

import mimkd_ray


def train_student(distiller: mimkd_ray.Distiller, train: DataLoader, epochs: int, lr: float) -> None:
    """Train a student, and the critics of its loss, on batches (images_BCHW, labels, numbers of the images)."""
    optimizer = torch.optim.SGD(distiller.parameters(), lr=lr, momentum=0.9)
    for epoch in range(epochs):
        for images, labels, ids in train:
            loss = distiller(images, labels, ids)
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()
            distiller.after_step()
        nats = {name: round(float(value), 2) for name, value in loss.log.items() if name.endswith("/nats")}
        print(f"epoch {epoch + 1}: loss {float(loss.total.detach()):.2f}, {nats}")


def main(epochs: int = 8) -> tuple[float, ...]:
    """Train a teacher with labels, then a student that learns from it. Returns their top-1 in percent."""
    torch.manual_seed(0)
    train, held_out = batches()
    teacher, student = Network(width=32), Network(width=8)
    train_with_labels(teacher, torch.optim.SGD(teacher.parameters(), lr=0.1, momentum=0.9), train, epochs)
    loss = mimkd_ray.LossConfig(global_weight=1.0, feature_weight=0.3)  # for a small student: by default 10 and 3
    train_student(mimkd_ray.distill(teacher, student, image_size=8, loss=loss), train, epochs, lr=0.05)
    top1 = tuple(mimkd_ray.evaluate(network, held_out).top1 for network in (teacher, student))
    print("top-1: teacher {:.1f} %, student {:.1f} %".format(*top1))
    return top1


if __name__ == "__main__":
    main()
