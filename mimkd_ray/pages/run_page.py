"""The report.html of a run, finished or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mimkd_ray.console import clock
from mimkd_ray.errors import count
from mimkd_ray.pages.figures import BLUE, GREY, Line, color_of, lines_figure, reliability_figure
from mimkd_ray.pages.page import Cell, Page
from mimkd_ray.pages.run_records import RunRecord, alone_beside
from mimkd_ray.pages.sections import (
    RELIABILITY,
    class_gains,
    confusions,
    number_cell,
    reproduction,
    size_tile,
    top1_by_class,
)
from mimkd_ray.pages.thumbnails import MOST_IMAGES, worst_images
from mimkd_ray.train.records.progress import reading


def run_page(run: RunRecord) -> str:
    """Return the page of a run: headline, curves, what `mimkd-ray evaluate` found, and how to make it again."""
    alone = alone_beside(run)
    taught = f" taught by {run.teacher_name}" if run.uses_teacher else ""
    page = Page(f"{run.student_name}{taught}")
    _headline(page, run, alone)
    _curves(page, run)
    if run.evaluation:
        _evaluation(page, run, alone)
    else:
        page.paragraph("mimkd-ray evaluate adds classes, confusions, calibration and the worst images.")
    reproduction(page, run.place, run.config, run.result)
    return page.html()


def _headline(page: Page, run: RunRecord, alone: RunRecord | None) -> None:
    last = run.train[-1] if run.train else {}
    tiles = []
    if run.top1 is not None:
        tiles.append((f"{run.top1:.2f} %", f"top-1 of the student on {run.held_out('rows') or 0:,.0f} held-out images"))
        if run.teacher_top1 is not None:
            gap = run.top1 - run.teacher_top1
            tiles.append((f"{run.teacher_top1:.2f} %", f"top-1 of the teacher; the student is {gap:+.2f} from it"))
        if alone is not None and alone.top1 is not None:
            tiles.append((f"{run.top1 - alone.top1:+.2f}", f"points over the student alone, {alone.top1:.2f} %"))
    elif (knn := run.held_out("knn")) is not None:
        rows = f"{run.held_out('rows') or 0:,.0f} held-out images"
        tiles.append((f"{knn:.2f} %", f"of {rows} by k nearest neighbours in the student's features"))
    if run.size is not None:
        tiles.append(size_tile(run.size, run.teacher_size))
    rate = run.result.get("images_per_second") or last.get("images_per_second")
    if rate is not None:
        wait = last.get("data_wait")
        tiles.append(
            (f"{rate:,.0f}", "images/s of training" + ("" if wait is None else f", {wait:.0%} waiting for data"))
        )
    if "seconds" in run.result:
        tiles.append((clock(run.result["seconds"]), f"h:mm:ss for {count(run.result['steps'], 'step')}"))
    exported, files = _exported(run.export)
    page.tiles([*tiles, *exported])
    if not run.result:
        page.paragraph(f"This run has not come to its end: it is at step {last.get('step', 0):,}.")
    readings = run.result.get("nats") or {}
    terms = [(f"mutual information, {name}", reading(v["nats"], v["ceiling"])) for name, v in readings.items()]
    page.facts([("recipe", str(run.config.get("recipe", ""))), *_held_out_facts(run), *terms, *files])


def _exported(found: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return tiles of export.json, multiply-adds and the least latency, and facts: those of every file."""
    if not found:
        return [], []
    files = {"PyTorch": found["student"], **found["files"]}
    took = {name: each["latency_ms"]["1"] for name, each in files.items()}
    best = min(took, key=lambda name: took[name])
    tiles = [
        (f"{found['macs'] / 1e6:,.1f} M", "multiply-adds an image"),
        (f"{took[best]:.2f} ms", f"an image, batch 1, {count(found['threads'], 'thread')}, exported as {best}"),
    ]
    return tiles, [(f"export, {n}", f"{took[n]:.2f} ms, {each['bytes'] / 1e6:.2f} MB") for n, each in files.items()]


def _held_out_facts(run: RunRecord) -> list[tuple[str, str]]:
    if not run.head_learns:
        return []
    found = [(key, run.held_out(key)) for key in ("top5", "cross_entropy")]
    form = {"top5": ("top-5", "{:.2f} %"), "cross_entropy": ("cross-entropy", "{:.4g} nats an image")}
    return [(form[key][0], form[key][1].format(value)) for key, value in found if value is not None]


def _curves(page: Page, run: RunRecord) -> None:
    page.section(
        "curves",
        "Curves",
        "Over epochs. A dotted line is the ceiling of what the term of its colour can read. Drag to zoom into a plot; "
        "double-click to return.",
    )
    if not run.train:
        page.paragraph("No step has been logged.")
        return
    x = column(run.train, "epoch")
    at = column(run.evals, "epoch")
    terms = sorted({key.removesuffix("/nats") for line in (*run.train, *run.evals) for key in line if "/nats" in key})
    terms = [term for term in terms if not term.endswith("lane")]
    colors = {term: color_of(place) for place, term in enumerate(terms)}
    measured = {"top1": "top-1", "top5": "top-5"} if run.head_learns else {}
    if any(line.get("knn") is not None for line in run.evals):
        measured["knn"] = "k-NN top-1"
    colored = zip(measured.items(), (0, 2, 1), strict=False)
    accuracy = [Line(name, at, column(run.evals, key), color_of(place)) for (key, name), place in colored]
    if run.teacher_top1 is not None and at:
        accuracy.append(Line("teacher's top-1", [at[0], at[-1]], [run.teacher_top1] * 2, GREY, "dash"))
    losses = [
        Line(label, x, column(run.train, key), color_of(place))
        for place, (key, label) in enumerate({"loss": "total", "ce": "cross-entropy", "kd": "KD"}.items())
        if key in run.train[-1] and (run.head_learns or key != "ce")
    ]
    if run.head_learns:
        losses.append(Line("held out", at, column(run.evals, "cross_entropy"), color_of(3)))
    figures = [
        ("Loss", lines_figure(losses, "epoch", "nats")),
        ("Held-out accuracy", lines_figure(accuracy, "epoch", "%")),
    ]
    if terms:
        figures.append(("Information, in training", _information(run.train, terms, colors)))
        if any(f"{term}/nats" in line for term in terms for line in run.evals):
            figures.append(("Information, held out", _information(run.evals, terms, colors)))
    scaled = [term for term in terms if f"{term}/scale" in run.train[-1]]
    if scaled:
        lines = [
            Line(term, x, [_inverse(v) for v in column(run.train, f"{term}/scale")], colors[term]) for term in scaled
        ]
        figures.append(("Temperature of the critics", lines_figure(lines, "epoch", "", from_zero=True)))
    figures.append(
        (
            "Learning rate",
            lines_figure([Line("learning rate", x, column(run.train, "lr"))], "epoch", "", from_zero=True),
        )
    )
    wait = [None if value is None else 100 * value for value in column(run.train, "data_wait")]
    speed = [
        Line("images/s so far", x, column(run.train, "images_per_second")),
        Line("waiting for data (%)", x, wait, color_of(1), right=True),
    ]
    figures.append(("Speed", lines_figure(speed, "epoch", "images/s", "%", from_zero=True)))
    page.figures(figures)


def column(lines: Sequence[Mapping[str, Any]], key: str) -> list[float | None]:
    """Return one figure of every line; None where it is missing."""
    return [line.get(key) for line in lines]


def _inverse(value: float | None) -> float | None:
    return 1 / value if value else None


def _information(lines: Sequence[Mapping[str, Any]], terms: Sequence[str], colors: Mapping[str, str]) -> Any:
    """Return nats by term, each below its ceiling of the same colour, dotted; some bounds have none."""
    x = column(lines, "epoch")
    drawn = []
    for term in terms:
        drawn.append(Line(term, x, column(lines, f"{term}/nats"), colors[term]))
        ceilings = column(lines, f"{term}/ceiling")
        if any(value is not None for value in ceilings):
            drawn.append(Line(f"ceiling of {term}", x, ceilings, colors[term], "dot", legend=False))
    return lines_figure(drawn, "epoch", "nats")


def _evaluation(page: Page, run: RunRecord, alone: RunRecord | None) -> None:
    """Add what evaluation.json and predictions.parquet say."""
    found = run.evaluation
    rows = run.predictions()
    page.section("evaluation", "Evaluation", "What mimkd-ray evaluate found.")
    facts = {"what": "network", "data": "data", "rows": "images", "top1": "top-1 (%)", "top5": "top-5 (%)"}
    facts |= {"knn": "k-NN on its features (%)", "linear_probe": "linear probe on its features (%)"}
    page.facts([(text, _short(found[key])) for key, text in facts.items() if found.get(key) is not None])
    student, counts = top1_by_class(found)
    other = top1_by_class(alone.evaluation)[0] if alone is not None else {}
    if student and other:
        class_gains(page, {"alone": other, "taught": student}, counts, "The student taught, against the student alone.")
    elif student:
        teacher = _teacher_by_class(rows)
        if teacher:
            class_gains(page, {"teacher": teacher, "student": student}, counts, "The student against its teacher.")
        else:
            page.section("classes", "Per class")
            by_top1 = sorted(student, key=lambda name: student[name])
            page.table(
                ["class", "images", "top-1 %"],
                [[Cell(n), Cell(str(counts[n]), counts[n]), number_cell(student[n])] for n in by_top1],
                sortable=True,
            )
    _agreement(page, found)
    confusions(page, {"images": found}, "What the student says most often where it is wrong.")
    _calibration(page, found.get("calibration") or {})
    _corruptions(page, found.get("corruptions") or [])
    if rows:
        page.section(
            "worst",
            "Worst images",
            f"The {MOST_IMAGES} images where the student is most certain and wrong.",
        )
        images, trouble = worst_images(run, rows)
        if trouble:
            page.paragraph(trouble)
        page.images(images)


def _teacher_by_class(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the teacher's top-1 in percent by class, of the predictions; {} where there are none of a teacher."""
    hits: dict[str, list[bool]] = {}
    for row in rows:
        if row.get("teacher_prediction") is not None and row["label"] is not None:
            hits.setdefault(row["label"], []).append(row["teacher_prediction"] == row["label"])
    return {name: 100 * sum(own) / len(own) for name, own in hits.items()}


def _agreement(page: Page, found: Mapping[str, Any]) -> None:
    teacher, taps = found.get("teacher") or {}, found.get("taps") or []
    if not (teacher or taps):
        return
    page.section("agreement", "Agreement with the teacher")
    names = {
        "top1": ("top-1 of the teacher", "{:.2f} %"),
        "agreement": ("same answer as the teacher", "{:.2f} %"),
        "kl": ("KL from the teacher", "{:.4g} nats"),
    }
    page.facts(
        [(text, form.format(teacher[key])) for key, (text, form) in names.items() if teacher.get(key) is not None]
    )
    if taps:
        page.table(
            ["teacher's layer", "student's layer", "nats", "ceiling", "linear CKA"],
            [
                [Cell(str(t["teacher"])), Cell(str(t["student"])), *(number_cell(t.get(k), ".3f") for k in _TAP)]
                for t in taps
            ],
        )


def _short(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _corruptions(page: Page, found: Sequence[Mapping[str, Any]]) -> None:
    if not found:
        return
    page.section("corruptions", "Under corruptions")
    kinds = list(dict.fromkeys(each["corruption"] for each in found))
    lines = []
    for place, kind in enumerate(kinds):
        own = [each for each in found if each["corruption"] == kind]
        lines.append(Line(kind, column(own, "severity"), column(own, "top1"), color_of(place)))
    figure = lines_figure(lines, "severity", "top-1 (%)")
    page.figure(figure.update_xaxes(dtick=1))


_TAP = ("nats", "ceiling", "cka")


def _calibration(page: Page, found: Mapping[str, Any]) -> None:
    if not found.get("bins"):
        return
    page.section("calibration", "Reliability", RELIABILITY)
    names = {"ece": "ECE", "ece_scaled": "ECE at the fitted temperature", "temperature": "fitted temperature"}
    facts = [(text, f"{found[key]:.4g}") for key, text in names.items() if found.get(key) is not None]
    page.facts([*facts, *([("fitted on", found["fitted_on"])] if "fitted_on" in found else [])])
    page.figures([("Accuracy by confidence", reliability_figure({"student": found["bins"]}, {"student": BLUE}))])
