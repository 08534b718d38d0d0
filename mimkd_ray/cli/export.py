"""`python -m mimkd_ray export`: write a trained student for other programs, and compare every file with it.

Exit status: 0 all files are done, 1 a file is not (one line says why), 2 bad input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mimkd_ray import console, storage
from mimkd_ray.cli import command_line
from mimkd_ray.config import DataConfig, ExportConfig
from mimkd_ray.errors import UserError, count
from mimkd_ray.export.examine import top1_text
from mimkd_ray.export.export_student import export_student
from mimkd_ray.models.weights_file import FOLDER, HUB, WEB
from mimkd_ray.places import check_lasting, is_function
from mimkd_ray.recipes import cifar100, r34_r18
from mimkd_ray.train.records.read_run import RunFacts, read_run


def main(argv: Sequence[str], program: str) -> int:
    """Export what a command line names; return the exit status. Raises UserError."""
    arguments = list(argv)
    run = None
    if arguments and not arguments[0].startswith("-"):
        run = read_run(storage.absolute(arguments.pop(0))).single()
    config = command_line.from_flags(
        ExportConfig,
        arguments,
        prog=f"{program} [RUN]",
        description="Write a trained student as ONNX, .pt2, int8 and a model of the Hugging Face hub. RUN is the "
        "directory or URL of a run; without one --network and --weights name the student, and --data.root images.",
        default=ExportConfig(data=_images(run, arguments)),
    )
    return 0 if config is None else export(config, run, program)


def export(config: ExportConfig, run: RunFacts | None, program: str) -> int:
    """Export, print the table and what failed; return the exit status."""
    config = _whole(config, run)
    with console.phase(f"exporting {config.network}: reading it and its images"):
        report = export_student(config, run)
    print("\n".join(_table(report)))
    for line in report["warnings"]:
        command_line.fail(f"{program}: {line}", 0)
    for name, reason in report["failed"].items():
        command_line.fail(f"{program}: {name}: {reason}; it is not written", 1)
    print(f"exported to {config.out}", flush=True)
    if config.push_to and report["failed"]:
        command_line.fail(f"{program}: nothing was pushed to {config.push_to}, as not all files are done", 1)
    elif config.push_to:
        print(f"pushed to {config.push_to}", flush=True)
    return 1 if report["failed"] else 0


def _images(run: RunFacts | None, arguments: Sequence[str]) -> DataConfig:
    """The images that are taken unless flags say otherwise."""
    if run is not None:
        return run.config.data
    text = " ".join(arguments).replace("=", " ")
    cifar = "--network cifar/" in text
    return cifar100("cifar100", "resnet8", "resnet8").data if cifar else r34_r18().data


def _whole(config: ExportConfig, run: RunFacts | None) -> ExportConfig:
    """The config with its network, and with its places as they are for every process. Raises UserError for a student
    that nothing names."""
    network = config.network or (run.config.student.name if run is not None else "")
    if run is None and not (network and config.weights):
        raise UserError(
            "nothing to export: give the directory of a run, or --network NAME --weights FILE --data.root DIR"
        )
    weights = config.weights
    if weights and not weights.startswith((HUB, FOLDER, *WEB)) and weights not in ("random", "published"):
        weights = storage.absolute(weights)
    out = config.out or (storage.join(run.place, "export") if run else "export")
    check_lasting("--out", storage.absolute(out))
    root = config.data.root
    return replace(
        config,
        network=network,
        weights=weights,
        out=storage.absolute(out) if config.out else out,
        data=replace(config.data, root=root if root == "digits" or is_function(root) else storage.absolute(root)),
    )


def _table(report: Mapping[str, Any]) -> list[str]:
    """The lines that are printed."""
    lines = [
        f"{report['network']}: {report['parameters']:,} parameters, {report['macs']:,} multiply-adds an "
        f"image; compared on {report['images']['compared']:,} held-out images, "
        f"timed with {count(report['threads'], 'thread')}",
        f"{'file':20} {'MB':>8} {'logits +-':>10} {'same top-1':>11} {'top-1 %':>8} {'ms at 1':>8} {'at 32':>8}",
    ]
    for each in (report["student"], *report["files"].values()):
        times = each["latency_ms"]
        lines.append(
            f"{each['file']:20} {each['bytes'] / 1e6:8.2f} {each['max_logit_difference']:10.2g} "
            f"{each['agreement']:9.2f} % {top1_text(each):>8} {times['1']:8.2f} {times['32']:8.2f}"
        )
    others = {name: value for name, value in report["int8"].items() if name != "kept"}
    if others:
        told = [
            f"{name} {value}"
            if isinstance(value, str)
            else f"{name} top-1 {top1_text(value)} %, "
            f"{value['bytes'] / 1e6:.2f} MB, {value['latency_ms']['1']:.2f} ms at batch 1"
            for name, value in others.items()
        ]
        lines.append(f"int8: {'; '.join(told)}; kept: {report['int8'].get('kept', 'none')}")
    return lines
