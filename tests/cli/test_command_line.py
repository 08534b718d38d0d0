"""The command line of jobs/: choose, override, and answer bad input with status 2 and a message, without Ray."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from mimkd_ray.cli import command_line, evaluate
from mimkd_ray.cli.short_help import FIELDS, OF_EVALUATION
from mimkd_ray.config import Config, OptimConfig
from mimkd_ray.config.form.json_form import from_dict, to_dict
from mimkd_ray.config.jobs.evaluate import evaluate_job
from mimkd_ray.config.jobs.search import search_job
from mimkd_ray.errors import UserError
from mimkd_ray.models.build_model import build_model
from mimkd_ray.recipes import CIFAR_RECIPES, IMAGENET_RECIPES, demo

ROOT = Path(__file__).parents[2]


def parsed(*argv: str) -> Config:
    config = command_line.parse(IMAGENET_RECIPES, "demo", argv, "job")
    assert config is not None
    return config


def test_recipes_are_chosen_by_name() -> None:
    assert parsed() == demo()
    assert parsed("r34_r18") == IMAGENET_RECIPES["r34_r18"]()


def test_any_field_is_overridden_by_its_dotted_name() -> None:
    config = parsed(
        *("r34_r18", "--optim.lr", "0.3", "--optim.milestones", "10", "20", "--teacher.train", "true"),
        *("--teacher.weights", "random", "--run.tensorboard", "false", "--loss.critic.width", "32"),
        *("--loss.feature-pairs", "layer3:layer3", "layer4:layer4:0.5", "--data.mean", "0.1", "0.2", "0.3"),
        *("--loss.bound", "jsd", "--train.lane_batch", "16"),
    )
    assert config.optim.lr == 0.3
    assert config.optim.milestones == (10, 20)
    assert config.teacher.train is True
    assert config.run.tensorboard is False
    assert config.loss.critic.width == 32
    assert config.loss.feature_pairs == ("layer3:layer3", "layer4:layer4:0.5")
    assert config.data.mean == (0.1, 0.2, 0.3)
    assert config.loss.bound == "jsd"
    assert config.train.lane_batch == 16, "underscores and dashes are the same"
    assert config.optim.weight_decay == IMAGENET_RECIPES["r34_r18"]().optim.weight_decay, "the rest stays"


@pytest.mark.parametrize("word", ["true", "True"])
def test_truth_values_are_spelled_either_way(word: str) -> None:
    config = parsed("--teacher.train", word, "--loss.critic.learn-temperature", "false", "--run.name", word)
    assert (config.teacher.train, config.loss.critic.learn_temperature, config.run.name) == (True, False, word)


def test_printed_config_is_a_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--optim.lr", "0.25", "--compare.arms", "alone", "kd", "--loss.critic.width", "24", "--print-config"]
    assert command_line.main(IMAGENET_RECIPES, "demo", argv) == 0
    printed = capsys.readouterr().out
    file = tmp_path / "config.json"
    file.write_text(printed)
    again = parsed("--config", str(file))
    assert again == from_dict(Config, json.loads(printed))
    assert again != demo()
    assert (again.optim.lr, again.compare.arms, again.loss.critic.width) == (0.25, ("alone", "kd"), 24)
    assert parsed("--config", str(file), "--optim.lr", "0.5").optim.lr == 0.5, "flags win over the file"


def test_a_config_file_with_an_unknown_name_or_a_wrong_type_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    value = to_dict(demo())
    value["optim"]["lrr"] = 1.0
    file.write_text(json.dumps(value))
    with pytest.raises(UserError, match="lrr"):
        parsed("--config", str(file))
    value = to_dict(demo())
    value["train"]["epochs"] = "many"
    file.write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"epochs"):
        parsed("--config", str(file))


def test_every_job_offers_its_own_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(CIFAR_RECIPES, "resnet32x4_resnet8x4", ["r34_r18", "--print-config"]) == 2
    assert "resnet32x4_resnet8x4" in capsys.readouterr().err


# Name -> (arguments, words of the message). Run one after the other in one new process, which never imports Ray.
BAD_FLAGS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "flag": (("--optim.learning-rate", "1"), ("--optim.learning-rate", "--help")),
    "flag misspelt": (("--optim.momentun", "1"), ("--optim.momentun", "Perhaps you meant: --optim.momentum FLOAT")),
    "type": (("--optim.lr", "fast"), ("--optim.lr", "fast")),
    "choice": (("--train.precision", "fp8"), ("--train.precision", "fp8", "bf16")),
    "truth value": (("--teacher.train", "perhaps"), ("--teacher.train", "perhaps", "('true', 'false'")),
    "stray word": (("demo", "--optim.lr", "0.1", "0.2"), ("0.2",)),
}
"""Flags that tyro rejects, and parts of its own message."""

BAD: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "recipe": (("r34_r81",), ("unknown recipe 'r34_r81'", "did you mean 'r34_r18'", "demo")),
    "out of range": (("--optim.lr", "-1"), ("optim.lr is -1", "give a rate above 0")),
    "config without a file": (("--config",), ("--config needs a JSON, YAML or TOML file",)),
    "missing config file": (("--config", "{tmp}/none.json"), ("{tmp}/none.json", "no such file")),
    "config that is not JSON": (("--config", "{tmp}/broken.json"), ("{tmp}/broken.json", "not JSON")),
    "missing data": (("--data.root", "{tmp}/none"), ("{tmp}/none", "does not exist")),
    "empty data": (("--data.root", "{tmp}/empty"), ("{tmp}/empty", "neither Parquet files nor folders")),
    "missing weights": (("{plain}", "--student.weights", "{tmp}/none.pth"), ("no weights file", "{tmp}/none.pth")),
    "classes": (
        ("{plain}", "--teacher.name", "cifar/resnet8_w4", "--teacher.weights", "{tmp}/hundred.safetensors"),
        ("hundred.safetensors", "100", "10"),
    ),
    "class count": (("--data.num-classes", "5"), ("labels up to 9", "5 classes", "--data.num-classes 10")),
    "network": (("--student.name", "cifar/resnet9"), ("cifar/resnet9", "did you mean")),
    "layer": (("--loss.feature-pairs", "stage9:stage3"), ("'stage9'", "cifar/resnet20", "mimkd_ray layers")),
    "queue": (("--loss.queue", "9000000"), ("loss.queue is 9000000", "64 MiB", "--loss.queue")),
    "vector for a map": (("--loss.feature-pairs", "head:stage3"), ("head:stage3", "needs a map", "vector of 10")),
    "pair": (("--loss.feature-pairs", "stage3"), ("tap pair 'stage3'", "teacher_layer:student_layer")),
    "workers": (("--launch.workers", "3"), ("launch.workers is 3", "train.lanes 2", "--train.lanes 3")),
    "arms without seeds": (("{plain}", "--compare.arms", "kd"), ("--compare.arms", "compare.seeds 0", "seeds 3")),
    "lanes": (("--train.lane-batch", "500"), ("500", "200")),
    "contradiction": (
        ("--teacher.weights", "x.pth"),
        ("teacher.train", "x.pth", "train the teacher (--teacher.weights random), start"),
    ),
}

SCRIPT = """
import contextlib, io, json, sys
from mimkd_ray.cli.command_line import main
from mimkd_ray.recipes import IMAGENET_RECIPES
seen = {}
for name, argv in json.loads(sys.argv[1]).items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(IMAGENET_RECIPES, "demo", argv)
    seen[name] = {"status": status, "out": out.getvalue(), "err": err.getvalue(), "ray": "ray" in sys.modules}
print(json.dumps(seen))
"""


def words(text: str) -> str:
    """A message of tyro's as one line, whether it has a frame or not."""
    return " ".join(text.replace("│", " ").split())


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "broken.json").write_text("{")
    (folder / "empty").mkdir()
    save_file(build_model("cifar/resnet8_w4", 100).state_dict(), folder / "hundred.safetensors")
    return folder


@pytest.fixture(scope="module")
def refused(places: Path) -> dict[str, Any]:
    """Run every bad command in one process; return the answers."""
    plain = ["--teacher.train", "false", "--compare.seeds", "0"]
    commands: dict[str, list[str]] = {}
    for name, (argv, _) in {**BAD, **BAD_FLAGS}.items():
        words = [part for word in argv for part in (plain if word == "{plain}" else [word])]
        commands[name] = [word.replace("{tmp}", str(places)) for word in words]
        commands[name] += ["--run.root", str(places / "runs")] if "--config" not in argv else []
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands)], capture_output=True, text=True, check=False, cwd=places
    )
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_status_two(name: str, refused: dict[str, Any], places: Path) -> None:
    answer = refused[name]
    assert answer["status"] == 2, answer
    said = [line for line in answer["out"].splitlines() if "goes on, 0:" not in line]  # on a slow machine
    assert not said or said[-1].endswith(("loading PyTorch", "networks and places"))
    assert answer["err"].count("\n") == 1
    assert answer["err"].endswith("\n")
    for word in BAD[name][1]:
        assert word.replace("{tmp}", str(places)) in answer["err"]
    assert "Traceback" not in answer["err"]
    assert not answer["ray"], "Ray takes seconds to import, and bad input is known before"


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags_are_told_in_tyros_words_and_status_two(name: str, refused: dict[str, Any]) -> None:
    answer = refused[name]
    assert answer["status"] == 2, answer
    assert answer["out"] == ""
    said = words(answer["err"])
    for word in BAD_FLAGS[name][1]:
        assert word in said
    assert "--help" in said
    assert "Traceback" not in said
    assert not answer["ray"]


def test_bad_input_leaves_nothing_behind(refused: dict[str, Any], places: Path) -> None:
    assert not (places / "runs").exists(), sorted((places / "runs").rglob("*"))


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_job_exits_with_the_status_and_tells_errors_on_any_terminal(encoding: str) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "imagenet.py"), "--optim.momentun", "0.5"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert done.stdout == ""
    said = words(done.stderr)
    assert "Unrecognized options: --optim.momentun, 0.5" in said
    assert "Perhaps you meant: --optim.momentum FLOAT" in said
    assert said.count("Unrecognized options:") == 1, "once, by tyro alone"
    assert "--help" in said


def test_help_lists_recipes_and_fields_with_types_defaults_and_docs() -> None:
    command = [sys.executable, str(ROOT / "jobs" / "imagenet.py"), "r34_r18", "--help-all"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""
    text = " ".join(done.stdout.replace("│", " ").split())
    for name in IMAGENET_RECIPES:
        assert f"{name}: " in text
    assert "--optim.lr FLOAT" in text
    assert "Peak learning rate, for the whole global batch. (default: 0.2)" in text, "the recipe's own default"
    assert "--train.precision {auto,float32,bf16,float64}" in text
    assert "--optim.milestones [INT [INT ...]]" in text
    assert "(default: 30 60 90)" in text
    fields = [f"{section}.{name}" for section, part in to_dict(demo()).items() if section != "recipe" for name in part]
    flags = {word.split("=")[0] for word in done.stdout.split() if word.startswith("--")}
    missing = [field for field in fields if not any(f.startswith("--" + field.replace("_", "-")) for f in flags)]
    assert not missing


def test_help_is_one_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(IMAGENET_RECIPES, "demo", ["r34_r18", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 30
    assert max(map(len, lines)) <= 130
    assert any(re.match(r"  --optim\.lr +peak learning rate.*\(0\.2\)$", line) for line in lines)
    assert "--help-all" in lines[-1]
    assert evaluate.main(["--help"], "evaluate") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 30
    assert max(map(len, lines)) <= 130
    assert any(re.match(r"  --eval\.train-rows +training images .*\(5000\)$", line) for line in lines)
    for job, known in ((search_job(demo()), FIELDS), (evaluate_job(demo()), OF_EVALUATION)):
        for name in known:
            section, _, field = name.partition(".")
            assert hasattr(getattr(job, section), field), name


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("own.yaml", "recipe: own\noptim:\n  lr: 0.3\n  milestones: [1, 2]\n"),
        ("own.toml", 'recipe = "own"\n[optim]\nlr = 0.3\nmilestones = [1, 2]\n'),
    ],
)
def test_configs_in_yaml_and_toml(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    expected = Config(recipe="own", optim=OptimConfig(lr=0.3, milestones=(1, 2)))
    assert command_line.read_config(str(tmp_path / name), Config) == expected
    (tmp_path / name).write_text(text.replace("lr", "7"))
    with pytest.raises(UserError, match=r"optim\.7 is no name of a field|extra fields found \(7\)"):  # TOML's is text
        command_line.read_config(str(tmp_path / name), Config)
    (tmp_path / name).write_text(text + "[")
    with pytest.raises(UserError, match=f"is not {name[4:].upper()}: "):
        command_line.read_config(str(tmp_path / name), Config)


def test_interruption_is_one_line_and_status_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mimkd_ray.cli import training

    def interrupted(config: Config) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "run", interrupted)
    assert command_line.main(IMAGENET_RECIPES, "demo", []) == 130
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "the same command goes on" in error


def test_sigterm_outside_of_training_is_status_3(capsys: pytest.CaptureFixture[str]) -> None:
    """In imports, checks, and where a job waits for nodes. Ray turns Ctrl-C into an exit with status 0."""
    before = signal.getsignal(signal.SIGTERM)

    def stopped() -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)  # in which it comes
        return 0

    assert command_line.guarded("job", stopped, "the same command goes on") == 3

    def stopped_in_ray() -> int:
        """`ray.get` makes SystemExit(1) of that of a signal's handler."""
        with pytest.raises(SystemExit):
            stopped()
        sys.exit(1)

    assert command_line.guarded("job", stopped_in_ray, "the same command goes on") == 3
    assert capsys.readouterr().err == 2 * "job: asked to stop; the same command goes on\n"
    assert signal.getsignal(signal.SIGTERM) == before
    assert command_line.guarded("job", lambda: sys.exit(0), "the same command goes on") == 130
    with pytest.raises(SystemExit):
        command_line.guarded("job", lambda: sys.exit(7), "")
