"""Results of the CIFAR-100 study: means, spreads, paired differences; as text, Markdown and JSON."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import machine, table, versions
from study_arms import ABLATIONS, PUBLISHED
from study_plan import Plan

from mimkd_ray.json_files import read_json
from mimkd_ray.train.compare import paired

Figures = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """Figures by pair and method, of the runs that are finished."""

    plan: Plan
    pairs: dict[str, dict[str, Figures]]

    @classmethod
    def read(cls, plan: Plan) -> Study:
        """Collect the results of a plan, whole or in part."""
        return cls(plan, {pair: _pair(plan, pair) for pair in plan.base})

    def rows(self) -> list[list[object]]:
        """Return the rows of the table: pair, method, factor, top-1 with its spread, differences (for an ablation also
        from mimkd), seconds an epoch, published."""
        found: list[list[object]] = []
        for pair, methods in self.pairs.items():
            for method, figures in methods.items():
                top1 = f"{figures['mean']:.2f}" + (f" ± {figures['sd']:.2f}" if figures["sd"] is not None else "")
                found.append(
                    [
                        pair,
                        method,
                        len(figures["top1"]),
                        f"{figures['factor']:.2f}" if "factor" in figures else "",
                        top1,
                        _difference(figures.get("against_alone")),
                        _difference(figures.get("against_crd")),
                        _difference(figures.get("against_mimkd")),
                        f"{figures['seconds_per_epoch']:.1f}",
                        figures.get("published", ""),
                    ]
                )
        return found

    HEADER = ("pair", "method", "seeds", "factor", "top-1 %", "- alone", "- CRD", "- mimkd", "s/epoch", "published")

    def text(self) -> str:
        """Return the table for a terminal. Differences are paired by seed, with their standard errors."""
        return table(list(self.HEADER), self.rows())

    def markdown(self) -> str:
        """Return the table for a README."""
        lines = [self.HEADER, ["---"] * len(self.HEADER), *self.rows()]
        return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)

    def write(self, file: Path | None, complete: bool) -> None:
        """Write the JSON, if a file is given."""
        if file is None:
            return
        settings = {
            pair: {
                "teacher": config.teacher.name,
                "student": config.student.name,
                "epochs": config.train.epochs,
                "teacher_epochs": config.teacher.epochs or config.train.epochs,
                "lane_batch": config.train.lane_batch,
                "lr": config.optim.lr,
                "schedule": config.optim.schedule,
                "training_rows": config.data.subset or "all",
            }
            for pair, config in self.plan.base.items()
        }
        report = {
            "name": "cifar100",
            "complete": complete,
            "settings": {"seeds": self.plan.seeds, "tuning_trials": self.plan.tuning, "pairs": settings},
            "pairs": self.pairs,
            "figures": self.figures(),
            "targets": {},
            "machine": machine(),
            "versions": versions(),
        }
        file.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")

    def figures(self) -> dict[str, float]:
        """Return the means by pair and method."""
        return {f"{pair}/{name}/top1": value["mean"] for pair, of in self.pairs.items() for name, value in of.items()}


def _pair(plan: Plan, pair: str) -> dict[str, Figures]:
    """Return the figures of every method of a pair that has a finished student, the teacher first."""
    known = PUBLISHED.get(pair, {})
    found: dict[str, Figures] = {}
    _, place = plan.teachers()[pair]
    teacher = read_json(str(place / "result.json"))
    if teacher is not None:
        found["teacher"] = _figures([teacher]) | _published(known, "teacher")
    for method in (*plan.methods, *plan.ablations):
        trials = {factor: read_json(str(at / "result.json")) for factor, (_, at) in plan.trials(pair, method).items()}
        if None in trials.values():
            continue
        results = {
            seed: read_json(str(plan.final(pair, method, seed)[1] / "result.json")) for seed in range(plan.seeds)
        }
        finished = {seed: result for seed, result in results.items() if result is not None}
        if not finished:
            continue
        figures = _figures(list(finished.values())) | _published(known, method)
        figures["by_seed"] = {str(seed): result["student"]["top1"] for seed, result in finished.items()}
        figures["nats"] = {
            term: statistics.fmean(result["nats"][term]["nats"] for result in finished.values())
            for term in next(iter(finished.values()))["nats"]
        }
        figures["factor"] = plan.factor(pair, method)
        figures["tuning"] = {f"{f:.2f}": r["student"]["top1"] for f, r in trials.items() if r}
        for other in ("alone", "crd", *(["mimkd"] if method in ABLATIONS else [])):
            if other in found and other != method:
                common = found[other]["by_seed"].keys() & figures["by_seed"].keys()
                if common:
                    figures[f"against_{other}"] = paired(
                        [figures["by_seed"][seed] - found[other]["by_seed"][seed] for seed in sorted(common)]
                    )
        found[method] = figures
    return found


def _figures(results: list[dict[str, Any]]) -> Figures:
    top1 = [result["student"]["top1"] for result in results]
    rows = [result["steps"] * result["lanes"] * result["lane_batch"] / result["epochs"] for result in results]
    return {
        "top1": top1,
        "mean": statistics.fmean(top1),
        "sd": statistics.stdev(top1) if len(top1) > 1 else None,
        "seconds_per_epoch": statistics.median(
            images / result["images_per_second"] for images, result in zip(rows, results, strict=True)
        ),
    }


def _published(known: dict[str, float], method: str) -> Figures:
    return {"published": known[method]} if method in known else {}


def _difference(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return ""
    error = figures["standard_error"]
    return f"{figures['mean']:+.2f}" + (f" ± {error:.2f}" if error is not None else "")
