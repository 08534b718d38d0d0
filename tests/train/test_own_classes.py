"""A teacher with classes of its own: features are used as they are, logits are compared over the classes in common."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_run import cpu, run_tiny, tiny_config, tiny_data
from torch import nn

from mimkd_ray import console
from mimkd_ray.cli.preflight import preflight
from mimkd_ray.config import Config, LossConfig
from mimkd_ray.errors import UserError
from mimkd_ray.losses.features import Features
from mimkd_ray.losses.methods.base import RivalTaps
from mimkd_ray.losses.methods.build_method import RivalPlan
from mimkd_ray.losses.methods.registry import RIVALS, Method
from mimkd_ray.losses.mimkd_loss import MIMKDLoss
from mimkd_ray.losses.shared_classes import SharedClasses, match
from mimkd_ray.models.build_model import build_model
from mimkd_ray.models.outputs import logits_from
from mimkd_ray.train.distiller import distill
from mimkd_ray.train.engine.student import lone_student

NAMES = ["zero", "3", "seven", "5", "1", "12", "8"]
"""Of a teacher's seven classes; the digits' are "0" to "9"."""


@pytest.fixture(autouse=True)
def _nothing_said() -> None:
    console.told.clear()


@pytest.fixture
def names(tmp_path: Path) -> str:
    path = tmp_path / "names.txt"
    path.write_text("\n".join(NAMES) + "\n")
    return str(path)


def test_classes_are_paired_by_their_names() -> None:
    teacher = ["tench, Tinca tinca", "crane", "crane, machine", "Great White-Shark", "ice_cream"]
    found = match(teacher, ["Ice cream", "tinca tinca", "crane", "dog", "great white shark"])
    assert found == SharedClasses((4, 0, 1, 3), (0, 1, 2, 4)), "'crane' is the whole name of one class alone"
    assert match(["a, x", "b, x"], ["x"]) == SharedClasses(), "two classes could be meant"
    assert match(["a, b"], ["a", "b"]) == SharedClasses(), "one class cannot be two"


def test_kd_is_of_the_shared_classes_alone() -> None:
    """KD and DIST against the same losses of networks that have the shared classes only; other columns do not count."""
    shared = SharedClasses((4, 1, 3, 6), (1, 3, 5, 8))
    teacher_BT, student_BC, labels_B = torch.randn(6, 7), torch.randn(6, 10), torch.arange(6)
    config = LossConfig(name=("kd", "dist"), kd_weight=0.3)

    def kd_and_dist(loss: MIMKDLoss, teacher: torch.Tensor, student: torch.Tensor) -> tuple[float, float]:
        log = loss(Features(teacher, {}, {}), Features(student, {}, {}), labels_B, labels_B).log
        return float(log["kd"]), float(log["rival/dist"])

    dist = [RivalPlan("dist", RivalTaps())]
    some = kd_and_dist(MIMKDLoss(config, (), dist, shared=shared), teacher_BT, student_BC)
    oracle = MIMKDLoss(config, (), dist)
    of_teacher, of_student = teacher_BT[:, [4, 1, 3, 6]], student_BC[:, [1, 3, 5, 8]]
    padded = [F.pad(logits, (0, 6), value=-1e9) for logits in (of_teacher, of_student)]
    assert some[0] == pytest.approx(kd_and_dist(oracle, *padded)[0], rel=1e-5)
    changed = teacher_BT.clone()
    changed[:, [0, 2, 5]] += 3
    assert kd_and_dist(MIMKDLoss(config, (), dist, shared=shared), changed, student_BC) == some
    assert some[1] > 0


def test_a_run_with_a_teacher_of_other_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By number alone: features train the student, and nothing is said of the teacher's top-1, expected or not."""
    teacher = {"classes": 1000, "expect_top1": 76.0}
    preflight(tiny_config(teacher=teacher))
    result = run_tiny(tmp_path / "run", teacher=teacher, loss={"kd_weight": 1.0})
    assert result["teacher"] | {"top1": None, "top5": None, "rows": 0} == result["teacher"]
    assert result["nats"]
    assert [m for m in caplog.messages if "1000 classes of its own" in m] == [
        "teacher cifar/resnet8 has 1000 classes of its own: its features are used; what compares logits (KD, DKD, "
        "DIST) and the check of its top-1 are off"
    ]


READS_FEATURES: list[tuple[Method, ...]] = [(method,) for method in RIVALS if not RIVALS[method].logits]


@pytest.mark.parametrize("name", [*READS_FEATURES, ("kd", "dkd", "crd"), ("mimkd", "dist")], ids="+".join)
def test_what_reads_features_trains_and_what_compares_logits_is_left_out(name: tuple[Method, ...]) -> None:
    config = tiny_config(
        teacher={"classes": 7},
        loss={"name": name, "preset": "best", "feature_pairs": ()},
        train={"lanes": 1},
    )
    preflight(config)
    student = lone_student(config, tiny_data(), build_model("cifar/resnet8", 7), cpu())
    student.inputs.start(0)
    log = student.step(0).log
    of_teacher = {key for key in log if key.startswith("rival/")}
    assert of_teacher == {f"rival/{method}" for method in name if (method,) in READS_FEATURES}
    assert "kd" not in log
    assert any(key.endswith("/nats") for key in log) == ("mimkd" in name)
    assert all(torch.isfinite(value) for value in map(torch.as_tensor, log.values()))
    assert float(log["loss"]) != pytest.approx(float(log["ce"])), "the teacher has a part in it"


def test_kd_from_a_file_of_names(tmp_path: Path, names: str, caplog: pytest.LogCaptureFixture) -> None:
    """The teacher is judged on the images of the shared classes."""
    sections: dict[str, dict[str, Any]] = {"teacher": {"classes": names}, "loss": {"kd_weight": 0.5}}
    result = run_tiny(tmp_path / "run", **sections)
    data = tiny_data()
    shared = {1, 3, 5, 8}
    assert result["teacher"]["rows"] == sum(int(label) in shared for label in data.val.labels())
    assert any("7 classes, 4 of the data's 10 among them" in line for line in caplog.messages)
    network = build_model("cifar/resnet8", 7)
    student = lone_student(tiny_config(**sections), data, network, cpu())
    student.inputs.start(0)
    assert float(student.step(0).log["kd"]) > 0


@pytest.mark.parametrize(
    ("sections", "match"),
    [
        ({"teacher": {"classes": 7}, "loss": {"name": ("kd", "dist")}}, r"KD .* and dist, .*--teacher.classes FILE"),
        ({"teacher": {"classes": "NAMES"}, "loss": {"name": ("dkd",)}}, r"dkd .*6 of the data's 10 classes are not"),
        ({"teacher": {"classes": "no/such/file"}}, r"no/such/file cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    names: str, sections: dict[str, dict[str, Any]], match: str
) -> None:
    if sections["teacher"]["classes"] == "NAMES":
        sections["teacher"]["classes"] = names
    with pytest.raises(UserError, match=match):
        preflight(tiny_config(**sections))


class _Encoder(nn.Module):
    """A ViT as Hugging Face has them: an output object with tokens and a pooled vector, and no logits."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 2, 2)
        self.cls_1IC = nn.Parameter(torch.zeros(1, 1, 16))
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(4))
        self.layernorm = nn.LayerNorm(16)

    def forward(self, pixel_values: torch.Tensor, return_dict: bool | None = None) -> OrderedDict[str, Any]:
        tokens_BTC = self.patches(pixel_values).flatten(2).mT
        tokens_BTC = torch.cat([self.cls_1IC.expand(len(tokens_BTC), -1, -1), tokens_BTC], 1)
        for layer in self.layers:
            tokens_BTC = layer(tokens_BTC)
        tokens_BTC = self.layernorm(tokens_BTC)
        pooled_BC = tokens_BTC[:, 0]
        return OrderedDict(last_hidden_state=tokens_BTC, pooler_output=pooled_BC, hidden_states=None)


def make_encoder(num_classes: int) -> nn.Module:
    return _Encoder()


def test_an_encoder_of_hugging_faces_is_a_teacher() -> None:
    teacher = {"name": "test_own_classes:make_encoder", "classes": 16}
    config = tiny_config(teacher=teacher, loss={"preset": "accuracy", "feature_pairs": ()})
    preflight(config)
    network = build_model(config.teacher.name, 16).eval()
    assert logits_from(network, torch.randn(2, 3, 8, 8)).shape == (2, 16)
    student = lone_student(config, tiny_data(), network, cpu())
    student.inputs.start(0)
    assert {"feature/layers.3-stage3/nats", "global/layers.3-pool/nats"} <= student.step(0).log.keys()


def test_own_loops_leave_kd_from_other_classes_out(caplog: pytest.LogCaptureFixture) -> None:
    networks = build_model("cifar/resnet8", 7), build_model("cifar/resnet8_w4", 10)
    with pytest.raises(UserError, match=r"has 7 classes and the student 10.*such as LossConfig"):
        distill(*networks, 32, LossConfig(name=("kd",)))
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    terms = distill(*networks, 32, LossConfig(preset="best"))(images, labels).terms
    assert terms.keys() == distill(*networks, 32, LossConfig())(images, labels).terms.keys()
    assert caplog.messages == ["teacher has 7 classes and the student 10: what compares logits (KD, DKD, DIST) is off"]


def test_dkd_of_a_single_class_is_refused_in_own_loops_too() -> None:
    """Its softmax over the classes other than the label's would be of none."""
    networks = build_model("cifar/resnet8", 1), build_model("cifar/resnet8_w4", 1)
    with pytest.raises(UserError, match="dkd, which compares the label with the other classes, and the student has 1"):
        distill(*networks, 32, LossConfig(name=("dkd",), rival_warmup=0))


def test_a_teacher_that_is_trained_has_the_classes_of_the_data() -> None:
    with pytest.raises(UserError, match=r"teacher.train is true"):
        Config(teacher=tiny_config(teacher={"train": True, "classes": 5}).teacher)
