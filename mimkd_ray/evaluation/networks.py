"""The networks of an evaluation: a run's student or teacher, or those that the config names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mimkd_ray import console, storage
from mimkd_ray.config import Config, LossConfig
from mimkd_ray.config.jobs.evaluate import EvaluateJob
from mimkd_ray.data.sources.data_set import Data, open_data
from mimkd_ray.data.sources.source import SubsetSource, numbers_in_names
from mimkd_ray.errors import UserError
from mimkd_ray.json_files import read_json
from mimkd_ray.losses.shared_classes import SharedClasses, match
from mimkd_ray.losses.terms import LOGITS
from mimkd_ray.models.build_model import build_model
from mimkd_ray.models.weights_file import shown
from mimkd_ray.taps.default_stages import default_taps
from mimkd_ray.taps.dry_checks import check_logits
from mimkd_ray.taps.tapped_model import TappedModel, TapShape, find_shapes
from mimkd_ray.train.networks.build import build_network, taps_of_run, teacher_images
from mimkd_ray.train.networks.device_settings import parameter_dtype, place, uses_channels_last
from mimkd_ray.train.networks.student_module import Normalizer
from mimkd_ray.train.networks.teacher import canonical
from mimkd_ray.train.networks.teacher_head import read_names, teacher_head, trains_head
from mimkd_ray.train.networks.teacher_input import TeacherImages
from mimkd_ray.train.records.read_run import student_of_run, teacher_file


@dataclass(frozen=True)
class Network:
    """A frozen network with the taps that are read."""

    name: str
    weights: str
    """Where they are from."""
    tapped: TappedModel
    shapes: dict[str, TapShape]
    prepare: TeacherImages | None
    """Makes its images of the student's normalised ones; None: they are its own."""
    columns: tuple[int, ...] | None
    """Its logits of the classes that are evaluated; None: all, in their order. () where its head has others, and where
    nothing has trained it."""

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits (B, classes) and each tap's mean over its places (B, C), in float32."""
        if self.prepare is not None:
            images_BCHW = self.prepare(images_BCHW)
        logits_BV, taps = self.tapped(images_BCHW)
        found = canonical(logits_BV, taps, self.shapes, self.shapes, ())
        if self.columns is not None:
            logits_BV = logits_BV[:, list(self.columns)]
        return logits_BV.float(), {name: vector.float() for name, vector in found.vectors.items()}


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a network, its teacher if there is one, and the classes that both and the data have."""

    network: Network
    teacher: Network | None
    vector: str
    """The tap of `network` that k-NN and the probe read."""
    pairs: tuple[tuple[str, str], ...]
    """(teacher's tap, network's tap) whose information is measured."""
    classes: tuple[str, ...]
    labels: tuple[int, ...]
    """The data's numbers of `classes`."""
    of_run: Data | None = None
    """The data of the run, where it is other than the evaluated, and has `classes`."""
    labels_of_run: tuple[int, ...] = ()
    """The numbers of `classes` there."""
    is_own: bool = False
    """Whether the network is the student that the run trained."""


def subject_of(job: EvaluateJob, run_dir: str, trained_on: Config, data: Data, device: torch.device) -> Subject:
    """Build what `job` names. `trained_on`: the config of the run, whose data says what the heads mean; `run_dir` is ""
    without a run. Raises UserError for weights that are missing or do not fit, and for classes that nobody shares."""
    names = read_names("eval.classes", storage.absolute(job.eval.classes)) if job.eval.classes else None
    of_run = _data_of_run(trained_on, job, data, names)
    count = len(names) if names is not None else of_run.num_classes
    head = of_run.names if names is None else names
    is_own = takes_own_student(job, run_dir, trained_on)
    untrained = False
    if run_dir and job.eval.network != "teacher":
        untrained = not trains_head(replace(trained_on, student=job.student), teacher_head(trained_on, of_run).shared)
    related = not untrained or bool(match(of_run.classes, data.classes).of_data)  # else the head's classes mean nothing
    shared = _shared(job, head, count, data, bool(run_dir or names)) if related else None
    classes = data.names if shared is None else tuple(data.names[number] for number in shared.of_data)
    given = _teacher(job, run_dir, of_run)
    teacher_model = given[0] if given else None
    columns = None if shared is None or shared.of_teacher == tuple(range(count)) else shared.of_teacher
    of_teacher = None
    if teacher_model is not None:
        own = teacher_head(replace(trained_on, teacher=job.teacher), of_run).shared
        of_teacher = _through(own, columns, of_run.num_classes) if names is None and related else ()
    if job.eval.network == "teacher":
        if given is None:
            raise UserError(f"{run_dir or 'the config'} has no teacher: give --teacher.name and --teacher.weights")
        if of_teacher == ():
            console.say_once("the teacher has classes of its own, not the data's: --teacher.classes FILE names them")
        (model, weights), teacher_model, columns = given, None, of_teacher
        name = job.teacher.name
    else:
        name = job.student.name
        model, weights = _student(job, run_dir, count, is_own)
        columns = () if untrained else columns
    for each in (model, teacher_model):
        if each is not None:
            place(each, job.train, device).eval().requires_grad_(False)
    as_teacher = teacher_images(job, device) if job.eval.network == "teacher" else None
    size = as_teacher.wanted.size if as_teacher else job.data.image_size
    pairs: tuple[tuple[str, str], ...] = ()
    if teacher_model is not None and job.eval.tap_rows:
        loss = job.loss if job.loss.uses_teacher and "mimkd" in job.loss.name else LossConfig()
        plan = taps_of_run(replace(job, loss=loss), teacher_model, model)
        named = dict.fromkeys((term.teacher, term.student) for term in plan.terms)
        pairs = tuple(pair for pair in named if LOGITS not in pair)
    vector = default_taps(model, size).vector
    taps = sorted({vector, *(student for _, student in pairs)})
    network = Network(
        name, shown(weights), TappedModel(model, taps), find_shapes(model, size, taps), as_teacher, columns
    )
    teacher = None
    if teacher_model is not None:
        images = teacher_images(job, device)
        read = sorted({tap for tap, _ in pairs})
        shapes = find_shapes(teacher_model, images.wanted.size, read)
        teacher = Network(
            job.teacher.name,
            shown(given[1]) if given else "",
            TappedModel(teacher_model, read),
            shapes,
            images,
            of_teacher,
        )
    labels = tuple(range(len(classes))) if shared is None else shared.of_data
    known = related and of_run is not data and (names is None or job.student.weights == trained_on.student.weights)
    of_classes = labels if shared is None else shared.of_teacher
    return Subject(network, teacher, vector, pairs, classes, labels, of_run if known else None, of_classes, is_own)


def normalizer(job: Config, device: torch.device) -> Normalizer:
    """Return what makes normalised images of the data's bytes."""
    channels_last = uses_channels_last(job.train, device)
    return Normalizer(job.data.mean, job.data.std, device, parameter_dtype(job.train), channels_last=channels_last)


def takes_own_student(job: EvaluateJob, run_dir: str, trained_on: Config) -> bool:
    """Say whether the student that the run trained is evaluated: its weights are named as those that it began with."""
    return bool(run_dir) and job.eval.network != "teacher" and job.student.weights == trained_on.student.weights


def _student(job: EvaluateJob, run_dir: str, count: int, is_own: bool) -> tuple[nn.Module, str]:
    """The student, and where its weights are from: the command line, or else the run."""
    name, weights, size = job.student.name, job.student.weights, job.data.image_size
    if is_own:
        return student_of_run(run_dir, name, count, size, job.eval.network)
    model = build_model(name, count, weights, size)
    check_logits(model, size, count)
    return model, weights


def _teacher(job: EvaluateJob, run_dir: str, of_run: Data) -> tuple[nn.Module, str] | None:
    """The teacher, of the run or the config, and where its weights are from; None where there is none with weights."""
    known = read_json(teacher_file(run_dir)) if run_dir else None
    given = job.teacher.weights != "random" and not job.teacher.finetune  # else the run has trained it
    weights = job.teacher.weights if given else (known or {}).get("weights", "random")
    if weights == "random":
        return None
    return build_network(job, teacher_head(job, of_run).count, weights), weights


def _data_of_run(trained_on: Config, job: EvaluateJob, data: Data, names: tuple[str, ...] | None) -> Data:
    """The data of the run, which says what its head means; where it cannot be read, one of `names` without images.
    Raises UserError without these."""
    if trained_on.data == job.data:
        return data
    try:
        return open_data(trained_on.data)
    except (UserError, storage.StorageError) as error:
        if names is None:
            raise UserError(
                f"the run's own data says what its classes are, and cannot be read: {error}; name them with "
                "--eval.classes FILE"
            ) from error
        nothing = SubsetSource(data.val, ())
        return replace(data, train=nothing, val=nothing, classes=names, num_classes=len(names), judged=False)


def _shared(job: EvaluateJob, head: Sequence[str], count: int, data: Data, named: bool) -> SharedClasses | None:
    """The classes of the head that the data has; None: all, in its order. Not `named`: the head's names are the data's
    for want of others."""
    of_data = data.classes or data.names
    numbers = numbers_in_names(data.classes)
    same = tuple(head) == data.names
    if same and (named or numbers in (None, tuple(range(len(of_data))))):
        return None
    found = match(head, of_data)
    if numbers is not None and max(numbers) < count and (same or not found.of_data):
        order = sorted(range(len(numbers)), key=numbers.__getitem__)
        console.say_once(f"the classes of {job.data.root} are numbers, and taken as those of the network's classes")
        return SharedClasses(tuple(numbers[place] for place in order), tuple(order))
    if not found.of_data:
        if count == data.num_classes and not job.eval.classes:
            return None  # classes without names in common, such as numbers: the order is the data's
        raise UserError(
            f"the network has {count} classes ({', '.join(head[:3])} ...) and {job.data.root} has {len(of_data)} "
            f"({', '.join(of_data[:3])} ...), and none has the same name: name the network's classes with "
            "--eval.classes FILE, one a line, as the data names them"
        )
    return found


def _through(own: SharedClasses | None, columns: tuple[int, ...] | None, count: int) -> tuple[int, ...] | None:
    """The teacher's columns of the evaluated classes, given its columns of the run's; () if it lacks some."""
    if own is None:
        return columns
    wanted = columns if columns is not None else tuple(range(count))
    by_class = dict(zip(own.of_data, own.of_teacher, strict=True))
    return tuple(by_class[number] for number in wanted) if set(wanted) <= by_class.keys() else ()
