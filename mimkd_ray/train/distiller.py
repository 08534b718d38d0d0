"""Distillation in anybody's own loop: the student, its critics and the loss in one module, beside a frozen teacher.

distiller = distill(teacher, student, image_size=224)
optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05, momentum=0.9)
for images, labels, ids in loader:
    loss = distiller(images, labels, ids)
    optimizer.zero_grad()
    loss.total.backward()
    optimizer.step()
    distiller.after_step()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mimkd_ray import console
from mimkd_ray.config import LossConfig
from mimkd_ray.errors import UserError
from mimkd_ray.losses.features import Features, Others
from mimkd_ray.losses.methods.registry import RIVALS
from mimkd_ray.losses.mimkd_loss import MIMKDLoss
from mimkd_ray.losses.teacher_queue import class_numbers
from mimkd_ray.taps.dry_checks import check_logits
from mimkd_ray.taps.tapped_model import TappedModel
from mimkd_ray.train.distill_arguments import Labels, check_combination, check_kinds, with_pairs, without_other_classes
from mimkd_ray.train.distributed import all_but, gather_lanes, is_distributed
from mimkd_ray.train.networks.build import TapPlan, plan_taps
from mimkd_ray.train.networks.teacher import canonical

MOST_BATCHES = 1024
"""Batches that are trained on without an ``after_step`` before that is an error: each leaves its teacher vectors."""


class Distilled(NamedTuple):
    """The loss of a batch, what it consists of, and the student's logits (B, classes)."""

    total: Tensor
    """Scalar to minimise."""
    terms: dict[str, Tensor]
    """Weighted parts with their gradient; they sum to total."""
    log: dict[str, Tensor]
    """Detached scalars: ce, kd, rival/<method>, and per term loss, nats, ceiling, scale, bias, mean_u, mean_v."""
    logits: Tensor


class Distiller(nn.Module):
    """A student with its critics and its loss; :func:`distill` makes it.

    Its parameters and its state are those of the student and of the loss. The teacher is in neither: it is frozen,
    always in evaluation mode, and follows the images from device to device. ``student`` is the network that was given,
    with hooks on the layers that are read (:meth:`release` takes them off): save ``distiller.student.state_dict()``.
    """

    next_id: Tensor
    steps_taken: Tensor

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        plan: TapPlan,
        loss: LossConfig,
        steps: int | None = None,
        epoch_steps: int | None = None,
        labels: Labels = "all",
    ) -> None:
        """``plan``: the taps that ``loss`` reads (:func:`mimkd_ray.train.networks.build.plan_taps`). The rest is as in
        :func:`distill`. Critics are drawn from torch's global generator."""
        super().__init__()
        self.student = student
        self.loss = MIMKDLoss(loss, plan.terms, plan.rivals, labels=labels)
        self.steps, self.epoch_steps = steps, epoch_steps
        self._shapes = dict(plan.student_shapes)
        self._vectors, self._maps = plan.student_taps()
        # In tuples: the student's parameters have one name in the state, and the teacher's have none.
        self._tapped = (TappedModel(student, sorted({*self._vectors, *self._maps})),)
        self._teacher_shapes, self._teacher_taps = dict(plan.teacher_shapes), plan.teacher_taps()
        self._teacher = (TappedModel(teacher, sorted({name for names in self._teacher_taps for name in names})),)
        self._teacher[0].requires_grad_(False).eval()
        first = next(student.parameters(), torch.zeros(()))
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        self.loss.to(first.device, dtype)
        # Both are part of the state: ids of the vectors in the queue are compared with those that follow.
        self.register_buffer("next_id", torch.zeros((), dtype=torch.int64, device=first.device))
        self.register_buffer("steps_taken", torch.zeros((), dtype=torch.int64, device=first.device))
        self.step = 0
        self._noted = False  # whether a batch was trained on since the last after_step
        self.register_load_state_dict_post_hook(_take_up)
        self._begin_step()

    def forward(self, images: Tensor, labels: Tensor | None = None, ids: Tensor | None = None) -> Distilled:
        """The loss of a batch of normalised images (B, 3, H, W).

        ``labels`` are class numbers (B,), or (B, classes) probabilities of mixed images; a distiller that was made with
        ``labels="none"`` needs none. ``ids`` (B,) are the images'
        numbers in the data set: pairs of equal ids are never negatives of each other, also where the queue holds an
        image's vector from an epoch before. Without ``ids`` every image counts as one that was never seen (numbers
        from a counter, others on every rank), so that an image and its own earlier vector in the queue are a negative
        pair. Pass them always or never.

        Under autocast both networks run in its precision, and the loss in float32. In training mode the batch is
        noted for :meth:`after_step`.
        """
        labels, ids = self._checked(images, labels, ids)
        teacher, student, logits = self._features(images)
        if teacher is not None and teacher.vectors and self.loss.negatives == "step" and is_distributed():
            teacher = teacher._replace(others=_of_other_ranks(teacher.vectors, ids, class_numbers(labels, ids)))
        output = self.loss(teacher, student, labels, ids)
        if self.training:
            self._note(teacher, labels, ids)
        return Distilled(output.total, output.terms, output.log, logits)

    @torch.no_grad()
    def read(self, images: Tensor, labels: Tensor | None = None, ids: Tensor | None = None) -> dict[str, Tensor]:
        """Return the log of :meth:`forward` with every bound read over all pairs of the batch and all locations, and
        without rivals: for held-out images, in evaluation mode. Any rank may call it alone."""
        labels, ids = self._checked(images, labels, ids)
        teacher, student, _ = self._features(images)
        return self.loss(teacher, student, labels, ids, reading=True).log

    def _checked(self, images: Tensor, labels: Tensor | None, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return labels and ids of a batch. Raises UserError for what is none of these images, and for a loss that was
        cast to half precision."""
        kind = next((parameter.dtype for parameter in self.loss.parameters()), torch.float32)
        if kind in (torch.float16, torch.bfloat16):
            raise UserError(
                f"the distiller was cast to {kind}, and its loss is computed in float32: cast the student before "
                "distill(), or put torch.autocast around the call"
            )
        if labels is None:
            if self.loss.labels != "none":
                raise UserError("labels is None: pass class numbers (B,), or make the distiller with labels='none'")
            labels = torch.full((len(images),), -1, device=images.device)
        if ids is None:
            ids = self._new_ids(len(images))
        for name, value, mixed in (("labels", labels, True), ("ids", ids, False)):
            is_tensor = isinstance(value, Tensor)
            whole = is_tensor and value.dim() == 1 and not value.is_floating_point()
            soft = mixed and is_tensor and value.dim() == 2 and value.is_floating_point()
            if not (whole or soft) or len(value) != len(images):
                found = f"{tuple(value.shape)} of {value.dtype}" if is_tensor else f"a {type(value).__name__}"
                raise UserError(
                    f"{name} is {found}, for {len(images)} images: pass a tensor of whole numbers (B,)"
                    + (", or of probabilities (B, classes)" if mixed else "")
                )
        if not labels.is_floating_point():
            return labels.long(), ids.long()
        one_class = [method for method in self.loss.methods if RIVALS[method].one_class]
        if one_class or self.loss.labels == "partial":
            why = f"loss.name has {one_class[0]}" if one_class else "the distiller was made with labels='partial'"
            raise UserError(f"labels are probabilities {tuple(labels.shape)}, and {why}: pass class numbers (B,)")
        return labels, ids.long()

    def _features(self, images: Tensor) -> tuple[Features | None, Features, Tensor]:
        tapped = self._tapped[0]
        if not tapped.names and (self._vectors or self._maps):
            raise UserError("this Distiller was released, its hooks are gone: make another one with distill()")
        teacher = self._teach(images)
        logits, taps = tapped(images)
        return teacher, canonical(logits, taps, self._shapes, self._vectors, self._maps), logits

    @torch.no_grad()
    def _new_ids(self, count: int) -> Tensor:
        """Numbers that no image had: those of rank r are r, r + ranks, r + 2 * ranks ..."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)
        ids = (self.next_id + torch.arange(count, device=self.next_id.device)) * world + rank
        self.next_id += count
        return ids

    @torch.no_grad()
    def _teach(self, images: Tensor) -> Features | None:
        """Return the teacher's features."""
        if not self.loss.config.uses_teacher:
            return None
        network = self._teacher[0]
        first = next(network.parameters(), images)
        # To float64 and back, as distiller.double() takes the student; half precision is the teacher's own choice.
        dtype = images.dtype if torch.float64 in (images.dtype, first.dtype) else first.dtype
        if (first.device, first.dtype) != (images.device, dtype):
            network.to(images.device, dtype)
        if network.model.training:  # a module of the user's that holds the teacher too may have switched it
            network.eval()
        logits, taps = network(images.to(dtype))
        return canonical(logits, taps, self._teacher_shapes, *self._teacher_taps)

    @torch.compiler.disable
    def _note(self, teacher: Features | None, labels: Tensor, ids: Tensor) -> None:
        if len(self.loss.lanes) >= MOST_BATCHES:
            raise UserError(
                f"{MOST_BATCHES} batches were trained on without distiller.after_step(): call it after every step of "
                "the optimiser, or distiller.eval() before batches that are not trained on"
            )
        if not self.student.training:
            console.say_once(
                "the student is in evaluation mode in a step of training: its batch norm and dropout are off; call "
                "distiller.train() after an evaluation"
            )
        self._noted = True
        self.loss.observe(teacher, labels, ids)

    @torch.no_grad()
    def after_step(self) -> None:
        """Do the bookkeeping of a step; call it after every step of the optimiser.

        Keeps temperatures within their limits, takes the batches since the last call into the queue and the means of
        frozen critics, and moves schedules on. Several batches may make a step (gradients that accumulate). With
        several ranks every rank calls it, after equally many batches of equal sizes.
        """
        if not self._noted:
            console.say_once(
                "distiller.after_step() after no batch in training mode, so that nothing enters the queue and the "
                "means of the critics: call distiller.train() after an evaluation"
            )
        self._noted = False
        world = dist.get_world_size() if is_distributed() else 1
        self.loss.after_step(lambda own_KX: gather_lanes(own_KX, len(own_KX) * world))
        self.step += 1
        self.steps_taken += 1
        self._begin_step()

    def _begin_step(self) -> None:
        """Set the weights of the next step."""
        epoch = self.step / self.epoch_steps if self.epoch_steps else 0.0
        self.loss.begin_step(epoch, self.step / self.steps if self.steps else 0.0)

    def release(self) -> None:
        """Take the hooks off both networks. The student may be used elsewhere; this object may not be called again."""
        self._tapped[0].release()
        self._teacher[0].release()


def _take_up(distiller: Distiller, _: Any) -> None:
    """Go on from the step of a loaded state: weights that follow a schedule are no part of it."""
    distiller.step = int(distiller.steps_taken)
    distiller._begin_step()


@torch.compiler.disable
@torch.no_grad()
def _of_other_ranks(vectors: Mapping[str, Tensor], ids: Tensor, labels: Tensor) -> Others:
    """The teacher vectors, ids and class numbers of the other ranks' batches, which are of this one's size."""
    world = dist.get_world_size()

    def others(value: Tensor) -> Tensor:
        return all_but(dist.get_rank(), gather_lanes(value.unsqueeze(0), world)).flatten(0, 1)

    return Others({tap: others(value.float()) for tap, value in vectors.items()}, others(ids), others(labels))


def distill(
    teacher: nn.Module,
    student: nn.Module,
    image_size: int,
    loss: LossConfig | None = None,
    pairs: Mapping[str, Sequence[str]] | None = None,
    steps: int | None = None,
    epoch_steps: int | None = None,
    labels: Labels = "all",
) -> Distiller:
    """Make what distils ``teacher`` into ``student`` in a loop of your own.

    Args:
        teacher: any network of images (B, 3, H, W) to logits (B, classes). It is frozen and put in evaluation mode.
        student: another one, as it is: wrap the result in DDP or torch.compile, not the student.
        image_size: height and width of the images, in pixels. One dry forward of each network finds its layers.
        loss: what is minimised; by default ``LossConfig()``, the preset ``accuracy``.
        pairs: layers to pair, by kind of term: ``{"global": ["avgpool:pool"], "feature": ["layer4:stage3"]}``, also
            ``local`` and ``rival``. Kinds that are not named, or not here, are as in ``loss``: chosen where it names
            none. A layer is a module path, PATH@input what it is given, ``logits`` a network's logits.
        steps: steps of the whole training, for ``loss.schedule``.
        epoch_steps: steps of an epoch, for rivals that warm up over ``loss.rival_warmup`` epochs.
        labels: which images have a label: ``all``; ``partial``, where those without have a negative number and no part
            in the cross-entropy; or ``none``, where the student learns from the teacher alone.

    The critics' weights come from torch's global generator: seed it for a run that can be repeated. Raises UserError
    for layers that do not exist or do not fit, and for what needs more than a loop of batches: memory banks (crd),
    negatives from a cache.
    """
    check_kinds(teacher, student, image_size, loss, labels)
    loss = with_pairs(loss or LossConfig(), pairs or {})
    check_combination(teacher, student, loss, steps, epoch_steps, labels)
    of_teacher, of_student = check_logits(teacher, image_size), check_logits(student, image_size, trained=True)
    loss = without_other_classes(loss, of_teacher, of_student)
    return Distiller(teacher, student, plan_taps(loss, teacher, student, image_size), loss, steps, epoch_steps, labels)
