"""From a config to networks: the teacher, and the student with its taps, critics and loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from mimkd_ray.config import CacheConfig, Config, LossConfig
from mimkd_ray.config.loss_presets import Kind
from mimkd_ray.data.order.sample_order import Order
from mimkd_ray.data.sources.source import Source, ids_of
from mimkd_ray.losses.methods.build_method import RivalPlan
from mimkd_ray.losses.methods.crd import TrainingRows
from mimkd_ray.losses.methods.registry import RIVALS
from mimkd_ray.losses.mimkd_loss import MIMKDLoss
from mimkd_ray.losses.shared_classes import SharedClasses, check_classes, comparable
from mimkd_ray.losses.terms import LOGITS, Term
from mimkd_ray.models.build_model import build_model
from mimkd_ray.seeds import derive
from mimkd_ray.taps.default_stages import Stages, before_activation, default_taps
from mimkd_ray.taps.dry_run import DryRun, dry_run
from mimkd_ray.taps.pairing import Pair, build_terms, choose_pairs, configured_pairs
from mimkd_ray.taps.rival_pairing import pair_rivals, plan_rivals, reads_taps
from mimkd_ray.taps.tap_codecs import Coding, coded_term
from mimkd_ray.taps.tapped_model import TapShape, tap_shape
from mimkd_ray.train.networks.device_settings import autocast_dtype, parameter_dtype, place, teacher_autocast
from mimkd_ray.train.networks.student_module import StudentModule
from mimkd_ray.train.networks.teacher import Teacher
from mimkd_ray.train.networks.teacher_input import TeacherImages, teacher_input

KINDS: tuple[Kind, ...] = ("global", "local", "feature")
NO_CACHE = CacheConfig()


@dataclass(frozen=True)
class TapPlan:
    """The terms and rivals of a loss and the taps that they read, found by one dry forward of each network."""

    terms: tuple[Term, ...] = ()
    rivals: tuple[RivalPlan, ...] = ()
    teacher_shapes: Mapping[str, TapShape] = field(default_factory=dict)
    student_shapes: Mapping[str, TapShape] = field(default_factory=dict)

    def teacher_taps(self) -> tuple[list[str], list[str]]:
        """Teacher taps read as vectors, and as maps."""
        vectors = [term.teacher for term in self.terms if term.kind != "feature" and term.teacher != LOGITS]
        maps = [term.teacher for term in self.terms if term.kind == "feature"]
        vectors += [pair.teacher.tap for rival in self.rivals for pair in rival.taps.vectors]
        maps += [pair.teacher.tap for rival in self.rivals for pair in rival.taps.maps]
        return _unique(vectors), _unique(maps)

    def student_taps(self) -> tuple[list[str], list[str]]:
        """Student taps read as vectors, and as maps."""
        vectors = [term.student for term in self.terms if term.kind == "global" and term.student != LOGITS]
        maps = [term.student for term in self.terms if term.kind != "global"]
        vectors += [pair.student.tap for rival in self.rivals for pair in rival.taps.vectors]
        maps += [pair.student.tap for rival in self.rivals for pair in rival.taps.maps]
        return _unique(vectors), _unique(maps)


def _unique(names: object) -> list[str]:
    return list(dict.fromkeys(names))  # type: ignore[call-overload]


def plan_taps(
    loss: LossConfig,
    teacher: nn.Module,
    student: nn.Module,
    image_size: int,
    cache: CacheConfig = NO_CACHE,
    teacher_size: int = 0,
) -> TapPlan:
    """Choose or check the tap pairs of every kind of term that is on, and of the rivals. Wrong layers are
    :class:`UserError`.

    Where ``cache`` has codecs, the terms read as many teacher channels as those leave, and rivals refuse those that
    leave less than all. ``teacher_size``: pixels of the teacher's images, if not ``image_size``.
    """
    teacher_size = teacher_size or image_size
    kinds = [kind for kind in KINDS if loss.weight(kind) > 0]
    if not kinds and not loss.rivals:
        return TapPlan()
    of_teacher, of_student = dry_run(teacher, teacher_size), dry_run(student, image_size)
    pairs: dict[Kind, list[Pair]] = {kind: configured_pairs(loss, kind) for kind in kinds}
    teacher_stages = student_stages = Stages((), "")
    if not all(pairs.values()) or reads_taps(loss):
        teacher_stages = default_taps(teacher, teacher_size, of_teacher)
        student_stages = default_taps(student, image_size, of_student)
        teacher_read = _read_at(loss, of_teacher, teacher_stages)
        student_read = _read_at(loss, of_student, student_stages)
        stage_shapes = {name: tap_shape(student, of_student, name) for name in student_read.maps}
        for kind in kinds:
            pairs[kind] = pairs[kind] or choose_pairs(kind, teacher_read, student_read, stage_shapes, loss.max_side)
    of_rivals = pair_rivals(loss, teacher_stages, student_stages)
    named = [pair for kind_pairs in pairs.values() for pair in kind_pairs]
    named += [pair for rival in of_rivals for pair in (*rival.vectors, *rival.maps)]
    teacher_shapes = _shapes(teacher, of_teacher, _unique(pair.teacher for pair in named))
    student_shapes = _shapes(student, of_student, _unique(pair.student for pair in named))
    terms = build_terms(loss, pairs, teacher_shapes, student_shapes)
    if cache.codes:
        terms = [coded_term(term, teacher_shapes[term.teacher], cache) for term in terms]
    rivals = plan_rivals(of_rivals, teacher_shapes, student_shapes, cache)
    return TapPlan(tuple(terms), rivals, teacher_shapes, student_shapes)


def _read_at(loss: LossConfig, run: DryRun, stages: Stages) -> Stages:
    """The stages as the terms read them: their outputs, or what their last activation is given."""
    if loss.taps == "after":
        return stages
    before = before_activation(run.model, run.side, stages.maps, run)
    return replace(stages, maps=tuple(before[name] for name in stages.maps))


def _shapes(model: nn.Module, run: DryRun, names: Sequence[str]) -> dict[str, TapShape]:
    """Shapes of the named taps, of which one may be the logits."""
    shapes = {name: tap_shape(model, run, name) for name in names if name != LOGITS}
    if LOGITS in names:
        shapes[LOGITS] = TapShape(LOGITS, "vector", run.logits.shape[1])
    return shapes


def make_order(config: Config, train: Source) -> Order:
    """The order of the training rows: what each step and lane sees. Raises UserError if there are too few."""
    own = config.train
    return Order(train.blocks, own.lanes, own.lane_batch, own.seed, config.data.window_blocks)


def build_student(config: Config, num_classes: int) -> nn.Module:
    """The student at its start: a function of train.seed alone."""
    torch.manual_seed(derive(config.train.seed, "student"))
    size = config.data.image_size
    return build_model(config.student.name, num_classes, config.student.weights, size, new_head=True)


def training_rows(config: LossConfig, train: Source) -> TrainingRows | None:
    """Ids and labels of the training images, where a rival has a bank of them; None otherwise. May read all labels."""
    if not any(RIVALS[method].bank for method in config.rivals):
        return None
    return TrainingRows(torch.from_numpy(ids_of(train)), torch.from_numpy(train.labels()))


@dataclass(frozen=True, eq=False)
class PlannedStudent:
    """A student at its start, and the taps that its loss reads: what the cache and the teacher of a run depend on."""

    config: Config
    student: nn.Module
    plan: TapPlan
    shared: SharedClasses | None = None
    """Classes whose logits are compared; None: all, which the teacher has in the data's order."""
    vector: TapShape | None = None
    """The student's pooled features, where these are evaluated too: where images lack labels."""

    @property
    def loss(self) -> LossConfig:
        """The config's loss, without what compares logits if there is nothing to compare."""
        return comparable(self.config.loss, self.shared)


def plan_student(
    config: Config, teacher: nn.Module | None, num_classes: int, shared: SharedClasses | None = None
) -> PlannedStudent:
    """Build the student of a run and choose its taps, once for the run. ``teacher`` is None where the loss needs none;
    ``shared``: the classes that it has in common with the data, if its own are others.

    Runs both networks dry. Raises UserError for a network that does not exist, for layers that do not fit, and for a
    rival that needs more classes than the data has.
    """
    check_classes(config.loss, shared, num_classes)
    student = build_student(config, num_classes)
    if teacher is None:
        return PlannedStudent(config, student, TapPlan())
    plan, vector = taps_of_run(config, teacher, student, shared), None
    if config.data.labels != "all":
        size = config.data.image_size
        run = dry_run(student, size)
        vector = tap_shape(student, run, default_taps(student, size, run).vector)
    return PlannedStudent(config, student, plan, shared, vector)


def taps_of_run(config: Config, teacher: nn.Module, student: nn.Module, shared: SharedClasses | None = None) -> TapPlan:
    """The taps of a run, whose networks may see images of different sizes."""
    sizes = config.data.image_size, teacher_input(config).size
    return plan_taps(comparable(config.loss, shared), teacher, student, sizes[0], config.cache, sizes[1])


def build_distiller(planned: PlannedStudent, train: Source, device: torch.device) -> StudentModule:
    """The planned student with its taps, critics and loss, on the device. ``train`` are the training images."""
    config, plan = planned.config, planned.plan
    # Seeded again, so that the critics' start does not depend on the student's size.
    torch.manual_seed(derive(config.train.seed, "critics"))
    loss = MIMKDLoss(
        planned.loss, plan.terms, plan.rivals, training_rows(config.loss, train), planned.shared, config.data.labels
    )
    vectors, maps = plan.student_taps()
    autocast = autocast_dtype(config.train, device)
    distiller = StudentModule(planned.student, plan.student_shapes, vectors, maps, loss, autocast)
    placed = place(distiller, config.train, device)
    assert isinstance(placed, StudentModule)
    return placed


def build_network(config: Config, num_classes: int, weights: str) -> nn.Module:
    """The teacher's network; a random one is the same for every worker, every restart and every builder of a cache."""
    torch.manual_seed(derive(config.train.seed, "teacher"))
    return build_model(config.teacher.name, num_classes, weights, teacher_input(config).size)


def teacher_images(config: Config, device: torch.device) -> TeacherImages:
    """What makes the teacher's images of the student's."""
    return TeacherImages(config.data, teacher_input(config), device, parameter_dtype(config.train))


def teacher_taps(planned: Sequence[PlannedStudent]) -> tuple[dict[str, TapShape], list[str], list[str]]:
    """Shapes of the teacher's taps that any of the students read, and which are read as vectors, and as maps."""
    plans = [one.plan for one in planned]
    return (
        {name: shape for plan in plans for name, shape in plan.teacher_shapes.items()},
        _unique(name for plan in plans for name in plan.teacher_taps()[0]),
        _unique(name for plan in plans for name in plan.teacher_taps()[1]),
    )


def build_teacher(
    planned: Sequence[PlannedStudent], model: nn.Module, device: torch.device, coding: Coding | None = None
) -> Teacher:
    """The frozen teacher with the taps that the students read: one, or those of a pack, which agree in the rest."""
    shapes, vectors, maps = teacher_taps(planned)
    config = planned[0].config
    autocast = teacher_autocast(config, device)
    return Teacher(
        place(model, config.train, device), shapes, vectors, maps, autocast, coding, teacher_images(config, device)
    )
