"""A distillation job without this project: Ray Train, torchvision's ResNets, digits. For `job_start.py`.

python job_start_bare.py FOLDER
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.nn.functional as F
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_data_loader, prepare_model
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

BATCH = 64


def train(setup: dict[str, Any]) -> None:
    """Train two steps of Hinton's KD."""
    marks = {**setup["marks"], "worker": time.time()}
    digits = load_digits()
    images_BCHW = torch.tensor(digits.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 16
    data = TensorDataset(images_BCHW, torch.tensor(digits.target))
    loader = prepare_data_loader(DataLoader(data, batch_size=BATCH, shuffle=True))
    marks["data"] = time.time()
    teacher = resnet18(num_classes=10).eval()
    student = prepare_model(resnet18(num_classes=10))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    marks["built"] = time.time()
    for step, (images, labels_B) in zip(range(2), loader, strict=False):
        marks.setdefault("first_batch", time.time())
        logits_BK = student(images)
        with torch.no_grad():
            wanted_BK = teacher(images).softmax(1)
        loss = F.cross_entropy(logits_BK, labels_B) + F.cross_entropy(logits_BK, wanted_BK)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        marks.setdefault("first_step", time.time())
        ray.train.report({"step": step, "loss": loss.item()})
    if ray.train.get_context().get_world_rank() == 0:
        Path(setup["file"]).write_text(json.dumps(marks))


def main() -> None:
    """Join the cluster that the job was submitted to, and train on two workers."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("folder", type=Path)
    folder = options.parse_args().folder
    marks = {"parsed": time.time()}
    ray.init()
    marks["connected"] = time.time()
    TorchTrainer(
        train,
        train_loop_config={"marks": marks, "file": str(folder / "marks.json")},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=str(folder)),
    ).fit()


if __name__ == "__main__":
    main()
