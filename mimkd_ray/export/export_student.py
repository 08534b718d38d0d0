"""An export from beginning to end: the student is found, and every file written, loaded back, compared, described."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from mimkd_ray import console, local_files, storage
from mimkd_ray.config import ExportConfig
from mimkd_ray.data.loading.cpu_quota import usable_cores
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.errors import UserError
from mimkd_ray.export import coreml_file, hub
from mimkd_ray.export.deployed import Deployed
from mimkd_ray.export.examine import (
    Comparison,
    Figures,
    best_int8,
    bytes_at,
    fault_at_float32,
    fault_of_int8,
    multiply_adds,
    no_better_than_chance,
    too_little_of_int8,
)
from mimkd_ray.export.executorch_file import executorch_runner, write_executorch
from mimkd_ray.export.images import Images, read_images
from mimkd_ray.export.int8 import has_pt2e, quantize_onnx, quantize_pt2
from mimkd_ray.export.model_card import CARD, TRAINING, model_card, portable, without_folders
from mimkd_ray.export.model_folder import CONFIG, WEIGHTS, read_model_folder, write_model_folder
from mimkd_ray.export.onnx_file import onnx_runner, write_onnx
from mimkd_ray.export.pt2_file import pt2_runner, write_pt2
from mimkd_ray.export.runners import Runner, quiet
from mimkd_ray.models.build_model import build_model
from mimkd_ray.models.outputs import describe
from mimkd_ray.models.weights_file import cause, shown
from mimkd_ray.run_lock import held
from mimkd_ray.secret_urls import scrubbed
from mimkd_ray.taps.dry_checks import check_logits
from mimkd_ray.train.held_out.accuracy import held_out_name
from mimkd_ray.train.networks.teacher_head import trains_head
from mimkd_ray.train.records.read_run import RunFacts, student_of_run
from mimkd_ray.train.records.run_dir import write_json
from mimkd_ray.train.records.run_files import OF_AN_EXPORT, kind_of
from mimkd_ray.versions import versions

REPORT = "export.json"
FILES = {"onnx": "student.onnx", "pt2": "student.pt2", "executorch": "student.pte"}
INT8 = "student_int8"
COREML = "student.mlpackage"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")

Writer = Callable[[Deployed, torch.Tensor, Path], None]
"""Writes a network, traced with images like these, to a file."""


class NotWrittenError(Exception):
    """A file is not as it should be. The message says what is wrong with it."""


@dataclass
class Export:
    """What one export does, and what it has found so far."""

    config: ExportConfig
    network: Deployed
    compare: Comparison
    calibration: Images
    folder: Path
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    not_compared: dict[str, dict[str, Any]] = field(default_factory=dict)
    int8: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    student: Figures | None = None
    """Of model.safetensors as it was loaded back."""

    @property
    def example(self) -> torch.Tensor:
        """Two images for tracing. They are no real ones: .pt2 files keep them."""
        side = self.config.data.image_size
        return torch.zeros(2, 3, side, side)

    @property
    def threads(self) -> int:
        """Threads of ONNX Runtime, as of torch."""
        return self.compare.threads

    def attempt(self, name: str, work: Callable[[], None], *files: str) -> None:
        """Do the work for one format, which writes these files. What goes wrong is noted, none of the files stays, and
        the other formats go on."""
        try:
            with console.phase(f"writing and comparing {name}"):
                work()
            return
        except NotWrittenError as error:
            self.failed[name] = str(error)
        except Exception as error:  # exporters have many; the innermost says which operation it was
            reason = " ".join(scrubbed(cause(error)).split())[:300]
            self.failed[name] = (
                f"{without_folders(self.config.network)} cannot be exported: {type(error).__name__}: {reason}"
            )
        for file in files:
            (self.folder / file).unlink(missing_ok=True)

    def model_folder(self, model: torch.nn.Module, classes: Sequence[str], num_classes: int) -> None:
        """Write the files of timm and the hub, load them back, and keep them if their logits are the student's."""
        data = self.config.data
        write_model_folder(model, data, classes, num_classes, self.folder)
        again = read_model_folder(self.folder, describe(model), num_classes, data.image_size)
        loaded = Deployed(again, data.mean, data.std, self.config.normalize)
        self.student = self.checked(loaded, self.folder / WEIGHTS)

    def float32(self, name: str, write: Writer, load: Callable[[Path], Runner]) -> None:
        """Write a file, load it back, and keep it if its logits are the student's."""
        path = self.folder / FILES[name]
        write(self.network, self.example, path)
        self.done[name] = {"file": path.name, **self.checked(load(path), path).as_json()}

    def checked(self, run: Runner, path: Path) -> Figures:
        """Return the figures of a file at float32. Raises NotWrittenError where its logits are not the student's."""
        figures = self.compare.examine(run, path)
        if fault := fault_at_float32(figures):
            raise NotWrittenError(fault)
        return figures

    def coreml(self) -> None:
        """Write the Core ML package, and compare it where Core ML is."""
        path = self.folder / COREML
        coreml_file.write_coreml(self.network, self.example, path)
        if coreml_file.RUNS_HERE:
            self.done["coreml"] = {"file": COREML, **self.checked(coreml_file.coreml_runner(path), path).as_json()}
            return
        size, reason = bytes_at(path), "Core ML runs on macOS alone"
        self.not_compared["coreml"] = {"file": COREML, "bytes": size, "reason": reason}
        self.warnings.append(f"{COREML} ({size / 1e6:.2f} MB) is converted but not compared: {reason}")

    def quantize(self, student: Figures) -> None:
        """Write int8 by all means that are installed, keep the best, and note the figures of all."""
        source = self.folder / FILES["onnx"]
        made: dict[str, Figures] = {}
        with local_files.scratch("int8") as place:
            tried = {
                "onnxruntime": Path(place) / "8_bits.onnx",
                "onnxruntime_narrow": Path(place) / "7_bits.onnx",
                "pt2e": Path(place) / "8_bits.pt2",
            }
            for name, path in tried.items():
                if has_pt2e() if name == "pt2e" else source.exists():
                    self.attempt(f"int8 by {name}", partial(self._quantized, made, name, source, path))
            self.int8 = {name: figures.as_json() for name, figures in made.items()}
            if not has_pt2e():
                self.int8["pt2e"] = "not tried: torchao is not installed"
            if not made:
                raise NotWrittenError("no quantisation worked")
            for name in tried.keys() - made.keys():  # another one worked: nothing is missing
                if reason := self.failed.pop(f"int8 by {name}", ""):
                    self.int8[name] = f"not made: {reason}"
            best = best_int8(made, student.right - self.config.int8_drop)
            if fault := fault_of_int8(made[best], student, self.config.int8_drop):
                raise NotWrittenError(fault)
            kept = self.folder / f"{INT8}{tried[best].suffix}"
            shutil.move(tried[best], kept)
        self.int8["kept"] = best
        float32_ms = min(each["latency_ms"]["1"] for each in (student.as_json(), *self.done.values()))
        if little := too_little_of_int8(made[best], student, float32_ms):
            self.warnings.append(f"{kept.name} {little}")
        self.done["int8"] = {"file": kept.name, **made[best].as_json()}

    def _quantized(self, made: dict[str, Figures], name: str, source: Path, path: Path) -> None:
        batches = list(self.calibration.batches(self.network))
        if name == "pt2e":
            quantize_pt2(self.network, self.example, batches, path)
            run = pt2_runner(path)
        else:
            quantize_onnx(source, batches, path, narrow=name == "onnxruntime_narrow")
            run = onnx_runner(path, self.threads)
        made[name] = self.compare.examine(run, path)


def check_packages(config: ExportConfig) -> None:
    """Raise UserError for a package that the export needs and that is not installed."""
    by_extra = {
        "export": PACKAGES if {"onnx", "int8"} & set(config.formats) else (),
        "coreml": ("coremltools",) if "coreml" in config.formats else (),
        "executorch": ("executorch",) if "executorch" in config.formats else (),
    }
    for extra, needed in by_extra.items():
        if missing := [name for name in needed if not _installed(name)]:
            verb = "is" if len(missing) == 1 else "are"
            raise UserError(
                f"--formats {' '.join(config.formats)} needs {' and '.join(missing)}, which {verb} not installed: pip "
                f"install mimkd-ray[{extra}], or leave it out with --formats pt2"
            )
    if config.push_to:
        hub.check_client(config.push_to)


def _installed(name: str) -> bool:
    try:
        with quiet():  # coremltools says what else is not installed
            import_module(name)
    except ImportError:
        return False
    return True


def export_student(config: ExportConfig, run: RunFacts | None) -> dict[str, Any]:
    """Export as ``config`` says, whose ``network`` is set; return what export.json says.

    Files that did not pass are not among the results: "failed" says why. Raises UserError for bad input.
    """
    check_packages(config)
    _check_folder(config.out)
    data = open_data(config.data)
    model, weights = _load(config, run, data.num_classes)
    network = Deployed(model, config.data.mean, config.data.std, config.normalize)
    threads = config.threads or usable_cores()
    torch.set_num_threads(threads)
    images = read_images(data.val, config.data, config.images, held_out_name(config.data))
    if not head_learns(config, run):
        images = replace(images, labels_N=torch.full_like(images.labels_N, -1))  # they say nothing of its predictions
    compare = Comparison.of(network, images, threads)
    calibration = read_images(data.train, config.data, config.calibration, f"the training set of {config.data.root}")
    with held(config.out, otherwise="--out"), local_files.scratch("export") as place:
        folder = Path(place)
        export = Export(config, network, compare, calibration, folder)
        student = _write_model(export, model, data.classes, data.num_classes)
        if chance := no_better_than_chance(student, data.num_classes):
            export.warnings.append(chance)
        _write_formats(export, student)
        report = {
            "network": without_folders(describe(model)),
            "weights": without_folders(shown(weights)),
            "classes": data.num_classes,
            "image_size": config.data.image_size,
            "input": "images of values in 0..1" if config.normalize else "normalised images",
            "parameters": sum(p.numel() for p in model.parameters()),
            "macs": multiply_adds(network, config.data.image_size),
            "images": {"compared": len(images.labels_N), "calibration": len(calibration.labels_N)},
            "student": {"file": WEIGHTS if export.student else "(not written)", **student.as_json()},
            "files": export.done,
            "int8": export.int8,
            "not_compared": export.not_compared,
            "warnings": export.warnings,
            "failed": export.failed,
            "threads": threads,
            "versions": versions((*PACKAGES, "torchao", "timm")),
        }
        write_json(str(folder / REPORT), report)
        if run is not None:
            (folder / TRAINING).write_text(json.dumps(portable(run.config), indent=2) + "\n")
        (folder / CARD).write_text(model_card(report, config, run))
        _publish(folder, config.out)
        if config.push_to and not export.failed:
            hub.push(folder, config.push_to)
    return report


def _check_folder(out: str) -> None:
    """Raise UserError for a folder with files of somebody else's that an export would replace or remove."""
    if kind := kind_of(out):
        raise UserError(
            f"{out} is the directory of a {kind}, whose {CONFIG} an export would replace: give another --out"
        )
    found = [name for name in OF_AN_EXPORT if storage.exists(storage.join(out, name))]
    if found and REPORT not in found:
        raise UserError(
            f"{out} has {', '.join(found)} and no {REPORT}, so that these are of no export, which would replace or "
            "remove them: give an empty folder with --out, or move them"
        )


def head_learns(config: ExportConfig, run: RunFacts | None) -> bool:
    """Say whether the student predicts anything: labels or logits have trained its head."""
    if run is None or config.weights:
        return True
    learns: bool = run.result.get("student", {}).get("head_learns", trains_head(run.config, None))
    return learns


def _load(config: ExportConfig, run: RunFacts | None, num_classes: int) -> tuple[torch.nn.Module, str]:
    if run is not None and not config.weights:
        model, weights = student_of_run(run.place, config.network, num_classes, run.config.data.image_size)
    else:
        model, weights = (
            build_model(config.network, num_classes, config.weights, config.data.image_size),
            config.weights,
        )
    check_logits(model, config.data.image_size, num_classes)
    return model, weights


def _write_model(export: Export, model: torch.nn.Module, classes: Sequence[str], num_classes: int) -> Figures:
    """Write the model folder; return the student's figures, those of the folder where that is as it should be."""
    export.attempt("model folder", lambda: export.model_folder(model, classes, num_classes), WEIGHTS, CONFIG)
    size = sum(value.nbytes for value in model.state_dict().values())
    return export.student or export.compare.student(size)


def _write_formats(export: Export, student: Figures) -> None:
    formats = export.config.formats
    float32: dict[str, tuple[Writer, Callable[[Path], Runner]]] = {
        "onnx": (write_onnx, partial(onnx_runner, threads=export.threads)),
        "pt2": (write_pt2, pt2_runner),
        "executorch": (write_executorch, executorch_runner),
    }
    for name, (write, load) in float32.items():
        if name in formats or (name == "onnx" and "int8" in formats):
            export.attempt(name, partial(export.float32, name, write, load), FILES[name])
    if "coreml" in formats:
        export.attempt("coreml", export.coreml, *(name for name in OF_AN_EXPORT if name.startswith(COREML)))
    if "int8" in formats:
        export.attempt("int8", lambda: export.quantize(student))


def _publish(folder: Path, out: str) -> None:
    """Bring the files to their place, and remove those of an earlier export that this one did not write."""
    for name in sorted(OF_AN_EXPORT, key=lambda name: name != REPORT):  # first what says that the others are ours
        if (folder / name).exists():
            storage.upload(folder / name, storage.join(out, name))
        else:
            storage.remove_file(storage.join(out, name))
