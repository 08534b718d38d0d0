"""The frozen teacher: its features, and the digest of its weights. Its checks are in teacher_check.py."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from mimkd_ray.losses.features import Features
from mimkd_ray.taps.tap_codecs import Coding
from mimkd_ray.taps.tapped_model import TappedModel, TapShape, to_map, to_vector


def canonical(
    logits_BC: Tensor,
    taps: Mapping[str, Tensor],
    shapes: Mapping[str, TapShape],
    vectors: Iterable[str],
    maps: Iterable[str],
) -> Features:
    """Raw tap tensors as the loss wants them: vectors (B, C) and maps (B, C, H, W)."""
    return Features(
        logits_BC,
        {name: to_vector(taps[name], shapes[name]) for name in vectors},
        {name: to_map(taps[name], shapes[name]) for name in maps},
    )


class Teacher:
    """A frozen network in inference mode that gives the features which the loss reads.

    It is not a module of the student's: it appears in no checkpoint, no optimiser and no gradient reduction.
    """

    def __init__(
        self,
        model: nn.Module,
        shapes: Mapping[str, TapShape],
        vectors: Iterable[str],
        maps: Iterable[str],
        autocast: torch.dtype | None,
        coding: Coding | None = None,
        images: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """``coding``: the codecs of the run, whose pooling and components the features go through. ``images`` makes
        its images of the student's, if they are others (teacher_input.py)."""
        self.vectors, self.maps = tuple(vectors), tuple(maps)
        self.shapes = dict(shapes)
        self.tapped = TappedModel(model, sorted({*self.vectors, *self.maps}))
        self.tapped.requires_grad_(False).eval()
        self.autocast = autocast
        self.coding = coding
        self.images = images

    @torch.no_grad()
    def features(self, images_BCHW: Tensor) -> Features:
        """Run the teacher on normalised images, the student's. no_grad and not inference_mode: critics keep these
        tensors for their own backward pass."""
        if self.images is not None:
            images_BCHW = self.images(images_BCHW)
        with torch.autocast(images_BCHW.device.type, self.autocast, enabled=self.autocast is not None):
            logits_BC, taps = self.tapped(images_BCHW)
        found = canonical(logits_BC, taps, self.shapes, self.vectors, self.maps)
        return found if self.coding is None else self.coding.apply(found)


def weights_digest(model: nn.Module) -> str:
    """sha256 over names, shapes and bytes of all parameters and buffers. About 1 s per GB.

    The same for a network that was loaded in float32 and moved to float64, another device or memory layout.
    """
    sha = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        tensor = value.float() if value.dtype == torch.float64 else value
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()
