"""Evaluation of students on held-out images: several at a time, with one pass of the teacher."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from mimkd_ray.models.train_or_eval import in_mode
from mimkd_ray.train.engine.student import Student
from mimkd_ray.train.held_out.accuracy import Accuracy, accuracies, held_out_name, read_information
from mimkd_ray.train.held_out.captured_forwards import logits_of
from mimkd_ray.train.held_out.neighbours import knn_top1
from mimkd_ray.train.out_of_memory import each


def evaluate_together(
    students: Sequence[Student], failed: dict[Student, str] | None = None
) -> dict[Student, dict[str, Any]]:
    """Return held-out top-1, top-5, cross-entropy, k-NN and nats of each term of students with the same inputs.

    Images are decoded and the teacher runs once for all. Training goes on as if nobody had looked. Every worker calls
    it.

    A student that finds no memory is added to ``failed`` with what the allocator said, and has no figures; None: its
    error is raised.
    """
    inputs = students[0].inputs
    train, images = inputs.config.train, inputs.config.data
    with ExitStack() as stack:
        for student in students:
            stack.enter_context(student.settled())
        # With their taps: the network alone would leave those of its last batch in the hooks that are on it.
        networks = {student: student.tapped() for student in students}
        recorded = inputs.forwards
        logits = {
            student: partial(logits_of, network) if recorded is None else recorded.of(network)
            for student, network in networks.items()
        }
        measured = {student: Accuracy(math.nan, math.nan, math.nan, inputs.data.val.num_rows, 0) for student in logits}
        if inputs.data.judged:
            batches = inputs.held_out(inputs.eval_batch)
            with in_mode(False, *networks.values()):
                measured = accuracies(
                    logits, batches, inputs.normalize, images.max_damaged, held_out_name(images), failed=failed
                )
        values: dict[Student, dict[str, Any]] = {student: found._asdict() for student, found in measured.items()}

        def look_around(student: Student) -> None:
            if student.vector is not None:
                knn = knn_top1(student.exported(), student.vector, student.config, inputs.data, inputs.normalize)
                values[student]["knn"] = math.nan if knn is None else knn

        each(values, look_around, failed)
        readable = {student: student.distiller for student in values if student.distiller.loss.plan}
        if inputs.teacher is not None and readable and train.information_rows:
            # In batches of a lane, so that held-out nats have the ceiling of those in training.
            rows = train.information_rows
            lanes = inputs.held_out(train.lane_batch, "mutual information on held-out images", rows)
            read = read_information(readable, inputs.teacher, lanes, inputs.normalize, rows, failed)
            for student, information in read.items():
                values[student] |= information
    return {student: found for student, found in values.items() if student not in (failed or {})}
