"""A vision transformer teaches a MobileNet: tokens are compared with maps, location by location. A minute on a CPU.

python examples/vit_to_mobilenet.py
"""

from __future__ import annotations

import torch
from own_loop import train_student
from small_digits import batches, train_with_labels
from torchvision.models.vision_transformer import VisionTransformer

import mimkd_ray


def main(epochs: int = 8) -> tuple[float, ...]:
    """Train the transformer with labels, then the MobileNet with labels and its features. Returns their top-1 (%)."""
    torch.manual_seed(0)
    train, held_out = batches(image_size=32)
    teacher = VisionTransformer(
        image_size=32, patch_size=8, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10
    )
    train_with_labels(teacher, torch.optim.AdamW(teacher.parameters(), lr=2e-3), train, epochs)
    student = mimkd_ray.build_model("cifar/mobilenet_v2", 10)
    # The layers are found: the class token and the patch tokens of the transformer, a map of 4x4 of the student.
    train_student(mimkd_ray.distill(teacher, student, image_size=32), train, epochs, lr=0.02)
    top1 = tuple(mimkd_ray.evaluate(network, held_out).top1 for network in (teacher, student))
    print("top-1: teacher {:.1f} %, student {:.1f} %".format(*top1))
    return top1


if __name__ == "__main__":
    main()
