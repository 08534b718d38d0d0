"""CRD, contrastive representation distillation (Tian et al., arXiv 1910.10699), with its memory banks.

    loss = NCE(teacher embedding, bank of student embeddings) + NCE(student embedding, bank of teacher embeddings)

A linear layer maps each network's vector to 128 values of unit length. Two banks hold such an embedding of every
training image, one bank for each network. An embedding v of one network is scored against the other network's bank, at
its own image (the positive) and at m random images of other classes: with x = exp(v . bank / TEMPERATURE) / Z,

    NCE = - ln(x+ / (x+ + m/N)) - sum over negatives of ln((m/N) / (x- + m/N)),   mean over the batch

where Z is N times the mean of exp(v . bank / TEMPERATURE) over the loss's first batch and does not change after it.
Then the banks are updated with the batch's embeddings: bank = normalised(MOMENTUM * bank + (1 - MOMENTUM) * v).

Published, and the values here: 128 values, m = 16,384, TEMPERATURE 0.07, MOMENTUM 0.5, weight 0.8. Negatives are drawn
from torch's generator, with replacement: the authors' loader draws without replacement if a class leaves enough images,
which has the same expectation. They add 1e-7 to the denominators, which the logarithm of a sum does not need.

Memory: the banks hold 2 * N * 128 values (1.3 GB in float32 at N = 1,281,167), and a checkpoint holds them as well.
Scores of all negatives are B * (m + 1) values; the bank's rows for them are 128 times as much, and the authors' code
keeps them for the backward pass. Here the gradient of the embeddings is computed together with the loss, from rows that
are gathered for a few images at a time. If the whole bank is not much larger than the rows of one image, every image is
scored with all of it by one matrix product, in B * N values and a small part of the time.

The banks change within a step, so this loss needs a single lane. They are in the checkpoint, so a resumed run is equal
bit for bit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimkd_ray.errors import UserError
from mimkd_ray.losses.methods.base import Picked, Rival, RivalTaps

WIDTH, NEGATIVES, TEMPERATURE, MOMENTUM = 128, 16_384, 0.07, 0.5
CPU_CHUNK_BYTES, CHUNK_BYTES = 8 * 2**20, 64 * 2**20
"""Bytes of rows gathered at a time. A CPU is 1.4 times as fast if they stay in its cache; a GPU is faster with fewer
calls."""
DENSE = 8
"""Largest bank, in multiples of m rows, that is multiplied as a whole: arithmetic is cheaper than fetching rows."""


class TrainingRows(NamedTuple):
    """The training images: their ids, ascending, and their class numbers."""

    ids_N: Tensor
    labels_N: Tensor


class CRD(Rival):
    """The CRD loss on vectors and ids; two embeddings and two banks. An id outside the training set uses another
    image's row."""

    ids_N: Tensor
    labels_N: Tensor
    by_class_N: Tensor
    class_starts: Tensor
    class_sizes: Tensor
    of_student_Nd: Tensor
    of_teacher_Nd: Tensor
    log_z_2: Tensor

    def __init__(self, taps: RivalTaps, rows: TrainingRows, negatives: int = NEGATIVES) -> None:
        super().__init__(taps)
        (pair,) = taps.vectors
        self.negatives = negatives
        self.count = len(rows.ids_N)
        if len(rows.labels_N.unique()) < 2:
            raise UserError(f"loss.name has crd, and all {self.count} training images are of one class: no negatives")
        self.embed_student = nn.Linear(pair.student.channels, WIDTH)
        self.embed_teacher = nn.Linear(pair.teacher.channels, WIDTH)
        sizes = torch.bincount(rows.labels_N)
        for name, value in (
            ("ids_N", rows.ids_N),
            ("labels_N", rows.labels_N),
            ("by_class_N", rows.labels_N.argsort(stable=True)),
            ("class_sizes", sizes),
            ("class_starts", sizes.cumsum(0) - sizes),
        ):
            self.register_buffer(name, value, persistent=False)
        # As published: uniform, so that a row's length is about 1.
        bound = math.sqrt(3 / WIDTH)
        self.register_buffer("of_student_Nd", torch.empty(self.count, WIDTH).uniform_(-bound, bound))
        self.register_buffer("of_teacher_Nd", torch.empty(self.count, WIDTH).uniform_(-bound, bound))
        # ln Z of the student's and of the teacher's scores; infinite before the first batch.
        self.register_buffer("log_z_2", torch.full((2,), math.inf))
        # True once both are known to be set, so that the device need not be queried. A compiled loss is recompiled once
        # for it.
        self.settled = False
        self.register_load_state_dict_post_hook(_look_again)

    def compare(self, teacher: Picked, student: Picked, labels_B: Tensor, ids_B: Tensor) -> Tensor:
        student_Bd = F.normalize(self.embed_student(student.vectors[0]), dim=1)
        teacher_Bd = F.normalize(self.embed_teacher(teacher.vectors[0]), dim=1)
        rows_B = torch.searchsorted(self.ids_N, ids_B).clamp(max=self.count - 1)
        rows_BK = torch.cat([rows_B.unsqueeze(1), self.draw(rows_B)], dim=1)
        loss = self._contrast(0, student_Bd, self.of_teacher_Nd, rows_BK)
        loss = loss + self._contrast(1, teacher_Bd, self.of_student_Nd, rows_BK)
        self._remember(self.of_student_Nd, student_Bd, rows_B)
        self._remember(self.of_teacher_Nd, teacher_Bd, rows_B)
        if not self._multiplies:
            self.settled = True
        return loss

    def draw(self, rows_B: Tensor) -> Tensor:
        """Return random training rows of other classes than those of ``rows_B``: (B, m), evenly among all."""
        labels_B1 = self.labels_N[rows_B].unsqueeze(1)
        starts_B1, sizes_B1 = self.class_starts[labels_B1], self.class_sizes[labels_B1]
        # 62 random bits: the remainder favours no row by more than 1 in 10^12.
        places = torch.randint(2**62, (len(rows_B), self.negatives), device=rows_B.device) % (self.count - sizes_B1)
        return self.by_class_N[torch.where(places < starts_B1, places, places + sizes_B1)]

    def _contrast(self, which: int, own_Bd: Tensor, bank_Nd: Tensor, rows_BK: Tensor) -> Tensor:
        """Return the NCE of embeddings against a bank; the first column of ``rows_BK`` is the positives."""
        with torch.no_grad():
            against = self._whole if self._multiplies else self._gathered
            losses_B, slopes_Bd = against(which, own_Bd, bank_Nd, rows_BK)
            gradient_Bd = slopes_Bd / (TEMPERATURE * len(own_Bd))
        # A loss with the gradient computed above: own - own is 0.
        return losses_B.mean() + (gradient_Bd * (own_Bd - own_Bd.detach())).sum()

    def _whole(self, which: int, own_Bd: Tensor, bank_Nd: Tensor, rows_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the NCE of each image (B,), and the sum of its rows times their slopes (B, 128), with the whole bank
        at once."""
        scores_BK = (own_Bd @ bank_Nd.T).gather(1, rows_BK) / TEMPERATURE
        self._settle(which, scores_BK)
        losses_B, slope_BK = self._nce(which, scores_BK)
        return losses_B, slope_BK.new_zeros(len(rows_BK), self.count).scatter_add_(1, rows_BK, slope_BK) @ bank_Nd

    def _gathered(self, which: int, own_Bd: Tensor, bank_Nd: Tensor, rows_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same as `_whole` from the gathered rows of a few images at a time. The first step fetches rows
        twice."""
        most = CPU_CHUNK_BYTES if bank_Nd.device.type == "cpu" else CHUNK_BYTES
        size = max(1, most // (rows_BK.shape[1] * WIDTH * bank_Nd.element_size()))
        chunks = list(zip(own_Bd.split(size), rows_BK.split(size), strict=True))
        # One buffer for all chunks: malloc does not give back all memory of separate ones.
        place = bank_Nd.new_empty(min(size, len(rows_BK)) * rows_BK.shape[1], WIDTH)

        def fetch(rows_bK: Tensor) -> Tensor:
            return torch.index_select(bank_Nd, 0, rows_bK.flatten(), out=place[: rows_bK.numel()]).view(
                *rows_bK.shape, WIDTH
            )

        if not self.settled:
            scored = [torch.einsum("bd,bkd->bk", own_bd, fetch(rows_bK)) for own_bd, rows_bK in chunks]
            self._settle(which, torch.cat(scored) / TEMPERATURE)
        losses, slopes = [], []
        for own_bd, rows_bK in chunks:
            bank_bKd = fetch(rows_bK)
            loss_b, slope_bK = self._nce(which, torch.einsum("bd,bkd->bk", own_bd, bank_bKd) / TEMPERATURE)
            losses.append(loss_b)
            slopes.append(torch.einsum("bk,bkd->bd", slope_bK, bank_bKd))
        return torch.cat(losses), torch.cat(slopes)

    def _settle(self, which: int, scores_BK: Tensor) -> None:
        """Set Z from these scores if it is not yet set."""
        log_mean = scores_BK.flatten().logsumexp(0) - math.log(scores_BK.numel())
        found = log_mean + math.log(self.count)
        self.log_z_2[which] = torch.where(self.log_z_2[which].isinf(), found, self.log_z_2[which])

    def _nce(self, which: int, scores_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the NCE (B,), and its slope by each score (B, K)."""
        # With u = ln(x / (m/N)) the NCE is a logistic loss of u.
        u_BK = scores_BK - self.log_z_2[which] - math.log(self.negatives / self.count)
        slope_BK = u_BK.sigmoid()
        slope_BK[:, 0] -= 1
        return F.softplus(-u_BK[:, 0]) + F.softplus(u_BK[:, 1:]).sum(1), slope_BK

    @property
    def _multiplies(self) -> bool:
        return self.count <= DENSE * self.negatives

    @torch.no_grad()
    def _remember(self, bank_Nd: Tensor, own_Bd: Tensor, rows_B: Tensor) -> None:
        mixed_Bd = MOMENTUM * bank_Nd[rows_B] + (1 - MOMENTUM) * own_Bd.detach()
        bank_Nd[rows_B] = F.normalize(mixed_Bd, dim=1)


def _look_again(loss: nn.Module, _: object) -> None:
    """Check whether Z is set after a state was loaded."""
    assert isinstance(loss, CRD)
    loss.settled = bool(loss.log_z_2.isfinite().all())
