"""The networks of an evaluation: a run's student or teacher, or those that the config names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mimkd_ray import storage
from mimkd_ray.config import Config, LossConfig
from mimkd_ray.config.jobs.evaluate import EvaluateJob
from mimkd_ray.data.sources.data_set import Data, open_data
from mimkd_ray.errors import UserError
from mimkd_ray.json_files import read_json
from mimkd_ray.losses.shared_classes import SharedClasses, match
from mimkd_ray.models.weights import put_state
from mimkd_ray.models.weights_file import shown
from mimkd_ray.models.zoo import build_model
from mimkd_ray.taps.default_stages import default_taps
from mimkd_ray.taps.tapped_model import TappedModel, TapShape, find_shapes
from mimkd_ray.train.distributed import ask_first
from mimkd_ray.train.networks.build import build_network, place, taps_of_run, teacher_images, uses_channels_last
from mimkd_ray.train.networks.student_module import Normalizer
from mimkd_ray.train.networks.teacher import canonical
from mimkd_ray.train.networks.teacher_head import teacher_head
from mimkd_ray.train.networks.teacher_input import TeacherImages
from mimkd_ray.train.records import checkpoint

FILES = {"student": "student.safetensors", "best": "best.safetensors"}


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
    """Its logits of the classes that are evaluated; None: all, in their order. () where it has none of them."""

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


def subject_of(job: EvaluateJob, run_dir: str, trained_on: Config, data: Data, device: torch.device) -> Subject:
    """Build what `job` names. `trained_on`: the config of the run, whose data says what the heads mean; `run_dir` is ""
    without a run. Raises UserError for weights that are missing or do not fit, and for classes that nobody shares."""
    of_run = data if trained_on.data == job.data else open_data(trained_on.data)
    names = _names(job.eval.classes) if job.eval.classes else None
    count = len(names) if names is not None else of_run.num_classes
    head = _numbered(of_run) if names is None else names
    of_data = _numbered(data)
    shared = _shared(job, head, count, of_data)
    classes = of_data if shared is None else tuple(of_data[number] for number in shared.of_data)
    given = _teacher(job, run_dir, of_run)
    teacher_model = given[0] if given else None
    columns = None if shared is None else shared.of_teacher
    of_teacher = None
    if teacher_model is not None:
        own = teacher_head(replace(trained_on, teacher=job.teacher), of_run).shared
        of_teacher = _through(own, columns, of_run.num_classes) if names is None else ()
    if job.eval.network == "teacher":
        if given is None:
            raise UserError(f"{run_dir or 'the config'} has no teacher: give --teacher.name and --teacher.weights")
        if of_teacher == ():
            raise UserError("the teacher's classes are not the data's: name them with --teacher.classes FILE")
        (model, weights), teacher_model, columns = given, None, of_teacher
        name = job.teacher.name
    else:
        name = job.student.name
        model, weights = _student(job, run_dir, count)
    for each in (model, teacher_model):
        if each is not None:
            place(each, job.train, device).eval().requires_grad_(False)
    as_teacher = teacher_images(job, device) if job.eval.network == "teacher" else None
    size = as_teacher.wanted.size if as_teacher else job.data.image_size
    pairs: tuple[tuple[str, str], ...] = ()
    if teacher_model is not None and job.eval.tap_rows:
        loss = job.loss if job.loss.uses_teacher and "mimkd" in job.loss.name else LossConfig()
        plan = taps_of_run(replace(job, loss=loss), teacher_model, model)
        pairs = tuple(dict.fromkeys((term.teacher, term.student) for term in plan.terms if term.teacher != "logits"))
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
    return Subject(network, teacher, vector, pairs, classes, labels)


def normalizer(job: Config, device: torch.device) -> Normalizer:
    """Return what makes normalised images of the data's bytes."""
    return Normalizer(
        job.data.mean, job.data.std, device, torch.float32, channels_last=uses_channels_last(job.train, device)
    )


def _student(job: EvaluateJob, run_dir: str, count: int) -> tuple[nn.Module, str]:
    """The student, and where its weights are from: the command line, or else the run; of one that has not ended its
    newest checkpoint."""

    def built(weights: str) -> nn.Module:
        return build_model(job.student.name, count, weights, job.data.image_size)

    if not run_dir or job.student.weights not in ("random", "published", ""):
        return built(job.student.weights), job.student.weights
    file = storage.join(run_dir, FILES[job.eval.network])
    if storage.exists(file):
        return built(file), file
    if job.eval.network == "best":
        raise UserError(f"{run_dir} has no {FILES['best']}: train with --run.keep-best true")
    folder = ask_first(lambda: (checkpoint.newest(run_dir) or ("",))[0])
    if not folder:
        raise UserError(
            f"{run_dir} has no {FILES['student']}, with which a run ends, and no sound checkpoint: let it train on, or "
            "pass --student.weights"
        )
    state = checkpoint.parse(checkpoint.read(folder), torch.device("cpu"))
    holder, prefix = ("ema", "module.model.") if state["ema"] else ("distiller", "student.model.")
    own = {key.removeprefix(prefix): value for key, value in state[holder].items() if key.startswith(prefix)}
    model = built("random")
    put_state(model, {"": own}, folder, count)
    return model, folder


def _teacher(job: EvaluateJob, run_dir: str, of_run: Data) -> tuple[nn.Module, str] | None:
    """The teacher, of the run or the config, and where its weights are from; None where there is none with weights."""
    known = read_json(storage.join(run_dir, "teacher.json")) if run_dir else None
    given = job.teacher.weights != "random" and not job.teacher.finetune  # else the run has trained it
    weights = job.teacher.weights if given or known is None else known["weights"]
    if weights == "random":
        return None
    return build_network(job, teacher_head(job, of_run).count, weights), weights


def _names(file: str) -> tuple[str, ...]:
    url = storage.absolute(file)
    if not storage.exists(url):
        raise UserError(f"eval.classes {file}: there is no such file; give the names of the classes, one a line")
    return tuple(line.strip() for line in storage.read_bytes(url).decode().splitlines() if line.strip())


def _numbered(data: Data) -> tuple[str, ...]:
    """Names of all classes of a data set; those without a name, such as in a set without labels, have their number."""
    return data.classes + tuple(map(str, range(len(data.classes), data.num_classes)))


def _shared(job: EvaluateJob, head: Sequence[str], count: int, of_data: tuple[str, ...]) -> SharedClasses | None:
    """The classes of the head that the data has; None: all, in its order."""
    if tuple(head) == of_data:
        return None
    found = match(head, of_data)
    if not found.of_data:
        if count == len(of_data) and not job.eval.classes:
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
