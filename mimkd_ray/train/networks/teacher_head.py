"""What the teacher's head means: its number of classes, and which of them the data has too (``teacher.classes``)."""

from __future__ import annotations

from dataclasses import dataclass

from mimkd_ray import console, storage
from mimkd_ray.config import Config
from mimkd_ray.data.sources.data_set import Data
from mimkd_ray.errors import UserError
from mimkd_ray.losses.methods.registry import RIVALS
from mimkd_ray.losses.shared_classes import SharedClasses, comparable, match


@dataclass(frozen=True)
class TeacherHead:
    """The teacher's last layer."""

    count: int
    """Its classes."""
    shared: SharedClasses | None = None
    """Which of them the data has too; None: they are the data's, in its order."""


def teacher_head(config: Config, data: Data) -> TeacherHead:
    """The head of a run's teacher. Reads the file of names, if there is one; says once what teacher and data share.

    Raises UserError for a file that cannot be read.
    """
    classes = config.teacher.classes
    if not config.teacher.has_own_classes or classes == data.num_classes:
        return TeacherHead(data.num_classes)
    name = config.teacher.name
    if isinstance(classes, int):
        count, shared, seen = classes, SharedClasses(), f"{classes} classes of its own"
    else:
        names = read_names("teacher.classes", classes, "the number of the teacher's classes, or ")
        if names == data.classes:
            return TeacherHead(data.num_classes)
        count, shared = len(names), match(names, data.classes)
        seen = f"{count} classes, {len(shared.of_data)} of the data's {data.num_classes} among them"
    if len(shared.of_data) < 2:
        shared = SharedClasses()  # one class is not compared with any other
        console.say_once(
            f"teacher {name} has {seen}: its features are used; what compares logits (KD, DKD, DIST) and the check of "
            "its top-1 are off"
        )
    elif len(shared.of_data) < data.num_classes:
        console.say_once(f"teacher {name} has {seen}: KD and the check of its top-1 are of those alone")
    return TeacherHead(count, shared)


def trains_head(config: Config, shared: SharedClasses | None) -> bool:
    """Whether a student's head learns what classes are, of labels or of a teacher's logits, or knew it before.
    ``shared``: the classes that the teacher has in common with the data."""
    if config.data.labels != "none" or config.student.weights != "random":
        return True
    loss = comparable(config.loss, shared)
    return loss.resolved_kd_weight > 0 or any(RIVALS[rival].logits for rival in loss.rivals)


def read_names(field: str, url: str, otherwise: str = "") -> tuple[str, ...]:
    """Return the names of classes in the text file that `field` of a config names; `otherwise` says what else may be
    given. Raises UserError for a file that cannot be read, and for a line without a name, which would shift others."""
    storage.refuse_pipe(url, field)
    try:
        text = storage.read_bytes(url).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{field} {url} cannot be read ({type(error).__name__}): give {otherwise}a text file with the names of the "
            "classes, one a line"
        ) from error
    names = tuple(line.strip() for line in text.strip("\r\n").splitlines())
    if not all(names) or not names:
        raise UserError(f"{field} {url} has {len(names)} lines, and an empty one: give a name on each line")
    return names
