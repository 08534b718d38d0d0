"""The accuracy of a plain network: of a config's validation set, or of anybody's batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from mimkd_ray import console
from mimkd_ray.config import DataConfig
from mimkd_ray.data.loading.batches import LaneBatch
from mimkd_ray.data.loading.loader import eval_batches
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.data.sources.folders import FolderSource
from mimkd_ray.data.sources.own_dataset import OwnSource
from mimkd_ray.data.sources.source import Source, numbers_in_names
from mimkd_ray.errors import UserError
from mimkd_ray.models.outputs import describe, logits_from
from mimkd_ray.models.train_or_eval import in_mode
from mimkd_ray.train.distributed import is_distributed
from mimkd_ray.train.held_out.accuracy import Accuracy, accuracy, held_out_name
from mimkd_ray.train.networks.student_module import Normalizer

Batches = Iterable[tuple[Tensor, Tensor]]


def evaluate(
    model: nn.Module, data: DataConfig | Batches, validation: Dataset | None = None, batch: int = 256
) -> Accuracy:
    """Return top-1 and top-5 in percent, cross-entropy and the number of images of a network, in evaluation mode.

    Args:
        model: a network of normalised images (B, 3, H, W) to logits (B, classes), on the device that it is to run on.
            Its modules' training modes are afterwards what they were.
        data: a :class:`DataConfig`, whose validation set is decoded, cropped and normalised as a run does it; or
            batches of your own, such as a DataLoader: (normalised images, class numbers).
        validation: with a :class:`DataConfig`: a map-style data set of (image, label) in the place of its own
            (data/sources/own_dataset.py).
        batch: images of a batch, where the batches are made here.

    In a process group the figures are those of all ranks: validation sets are dealt to them; of batches of your own
    each rank must bring other images. Every rank calls it. Raises UserError for labels that are none of the network's
    classes.
    """
    parameter = next(model.parameters(), torch.zeros(()))
    with in_mode(False, model):
        if isinstance(data, DataConfig):
            return _of_config(model, data, validation, batch, parameter)
        if validation is not None:
            raise UserError("validation goes with a DataConfig, whose size and normalisation it takes; give one")
        judged = _Judged(model, _as_lanes(data))
        return accuracy(
            judged.logits,
            judged.batches(),
            _AsGiven(parameter),
            name="the iterable",
            remedy="give batches of images, a list or a DataLoader that was not read before",
        )


def _of_config(
    model: nn.Module, data: DataConfig, validation: Dataset | None, batch: int, parameter: Tensor
) -> Accuracy:
    numbers: tuple[int, ...] | None = None
    if validation is None:
        opened = open_data(data, for_training=False)
        source: Source = opened.val
        folders = isinstance(source, FolderSource) and not opened.train.num_rows
        found = numbers_in_names(opened.classes) if folders else ()
        if found and sorted(found) == list(range(len(found))):  # class folders alone, such as ImageNetV2's 0 to 999
            console.say_once(f"the class folders of {data.root} are numbers: taken as those of the network's classes")
            numbers = found
    else:
        source = OwnSource(validation, "validation")
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if is_distributed() else (0, 1)
    batches: Iterable[LaneBatch] = eval_batches(source, data, batch, rank, world)
    if numbers is not None:
        number_V = torch.tensor(numbers)
        batches = (replace(lane, labels_B=number_V[lane.labels_B]) for lane in batches)
    normalize = Normalizer(data.mean, data.std, parameter.device, parameter.dtype, channels_last=False)
    name = held_out_name(data) if validation is None else "the validation set"
    judged = _Judged(model, batches)
    return accuracy(judged.logits, judged.batches(), normalize, data.max_damaged, name)


class _Judged:
    """A network whose logits are held against the labels of the batch that was taken last. On a GPU a label of no class
    would be an error after which the process cannot use it any more."""

    def __init__(self, model: nn.Module, batches: Iterable[LaneBatch]) -> None:
        self._model, self._batches = model, batches

    def batches(self) -> Iterator[LaneBatch]:
        for lane in self._batches:
            self._labels_B = lane.labels_B
            yield lane

    def logits(self, images_BCHW: Tensor) -> Tensor:
        logits_BC, labels_B = logits_from(self._model, images_BCHW), self._labels_B
        name = describe(self._model)
        if logits_BC.dim() != 2:
            raise UserError(f"{name} returns a tensor of shape {tuple(logits_BC.shape)}, not logits (B, classes)")
        if labels_B.shape != logits_BC.shape[:1] or labels_B.is_floating_point():
            raise UserError(
                f"labels are {tuple(labels_B.shape)} of {labels_B.dtype}, for {len(logits_BC)} images: give class "
                "numbers (B,)"
            )
        low, high = int(labels_B.min()), int(labels_B.max())
        if low < 0 or high >= logits_BC.shape[1]:
            raise UserError(
                f"there are labels from {low} to {high}, and {name} gives {logits_BC.shape[1]} logits: give a network "
                "of the data's classes, and images that have a label"
            )
        return logits_BC


class _AsGiven(Normalizer):
    """Leaves images as they are, but for their device and, if they are floats, their precision."""

    def __init__(self, parameter: Tensor) -> None:
        self.device, self.dtype = parameter.device, parameter.dtype

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) on any device -> on this one."""
        dtype = self.dtype if images_BCHW.is_floating_point() else None
        return images_BCHW.to(self.device, dtype, non_blocking=True)


def _as_lanes(batches: Batches) -> Iterator[LaneBatch]:
    for number, pair in enumerate(batches):
        if not isinstance(pair, (tuple, list)) or len(pair) < 2 or not all(isinstance(x, Tensor) for x in pair[:2]):
            raise UserError(
                f"batch {number} is a {type(pair).__name__}: give (images, labels), or a DataConfig instead of batches"
            )
        images, labels = pair[0], pair[1] if pair[1].is_floating_point() else pair[1].long()
        yield LaneBatch(number, 0, images, labels, labels, 0, ())
