"""CRD, contrastive representation distillation (Tian et al., arXiv 1910.10699), with its memory banks.

    loss = NCE(teacher embedding, bank of student embeddings) + NCE(student embedding, bank of teacher embeddings)

Each network's vector goes through a linear layer to 128 values of unit length. Two banks hold such an embedding of
every training image for either network. An embedding v of one network is scored against the other network's bank, at
its own image (the positive) and at m random images of other classes: with x = exp(v . bank / TEMPERATURE) / Z,

    NCE = - ln(x+ / (x+ + m/N)) - sum over negatives of ln((m/N) / (x- + m/N)),   mean over the batch

where Z is N times the mean of exp(v . bank / TEMPERATURE) over the first batch that the loss ever sees, and stays as it
is. Then the banks take the batch's embeddings in: bank = normalised(MOMENTUM * bank + (1 - MOMENTUM) * v).

Published, and the values here: 128 values, m = 16,384, TEMPERATURE 0.07, MOMENTUM 0.5, weight 0.8. Negatives are drawn
from torch's generator, with replacement: the authors' loader draws without it where a class leaves enough images, which
has the same expectation. They add 1e-7 to the denominators, which a logarithm of a sum has no need of.

Memory: the banks hold 2 * N * 128 values (1.3 GB in float32 at N = 1,281,167), and so much more is in a checkpoint.
Scores of all negatives are B * (m + 1) values; the bank's rows that belong to them are 128 times as much, and the
authors' code keeps them for the backward pass. Here the gradient of the embeddings is found together with the loss,
from rows that are gathered a few images at a time; and where the whole bank is not much larger than the rows of one
image, every image is scored with all of it by one matrix product, in B * N values and a small part of the time.

The banks change within a step: this loss is for one lane. A run goes on bit for bit, for they are in its checkpoint.
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
"""Of gathered rows at a time. A CPU is 1.4 times as fast with what stays in its cache; elsewhere calls cost more."""
DENSE = 8
"""A bank of up to so many times m rows is multiplied as a whole: arithmetic is cheaper than fetching rows."""


class TrainingRows(NamedTuple):
    """The training images: their ids, rising, and their class numbers."""

    ids_N: Tensor
    labels_N: Tensor


class CRD(Rival):
    """Vectors, and ids; two embeddings and two banks. An id that is no training image's reads and writes another's."""

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
        # ln Z of the student's and of the teacher's scores; infinite until the first batch.
        self.register_buffer("log_z_2", torch.full((2,), math.inf))
        # Whether they are known to be set, without a look at the device. A compiled loss is compiled once more for it.
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
        """Random training rows of other classes than those of ``rows_B``: (B, m), evenly among all."""
        labels_B1 = self.labels_N[rows_B].unsqueeze(1)
        starts_B1, sizes_B1 = self.class_starts[labels_B1], self.class_sizes[labels_B1]
        # 62 random bits: the remainder favours no row by more than one in 10^12.
        places = torch.randint(2**62, (len(rows_B), self.negatives), device=rows_B.device) % (self.count - sizes_B1)
        return self.by_class_N[torch.where(places < starts_B1, places, places + sizes_B1)]

    def _contrast(self, which: int, own_Bd: Tensor, bank_Nd: Tensor, rows_BK: Tensor) -> Tensor:
        """NCE of embeddings against a bank, whose first column of rows is the positives."""
        with torch.no_grad():
            against = self._whole if self._multiplies else self._gathered
            losses_B, slopes_Bd = against(which, own_Bd, bank_Nd, rows_BK)
            gradient_Bd = slopes_Bd / (TEMPERATURE * len(own_Bd))
        # The loss with the gradient that was just found: own - own is 0.
        return losses_B.mean() + (gradient_Bd * (own_Bd - own_Bd.detach())).sum()

    def _whole(self, which: int, own_Bd: Tensor, bank_Nd: Tensor, rows_BK: Tensor) -> tuple[Tensor, Tensor]:
        """NCE of each image (B,), and the sum of its rows by their slopes (B, 128), with all of the bank at once."""
        scores_BK = (own_Bd @ bank_Nd.T).gather(1, rows_BK) / TEMPERATURE
        self._settle(which, scores_BK)
        losses_B, slope_BK = self._nce(which, scores_BK)
        return losses_B, slope_BK.new_zeros(len(rows_BK), self.count).scatter_add_(1, rows_BK, slope_BK) @ bank_Nd

    def _gathered(self, which: int, own_Bd: Tensor, bank_Nd: Tensor, rows_BK: Tensor) -> tuple[Tensor, Tensor]:
        """The same from the rows alone, those of a few images at a time. Rows are fetched twice in the first step."""
        most = CPU_CHUNK_BYTES if bank_Nd.device.type == "cpu" else CHUNK_BYTES
        size = max(1, most // (rows_BK.shape[1] * WIDTH * bank_Nd.element_size()))
        chunks = list(zip(own_Bd.split(size), rows_BK.split(size), strict=True))
        # One place for all chunks: memory of its own for each of them is not all given back by malloc.
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
        """Fix Z on these scores, where it is not yet."""
        log_mean = scores_BK.flatten().logsumexp(0) - math.log(scores_BK.numel())
        found = log_mean + math.log(self.count)
        self.log_z_2[which] = torch.where(self.log_z_2[which].isinf(), found, self.log_z_2[which])

    def _nce(self, which: int, scores_BK: Tensor) -> tuple[Tensor, Tensor]:
        """(B,), and the slope of each by its scores (B, K)."""
        # u = ln(x / (m/N)): the NCE is a logistic loss of u.
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
    """After a state was loaded."""
    assert isinstance(loss, CRD)
    loss.settled = bool(loss.log_z_2.isfinite().all())
