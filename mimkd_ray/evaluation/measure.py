"""A whole evaluation: its passes, its figures, and the files that it writes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimkd_ray import console, storage
from mimkd_ray.config import Config, DataConfig
from mimkd_ray.config.jobs.evaluate import EvaluateJob
from mimkd_ray.data.sources.data_set import Data, open_data
from mimkd_ray.data.sources.source import Source, SubsetSource, ids_of
from mimkd_ray.errors import UserError, count
from mimkd_ray.evaluation.cka import linear_cka
from mimkd_ray.evaluation.corruptions import CORRUPTIONS, SEVERITIES, Corruption
from mimkd_ray.evaluation.forward_pass import Collected, collect, few
from mimkd_ray.evaluation.linear_probe import linear_probe_accuracy
from mimkd_ray.evaluation.networks import Subject, subject_of
from mimkd_ray.evaluation.predictions import agreement, calibration, confusions, per_class, top_k
from mimkd_ray.evaluation.real_labels import real_accuracy
from mimkd_ray.losses.mutual_information import mutual_information
from mimkd_ray.run_lock import held
from mimkd_ray.train.distributed import Context, ask_first
from mimkd_ray.train.held_out.neighbours import knn_accuracy
from mimkd_ray.train.records.progress import say
from mimkd_ray.train.records.run_dir import jsonable, write_json
from mimkd_ray.versions import versions

FIGURES, PREDICTIONS, LOCK = "evaluation.json", "predictions.parquet", "evaluation.lock.json"
LEAST_PAIRS = 128
"""Fewest images that mutual information is estimated on."""
CRITIC_EPOCHS = 20
TEMPERATURE_ROWS = 5000
"""Most held-out images of the run that a temperature is fitted on."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    figures: dict[str, Any]
    rows: Collected
    subject: Subject


def measure(
    job: EvaluateJob, context: Context, run_dir: str = "", trained_on: Config | None = None, out: str = ""
) -> Evaluation:
    """Evaluate what `job` names, on the validation set of its data. Every worker calls it, and gets the same.

    `run_dir`: the run whose networks are taken; `trained_on`: its config, if `job` names other data; `out`: where
    `save` will write, which is tried before the images are passed. Raises UserError.
    """
    with console.phase("opening data and networks"):
        data = open_evaluated(job.data, trained_on.data if trained_on else job.data)
        subject = subject_of(job, run_dir, trained_on or job, data, context.device)
    both = [subject.network, *([subject.teacher] if subject.teacher else [])]
    _check_real(job, subject)
    if out:
        ask_first(lambda: _check_place(out))
    restricted = None if len(subject.labels) == data.num_classes else subject.labels
    source = few(data.val, job.eval.rows, restricted)
    found = collect(both, source, job, context, "evaluating")
    found.labels_N = _evaluated(found.labels_N, subject.labels)
    if not _has_logits(found):
        why = "is of other classes" if job.eval.network == "teacher" else "has learnt nothing (data.labels none, no KD)"
        say(context, f"the head {why}: the features alone are measured")
    figures = _of_logits(subject, found, _held_out(job, context, subject, data))
    figures["real"] = _of_many_labels(job, source, found)
    figures["taps"] = _of_taps(job, context, subject, found)
    figures |= _of_features(job, context, subject, data, found)
    figures["corruptions"] = _under_corruptions(job, context, subject, data) if _has_logits(found) else []
    figures |= {
        "network": subject.network.name,
        "what": job.eval.network,
        "weights": subject.network.weights,
        "data": job.data.root,
        "rows": len(found.labels_N),
        "damaged": len(found.damaged),
        "classes": len(subject.classes),
        "versions": versions(),
    }
    return Evaluation(figures, found, subject)


def open_evaluated(config: DataConfig, of_run: DataConfig) -> Data:
    """Open the data that is evaluated, and may be others than the run's."""
    return open_data(config, for_training=False, others=config.root != of_run.root)


def _check_place(out: str) -> None:
    with held(out, LOCK, "--eval.out"):
        pass


def save(evaluation: Evaluation, out: str) -> None:
    """Write evaluation.json and predictions.parquet into a folder or URL."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, classes = evaluation.rows, evaluation.subject.classes
    label = [classes[number] if number >= 0 else None for number in rows.labels_N.tolist()]
    table = {"id": pa.array(rows.ids_N.numpy()), "label": pa.array(label, pa.string())}
    for role, logits_NV in zip(("", "teacher_"), rows.logits, strict=False):
        if not role or evaluation.figures["teacher"] is not None:
            prediction, probability = _best(logits_NV)
            guess = [classes[number] for number in prediction] if prediction else [None] * len(label)
            table[f"{role}prediction"] = pa.array(guess, pa.string())
            table[f"{role}probability"] = pa.array(probability if probability else [None] * len(label), pa.float64())
    buffer = io.BytesIO()
    pq.write_table(pa.table(table), buffer)
    with held(out, LOCK, "--eval.out"):  # both of one evaluation; the run itself may train meanwhile
        storage.write_bytes(storage.join(out, PREDICTIONS), buffer.getvalue())
        write_json(storage.join(out, FIGURES), jsonable(evaluation.figures))


def _best(logits_NV: Tensor) -> tuple[list[int], list[float]]:
    """The predictions and their probabilities; none without logits."""
    if not logits_NV.shape[1]:
        return [], []
    probability_N, prediction_N = logits_NV.double().softmax(dim=1).max(dim=1)
    return prediction_N.tolist(), probability_N.tolist()


def _has_logits(found: Collected) -> bool:
    return found.logits[0].shape[1] > 0


def _evaluated(labels_N: Tensor, classes: Sequence[int]) -> Tensor:
    """Return the place of each label among the evaluated classes, given by their numbers; -1 where it has none."""
    places = torch.full((max(int(labels_N.max()), *classes) + 1,), -1)
    places[list(classes)] = torch.arange(len(classes))
    return torch.where(labels_N >= 0, places[labels_N.clamp(min=0)], -1)


def _overlap(one: Source, other: Source) -> bool:
    """Whether rows of one set are in the other, as far as names of files tell."""
    same = _whole(one).digest == _whole(other).digest
    return same and bool(np.isin(ids_of(one), ids_of(other)).any())


def _whole(source: Source) -> Source:
    return _whole(source.parent) if isinstance(source, SubsetSource) else source


def _held_out(job: EvaluateJob, context: Context, subject: Subject, data: Data) -> tuple[Tensor, Tensor] | None:
    """Logits and labels of images that the run's student has not seen, if it is evaluated, on others. Images that a
    network was trained on would give a temperature that is too small."""
    own, judged = subject.of_run, data.judged and subject.network.columns != ()
    if own is None or not own.judged or not judged or not subject.is_own or _overlap(own.val, data.val):
        return None
    source = few(own.val, TEMPERATURE_ROWS, subject.labels_of_run)
    if source.num_rows < 2:
        return None
    found = collect([subject.network], source, job, context, "images that the run held out")
    return found.logits[0], _evaluated(found.labels_N, subject.labels_of_run)


def _of_logits(subject: Subject, found: Collected, held_out: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
    known = found.labels_N >= 0
    labels_N = found.labels_N[known]
    teacher = None
    if len(found.logits) > 1 and found.logits[1].shape[1]:
        teacher = {
            "name": subject.teacher.name if subject.teacher else "",
            "top1": _top(found.logits[1][known], labels_N, 1),
            **(agreement(*found.logits) if _has_logits(found) else {"agreement": None, "kl": None}),
        }
    figures = {"labelled": len(labels_N), "teacher": teacher}
    if not _has_logits(found):
        return figures | {"top1": None, "top5": None, "per_class": [], "calibration": None, "confusions": []}
    logits_NV = found.logits[0][known]
    predicted_N = logits_NV.argmax(dim=1)
    calibrated = None
    if len(labels_N) > 1:
        fitted_on = f"{len(held_out[1]):,} images that the run held out" if held_out else "the other half of the images"
        calibrated = calibration(logits_NV, labels_N, held_out) | {"fitted_on": fitted_on}
    return figures | {
        "top1": _top(logits_NV, labels_N, 1),
        "top5": _top(logits_NV, labels_N, 5),
        "per_class": per_class(predicted_N, labels_N, subject.classes),
        "calibration": calibrated,
        "confusions": confusions(predicted_N, labels_N, subject.classes),
    }


def _top(logits_NV: Tensor, labels_N: Tensor, k: int) -> float | None:
    return top_k(logits_NV, labels_N, k) if len(labels_N) else None


def _check_real(job: EvaluateJob, subject: Subject) -> None:
    """Raise UserError for lists of labels that do not go with the network and the data."""
    if not job.eval.real:
        return
    if subject.network.columns == ():
        raise UserError(f"eval.real {job.eval.real} judges predictions, and nothing has trained the head: leave it out")
    if subject.network.columns is not None:
        raise UserError(
            f"eval.real {job.eval.real} numbers the classes of the network, and {job.data.root} has only "
            f"{len(subject.classes)} of them: give the images of all classes"
        )


def _of_many_labels(job: EvaluateJob, source: Source, found: Collected) -> dict[str, float] | None:
    if not job.eval.real:
        return None
    return real_accuracy(found.logits[0].argmax(dim=1), found.labels_N, found.ids_N, source, job.eval.real)


def _of_taps(job: EvaluateJob, context: Context, subject: Subject, found: Collected) -> list[dict[str, Any]]:
    rows = min(job.eval.tap_rows, len(found.labels_N))
    if not subject.pairs or rows < LEAST_PAIRS:
        if subject.pairs:
            say(context, f"mutual information and CKA take {LEAST_PAIRS} images, and {rows} are given: left out")
        return []
    say(context, f"mutual information of {count(len(subject.pairs), 'pair')} of taps, on {count(rows, 'image')}")
    spread = torch.linspace(0, len(found.labels_N) - 1, rows, dtype=torch.float64).round().long()
    figures = []
    for of_teacher, of_student in subject.pairs:
        x_NC, y_ND = found.taps[1][of_teacher][spread], found.taps[0][of_student][spread]
        estimate = mutual_information(x_NC, y_ND, epochs=CRITIC_EPOCHS, batch=min(256, rows // 4), held_out=0.5)
        figures.append(
            {
                "teacher": of_teacher,
                "student": of_student,
                "nats": estimate.nats,
                "standard_error": estimate.standard_error,
                "ceiling": estimate.ceiling,
                "cka": linear_cka(x_NC, y_ND),
            }
        )
    return figures


def _of_features(
    job: EvaluateJob, context: Context, subject: Subject, data: Data, found: Collected
) -> dict[str, float | None]:
    """k-NN and a linear probe, by training images: those of the data, or where it has none those of the run. Where none
    has a label, or those that are evaluated are the training images, k-NN is by the other evaluated images."""
    rows, known = job.eval.train_rows, torch.nonzero(found.labels_N >= 0).flatten()
    nothing: dict[str, float | None] = {"knn": None, "linear_probe": None}
    if not rows or not len(known):
        return nothing
    features_NC, labels_N = found.taps[0][subject.vector][known], found.labels_N[known]
    train, labels = data.train, subject.labels
    if not train.num_rows and subject.of_run is not None:
        train, labels = subject.of_run.train, subject.labels_of_run
    source = few(train, rows, labels)  # those that have a label
    if _overlap(train, data.val) or (train.num_rows and not source.num_rows):
        say(context, "no training images with labels beside the evaluated: k-NN by the others of these, and no probe")
        spread = torch.linspace(0, len(known) - 1, min(rows, len(known)), dtype=torch.float64).round().long()
        bank = features_NC[spread], labels_N[spread]
        return nothing | ({"knn": knn_accuracy(*bank, *bank, leave_one_out=True)} if len(spread) > 1 else {})
    if not source.num_rows:
        say(context, f"{job.data.root} has no training images, nor a run with labels: no k-NN, no probe")
        return nothing
    found = collect([subject.network], source, job, context, "features of training images")
    arguments = found.taps[0][subject.vector], _evaluated(found.labels_N, labels), features_NC, labels_N
    return {"knn": knn_accuracy(*arguments), "linear_probe": linear_probe_accuracy(*arguments)}


def _corrupted(corrupt: Corruption, severity: int, images_BCHW: Tensor) -> Tensor:
    return corrupt(images_BCHW, severity)


def _under_corruptions(
    job: EvaluateJob,
    context: Context,
    subject: Subject,
    data: Data,
) -> list[dict[str, Any]]:
    if not job.eval.corruptions:
        return []
    rows = min(job.eval.corruption_rows, job.eval.rows or job.eval.corruption_rows)
    source = few(data.val, rows, subject.labels)  # those that have a label
    if not source.num_rows:
        return []
    figures = []
    for name, corrupt in CORRUPTIONS.items():
        say(context, f"corruption {name}")
        for severity in SEVERITIES:
            found = collect([subject.network], source, job, context, change=partial(_corrupted, corrupt, severity))
            top1 = top_k(found.logits[0], _evaluated(found.labels_N, subject.labels), 1)
            figures.append({"corruption": name, "severity": severity, "top1": top1})
    return figures
