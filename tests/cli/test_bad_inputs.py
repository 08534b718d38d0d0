"""A table of bad inputs: each ends with status 2, before anything is written, and a line that names the thing and what
to do."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bad_files
import pytest
from jobs_here import SMALL

from mimkd_ray.__main__ import main as tools
from mimkd_ray.cli import cache_teacher, command_line, prepare_data, search
from mimkd_ray.config.form.json_form import to_dict
from mimkd_ray.recipes import IMAGENET_RECIPES, demo

Case = tuple[str, Sequence[str], str]
"""Job, arguments, and a part of what is said."""

TRAIN: list[Case] = [
    ("train", arguments, said)
    for arguments, said in [
        (("nix",), "unknown recipe 'nix' (recipes: demo"),
        (("demo", "--config"), "--config needs a JSON, YAML or TOML file"),
        (("demo", "--config", "/nix.json"), "--config /nix.json: there is no such file"),
        (("demo", "--config", "/etc"), "--config /etc is a folder: give the file"),
        (("demo", "--optim.lr", "nan"), "optim.lr is nan: give a finite number"),
        (("demo", "--optim.lr", "1e308"), "optim.lr is 1e+308: give 1,000 at most"),
        (("demo", "--optim.lr", "0"), "optim.lr is 0.0: give a rate above 0"),
        (("demo", "--optim.momentum", "1"), "optim.momentum is 1.0"),
        (("demo", "--optim.momentum", "0", "--optim.nesterov", "true"), "more than 0 with nesterov"),
        (("demo", "--optim.min-lr", "1"), "optim.min_lr is 1.0"),
        (("demo", "--optim.gamma", "-1"), "gamma -1.0: give"),
        (("demo", "--optim.milestones", "-1", "3"), "optim.milestones is -1: give 0 or more"),
        (("demo", "--optim.clip-norm", "inf"), "optim.clip_norm is inf: give a finite number"),
        (("demo", "--train.epochs", "1.5"), "Error parsing --train.epochs"),
        (("demo", "--train.epochs", "0"), "train.epochs is 0: give 1 or more"),
        (("demo", "--train.epochs", "2000000000"), "train.epochs is 2,000,000,000: give 1,000,000 at most"),
        (("demo", "--train.lane-batch", "1"), "a lane needs 2 images"),
        (("demo", "--train.lane-batch", "1000000", "--data.image-size", "224"), "of one lane take 602 GB, of at most"),
        (("demo", "--train.seed", str(2**70)), f"train.seed is {2**70}: give a number from 0 to"),
        (("demo", "--train.seed", str(2**64 - 2), "--compare.seeds", "3"), "give a smaller train.seed"),
        (("demo", "--train.ema-decay", "1"), "train.ema_decay is 1.0; it must lie in [0, 1)"),
        (("demo", "--train.eval-batch", "-1"), "train.eval_batch is -1: give 0 or more"),
        (("demo", "--train.precision", "fp4"), "invalid choice 'fp4' for argument '--train.precision'"),
        (("demo", "--data.split-seed", str(2**64)), "data.split_seed is"),
        (("demo", "--data.image-size", "100000"), "data.image_size is 100,000: give 8,192 at most"),
        (("demo", "--data.num-classes", "1000000000"), "data.num_classes is 1,000,000,000: give 1,000,000 at most"),
        (("demo", "--data.mean", "nan", "0", "0"), "data.mean is nan: give a finite number"),
        (("demo", "--data.std", "0", "1", "1"), "positive deviations"),
        (("demo", "--data.window", "0"), "data.window = 0: give 'full'"),
        (("demo", "--data.max-pixels", "999999999"), "data.max_pixels = 999,999,999: give 1 to 178,956,970"),
        (("demo", "--data.loader-workers", "5000"), "data.loader_workers is 5,000: give 1,024 at most"),
        (("demo", "--data.holdout", "1"), "data.holdout = 1.0: give a share"),
        (("demo", "--data.holdout", "0.9999"), "leaves 0 to train on"),
        (("demo", "--data.subset", "99999999"), "data.subset = 99,999,999, but there are 1,347"),
        (("demo", "--data.root", ""), "data.root is empty"),
        (("demo", "--data.root", "/nix"), "data.root /nix does not exist"),
        (("demo", "--data.root", "/etc/hostname"), "holds neither Parquet files nor folders"),
        (("demo", "--data.root", "/a\udcffb"), "bytes that are not UTF-8"),
        (("demo", "--data.root", "nix://a"), "cannot open 'nix://' places"),
        (("demo", "--data.train-split", "nix"), "no training split 'nix'"),
        (("demo", "--data.pipeline", "nix"), "nix"),
        (("demo", "--data.pipeline", "builtins:dict"), "pipeline 'builtins:dict': called with 8, it raised TypeError"),
        (("demo", "--data.pipeline", "../x:y"), "pipeline '../x:y': cannot import '../x'"),
        (("demo", "--data.pipeline", "imagenet", "--data.resident", "on"), "pass --data.resident off"),
        (("demo", "--student.name", "resnet999"), "unknown model 'resnet999'"),
        (("demo", "--student.name", "../x:y"), "model '../x:y': cannot import '../x'"),
        (("demo", "--student.name", "builtins:dict"), "model 'builtins:dict': called with num_classes=10, but"),
        (("demo", "--student.name", "torch.nn:Module"), "model 'torch.nn:Module': called with num_classes=10"),
        (("demo", "--student.weights", "published"), "no published weights for cifar/resnet8"),
        (("demo", "--student.weights", "/nix.pth"), "there is no weights file /nix.pth"),
        (("demo", "--teacher.name", ""), "unknown model ''"),
        (("demo", "--teacher.tolerance", "-5"), "teacher.tolerance is -5.0: give 0 or more"),
        (("demo", "--teacher.expect-top1", "101"), "teacher.expect_top1 is 101.0: give 100 at most"),
        (("demo", "--teacher.lr", "-1"), "teacher.lr is -1.0: give 0 or more"),
        (("demo", "--loss.name", "mimkd", "mimkd"), "name each method once"),
        (("demo", "--loss.kd-temperature", "0"), "loss.kd_temperature is 0.0"),
        (("demo", "--loss.feature-pairs", "nix:stage3"), "layer 'nix' not found in cifar/resnet8"),
        (("demo", "--loss.feature-pairs", "stage3:stage3:1e308"), "tap pair 'stage3:stage3:1e308' is not"),
        (("demo", "--loss.queue", "99999999"), "loss.queue is 99999999"),
        (("demo", "--loss.critic.width", "1000000"), "loss.critic.width is 1,000,000: give 65,536 at most"),
        (("demo", "--loss.critic.min-temperature", "1"), "0 < min_temperature <= temperature is needed"),
        (("demo", "--mix.mixup-alpha", "-1"), "mix.mixup_alpha is -1.0: give 0 or more"),
        (("demo", "--launch.workers", "1..99999999"), "train.lanes 2: a worker needs a lane"),
        (("demo", "--launch.workers", "two"), "launch.workers is 'two': give a number, or a range"),
        (("demo", "--launch.wait-minutes", "nan"), "launch.wait_minutes is nan: give a finite number"),
        (("demo", "--launch.max-preemptions", "-2"), "launch.max_preemptions is -2"),
        (("demo", "--run.name", "a/b"), "run.name 'a/b' has a slash"),
        (("demo", "--run.name", "x" * 300), "has 300 bytes, of at most 200"),
        (("demo", "--run.root", "/etc/hostname"), "cannot create /etc/hostname/small/lock.json: Not a directory"),
        (
            ("demo", "--run.root", "/etc", "--run.name", "hostname"),
            "cannot create /etc/hostname/lock.json: File exists",
        ),
        (("demo", "--run.root", "/proc/x"), "cannot create /proc/x/small/lock.json"),
        (("demo", "--run.checkpoint-minutes", "nan"), "run.checkpoint_minutes is nan: give a finite number"),
        (("demo", "--run.keep-checkpoints", "0"), "run.keep_checkpoints is 0: give 1 or more"),
        (("demo", "--cache.logits", "top99", "--data.views", "2", "--cache.root", "/nix"), "there are 10 classes"),
        (("demo", "--cache.root", "/etc/hostname", "--data.views", "2"), "/etc/hostname"),
        (("demo", "--cache.codecs", "stage3=zip"), "codec 'zip' cannot be read: give"),
        (("demo", "--loss.name", "kd", "--loss.rival-weight", "0", "--loss.ce-weight", "0"), "would learn nothing"),
        (("demo", "--compare.seeds", "-1"), "compare.seeds is -1: give 0 or more"),
    ]
]
CONFIG: list[Case] = [
    ("config", (text,), said)
    for text, said in [
        ("{", "is not JSON: Expecting property name"),
        ("[" * 100_000, "is not JSON: maximum recursion depth"),
        ("[]", "is JSON of a list, not of sections and fields"),
        ('{"loss": 3}', "loss is 3: give an object with the section's fields"),
        ('{"loss": {"critic": null}}', "loss.critic is None: give an object"),
        ('{"recipe": ".."}', "recipe '..' names another folder"),
        ('{"train": {"epochs": 1.5}}', "train.epochs is 1.5: give a whole number"),
        ('{"train": {"epochs": true}}', "train.epochs is True: give a whole number"),
        ('{"train": {"lane_batch": "64"}}', "train.lane_batch is '64': give a whole number"),
        ('{"optim": {"lr": "0.1"}}', "optim.lr is '0.1': give a number"),
        ('{"optim": {"lr": NaN}}', "optim.lr is nan: give a finite number"),
        ('{"optim": {"milestones": [1.5]}}', "optim.milestones is [1.5]: give a list, each of them a whole number"),
        ('{"data": {"mean": [1, 2]}}', "data.mean is [1, 2]: give a list, each of them a number, 3 in all"),
        ('{"loss": {"name": "mimkd"}}', "loss.name is 'mimkd': give a list, each of them one of mimkd, kd"),
        ('{"loss": {"bound": "nce"}}', "loss.bound is 'nce': give one of"),
        ('{"run": {"overwrite": "no"}}', "run.overwrite is 'no': give true or false"),
    ]
]
OTHERS: list[Case] = [
    ("prepare", ("--block-rows", "0"), "--block-rows is 0: give 1 or more"),
    ("prepare", ("--shard-rows", "100"), "no multiple of --block-rows 256; 256 is"),
    ("prepare", ("--quality", "100"), "--quality 100: JPEG quality goes from 1 to 95"),
    ("prepare", ("--split", "../x"), "--split '../x' has a slash"),
    ("prepare", ("--workers", "-2"), "--workers -2: give 1 or more"),
    ("prepare", ("--source", "/nix"), "--source /nix does not exist"),
    ("prepare", ("--target", "/etc/hostname"), "cannot create /etc/hostname/"),
    ("search", ("--search.space", "nix"), "search.space 'nix' is unknown"),
    ("search", ("--search.trials", "0"), "the search would never end; give one"),
    ("search", ("--search.hours", "nan"), "search.hours is nan: give a finite number"),
    ("search", ("--search.gpu-hours", "1e300"), "search.gpu_hours is 1e+300"),
    ("search", ("--search.holdout", "0"), "pass --search.holdout 0.1"),
    ("search", ("--search.reduction", "1"), "search.reduction is 1: give 2 or more"),
    ("search", ("--search.seed", str(2**70)), "search.seed is"),
    ("search", ("--search.pack", "100000"), "search.pack is 100,000: give 1,024 at most"),
    ("search", ("--student.weights", "/nix.pth"), "there is no weights file /nix.pth"),
    ("cache", ("ls", "--cache.root", "/nix"), "--cache.root '/nix' does not exist"),
    ("cache", ("ls", "--cache.root", "/etc/hostname"), "--cache.root '/etc/hostname' is a file; give the folder"),
    ("cache", ("gc", "--cache.root", "/etc", "--hours", "nan"), "hours is nan: give a finite number"),
    ("cache", ("gc", "--cache.root", "/etc", "--hours", "-1"), "--hours -1: give 0 or more"),
    ("cache", ("build", "demo", "--launch.backend", "local"), "cache.root is not set"),
    ("tools", ("doctor", "--store-gb", "nan"), "--store-gb is nan: give a finite number"),
    ("tools", ("doctor", "--wait-seconds", "0"), "--wait-seconds is 0.0: give seconds above 0"),
    ("tools", ("layers", "nix"), "unknown model 'nix'"),
]
DATA: list[Case] = [
    ("data", (name,), said)
    for name, said in {
        "broken footer": "is not a readable Parquet file",
        "cut short": "is not a readable Parquet file",
        "empty": "(0 bytes) is not a readable Parquet file",
        "two labels": "several columns 'label'",
        "two images": "several columns 'image'",
        "nested images": "no column of images",
        "nested labels": "no column of labels",
        "dates": "no column of labels",
        "timestamps": "no column of labels",
        "decimals": "no column of labels",
        "fractions": "labels of type double are no class numbers",
        "label 10^12": "labels up to 1,000,000,000,000, and class numbers go up to 999,999",
        "label 2^32-1": "labels up to 4,294,967,295",
        "label 2^64-1": "labels up to 18,446,744,073,709,551,615",
        "label -5": "labels down to -5",
        "no rows": "hold no rows",
        "lists": "no column of images",
    }.items()
]
WEIGHTS: list[Case] = [
    ("weights", (name,), said)
    for name, said in {
        "NaN": "432 of 432 numbers of stem.0.weight are NaN or infinite",
        "one infinite": "27 of 432 numbers of stem.0.weight are NaN or infinite",
        "int8": "is a strided tensor of int8, and the network's is of float32",
        "sparse": "is a sparse_coo tensor",
        "meta": "is a meta tensor",
        "module": "it holds a mimkd_ray.models.cifar_blocks.StagedNet; save model.state_dict()",
        "list": "no state dict in it (found list)",
        "other network": "do not fit this network",
        "other classes": "have 7 classes, the data has 10",
        "not finished": "not a PyTorch file of plain tensors (5,000 bytes): it is damaged",
        "pointer": "is a Git LFS pointer of 63 bytes: git lfs pull",
        "pipe": "is a folder, a pipe or a device, and no file",
    }.items()
]
CASES = TRAIN + CONFIG + OTHERS + DATA + WEIGHTS


def run(job: str, arguments: Sequence[str], folder: Path) -> int:
    """Do what a command line says; its results would be below ``folder``/out."""
    out = str(folder / "out")
    small = [*SMALL, "--run.root", out, "--launch.backend", "local"]
    if job == "config":
        file = folder / "bad.json"
        file.write_text(_merged(arguments[0]))
        return command_line.main(IMAGENET_RECIPES, "demo", ["demo", "--config", str(file)])
    if job == "data":
        place = str(bad_files.data_set(arguments[0], folder / "data"))
        return command_line.main(IMAGENET_RECIPES, "demo", ["demo", *small, "--data.root", place, "--data.subset", "0"])
    if job == "weights":
        place = str(bad_files.weights(arguments[0], folder / "teacher.pth"))
        return command_line.main(IMAGENET_RECIPES, "demo", ["demo", *small, "--teacher.weights", place])
    if job == "prepare":
        (folder / "in" / "train" / "ant").mkdir(parents=True)
        (folder / "in" / "train" / "ant" / "1.png").write_bytes(bad_files.IMAGES[0].as_py())
        return prepare_data.main(["--source", str(folder / "in"), "--target", out, *arguments])
    if job == "search":
        return search.main(IMAGENET_RECIPES, ["demo", *SMALL, "--run.root", out, *arguments])
    if job == "cache":
        return cache_teacher.main(IMAGENET_RECIPES, arguments)
    if job == "tools":
        return tools(arguments)
    recipe, *flags = arguments
    return command_line.main(IMAGENET_RECIPES, "demo", [recipe, *small, *flags])


def _merged(text: str) -> str:
    """The demo's config with the changes of a JSON text in it; the text itself if it is no object."""
    try:
        change = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(change, dict):
        return text
    value: dict[str, Any] = to_dict(demo())
    for section, fields in change.items():
        value[section] = value[section] | fields if isinstance(fields, dict) else fields
    return json.dumps(value)


def test_the_table_has_a_hundred() -> None:
    assert len(CASES) >= 100
    assert len({(job, *arguments) for job, arguments, _ in CASES}) == len(CASES)


@pytest.mark.parametrize(
    ("job", "arguments", "said"), CASES, ids=[f"{job} {' '.join(arguments)[:50]}" for job, arguments, _ in CASES]
)
def test_a_bad_input_is_a_line_and_status_two(
    job: str, arguments: Sequence[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = run(job, arguments, tmp_path)
    told = capsys.readouterr().err
    assert status == 2, told
    assert said in " ".join(told.replace("│", " ").split())
    assert "For full helptext" in told or told.count("\n") == 1, told
    assert not os.path.lexists(tmp_path / "out"), "nothing is written before everything is checked"


def test_metadata_that_is_too_deep_is_passed_over(tmp_path: Path) -> None:
    """It could only have named the classes."""
    place = str(bad_files.data_set("deep metadata", tmp_path / "data"))
    out = ("--run.root", str(tmp_path / "out"), "--launch.backend", "local", "--data.subset", "0")
    flags = ("--train.max-steps", "1", "--loss.name", "kd")
    assert command_line.main(IMAGENET_RECIPES, "demo", ["demo", *SMALL, *out, *flags, "--data.root", place]) == 0
