"""An export from beginning to end: the student is found, and every file written, loaded back, compared, described."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from mimkd_ray import local_files, storage
from mimkd_ray.config import ExportConfig
from mimkd_ray.data.loading.cpu_quota import usable_cores
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.errors import UserError
from mimkd_ray.export import hub
from mimkd_ray.export.deployed import Deployed
from mimkd_ray.export.examine import (
    Comparison,
    Figures,
    best_int8,
    fault_at_float32,
    fault_of_int8,
    multiply_adds,
)
from mimkd_ray.export.find_student import RunFacts, load_of_run
from mimkd_ray.export.images import Images, read_images
from mimkd_ray.export.int8 import has_pt2e, quantize_onnx, quantize_pt2
from mimkd_ray.export.model_card import CARD, TRAINING, model_card, portable, without_folders
from mimkd_ray.export.model_folder import WEIGHTS, write_model_folder
from mimkd_ray.export.onnx_file import onnx_runner, write_onnx
from mimkd_ray.export.pt2_file import pt2_runner, write_pt2
from mimkd_ray.export.runners import Runner
from mimkd_ray.models.outputs import describe
from mimkd_ray.models.weights_file import cause, shown
from mimkd_ray.models.zoo import build_model
from mimkd_ray.secret_urls import scrubbed
from mimkd_ray.train.held_out.evaluate import held_out_name
from mimkd_ray.train.records.run_dir import write_json
from mimkd_ray.train.records.run_files import OF_AN_EXPORT
from mimkd_ray.versions import versions

REPORT = "export.json"
FILES = {"onnx": "student.onnx", "pt2": "student.pt2"}
INT8 = "student_int8"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


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
    int8: dict[str, Any] = field(default_factory=dict)

    @property
    def example(self) -> torch.Tensor:
        """Two images for tracing. They are no real ones: .pt2 files keep them."""
        side = self.config.data.image_size
        return torch.zeros(2, 3, side, side)

    @property
    def threads(self) -> int:
        """Threads of ONNX Runtime, as of torch."""
        return self.compare.threads

    def attempt(self, name: str, work: Callable[[], None]) -> None:
        """Do the work for one format. What goes wrong is noted, and the other formats go on."""
        try:
            work()
        except NotWrittenError as error:
            self.failed[name] = str(error)
        except Exception as error:  # exporters have many; the innermost says which operation it was
            reason = " ".join(scrubbed(cause(error)).split())[:300]
            self.failed[name] = f"{self.config.network} cannot be exported: {type(error).__name__}: {reason}"

    def float32(self, name: str, write: Callable[[Path], None], load: Callable[[Path], Runner]) -> None:
        """Write a file, load it back, and keep it if its logits are the student's."""
        path = self.folder / FILES[name]
        write(path)
        figures = self.compare.examine(load(path), path)
        if fault := fault_at_float32(figures):
            path.unlink()
            raise NotWrittenError(fault)
        self.done[name] = {"file": path.name, **figures.as_json()}

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
            best = best_int8(made, student.top1 - self.config.int8_drop)
            if fault := fault_of_int8(made[best], student, self.config.int8_drop):
                raise NotWrittenError(fault)
            kept = self.folder / f"{INT8}{tried[best].suffix}"
            shutil.move(tried[best], kept)
        self.int8["kept"] = best
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
    needed = list(PACKAGES) if {"onnx", "int8"} & set(config.formats) else []
    missing = [name for name in needed if not _installed(name)]
    if missing:
        raise UserError(
            f"--formats {' '.join(config.formats)} needs {' and '.join(missing)}, which is not installed: pip install "
            "mimkd-ray[export], or leave it out with --formats pt2"
        )
    if config.push_to:
        hub.check_client(config.push_to)


def _installed(name: str) -> bool:
    try:
        import_module(name)
    except ImportError:
        return False
    return True


def export_student(config: ExportConfig, run: RunFacts | None) -> dict[str, Any]:
    """Export as ``config`` says, whose ``network`` is set; return what export.json says.

    Files that did not pass are not among the results: "failed" says why. Raises UserError for bad input.
    """
    check_packages(config)
    data = open_data(config.data)
    model, weights = _load(config, run, data.num_classes)
    network = Deployed(model, config.data.mean, config.data.std, config.normalize)
    threads = config.threads or usable_cores()
    torch.set_num_threads(threads)
    images = read_images(data.val, config.data, config.images, held_out_name(config.data))
    compare = Comparison.of(network, images, threads)
    calibration = read_images(data.train, config.data, config.calibration, f"the training set of {config.data.root}")
    with local_files.scratch("export") as place:
        folder = Path(place)
        write_model_folder(model, config.data, data.classes, data.num_classes, folder)
        student = compare.student((folder / WEIGHTS).stat().st_size)
        export = Export(config, network, compare, calibration, folder)
        _write_formats(export, student)
        report = {
            "network": describe(model),
            "weights": without_folders(shown(weights)),
            "classes": data.num_classes,
            "image_size": config.data.image_size,
            "input": "images of values in 0..1" if config.normalize else "normalised images",
            "parameters": sum(p.numel() for p in model.parameters()),
            "macs": multiply_adds(network, config.data.image_size),
            "images": {"compared": len(images.labels_N), "calibration": len(calibration.labels_N)},
            "student": {"file": WEIGHTS, **student.as_json()},
            "files": export.done,
            "int8": export.int8,
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


def _load(config: ExportConfig, run: RunFacts | None, num_classes: int) -> tuple[torch.nn.Module, str]:
    if run is not None and not config.weights:
        return load_of_run(run, config.network, num_classes)
    return build_model(config.network, num_classes, config.weights, config.data.image_size), config.weights


def _write_formats(export: Export, student: Figures) -> None:
    example, network, formats = export.example, export.network, export.config.formats

    def onnx() -> None:
        export.float32(
            "onnx", lambda path: write_onnx(network, example, path), lambda p: onnx_runner(p, export.threads)
        )

    if "onnx" in formats or "int8" in formats:
        export.attempt("onnx", onnx)
    if "pt2" in formats:
        export.attempt("pt2", lambda: export.float32("pt2", lambda path: write_pt2(network, example, path), pt2_runner))
    if "int8" in formats:
        export.attempt("int8", lambda: export.quantize(student))


def _publish(folder: Path, out: str) -> None:
    """Bring the files to their place, and remove those of an earlier export that this one did not write."""
    for name in OF_AN_EXPORT:
        if (folder / name).exists():
            storage.upload(folder / name, storage.join(out, name))
        else:
            storage.remove_file(storage.join(out, name))
