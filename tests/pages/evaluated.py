"""What an evaluation leaves in a run's directory, made up for pages."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mimkd_ray.data.sources.digits import DigitsSource
from mimkd_ray.data.sources.source import Source
from mimkd_ray.train.records.run_dir import write_json

EVIL = "<script>alert(1)</script>"
CLASSES = [*"0123", EVIL, *"56789"]


def write_evaluation(
    run_dir: Path, seed: int = 0, source: Source | None = None, classes: list[str] = CLASSES
) -> list[dict[str, Any]]:
    """Write evaluation.json and predictions.parquet of a student that is right seven times of ten; return the rows."""
    source = source or DigitsSource("val")
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for place, label in enumerate(source.labels().tolist()):
        said, taught = (label if draw.random() < share else draw.randrange(len(classes)) for share in (0.7, 0.9))
        rows.append(
            {
                "id": place,
                "label": classes[label],
                "prediction": classes[said],
                "probability": draw.random(),
                "teacher_prediction": classes[taught],
                "teacher_probability": draw.random(),
            }
        )
    hits = [[row["prediction"] == name for row in rows if row["label"] == name] for name in classes]
    wrong = {(row["label"], row["prediction"]) for row in rows if row["label"] != row["prediction"]}
    counts = {pair: sum((row["label"], row["prediction"]) == pair for row in rows) for pair in sorted(wrong)}
    bins = torch.linspace(0.05, 0.95, 10).tolist()
    evaluation = {
        "top1": 70.0,
        "top5": 95.0,
        "per_class": [
            {"class": name, "rows": len(own), "top1": 100 * sum(own) / len(own)}
            for name, own in zip(classes, hits, strict=True)
        ],
        "calibration": {
            "ece": 0.0812,
            "ece_scaled": 0.0211,
            "temperature": 1.43,
            "bins": [{"confidence": p, "accuracy": p * 0.8, "rows": int(100 * p)} for p in bins],
        },
        "confusions": [
            {"label": a, "prediction": b, "count": count}
            for (a, b), count in sorted(counts.items(), key=lambda item: -item[1])
        ],
        "teacher": {"agreement": 71.5, "kl": 0.31, "top1": 90.0},
        "corruptions": [{"corruption": "fog", "severity": n, "top1": 60.0 - n} for n in range(1, 6)],
        "taps": [{"teacher": "stage3", "student": "stage3", "nats": 1.5, "ceiling": 4.16, "cka": 0.61}],
    }
    write_json(str(run_dir / "evaluation.json"), evaluation)
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    (run_dir / "predictions.parquet").write_bytes(sink.getvalue())
    return rows
