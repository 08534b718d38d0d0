"""The MIMKD loss: cross-entropy plus lower bounds on the mutual information of teacher and student features.

    loss = CE + kd_weight * T^2 KL(teacher_T || student_T) + sum over terms of weight * (-bound) + rivals

Three kinds of term, after arXiv 2110.15946 (the pairing of unequal shapes, critic widths and weights are ours):

* global:  critic(teacher vector, student vector)
* local:   critic(teacher vector, student map[h, w]) for every location
* feature: critic(teacher map[h, w], student map[h, w]) at matching locations; the larger map is average-pooled

Of a large map each step scores an even grid of `locations`, elsewhere each time (locations.py).

A positive pair comes from one image. Negatives pair a student with the teacher of *another image at the same
location*: the image before it in the lane (``rolled``), every other image of the lane (``all``), or for terms of
teacher vectors every other image of all lanes of the step (``step``: feature terms keep to the lane), or random images
of the training set beside those of the lane (``cache``). Pairs of equal ids are left out. Everything is computed in
float32 with autocast off; no gradient reaches the teacher.

Rivals (rivals.py) are losses of other methods, which `loss.name` adds or puts in the place of the terms.

Memory: the scores of all pairs at every location would be B*B*L values. Locations are scored in chunks that are
computed again in the backward pass, so a term holds O(B*L*d).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mimkd_ray.errors import UserError
from mimkd_ray.losses.bounds import BOUNDS, BoundName, ceiling
from mimkd_ray.losses.config import Kind, LossConfig, Negatives
from mimkd_ray.losses.crd import TrainingRows
from mimkd_ray.losses.critics import Critic, build_critic
from mimkd_ray.losses.features import Features, Others, in_full_precision, match_sizes
from mimkd_ray.losses.kd import kd_loss
from mimkd_ray.losses.locations import draw_locations, to_locations
from mimkd_ray.losses.methods import RIVALS
from mimkd_ray.losses.precision import full_precision
from mimkd_ray.losses.rivals import RivalPlan, build_rival


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
        """ "feature/layer4-stage3": unique within a loss, and fit for a tag of TensorBoard or a metric of MLflow, which
        allow no "@": a tap of an input reads "relu.input"."""
        return f"{self.kind}/{self.teacher}-{self.student}".replace("@", ".")


class LossOutput(NamedTuple):
    """The loss and what it consists of."""

    total: Tensor
    """Scalar to minimise."""
    terms: dict[str, Tensor]
    """Weighted parts with their gradient; they sum to total."""
    log: dict[str, Tensor]
    """Detached scalars: ce, kd, rival/<method>, and per term loss, nats, ceiling, scale, bias, mean_u, mean_v."""


def valid_pairs(ids_B: Tensor, negatives: Negatives) -> Tensor:
    """Which negatives of the lane count: (B, 1) for rolled, else (B, B), never the diagonal. Equal ids never count."""
    if negatives != "rolled":
        return ids_B.unsqueeze(1) != ids_B.unsqueeze(0)
    return (ids_B != ids_B.roll(1)).unsqueeze(1)


class MIMKDLoss(nn.Module):
    """The loss of one student, with the critics of its terms and the rivals. The critics' parameters are all the state
    of the terms; rivals may have more.

    ``forward(teacher, student, labels_B, ids_B)`` returns a :class:`LossOutput`; ``teacher`` may be None when the
    config uses no teacher. ``labels_B`` are class numbers, or (B, classes) probabilities of mixed images.
    ``reading=True`` reads every bound over all pairs of the lane and all locations whatever it trains with, and leaves
    the rivals out.
    A lane of one image has no negative and is an error.
    """

    def __init__(
        self,
        config: LossConfig,
        terms: Sequence[Term],
        rivals: Sequence[RivalPlan] = (),
        rows: TrainingRows | None = None,
    ) -> None:
        """``rows``: of the training set, for a rival with a bank."""
        super().__init__()
        self.config = config
        self.plan = tuple(terms)
        if len({term.name for term in terms}) != len(terms):
            raise UserError(f"a tap pair stands twice in the loss: {', '.join(term.name for term in terms)}")
        self.bound = config.resolved_bound
        self.negatives: Negatives = config.resolved_negatives
        self.critics = nn.ModuleList(
            build_critic(config.critic, term.teacher_channels, term.student_channels) for term in terms
        )
        self.methods = tuple(plan.method for plan in rivals)
        self.rivals = nn.ModuleList(build_rival(plan, rows) for plan in rivals)
        self.warmth: Tensor
        # A tensor, so that a compiled loss is not compiled anew every epoch; it follows from the step, like the rate.
        self.register_buffer("warmth", torch.ones(()), persistent=False)

    def begin_step(self, epoch: float) -> None:
        """Call before every step that trains with rivals which warm up. ``epoch``: passes over the data until now.

        As published the weight rises once an epoch, and the first one has its share already."""
        if self.config.rival_warmup and any(RIVALS[method].warms_up for method in self.methods):
            self.warmth.fill_(min(1.0, (math.floor(epoch) + 1) / self.config.rival_warmup))

    def constrain_(self) -> None:
        """Bring learned temperatures back to their limits; call after every optimiser step."""
        for critic in self.critics:
            critic.constrain_()  # type: ignore[operator]

    def forward(
        self,
        teacher: Features | None,
        student: Features,
        labels_B: Tensor,
        ids_B: Tensor,
        reading: bool = False,
    ) -> LossOutput:
        config = self.config
        parts: dict[str, Tensor] = {}
        log: dict[str, Tensor] = {}
        with torch.autocast(labels_B.device.type, enabled=False):
            student = in_full_precision(student)
            if labels_B.is_floating_point():
                labels_B = labels_B.to(student.logits_BC.dtype)
            ce = F.cross_entropy(student.logits_BC, labels_B, label_smoothing=config.label_smoothing)
            parts["ce"] = config.resolved_ce_weight * ce
            log["ce"] = ce.detach()
            if config.resolved_kd_weight:
                assert teacher is not None, "KD has a weight and no teacher was given"
                kd = kd_loss(student.logits_BC, teacher.logits_BC, config.kd_temperature)
                parts["kd"] = config.resolved_kd_weight * kd
                log["kd"] = kd.detach()
            if self.plan:
                assert teacher is not None, "the loss has mutual-information terms and no teacher was given"
                if len(labels_B) < 2:
                    raise ValueError("a lane of 1 image has no negatives: a mutual-information term needs 2 or more")
                negatives: Negatives = "all" if reading else self.negatives
                valid_BK = valid_pairs(ids_B, negatives)
                for term, critic in zip(self.plan, self.critics, strict=True):
                    limit = 0 if reading else config.resolved_locations
                    teacher_LKC, student_LBC = _inputs(term, teacher, student, limit)
                    loss, stats = score_term(
                        critic,  # type: ignore[arg-type]
                        self.bound,
                        negatives,
                        teacher_LKC,
                        student_LBC,
                        _with_others(valid_BK, ids_B, teacher_LKC, teacher.others),
                    )
                    parts[term.name] = term.weight * loss
                    log[f"{term.name}/loss"] = loss.detach()
                    log.update({f"{term.name}/{key}": value for key, value in stats.items()})
            for method, rival in zip(self.methods, self.rivals, strict=True) if not reading else ():
                assert teacher is not None, "the loss has rivals and no teacher was given"
                loss = rival(teacher, student, labels_B, ids_B)
                weight = config.weight_of(method) * (self.warmth if RIVALS[method].warms_up else 1.0)
                parts[f"rival/{method}"] = weight * loss
                log[f"rival/{method}"] = loss.detach()
        total = torch.stack(list(parts.values())).sum()
        log["loss"] = total.detach()
        return LossOutput(total, parts, log)


def _inputs(term: Term, teacher: Features, student: Features, limit: int) -> tuple[Tensor, Tensor]:
    """The two sides of a term in float32 by location: (L or 1, K, C_teacher), (L, B, C_student). K is B, and more where
    other lanes give negatives; L at most ``limit``. The student's features come in full precision."""
    if term.kind == "feature":
        teacher_BCHW, student_BCHW = match_sizes(full_precision(teacher.maps[term.teacher]), student.maps[term.student])
        where = draw_locations(student_BCHW, limit)
        return to_locations(teacher_BCHW.detach(), where), to_locations(student_BCHW, where)
    teacher_KC = teacher.vectors[term.teacher]
    if teacher.others is not None:
        teacher_KC = torch.cat([teacher_KC, teacher.others.vectors[term.teacher].to(teacher_KC.dtype)])
    teacher_1KC = to_locations(full_precision(teacher_KC.detach()))
    if term.kind == "global":
        return teacher_1KC, to_locations(student.vectors[term.student])
    student_BCHW = student.maps[term.student]
    return teacher_1KC, to_locations(student_BCHW, draw_locations(student_BCHW, limit))


def _with_others(valid_BK: Tensor, ids_B: Tensor, teacher_LKC: Tensor, others: Others | None) -> Tensor:
    """The lane's valid pairs, and those with the images of other lanes where the term's teacher side has them."""
    if others is None or teacher_LKC.shape[1] == len(ids_B):
        return valid_BK
    return torch.cat([valid_BK, ids_B.unsqueeze(1) != others.ids_M.unsqueeze(0)], dim=1)


def score_term(
    critic: Critic,
    bound: BoundName,
    negatives: Negatives,
    teacher_LKC: Tensor,
    student_LBC: Tensor,
    valid_BK: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Embed both sides, score positives and negatives, and apply the bound at each location.

    Returns the loss (mean over locations, with gradient) and detached statistics: nats, ceiling, scale, bias,
    mean_u (positives), mean_v (negatives). ``teacher_LKC`` may have one location, which serves all of the
    student's, and more images than the student's: the first B belong to its images, the others are negatives. Extra
    memory is O(L*B*width), time O(L*B*K*width) for all pairs and O(L*B*width) for rolled.
    """
    teacher_LKd, student_LBd = critic.embed_teacher(teacher_LKC), critic.embed_student(student_LBC)

    def rolled(teacher_lBd: Tensor, student_lBd: Tensor) -> Tensor:
        positive_lB = critic.paired(student_lBd, teacher_lBd)
        negative_lB1 = critic.paired(student_lBd, teacher_lBd.roll(1, dims=1)).unsqueeze(2)
        return _statistics(bound, positive_lB, negative_lB1, valid_BK)

    def all_pairs(teacher_lKd: Tensor, student_lBd: Tensor) -> Tensor:
        scores_lBK = critic.all_pairs(student_lBd, teacher_lKd)
        return _statistics(bound, scores_lBK.diagonal(dim1=1, dim2=2), scores_lBK, valid_BK)

    if negatives == "rolled":
        stats_4L = rolled(teacher_LKd, student_LBd)
    else:
        stats_4L = _by_chunks(all_pairs, teacher_LKd, student_LBd, critic.pair_width)
    loss, nats, mean_u, mean_v = stats_4L.mean(1).unbind()
    return loss, {
        "nats": nats.detach(),
        "ceiling": ceiling(bound, valid_BK),
        "scale": critic.scale().detach(),
        "bias": critic.bias.detach(),
        "mean_u": mean_u.detach(),
        "mean_v": mean_v.detach(),
    }


def _statistics(bound: BoundName, positive_LB: Tensor, negative_LBK: Tensor, valid_BK: Tensor) -> Tensor:
    """Rows loss, nats, mean u, mean v, each (L,). Only the loss carries a gradient."""
    value = BOUNDS[bound](positive_LB, negative_LBK, valid_BK)
    with torch.no_grad():
        mean_v_L = torch.where(valid_BK, negative_LBK, 0.0).sum((1, 2)) / valid_BK.sum().clamp(min=1)
    return torch.stack([value.loss_L, value.nats_L, positive_LB.detach().mean(1), mean_v_L])


def _by_chunks(
    score: Callable[[Tensor, Tensor], Tensor], teacher_LKd: Tensor, student_LBd: Tensor, pair_width: int
) -> Tensor:
    """Apply ``score`` to chunks of locations and join the results; chunks are recomputed in the backward pass.

    The scores of a chunk are at most a quarter of the embeddings' size (or one location's, if that is more), since a
    bound holds a handful of tensors of the scores' size. Where all scores together are at most half of the
    embeddings' size nothing is to be saved and they are computed at once.
    """
    locations, _, width = student_LBd.shape
    candidates = teacher_LKd.shape[1]
    if 2 * candidates * pair_width <= width or locations == 1:
        return score(teacher_LKd, student_LBd)
    size = max(1, locations * width // (4 * candidates * pair_width))
    # split (and not slicing) has one backward for all chunks: slices would each allocate a gradient of full size.
    students = student_LBd.split(size)
    teachers = teacher_LKd.split(size) if len(teacher_LKd) > 1 else (teacher_LKd,) * len(students)
    if not torch.is_grad_enabled():
        return torch.cat([score(t, s) for t, s in zip(teachers, students, strict=True)], dim=1)
    chunks = [
        checkpoint(score, t, s, use_reentrant=False, preserve_rng_state=False)
        for t, s in zip(teachers, students, strict=True)
    ]
    return torch.cat(chunks, dim=1)
