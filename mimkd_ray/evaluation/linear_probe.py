"""Accuracy of frozen features that a linear classifier reads, without the network's own head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mimkd_ray.errors import UserError


def linear_probe_accuracy(
    train_NC: Tensor, train_labels_N: Tensor, test_MC: Tensor, test_labels_M: Tensor, l2: float = 1e-3, steps: int = 100
) -> float:
    """Return the top-1 (%) of multinomial logistic regression on standardised features.

    `l2` is the weight of the mean squared weight beside the mean cross-entropy; the optimum is found with at most
    `steps` iterations of L-BFGS, so that nothing is random. Raises UserError for no rows.
    """
    _check(train_NC, train_labels_N, test_MC, test_labels_M)
    classes = int(max(train_labels_N.max(), test_labels_M.max())) + 1
    train_NC, test_MC = train_NC.float(), test_MC.float()
    mean_C, deviation_C = train_NC.mean(dim=0), train_NC.std(dim=0, correction=0)
    scale_C = torch.where(deviation_C > 0, deviation_C, 1.0)
    train_NC, test_MC = (train_NC - mean_C) / scale_C, (test_MC - mean_C) / scale_C
    weight_CV = torch.zeros(train_NC.shape[1], classes, device=train_NC.device, requires_grad=True)
    bias_V = torch.zeros(classes, device=train_NC.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_CV, bias_V], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(train_NC @ weight_CV + bias_V, train_labels_N) + l2 * weight_CV.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        return 100 * float(((test_MC @ weight_CV + bias_V).argmax(dim=1) == test_labels_M).float().mean())


def _check(train_NC: Tensor, train_labels_N: Tensor, test_MC: Tensor, test_labels_M: Tensor) -> None:
    for role, features, labels in (("training", train_NC, train_labels_N), ("test", test_MC, test_labels_M)):
        if not len(features) or len(features) != len(labels):
            raise UserError(f"{len(features)} {role} features and {len(labels)} labels: give as many of both, and some")
