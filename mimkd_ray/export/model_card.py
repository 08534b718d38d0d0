"""README.md in the form of the Hugging Face hub: front matter with the measured top-1, and how to use and remake it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import yaml

from mimkd_ray.config import Config, ExportConfig
from mimkd_ray.config.form.json_form import to_dict
from mimkd_ray.export.examine import top1_text
from mimkd_ray.export.model_folder import is_of_timm, is_read_by_timm
from mimkd_ray.models.weights_file import FOLDER
from mimkd_ray.secret_urls import redacted_values
from mimkd_ray.train.records.read_run import RunFacts

CARD, TRAINING = "README.md", "training_config.json"


def model_card(report: Mapping[str, Any], config: ExportConfig, run: RunFacts | None) -> str:
    """Return the card of an export. ``report`` is the content of export.json."""
    name = config.push_to.rpartition("/")[2] or f"{_bare(report['network'])}-{_data_name(config.data.root)}"
    parts = [
        f"# {name}",
        _origin(report, config, run),
        "## Files",
        _files(report),
        _figures(report),
        "## Use",
        _use(report, config),
        "## How it was made",
        _remake(run, config),
    ]
    return (
        f"---\n{yaml.safe_dump(_front(report, config, run, name), sort_keys=False)}---\n\n" + "\n\n".join(parts) + "\n"
    )


def without_folders(place: str) -> str:
    """Return the name of a local file or folder without the folders it is in; a URL, or a plain name, as it is."""
    kind, folder, path = place.rpartition(FOLDER)
    is_local = folder or path.startswith("/")
    return f"{kind}{folder}{path.rstrip('/').rpartition('/')[2]}" if is_local else place


def portable(config: Config) -> dict[str, Any]:
    """Return a run's config without the folders of this machine, and without credentials."""
    moved = replace(config, data=replace(config.data, store=""), run=replace(config.run, root="runs", name=""))
    found: dict[str, Any] = redacted_values(_moved(to_dict(moved)))
    return found


def _moved(value: Any) -> Any:
    """JSON with the names of local files and folders in the place of their paths."""
    if isinstance(value, Mapping):
        return {key: _moved(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_moved(item) for item in value]
    return without_folders(value) if isinstance(value, str) else value


def _front(report: Mapping[str, Any], config: ExportConfig, run: RunFacts | None, name: str) -> dict[str, Any]:
    top1, rows = _measured(report, config, run)
    data = _data_name(config.data.root)
    front: dict[str, Any] = {
        "library_name": "timm" if is_read_by_timm(report["network"]) else "mimkd-ray",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "knowledge-distillation", *(["onnx"] if "onnx" in report["files"] else [])],
    }
    if top1 is not None:
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": data, "type": data, "split": _split(config)},
            "metrics": [{"type": "accuracy", "value": round(top1, 2), "name": f"top-1 % of {rows:,} images"}],
        }
        front["model-index"] = [{"name": name, "results": [result]}]
    return front


def _measured(report: Mapping[str, Any], config: ExportConfig, run: RunFacts | None) -> tuple[float | None, int]:
    """Top-1 and the images it is of: the run's own figure if these are its last weights and its data, or what was
    measured here; None without labels, and where nothing has trained the head."""
    found, rows = report["student"]["top1"], report["images"]["compared"]
    student = run.result.get("student", {}) if run is not None and run.config.data == config.data else {}
    if found is not None and not config.weights and student.get("top1") is not None:
        return student["top1"], student["rows"]
    return found, rows


def _origin(report: Mapping[str, Any], config: ExportConfig, run: RunFacts | None) -> str:
    top1, rows = _measured(report, config, run)
    size = report["image_size"]
    text = (
        f"`{report['network']}` for {report['classes']:,} classes, {size}x{size} pixels: {report['parameters']:,} "
        f"parameters, {report['macs']:,} multiply-adds an image"
    )
    text += "." if top1 is None else f", top-1 {top1:.2f} % of {rows:,} held-out images."
    if run is None:
        return text
    teacher = run.result.get("teacher")
    if teacher:
        text += f" Distilled from `{without_folders(teacher['name'])}`"
        text += "" if teacher["top1"] is None else f" (top-1 {teacher['top1']:.2f} %)"
    elif run.config.loss.uses_teacher:
        text += f" Distilled from `{without_folders(run.config.teacher.name)}`"
    else:
        return f"{text} Trained on labels alone."
    text += " by maximising mutual information (MIMKD, arXiv 2110.15946)." if "mimkd" in run.config.loss.name else "."
    return text if run.result else f"{text} The run was stopped before its end; these are the weights of a checkpoint."


def _files(report: Mapping[str, Any]) -> str:
    rows = [
        "| file | bytes | largest logit difference | same top-1 % | top-1 % | ms at batch 1 | at 32 |",
        "|---|---|---|---|---|---|---|",
    ]
    student = [] if "model folder" in report["failed"] else [report["student"]]
    for each in (*student, *report["files"].values()):
        times = [f"{each['latency_ms'][batch]:.2f}" for batch in ("1", "32")]
        cells = [f"{each['max_logit_difference']:.2g}", f"{each['agreement']:.2f}", top1_text(each), *times]
        rows.append(f"| {each['file']} | {each['bytes']:,} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _figures(report: Mapping[str, Any]) -> str:
    count, threads = report["images"]["compared"], report["threads"]
    others = report["not_compared"].values()
    return (
        f"Every {'other ' if others else ''}file was loaded back and compared with the student on {count:,} held-out "
        f"images, of which these top-1 are; times are medians on one machine with {threads} threads. `export.json` has "
        "all figures." + "".join(f" `{each['file']}` was not compared: {each['reason']}." for each in others)
    )


def _use(report: Mapping[str, Any], config: ExportConfig) -> str:
    takes = report["input"]
    lines = [f"Every file takes `images`, float32 (batch, 3, {report['image_size']}, {report['image_size']}): {takes}."]
    if not config.normalize:
        lines[0] += f" Mean {list(config.data.mean)}, standard deviation {list(config.data.std)} of values in 0..1."
    written = "model folder" not in report["failed"]
    if written:
        lines.append("Where `config.json` has `label_names`, they are the classes in the order of the logits.")
    if written and is_read_by_timm(report["network"]):
        lines.append('`timm.create_model("local-dir:FOLDER", pretrained=True)` makes the network.')
    if written and not is_of_timm(report["network"]):
        lines.append(
            f'`mimkd_ray.build_model("local-dir:FOLDER", {report["classes"]}, "published")` makes the network; '
            "`hf-hub:ORG/NAME` does it from the hub."
        )
    if "onnx" in report["files"]:
        lines.append('`onnxruntime.InferenceSession("student.onnx").run(None, {"images": images})` gives the logits.')
    if "executorch" in report["files"]:
        lines.append(
            '`executorch.runtime.Runtime.get().load_program("student.pte").load_method("forward").execute([images])` '
            "does it for one image at a time."
        )
    return "\n\n".join(lines)


def _remake(run: RunFacts | None, config: ExportConfig) -> str:
    export = ["python", "-m", "mimkd_ray", "export"]
    if run is None:
        lines = [
            shlex.join(
                [*export, "--network", without_folders(config.network), "--weights", "FILE", "--data.root", "DIR"]
            )
        ]
    else:
        job = "jobs/cifar100.py" if config.network.startswith("cifar/") else "jobs/imagenet.py"
        root = run.config.data.root
        data = [] if root == without_folders(root) else ["--data.root", "DIR"]
        lines = [
            shlex.join(["python", job, "--config", TRAINING, *data]),
            f"{shlex.join([*export, 'RUN'])}    # the directory that its last line names",
        ]
    return "\n".join(["```sh", *lines, "```"])


def _split(config: ExportConfig) -> str:
    return "holdout" if config.data.holdout else config.data.val_split.replace("auto", "validation")


def _data_name(root: str) -> str:
    return root.rstrip("/").rpartition("/")[2] or "images"


def _bare(network: str) -> str:
    return network.rpartition("/")[2].rpartition(":")[2]
