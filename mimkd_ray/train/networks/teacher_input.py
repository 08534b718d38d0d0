"""The teacher's images: the student's views, with the same crop and flip, resized and normalised as it wants them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mimkd_ray import console
from mimkd_ray.config import Config, DataConfig
from mimkd_ray.errors import UserError
from mimkd_ray.models.published_input import NetworkInput, published_input, three


def teacher_input(config: Config) -> NetworkInput:
    """What images the teacher of a run takes: as ``config.teacher`` says, else as its publishers say, else the
    data's."""
    teacher, data = config.teacher, config.data
    own = None
    if teacher.input == "own" or (teacher.input == "auto" and teacher.weights == "published" and not teacher.finetune):
        own = published_input(teacher.name)
        if own is None and teacher.input == "own":
            raise UserError(
                f"teacher.input is own, and nobody has said what images {teacher.name} takes: pass "
                "--teacher.image-size, --teacher.mean and --teacher.std"
            )
    plain = own or of_data(data)
    found = NetworkInput(
        teacher.image_size or plain.size,
        three(teacher.mean or plain.mean),
        three(teacher.std or plain.std),
        teacher.interpolation or plain.interpolation,
    )
    if own is not None and (found.size, found.mean, found.std) != (data.image_size, data.mean, data.std):
        console.say_once(
            f"teacher {teacher.name} sees the views at {found.size} pixels (the student at {data.image_size}), "
            f"{found.interpolation}, with mean {_shown(found.mean)} and deviation {_shown(found.std)}, as it was "
            "published for; --teacher.input data gives it the student's"
        )
    return found


def of_data(data: DataConfig) -> NetworkInput:
    """What images the student takes."""
    return NetworkInput(data.image_size, data.mean, data.std, "bicubic")


def sees_data(config: Config) -> bool:
    """Return whether the teacher's images are the student's."""
    wanted, data = teacher_input(config), config.data
    return (wanted.size, wanted.mean, wanted.std) == (data.image_size, data.mean, data.std)


def resizing(config: Config) -> str:
    """How the teacher's images are resized, such as "384 bicubic"; "" if they are not."""
    wanted = teacher_input(config)
    return "" if wanted.size == config.data.image_size else f"{wanted.size} {wanted.interpolation}"


class TeacherImages:
    """Makes the teacher's images of the student's, which are normalised, and perhaps mixed.

    Both steps are linear, so the order does not matter: the resized image of another normalisation is the normalised
    image of another size, and a mix of images is one of theirs.
    """

    def __init__(self, data: DataConfig, wanted: NetworkInput, device: torch.device, dtype: torch.dtype) -> None:
        def channels(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device).view(3, 1, 1)

        self.wanted = wanted
        self.resizes = wanted.size != data.image_size
        mean, std = wanted.mean, wanted.std
        self.changes = (mean, std) != (data.mean, data.std)
        self.scale = channels([own / its for own, its in zip(data.std, std, strict=True)])
        shifts = zip(data.mean, mean, std, strict=True)
        self.shift = channels([(own - its) / deviation for own, its, deviation in shifts])
        self.black = channels([-m / s for m, s in zip(mean, std, strict=True)])
        self.white = channels([(1 - m) / s for m, s in zip(mean, std, strict=True)])

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) of the student -> (B, 3, size, size) of the teacher."""
        if self.resizes:
            side = self.wanted.size
            images_BCHW = F.interpolate(
                images_BCHW, (side, side), mode=self.wanted.interpolation, align_corners=False, antialias=True
            )
        if self.changes:
            images_BCHW = torch.addcmul(self.shift, images_BCHW, self.scale)
        # Bicubic interpolation goes beyond black and white at edges; images on disk cannot.
        return images_BCHW.clamp(self.black, self.white) if self.resizes else images_BCHW


def _shown(values: tuple[float, float, float]) -> str:
    return " ".join(f"{value:g}" for value in values)
