"""The MIMKD loss: cross-entropy plus lower bounds on the mutual information of teacher and student features.

    loss = CE + kd_weight * T^2 KL(teacher_T || student_T) + sum over terms of weight * (-bound) + rivals

A positive pair comes from one image, a negative pair from two (negatives.py). terms.py describes the inputs and the
score of a term. Everything is computed in float32 with autocast off; no gradient reaches the teacher.

Rivals (methods/) are losses of other methods, which `loss.name` adds to the terms or puts in their place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimkd_ray.config import LossConfig
from mimkd_ray.config.loss_presets import Negatives
from mimkd_ray.errors import UserError, count
from mimkd_ray.losses.critic_sides import FrozenSide, Standardised
from mimkd_ray.losses.critics import ConcatCritic, Critic, build_critic
from mimkd_ray.losses.features import Features, full_precision, in_full_precision
from mimkd_ray.losses.methods.build_method import RivalPlan, build_rival
from mimkd_ray.losses.methods.crd import TrainingRows
from mimkd_ray.losses.methods.kd import kd_loss
from mimkd_ray.losses.methods.registry import RIVALS
from mimkd_ray.losses.negatives import roll_of, valid_pairs, with_more, with_queue
from mimkd_ray.losses.shared_classes import SharedClasses, columns
from mimkd_ray.losses.teacher_queue import TeacherQueue, class_numbers
from mimkd_ray.losses.terms import Candidates, Objective, Term, inputs_of, score_term, vector_of

WARMUP_SHARE = 0.1
"""Share of training over which terms of schedule `warmup` rise to their full weight."""

Gather = Callable[[Tensor], Tensor]
"""(this worker's lanes, ...) -> (all lanes of the step, ...), in the order of lanes."""


class LossOutput(NamedTuple):
    """The loss and its parts."""

    total: Tensor
    """Scalar to minimise."""
    terms: dict[str, Tensor]
    """Weighted parts with their gradient; their sum is total."""
    log: dict[str, Tensor]
    """Detached scalars: ce, kd, rival/<method>, and per term loss, nats, ceiling, scale, bias, mean_u, mean_v."""


class _Lane(NamedTuple):
    """Data of a lane for the end of the step: reduced teacher vectors by tap, ids, class numbers (-1 for mixed images),
    and the mean teacher feature of each critic with a frozen side."""

    vectors: dict[str, Tensor]
    ids_B: Tensor
    labels_B: Tensor
    means: list[Tensor]


def queue_channels(config: LossConfig, terms: Sequence[Term]) -> dict[str, int]:
    """Return the channels of the vectors that a queue of these terms keeps, by tap: those of global and local terms,
    after the fixed part of their critic. Empty if there is no queue."""
    if config.resolved_negatives != "queue":
        return {}
    frozen = config.resolved_critic.teacher == "frozen"
    return {
        term.teacher: min(term.teacher_channels, config.critic.frozen_width) if frozen else term.teacher_channels
        for term in terms
        if term.kind != "feature"
    }


class MIMKDLoss(nn.Module):
    """The loss of one student, with the critics of its terms, the queue of teacher vectors, and the rivals.

    ``forward(teacher, student, labels_B, ids_B)`` returns a :class:`LossOutput`; ``teacher`` may be None if the config
    uses no teacher. ``labels_B`` are class numbers, or (B, classes) probabilities of mixed images. With
    ``reading=True`` every bound is estimated over all pairs of the lane and all locations, independently of the
    training options, and rivals are left out; if there is a queue, the estimate includes it and the estimate of the
    lane alone is ``lane_nats``. A lane of one image has no negative and is an error.

    Training calls :meth:`observe` with every lane and :meth:`after_step` after the optimiser's step.
    """

    teacher_S: Tensor
    student_S: Tensor

    def __init__(
        self,
        config: LossConfig,
        terms: Sequence[Term],
        rivals: Sequence[RivalPlan] = (),
        rows: TrainingRows | None = None,
        shared: SharedClasses | None = None,
        labels: Literal["all", "partial", "none"] = "all",
    ) -> None:
        """Build critics, queue and rivals. ``rows`` are those of the training set, for a rival with a memory bank.
        ``shared``: the classes whose logits are compared, if the teacher's are not the student's. ``labels``: which
        images have one; those without have a negative number, and no part in the cross-entropy."""
        super().__init__()
        self.labels = labels
        self.shares_some = shared is not None
        if shared is not None:
            self.register_buffer("teacher_S", columns(shared.of_teacher), persistent=False)
            self.register_buffer("student_S", columns(shared.of_data), persistent=False)
        self.config = config
        self.plan = tuple(terms)
        if len({term.name for term in terms}) != len(terms):
            raise UserError(f"a tap pair stands twice in the loss: {', '.join(term.name for term in terms)}")
        self.bound = config.resolved_bound
        self.negatives: Negatives = config.resolved_negatives
        self.score_bytes = config.score_memory_mb * 2**20
        self.objective = Objective(
            self.bound, int(self.negatives == "rolled"), config.soft_temperature, config.symmetric, config.hard_share
        )
        critic = config.resolved_critic
        self.critics = nn.ModuleList(
            build_critic(critic, term.teacher_channels, term.student_channels) for term in terms
        )
        channels = queue_channels(config, terms)
        self.queue = TeacherQueue(config.queue, channels) if channels else None
        self.methods = tuple(plan.method for plan in rivals)
        self.rivals = nn.ModuleList(build_rival(plan, config, rows) for plan in rivals)
        self.lanes: list[_Lane] = []
        # Tensors, because a changed number would recompile a compiled loss in every step; they follow from the step,
        # like the learning rate.
        self.warmth: Tensor
        self.register_buffer("warmth", torch.ones(()), persistent=False)
        self.strength: Tensor
        self.register_buffer("strength", torch.ones(()), persistent=False)

    def begin_step(self, epoch: float, progress: float = 0.0) -> None:
        """Set the weights that depend on the step. ``epoch``: passes over the data so far; ``progress``: finished share
        of training.

        As published, the weight of rivals with warm-up rises once per epoch, and the first epoch already has its share.
        """
        self.lanes = []
        if self.config.rival_warmup and any(RIVALS[method].warms_up for method in self.methods):
            self.warmth.fill_(min(1.0, (math.floor(epoch) + 1) / self.config.rival_warmup))
        if self.config.schedule == "warmup":
            self.strength.fill_(min(1.0, progress / WARMUP_SHARE))
        elif self.config.schedule != "constant":
            fall = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
            self.strength.fill_(fall if self.config.schedule == "fall" else 1 - fall)

    @torch.no_grad()
    def observe(self, teacher: Features | None, labels_B: Tensor, ids_B: Tensor) -> None:
        """Record a lane that was trained on, for the queue and the statistics of critics. Memory: the lane's vectors
        until :meth:`after_step`."""
        moving = any(isinstance(module, FrozenSide | Standardised) for module in self.critics.modules())
        if teacher is None or (self.queue is None and not moving):
            return
        vectors: dict[str, Tensor] = {}
        means: list[Tensor] = []
        for term, critic in zip(self.plan, self.critics, strict=True):
            if term.kind == "feature":
                if isinstance(critic.teacher, FrozenSide):
                    map_BCHW = full_precision(teacher.maps[term.teacher])
                    means.append(critic.reduce_teacher(map_BCHW.mean((0, 2, 3))))  # type: ignore[operator]
                continue
            if term.teacher not in vectors:
                raw_BC = full_precision(vector_of(teacher, term.teacher))
                vectors[term.teacher] = critic.reduce_teacher(raw_BC)  # type: ignore[operator]
            if isinstance(critic.teacher, FrozenSide):
                means.append(vectors[term.teacher].mean(0))
        kept = vectors if self.queue is not None else {}
        self.lanes.append(_Lane(kept, ids_B, class_numbers(labels_B, ids_B), means))

    @torch.no_grad()
    def after_step(self, gather: Gather | None = None) -> None:
        """Clamp learned temperatures to their limits, and add the step's lanes to the queue and the statistics of
        critics. Call this after every optimiser step; with several workers, ``gather`` collects the lanes of all."""
        for critic in self.critics:
            critic.constrain_()  # type: ignore[operator]
        lanes, self.lanes = self.lanes, []
        if not lanes:
            return

        def all_lanes(values: Sequence[Tensor]) -> Tensor:
            own_KX = torch.stack(list(values))
            return own_KX if gather is None else gather(own_KX)

        standard = [module for module in self.critics.modules() if isinstance(module, Standardised)]
        if standard:
            own = [module.observed() for module in standard]
            step_X = all_lanes([torch.cat(own)] * len(lanes)).mean(0)  # each lane has the mean of its worker's lanes
            for module, moments in zip(standard, step_X.split([len(each) for each in own]), strict=True):
                module.update(moments)
        # Lanes of one size at a time: in an own loop, an epoch's last batch may be smaller than the others of its step.
        for size, group in groupby(lanes, key=lambda lane: len(lane.ids_B)):
            self._take_in(size, list(group), all_lanes)

    def _take_in(self, size: int, lanes: Sequence[_Lane], all_lanes: Callable[[Sequence[Tensor]], Tensor]) -> None:
        """Add lanes of ``size`` images to the means of frozen sides and to the queue."""
        frozen = [critic.teacher for critic in self.critics if isinstance(critic.teacher, FrozenSide)]
        if frozen:
            means_LX = all_lanes([torch.cat(lane.means) for lane in lanes])
            widths = [side.width for side in frozen]
            for side, mean_d in zip(frozen, means_LX.mean(0).split(widths), strict=True):
                side.update(mean_d, len(means_LX) * size)
        if self.queue is not None:
            vectors = {tap: all_lanes([lane.vectors[tap] for lane in lanes]).flatten(0, 1) for tap in lanes[0].vectors}
            ids_N = all_lanes([lane.ids_B for lane in lanes]).flatten()
            self.queue.push(vectors, ids_N, all_lanes([lane.labels_B for lane in lanes]).flatten())

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
            ce = self._cross_entropy(student.logits_BC, labels_B)
            parts["ce"] = config.resolved_ce_weight * ce
            log["ce"] = ce.detach()
            if config.resolved_kd_weight:
                assert teacher is not None, "KD has a weight and no teacher was given"
                of_teacher, of_student = self._compared(teacher, student)
                logits = of_student.logits_BC, of_teacher.logits_BC
                kd = kd_loss(*logits, config.kd_temperature, config.kd_logits == "standardised")
                parts["kd"] = config.resolved_kd_weight * kd
                log["kd"] = kd.detach()
            if self.plan:
                assert teacher is not None, "the loss has mutual-information terms and no teacher was given"
                if len(labels_B) < 2:
                    raise UserError(
                        f"a batch (lane) of {count(len(labels_B), 'image')} has no negatives: mutual-information terms "
                        "need 2 or more; DataLoader(drop_last=True) leaves out what is left at an epoch's end"
                    )
                for term, critic in zip(self.plan, self.critics, strict=True):
                    score = self._read if reading else self._train
                    loss, stats = score(term, critic, teacher, student, labels_B, ids_B)  # type: ignore[arg-type]
                    parts[term.name] = term.weight * self.strength * loss
                    log[f"{term.name}/loss"] = loss.detach()
                    log.update({f"{term.name}/{key}": value for key, value in stats.items()})
            for method, rival in zip(self.methods, self.rivals, strict=True) if not reading else ():
                assert teacher is not None, "the loss has rivals and no teacher was given"
                reads = self._compared(teacher, student) if RIVALS[method].logits else (teacher, student)
                loss = rival(*reads, labels_B, ids_B)
                weight = config.weight_of(method) * (self.warmth if RIVALS[method].warms_up else 1.0)
                parts[f"rival/{method}"] = weight * loss
                log[f"rival/{method}"] = loss.detach()
        total = torch.stack(list(parts.values())).sum()
        log["loss"] = total.detach()
        return LossOutput(total, parts, log)

    def _cross_entropy(self, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        """Return the mean over the images with a label; zero where there is none, with a gradient of zeros, so that
        every parameter has one."""
        smoothing = self.config.label_smoothing
        if self.labels == "all":
            return F.cross_entropy(logits_BC, labels_B, label_smoothing=smoothing)
        if self.labels == "none":
            return 0.0 * logits_BC.sum()
        known_B = labels_B >= 0
        losses_B = F.cross_entropy(logits_BC, labels_B.clamp(min=0), label_smoothing=smoothing, reduction="none")
        return losses_B.where(known_B, 0.0).sum() / known_B.sum().clamp(min=1)

    def _compared(self, teacher: Features, student: Features) -> tuple[Features, Features]:
        """Return both with the logits of the classes that they share, in one order."""
        if not self.shares_some:
            return teacher, student
        of_teacher = teacher.logits_BC.index_select(1, self.teacher_S)
        of_student = student.logits_BC.index_select(1, self.student_S)
        return teacher._replace(logits_BC=of_teacher), student._replace(logits_BC=of_student)

    def _train(
        self, term: Term, critic: Critic, teacher: Features, student: Features, labels_B: Tensor, ids_B: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss and statistics of a term over its training candidates."""
        teacher_LBC, student_LBC = inputs_of(term, teacher, student, self.config.resolved_locations)
        leave_out = self.config.resolved_same_class == "leave_out" and self.labels != "none"
        classes_B = labels_B if leave_out and labels_B.dim() == 1 else None
        mixed = labels_B.is_floating_point()
        objective = self.objective._replace(rolled=roll_of(mixed)) if self.objective.rolled else self.objective
        valid_BK = valid_pairs(ids_B, self.negatives, mixed)
        if classes_B is not None:
            # Images without a label may be of any class.
            unknown_B1 = (classes_B < 0).unsqueeze(1)
            valid_BK = valid_BK & (valid_pairs(classes_B, self.negatives) | unknown_B1)
        reduced_LBC = critic.reduce_teacher(teacher_LBC)
        if self.training and isinstance(critic, ConcatCritic):
            critic.observe(reduced_LBC, student_LBC)
        candidates = Candidates(reduced_LBC, valid_BK)
        if term.kind != "feature":

            def apart(ids_M: Tensor, classes_M: Tensor) -> Tensor:
                valid_BM = ids_B.unsqueeze(1) != ids_M
                return (
                    valid_BM if classes_B is None else valid_BM & ((classes_B.unsqueeze(1) != classes_M) | unknown_B1)
                )

            if teacher.others is not None:
                others = teacher.others
                more_MC = critic.reduce_teacher(full_precision(others.vectors[term.teacher].detach()))
                candidates = with_more(candidates, more_MC, apart(others.ids_M, others.labels_M))
            if self.queue is not None:
                count = max(1, self.queue.size // len(student_LBC))
                valid_BM = self.queue.filled_Q[:count] & apart(self.queue.ids_Q[:count], self.queue.labels_Q[:count])
                candidates = with_queue(candidates, critic, self.queue.vectors(term.teacher, count), valid_BM)
        everywhere = self.config.feature_negatives == "all"
        return score_term(critic, objective, candidates, student_LBC, everywhere, self.score_bytes)

    def _read(
        self, term: Term, critic: Critic, teacher: Features, student: Features, labels_B: Tensor, ids_B: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss and statistics of a term over all pairs of the lane and all locations, and with the queue, if
        any. Held-out images are never in the queue."""
        teacher_LBC, student_LBC = inputs_of(term, teacher, student, 0)
        candidates = Candidates(critic.reduce_teacher(teacher_LBC), valid_pairs(ids_B, "all"))
        loss, stats = score_term(critic, Objective(self.bound), candidates, student_LBC, score_bytes=self.score_bytes)
        if self.queue is None or term.kind == "feature":
            return loss, stats
        count = max(1, self.queue.size // len(student_LBC))
        valid_BM = self.queue.filled_Q[:count].expand(len(ids_B), -1)
        candidates = with_queue(candidates, critic, self.queue.vectors(term.teacher, count), valid_BM)
        lane = {"lane_nats": stats["nats"], "lane_ceiling": stats["ceiling"]}
        loss, stats = score_term(critic, Objective(self.bound), candidates, student_LBC, score_bytes=self.score_bytes)
        return loss, stats | lane
