"""Results of the headline study: means, paired differences, curves; as a table and as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headline_runs import Pack
from report import machine, table, versions

from mimkd_ray.json_files import read_json
from mimkd_ray.train.records.run_dir import read_metrics

AGAINST = ("alone", "kd", "queue")


@dataclass(frozen=True)
class Study:
    """Finished runs by arm and seed: {arm: {seed: facts}}."""

    name: str
    runs: dict[str, dict[int, dict[str, Any]]]

    @staticmethod
    def read(packs: Iterable[Pack]) -> Study:
        """Read the runs that are finished."""
        runs: dict[str, dict[int, dict[str, Any]]] = {}
        name = ""
        for pack in packs:
            name = pack.name
            for arm in pack.losses:
                result = read_json(str(pack.folder(arm) / "result.json"))
                if result is not None:
                    runs.setdefault(arm, {})[pack.base.train.seed] = _facts(pack, arm, result)
        return Study(name, runs)

    def top1(self, arm: str, key: str) -> dict[int, float]:
        """Return the top-1 by seed: ``key`` is "test" or "held_out"."""
        return {seed: facts[key] for seed, facts in self.runs.get(arm, {}).items() if facts.get(key) is not None}

    def difference(self, arm: str, other: str, key: str) -> str:
        """Return the mean difference over the seeds that both have, with its standard error."""
        own, their = self.top1(arm, key), self.top1(other, key)
        both = [own[seed] - their[seed] for seed in sorted(own.keys() & their.keys())]
        if arm == other or not both:
            return ""
        if len(both) == 1:
            return f"{both[0]:+.2f}"
        return f"{statistics.mean(both):+.2f} ± {statistics.stdev(both) / len(both) ** 0.5:.2f}"

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Return header and rows of the table, in the order of the arms."""
        key = (
            "test"
            if any(f.get("test") is not None for runs in self.runs.values() for f in runs.values())
            else "held_out"
        )
        header = ["arm", "seeds", "held-out %", "test %", *(f"- {other}" for other in AGAINST), "nats / ceiling"]
        found = []
        for arm, runs in self.runs.items():
            held_out, test = self.top1(arm, "held_out"), self.top1(arm, "test")
            found.append(
                [
                    arm,
                    str(len(runs)),
                    _spread(held_out.values()),
                    _spread(test.values()),
                    *(self.difference(arm, other, key) for other in AGAINST),
                    _nats(runs),
                ]
            )
        return header, found

    def text(self) -> str:
        """Return the table for a terminal."""
        return table(*self.rows())

    def markdown(self) -> str:
        """Return the table for a page."""
        header, rows = self.rows()
        lines = [header, ["---"] * len(header), *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def write(self, file: Path, complete: bool) -> None:
        """Write all results as JSON."""
        value = {
            "name": self.name,
            "complete": complete,
            "runs": self.runs,
            "machine": machine(),
            "versions": versions(),
        }
        file.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def _facts(pack: Pack, arm: str, result: dict[str, Any]) -> dict[str, Any]:
    """Return the facts of a run that are kept."""
    folder = pack.folder(arm)
    test = read_json(str(folder / "test.json"))
    held_out = result["student"]["top1"]
    chooses = pack.base.data.val_split == "choose" or pack.base.data.holdout > 0
    trained = read_metrics(str(folder), "train")
    curve = [
        {key: value for key, value in line.items() if isinstance(value, int | float)} | _scales(trained, line["step"])
        for line in read_metrics(str(folder), "eval")
    ]
    return {
        "held_out": held_out if chooses else None,
        "test": test["top1"] if test is not None else None if chooses else held_out,
        "pack_seconds": result["seconds"],
        "epochs": result["epochs"],
        "loss": asdict(pack.losses[arm]),
        "curve": curve,
    }


def _scales(trained: Sequence[dict[str, Any]], step: int) -> dict[str, float]:
    """Return 1 / temperature of every term, as last logged before a step."""
    before = [line for line in trained if line["step"] <= step]
    return {key: value for key, value in before[-1].items() if key.endswith("/scale")} if before else {}


def _spread(values: Iterable[float]) -> str:
    found: Sequence[float] = list(values)
    if not found:
        return ""
    return f"{statistics.mean(found):.2f}" + (f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else "")


def _nats(runs: dict[int, dict[str, Any]]) -> str:
    """Return the held-out nats of the first term at the end, with their ceiling."""
    lines = [facts["curve"][-1] for facts in runs.values() if facts["curve"]]
    names = [key.removesuffix("/nats") for key in (lines[0] if lines else {}) if key.endswith("/nats")]
    if not names:
        return ""
    nats = [line[f"{names[0]}/nats"] for line in lines if f"{names[0]}/nats" in line]
    ceilings = [line[f"{names[0]}/ceiling"] for line in lines if f"{names[0]}/ceiling" in line]
    return f"{statistics.mean(nats):.2f} / {statistics.mean(ceilings):.2f}" if nats and ceilings else ""
