"""A whole evaluation: its passes, its figures, and the files that it writes."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mimkd_ray import storage
from mimkd_ray.config import Config
from mimkd_ray.config.jobs.evaluate import EvaluateJob
from mimkd_ray.data.sources.data_set import Data, open_data
from mimkd_ray.data.sources.source import Source
from mimkd_ray.errors import UserError, count
from mimkd_ray.evaluation.collect import Collected, collect, few
from mimkd_ray.evaluation.corruptions import CORRUPTIONS, SEVERITIES, Corruption
from mimkd_ray.evaluation.linear_probe import linear_probe_accuracy
from mimkd_ray.evaluation.networks import Subject, subject_of
from mimkd_ray.evaluation.predictions import agreement, calibration, confusions, per_class, top_k
from mimkd_ray.evaluation.real_labels import real_accuracy
from mimkd_ray.evaluation.similarity import linear_cka
from mimkd_ray.losses.estimate import mutual_information
from mimkd_ray.train.distributed import Context
from mimkd_ray.train.held_out.neighbours import knn_accuracy
from mimkd_ray.train.records.metrics import say
from mimkd_ray.train.records.run_dir import jsonable, write_json
from mimkd_ray.versions import versions

FIGURES, PREDICTIONS = "evaluation.json", "predictions.parquet"
LEAST_PAIRS = 128
"""Fewest images that mutual information is estimated on."""
CRITIC_EPOCHS = 20


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    figures: dict[str, Any]
    rows: Collected
    subject: Subject


def measure(job: EvaluateJob, context: Context, run_dir: str = "", trained_on: Config | None = None) -> Evaluation:
    """Evaluate what `job` names, on the validation set of its data. Every worker calls it, and gets the same.

    `run_dir`: the run whose networks are taken; `trained_on`: its config, if `job` names other data. Raises UserError.
    """
    data = open_data(job.data)
    subject = subject_of(job, run_dir, trained_on or job, data, context.device)
    both = [subject.network, *([subject.teacher] if subject.teacher else [])]
    restricted = None if len(subject.labels) == data.num_classes else subject.labels
    source = few(data.val, job.eval.rows, restricted)
    found = collect(both, source, job, context, "evaluating")
    by_data = torch.full((data.num_classes,), -1)
    by_data[list(subject.labels)] = torch.arange(len(subject.labels))
    found.labels_N = torch.where(found.labels_N >= 0, by_data[found.labels_N.clamp(min=0)], -1)
    figures = _of_logits(subject, found)
    figures["real"] = _of_many_labels(job, subject, source, found)
    figures["taps"] = _of_taps(job, context, subject, found)
    figures |= _of_features(job, context, subject, data, found)
    figures["corruptions"] = _under_corruptions(job, context, subject, data, by_data)
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


def save(evaluation: Evaluation, out: str) -> None:
    """Write evaluation.json and predictions.parquet into a folder or URL."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, classes = evaluation.rows, evaluation.subject.classes
    prediction, probability = _best(rows.logits[0])
    table = {
        "id": rows.ids_N.numpy(),
        "label": [classes[number] if number >= 0 else None for number in rows.labels_N.tolist()],
        "prediction": [classes[number] for number in prediction],
        "probability": probability,
    }
    if evaluation.figures["teacher"] is not None:
        prediction, probability = _best(rows.logits[1])
        table["teacher_prediction"] = [classes[number] for number in prediction]
        table["teacher_probability"] = probability
    buffer = io.BytesIO()
    pq.write_table(pa.table(table), buffer)
    storage.write_bytes(storage.join(out, PREDICTIONS), buffer.getvalue())
    write_json(storage.join(out, FIGURES), jsonable(evaluation.figures))


def _best(logits_NV: Tensor) -> tuple[list[int], list[float]]:
    probability_N, prediction_N = logits_NV.double().softmax(dim=1).max(dim=1)
    return prediction_N.tolist(), probability_N.tolist()


def _of_logits(subject: Subject, found: Collected) -> dict[str, Any]:
    known = found.labels_N >= 0
    logits_NV, labels_N = found.logits[0][known], found.labels_N[known]
    predicted_N = logits_NV.argmax(dim=1)
    teacher = None
    if len(found.logits) > 1 and found.logits[1].shape[1]:
        teacher = {
            "name": subject.teacher.name if subject.teacher else "",
            "top1": _top(found.logits[1][known], labels_N, 1),
            **agreement(found.logits[0], found.logits[1]),
        }
    return {
        "labelled": len(labels_N),
        "top1": _top(logits_NV, labels_N, 1),
        "top5": _top(logits_NV, labels_N, 5),
        "per_class": per_class(predicted_N, labels_N, subject.classes),
        "calibration": calibration(logits_NV, labels_N) if len(labels_N) > 1 else None,
        "confusions": confusions(predicted_N, labels_N, subject.classes),
        "teacher": teacher,
    }


def _top(logits_NV: Tensor, labels_N: Tensor, k: int) -> float | None:
    return top_k(logits_NV, labels_N, k) if len(labels_N) else None


def _of_many_labels(job: EvaluateJob, subject: Subject, source: Source, found: Collected) -> dict[str, float] | None:
    if not job.eval.real:
        return None
    if subject.network.columns is not None:
        raise UserError(
            f"eval.real {job.eval.real} numbers the classes of the network, and {job.data.root} has only "
            f"{len(subject.classes)} of them: give the images of all classes"
        )
    return real_accuracy(found.logits[0].argmax(dim=1), found.labels_N, found.ids_N, source, job.eval.real)


def _of_taps(job: EvaluateJob, context: Context, subject: Subject, found: Collected) -> list[dict[str, Any]]:
    rows = min(job.eval.tap_rows, len(found.labels_N))
    if not subject.pairs or rows < LEAST_PAIRS:
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
    if not job.eval.train_rows:
        return {"knn": None, "linear_probe": None}
    source = few(data.train, job.eval.train_rows, subject.labels)  # those that have a label
    known = found.labels_N >= 0
    if not source.num_rows or not known.any():
        return {"knn": None, "linear_probe": None}
    train = collect([subject.network], source, job, context, "features of training images")
    arguments = (
        train.taps[0][subject.vector],
        train.labels_N,
        found.taps[0][subject.vector][known],
        torch.tensor(subject.labels)[found.labels_N[known]],
    )
    return {"knn": knn_accuracy(*arguments), "linear_probe": linear_probe_accuracy(*arguments)}


def _corrupted(corrupt: Corruption, severity: int, images_BCHW: Tensor) -> Tensor:
    return corrupt(images_BCHW, severity)


def _under_corruptions(
    job: EvaluateJob,
    context: Context,
    subject: Subject,
    data: Data,
    by_data: Tensor,
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
            top1 = top_k(found.logits[0], by_data[found.labels_N], 1)
            figures.append({"corruption": name, "severity": severity, "top1": top1})
    return figures
