"""Linear centred kernel alignment of two sets of features (Kornblith et al. 2019, "Similarity of neural network
representations revisited")."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def linear_cka(x_NC: Tensor, y_ND: Tensor) -> float:
    """Return the linear CKA of features of the same N images: 1 where one is a rotation and scaling of the other.

    ||Y'X||^2 / (||X'X|| ||Y'Y||) of the centred features, with Frobenius norms, in float64; of constant features NaN.
    Cost: N x max(C, D)^2.
    """
    x_NC, y_ND = x_NC.double(), y_ND.double()
    x_NC, y_ND = x_NC - x_NC.mean(dim=0), y_ND - y_ND.mean(dim=0)
    both = (y_ND.T @ x_NC).square().sum()
    return float(both / ((x_NC.T @ x_NC).norm() * (y_ND.T @ y_ND).norm()))
