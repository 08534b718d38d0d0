"""One mutual-information term: the features that it pairs, its negatives, and its score.

Kinds of term, after arXiv 2110.15946 (the pairing of unequal shapes and the critics are ours):

* global:  critic(teacher vector, student vector)
* local:   critic(teacher vector, student map[h, w]) for every location
* feature: critic(teacher map[h, w], student map[h, w]) at matching locations; the larger map is average-pooled

For a large map, each step scores an even grid of `locations`, which moves at every step (locations.py).

Memory: the scores of all pairs at every location would be B*K*L values. Where those are many, locations are scored in
chunks that are computed again in the backward pass, so that a term holds O(L*(B+K)*d).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mimkd_ray.config.loss_presets import BoundName, Kind
from mimkd_ray.losses.bounds import BOUNDS, BoundValue, ceiling, infonce, soft_cross_entropy
from mimkd_ray.losses.critic_sides import Centred, cosines
from mimkd_ray.losses.critics import Critic
from mimkd_ray.losses.features import Features, full_precision, match_sizes
from mimkd_ray.losses.locations import draw_locations, to_locations

GPU_SCORE_BYTES = 256 * 2**20
"""Memory for a term's scores at a time on a GPU, unless the config says otherwise."""
SMALL_SCORE_BYTES = 4 * 2**20
"""Scores that a CPU computes at once, however small the embeddings are."""

LOGITS = "logits"
"""Name, in a tap pair, of a network's logits as a vector."""


@dataclass(frozen=True, kw_only=True)
class Term:
    """One mutual-information term: a kind, a pair of taps and their channel counts."""

    kind: Kind
    teacher: str
    student: str
    weight: float
    teacher_channels: int
    student_channels: int

    @property
    def name(self) -> str:
        """The name of the term, such as "feature/layer4-stage3", unique within a loss. TensorBoard and MLflow use it as
        a tag, which may not contain @."""
        return f"{self.kind}/{self.teacher}-{self.student}".replace("@", ".")


class Objective(NamedTuple):
    """The loss computed from the scores of a term."""

    bound: BoundName
    rolled: int = 0
    """Distance in the lane to an image's single negative, the image this many places before it; 0: all candidates."""
    soft_temperature: float = 0.0
    """Temperature of the teacher's own distribution over the candidates as the target; 0: the positive is the
    target."""
    symmetric: bool = False
    """Average with the opposite direction, in which each teacher feature picks its student among those of the lane."""
    hard_share: float = 1.0
    """Share of the candidates to keep: for each image, those whose teacher features are most similar to its own."""


class Candidates(NamedTuple):
    """The teacher's side of a term: reduced features (L or 1, K, C), of which the first B of each location belong to
    the lane's images; the mask of the negatives of each image (B, K + M); and M vectors of earlier steps, where they
    are compared as they are."""

    reduced_LKC: Tensor
    valid_BK: Tensor
    queue: Centred | None = None


def vector_of(features: Features, tap: str) -> Tensor:
    """Return the vector (B, C) of a tap, or the logits."""
    return features.logits_BC if tap == LOGITS else features.vectors[tap]


def inputs_of(term: Term, teacher: Features, student: Features, limit: int) -> tuple[Tensor, Tensor]:
    """Return the two sides of a term in float32 by location: (L or 1, B, C_teacher), (L, B, C_student); L at most
    ``limit`` (0: all). The student's features must already be in full precision."""
    if term.kind == "feature":
        teacher_BCHW, student_BCHW = match_sizes(full_precision(teacher.maps[term.teacher]), student.maps[term.student])
        where = draw_locations(student_BCHW, limit)
        return to_locations(teacher_BCHW.detach(), where), to_locations(student_BCHW, where)
    teacher_1BC = to_locations(full_precision(vector_of(teacher, term.teacher).detach()))
    if term.kind == "global":
        return teacher_1BC, to_locations(vector_of(student, term.student))
    student_BCHW = student.maps[term.student]
    return teacher_1BC, to_locations(student_BCHW, draw_locations(student_BCHW, limit))


def score_term(
    critic: Critic,
    objective: Objective,
    candidates: Candidates,
    student_LBC: Tensor,
    all_locations: bool = False,
    score_bytes: int = 0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Embed both sides, score positives and negatives, and apply the objective at each location.

    Returns the loss (mean over locations, with gradient) and detached statistics: nats, ceiling, scale, bias, mean_u
    (positives), mean_v (negatives). The candidates may have one location, which serves all of the student's. With
    ``all_locations`` a location's negatives are the other images' features at every location. ``score_bytes``: memory
    for scores at a time; 0: chosen by the device (:func:`_chunk_size`). Extra memory is O(L*(B+K)*width), time
    O(L*B*K*width) for all candidates and O(L*B*width) for rolled.
    """
    batch = student_LBC.shape[1]
    teacher_LKd = critic.embed_teacher(candidates.reduced_LKC, batch)
    student_LBd = critic.embed_student(student_LBC)
    own_LBd = teacher_LKd[:, :batch]
    valid_BK, queue = candidates.valid_BK, candidates.queue
    pooled = all_locations and len(teacher_LKd) > 1
    if pooled:
        valid_BK = valid_BK.repeat(1, len(teacher_LKd))
        teacher_LKd = teacher_LKd.reshape(1, -1, teacher_LKd.shape[2])

    def rolled(own_lBd: Tensor, student_lBd: Tensor) -> Tensor:
        positive_lB = critic.paired(student_lBd, own_lBd)
        negative_lB1 = critic.paired(student_lBd, own_lBd.roll(objective.rolled, dims=1)).unsqueeze(2)
        return _statistics(objective, positive_lB, negative_lB1, valid_BK)

    def all_pairs(own_lBd: Tensor, teacher_lKd: Tensor, student_lBd: Tensor) -> Tensor:
        scores_lBK = critic.all_pairs(student_lBd, teacher_lKd, queue)  # type: ignore[arg-type]
        positive_lB = critic.paired(student_lBd, own_lBd) if pooled else scores_lBK.diagonal(dim1=1, dim2=2)
        similarity_lBK = reverse_lBB = None
        if objective.soft_temperature or objective.hard_share < 1:
            with torch.no_grad():
                similarity_lBK = cosines(own_lBd, teacher_lKd, queue)
        if objective.symmetric:
            own_lBB = critic.all_pairs(student_lBd, own_lBd) if pooled else scores_lBK[:, :, :batch]
            reverse_lBB = own_lBB.transpose(1, 2)
        return _statistics(objective, positive_lB, scores_lBK, valid_BK, similarity_lBK, reverse_lBB)

    if objective.rolled:
        stats_4L = rolled(own_LBd, student_LBd)
    else:
        values = valid_BK.shape[1] * critic.pair_width
        stats_4L = _by_chunks(
            all_pairs, own_LBd, teacher_LKd, student_LBd, _chunk_size(student_LBd, values, score_bytes)
        )
    loss, nats, mean_u, mean_v = stats_4L.mean(1).unbind()
    return loss, {
        "nats": nats.detach(),
        "ceiling": ceiling(objective.bound, valid_BK, objective.hard_share),
        "scale": critic.scale().detach(),
        "bias": critic.bias.detach(),
        "mean_u": mean_u.detach(),
        "mean_v": mean_v.detach(),
    }


def _statistics(
    objective: Objective,
    positive_LB: Tensor,
    negative_LBK: Tensor,
    valid_BK: Tensor,
    similarity_LBK: Tensor | None = None,
    reverse_LBB: Tensor | None = None,
) -> Tensor:
    """Return rows loss, nats, mean u, mean v, each (L,). Only the loss has a gradient.

    ``similarity_LBK``: cosines of the teacher's features of each image and of the candidates. ``reverse_LBB``: scores
    of each teacher feature (rows) with the lane's students.
    """
    used_BK = valid_BK
    if objective.hard_share < 1:
        assert similarity_LBK is not None
        used_BK = hardest(similarity_LBK, valid_BK, objective.hard_share)
    value: BoundValue = BOUNDS[objective.bound](positive_LB, negative_LBK, used_BK)
    loss_L = value.loss_L
    if objective.soft_temperature:
        assert similarity_LBK is not None
        loss_L = soft_cross_entropy(positive_LB, negative_LBK, used_BK, similarity_LBK, objective.soft_temperature)
    if reverse_LBB is not None:
        batch = reverse_LBB.shape[1]
        loss_L = (loss_L + infonce(positive_LB, reverse_LBB, valid_BK[:, :batch].T).loss_L) / 2
    # Without a negative there is nothing to contrast the positive with: some bounds would raise its score without
    # limit.
    known = valid_BK.any()
    loss_L = torch.where(known, loss_L, 0.0)
    with torch.no_grad():
        nats_L = value.nats_L
        if objective.bound != "infonce":  # infonce gives ln 1
            nats_L = torch.where(known, nats_L, torch.nan)
        mean_v_L = torch.where(valid_BK, negative_LBK, 0.0).sum((1, 2)) / valid_BK.sum().clamp(min=1)
    return torch.stack([loss_L, nats_L, positive_LB.detach().mean(1), mean_v_L])


def hardest(similarity_LBK: Tensor, valid_BK: Tensor, share: float) -> Tensor:
    """Return the mask (L, B, K) of the valid negatives of each image that are among the ``share`` most similar to it by
    teacher features; at least one, and all of equally similar ones."""
    among_LBK = similarity_LBK.masked_fill(~valid_BK, -torch.inf)
    counts_B1 = (valid_BK.sum(1, keepdim=True) * share).ceil().long().clamp(min=1)
    ranked_LBK = among_LBK.sort(dim=2, descending=True).values
    least_LB1 = ranked_LBK.gather(2, (counts_B1 - 1).expand(len(ranked_LBK), -1, -1))
    return valid_BK & (among_LBK >= least_LB1)


def _chunk_size(student_LBd: Tensor, values: int, score_bytes: int) -> int:
    """Return how many locations are scored at a time. ``values`` are held for the scores of one image at one location.

    As many as ``score_bytes`` hold, at least one; by default GPU_SCORE_BYTES on a GPU, where many small operations cost
    more than memory. On a CPU the scores of a chunk are by default at most a quarter of the embeddings' size, since a
    bound holds a handful of tensors of the scores' size, or SMALL_SCORE_BYTES if that is more; where all together are
    at most half of it, nothing is to be saved, and they are computed at once.
    """
    locations, batch, width = student_LBd.shape
    if not score_bytes and student_LBd.device.type == "cuda":
        score_bytes = GPU_SCORE_BYTES
    location_bytes = batch * values * student_LBd.element_size()
    if score_bytes:
        return max(1, score_bytes // location_bytes)
    if 2 * values <= width:
        return locations
    return max(1, SMALL_SCORE_BYTES // location_bytes, locations * width // (4 * values))


def _by_chunks(
    score: Callable[[Tensor, Tensor, Tensor], Tensor],
    own_LBd: Tensor,
    teacher_LKd: Tensor,
    student_LBd: Tensor,
    size: int,
) -> Tensor:
    """Apply ``score`` to chunks of ``size`` locations and join the results; chunks are recomputed in the backward pass,
    a single one is not."""
    if size >= len(student_LBd):
        return score(own_LBd, teacher_LKd, student_LBd)
    # split (and not slicing) has one backward for all chunks: slices would each allocate a gradient of full size.
    students = student_LBd.split(size)
    owns = own_LBd.split(size) if len(own_LBd) > 1 else (own_LBd,) * len(students)
    teachers = teacher_LKd.split(size) if len(teacher_LKd) > 1 else (teacher_LKd,) * len(students)
    chunks = list(zip(owns, teachers, students, strict=True))
    if not torch.is_grad_enabled():
        return torch.cat([score(*chunk) for chunk in chunks], dim=1)
    return torch.cat(
        [checkpoint(score, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks], dim=1
    )
