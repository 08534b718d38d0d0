"""Size, multiply-adds, latency and top-1 of exported students: float32 in torch and ONNX Runtime, and int8.

Every student goes through `mimkd-ray export` and is then timed again, the files in turn, so that a busy machine is slow
for all of them alike; ratios are medians over rounds. Students without weights on the command line are random: their
top-1 says nothing and is left out.

python benchmarks/export_table.py --cifar DIR --cifar-weights FILE --imagenet DIR --imagenet-weights FILE --readme
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from report import finish, parser, refresh

from mimkd_ray.config import ExportConfig
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.export.deployed import Deployed
from mimkd_ray.export.export_student import export_student
from mimkd_ray.export.images import read_images
from mimkd_ray.export.onnx_file import onnx_runner
from mimkd_ray.export.pt2_file import pt2_runner
from mimkd_ray.export.runners import Runner, quiet
from mimkd_ray.models.build_model import build_model
from mimkd_ray.recipes import cifar100, r34_r18

README = Path(__file__).parent / "README.md"
ROUNDS = 9
Times = dict[str, dict[int, float]]


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--cifar", required=True, metavar="DIR", help="CIFAR-100")
    options.add_argument("--cifar-weights", required=True, metavar="FILE", help="of cifar/shufflenet_v2")
    options.add_argument("--imagenet", required=True, metavar="DIR", help="images of ImageNet, in one split `train`")
    options.add_argument("--imagenet-weights", required=True, metavar="FILE", help="of torchvision's mobilenet_v2")
    options.add_argument("--images", type=int, default=2000, help="held-out images of a comparison")
    options.add_argument("--calibration", type=int, default=256, help="training images of a calibration")
    options.add_argument("--readme", action="store_true", help="put the table into benchmarks/README.md")
    args = options.parse_args()
    cifar = replace(cifar100("cifar100", "resnet8", "resnet8").data, root=args.cifar, loader_workers=0, store_gb=0)
    imagenet = replace(
        r34_r18().data, root=args.imagenet, val_split="train", num_classes=1000, loader_workers=0, store_gb=0
    )
    students = {
        "cifar/shufflenet_v2": (cifar, args.cifar_weights),
        "mobilenet_v2": (imagenet, args.imagenet_weights),
        "shufflenet_v2_x0_5": (imagenet, ""),
        "resnet18": (imagenet, ""),
    }
    figures: dict[str, float] = {}
    targets: dict[str, Any] = {}
    lines = [
        "| student | million MACs | MB, float32 | int8 | ms at batch 1, torch | ONNX | int8 "
        "| at 32, torch | ONNX | int8 | top-1 %, float32 | int8 |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (data, weights) in students.items():
        trained = bool(weights)
        config = ExportConfig(
            network=name,
            weights=weights or "random",
            images=args.images if trained else 16,
            calibration=args.calibration if trained else 8,
            int8_drop=1 if trained else 100,
            threads=args.threads,
            data=data,
        )
        with tempfile.TemporaryDirectory(prefix="export-table-") as folder:
            torch.manual_seed(0)
            report = export_student(replace(config, out=folder), None)
            times, ratio = timed(report, config, Path(folder))
        own = of_student(report, times, ratio, trained)
        figures |= {f"{name}/{key}": value for key, value in own.items()}
        targets |= {f"{name}/{key}": limit for key, limit in limits(trained).items()}
        lines.append(line(name, own))
        print("\n".join(lines), flush=True)
        print(report["int8"], report["failed"], flush=True)
    if args.readme:
        refresh(README, "export", "\n".join(lines))
    return finish("export", figures, targets, args.json)


def timed(report: Mapping[str, Any], config: ExportConfig, folder: Path) -> tuple[Times, float]:
    """Time student and files in turn; return milliseconds by kind and batch, and those of ONNX at float32 over those of
    int8 at batch 1."""
    threads = report["threads"]
    model = build_model(config.network, report["classes"], f"local-dir:{folder}", config.data.image_size)
    network = Deployed(model, config.data.mean, config.data.std, False)
    int8 = folder / report["files"]["int8"]["file"]
    runners: dict[str, Runner] = {
        "torch": network,
        "onnx": onnx_runner(folder / "student.onnx", threads),
        "int8": onnx_runner(int8, threads) if int8.suffix == ".onnx" else pt2_runner(int8),
    }
    images = network.inputs(read_images(open_data(config.data).val, config.data, 32, "images").pixels_NCHW)
    found: Times = {kind: {} for kind in runners}
    ratio = 0.0
    for batch in (1, 32):
        rounds: dict[str, list[float]] = {kind: [] for kind in runners}
        with torch.inference_mode(), quiet():
            for number in range(ROUNDS + 2):
                for kind, run in runners.items():
                    seconds = per_call(run, images[:batch].contiguous(), 5 if batch == 1 else 1)
                    if number >= 2:  # the first ones warm up
                        rounds[kind].append(seconds)
        for kind, values in rounds.items():
            found[kind][batch] = 1000 * statistics.median(values)
        if batch == 1:
            ratio = statistics.median(a / b for a, b in zip(rounds["onnx"], rounds["int8"], strict=True))
    return found, ratio


def per_call(run: Runner, images: torch.Tensor, calls: int) -> float:
    """Seconds of the median call."""
    seconds = []
    for _ in range(calls):
        began = time.perf_counter()
        run(images)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def of_student(report: Mapping[str, Any], times: Times, ratio: float, trained: bool) -> dict[str, float]:
    """The figures of one student."""
    files = report["files"]
    own = {
        "parameters": report["parameters"],
        "macs": report["macs"],
        "bytes_onnx": files["onnx"]["bytes"],
        "bytes_int8": files["int8"]["bytes"],
        "onnx_over_int8_bytes": files["onnx"]["bytes"] / files["int8"]["bytes"],
        "onnx_over_int8_ms_at_1": ratio,
        **{f"{kind}_ms_at_{batch}": ms for kind, found in times.items() for batch, ms in found.items()},
        **{f"{kind}_logit_difference": files[kind]["max_logit_difference"] for kind in ("onnx", "pt2")},
        **{f"{kind}_same_top1": files[kind]["agreement"] for kind in ("onnx", "pt2")},
    }
    if trained:
        own |= {"top1": report["student"]["top1"], "images": report["images"]["compared"]}
        tried = {name: value for name, value in report["int8"].items() if isinstance(value, dict)}  # else: why not
        own |= {f"{name}_top1": value["top1"] for name, value in tried.items()}
        own |= {f"{name}_bytes": value["bytes"] for name, value in tried.items()}
        own["int8_top1"] = files["int8"]["top1"]
        own["int8_lost"] = report["student"]["top1"] - files["int8"]["top1"]
    return own


def limits(trained: bool) -> dict[str, tuple[str, float]]:
    """What is wanted of a student."""
    wanted = {f"{kind}_logit_difference": ("<=", 1e-3) for kind in ("onnx", "pt2")}
    wanted |= {f"{kind}_same_top1": (">=", 100.0) for kind in ("onnx", "pt2")}
    wanted |= {"onnx_over_int8_bytes": (">=", 3.0), "onnx_over_int8_ms_at_1": (">=", 1.0)}
    return wanted | ({"int8_lost": ("<=", 1.0)} if trained else {})


def line(name: str, own: Mapping[str, float]) -> str:
    """The student's line of the table."""
    milliseconds = [f"{own[f'{kind}_ms_at_{batch}']:.1f}" for batch in (1, 32) for kind in ("torch", "onnx", "int8")]
    tops = [f"{own['top1']:.1f}", f"{own['int8_top1']:.1f}"] if "top1" in own else ["random weights", ""]
    sizes = [f"{own['macs'] / 1e6:.1f}", f"{own['bytes_onnx'] / 1e6:.2f}", f"{own['bytes_int8'] / 1e6:.2f}"]
    return f"| {' | '.join([name, *sizes, *milliseconds, *tops])} |"


if __name__ == "__main__":
    sys.exit(main())
