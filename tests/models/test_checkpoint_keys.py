"""Checkpoints of other people's code: names of wrappers, other names of the same networks, notes on the run."""

from __future__ import annotations

import argparse
import pickle
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import other_code
import pytest
import torch
from torch import Tensor, nn

from mimkd_ray import console
from mimkd_ray.errors import UserError
from mimkd_ray.models.build_model import build_model
from mimkd_ray.models.cifar_registry import NETWORKS

STUDENT = "cifar/resnet8_w4"


@pytest.fixture(autouse=True)
def _nothing_said() -> None:
    console.told.clear()


def _same(one: nn.Module, two: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def _trained(net: nn.Module) -> nn.Module:
    """Batch norms with statistics, weights and shifts of their own, so that one at another's place would be seen."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / 10)
    return net.eval()


@pytest.mark.parametrize("name", other_code.NETWORKS)
def test_the_distillation_literatures_cifar_checkpoints(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    theirs = _trained(other_code.NETWORKS[name](100))
    accuracy = np.float64(73.3)
    torch.save({"epoch": 240, "model": theirs.state_dict(), "accuracy": accuracy}, tmp_path / "ckpt_epoch_240.pth")
    ours = build_model(f"cifar/{name}", 100, str(tmp_path / "ckpt_epoch_240.pth")).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected, found = theirs(images), ours(images)
    assert expected.std() > 1e-3
    assert float((expected - found).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert "translated other code's names of a" in caplog.text


def test_every_cifar_network_of_the_literature_is_tested() -> None:
    assert set(NETWORKS) - set(other_code.NETWORKS) == {"resnet8_w4"}, "which is of this project alone"


@pytest.mark.parametrize("suffix", [".pth.tar", ".ckpt", ".pt"])
@pytest.mark.parametrize(
    "key",
    ["state_dict", "model", "model_state", "model_state_dict", "state_dict_ema", "teacher", "student", "net", "ema"],
)
def test_notes_and_keys(tmp_path: Path, suffix: str, key: str) -> None:
    net = build_model(STUDENT, 10)
    notes = {
        "args": argparse.Namespace(lr=0.1, best=np.float32(1), out=Path("runs"), rows=np.int64(3), on=np.bool_(True)),
        "best_acc": np.float64(70.1),
        "random": np.random.RandomState(0).get_state(),
        "log": defaultdict(list, loss=[1.0]),
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
    }
    torch.save({key: net.state_dict(), "epoch": 3, **notes}, tmp_path / f"w{suffix}")
    assert _same(build_model(STUDENT, 10, str(tmp_path / f"w{suffix}")), net)


def test_numpys_older_name_of_its_scalars(tmp_path: Path) -> None:
    net = build_model(STUDENT, 10)
    torch.save(
        {"model": net.state_dict(), "acc": np.float64(1)}, tmp_path / "w.pt", _use_new_zipfile_serialization=False
    )
    data = (tmp_path / "w.pt").read_bytes()
    assert b"numpy._core.multiarray" in data
    (tmp_path / "old.pt").write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert _same(build_model(STUDENT, 10, str(tmp_path / "old.pt")), net)


class AttributeDict(dict):
    """What older releases of Lightning kept hyper_parameters in."""


def test_a_whole_checkpoint_of_lightnings(tmp_path: Path) -> None:
    net = build_model(STUDENT, 10)
    hyper = AttributeDict(lr=0.1, where=Path("runs"), optim=AttributeDict(betas=(0.9, 0.99)))
    hyper.note = "an attribute"
    checkpoint = {
        "epoch": 2,
        "global_step": 4,
        "pytorch-lightning_version": "1.9.5",
        "state_dict": _prefixed(dict(net.state_dict()), "model."),
        "loops": {"fit_loop": {"epoch_loop.batch_progress": {"total": {"ready": 4}, "is_last_batch": True}}},
        "callbacks": {
            "ModelCheckpoint{'monitor': 'v'}": {"best_model_score": torch.tensor(0.2), "best_k_models": {"a": None}}
        },
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"params": [0]}]}],
        "lr_schedulers": [{"milestones": Counter([1, 2]), "last_epoch": 2}],
        "hparams_name": "kwargs",
        "hyper_parameters": hyper,
    }
    torch.save(checkpoint, tmp_path / "here.ckpt", _use_new_zipfile_serialization=False)
    data, name = (tmp_path / "here.ckpt").read_bytes(), f"{__name__}\nAttributeDict".encode()
    assert name in data
    for module in ("pytorch_lightning.utilities.parsing", "lightning.fabric.utilities.data"):
        (tmp_path / "last.ckpt").write_bytes(data.replace(name, f"{module}\nAttributeDict".encode()))
        assert _same(build_model(STUDENT, 10, str(tmp_path / "last.ckpt")), net)


def test_a_whole_checkpoint_of_timms_saver(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    utils = pytest.importorskip("timm.utils")
    net = build_model(STUDENT, 10)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    args = argparse.Namespace(model=STUDENT, lr=0.1, clip_grad=None, mean=(0.5, 0.5), aa="rand-m9")
    saver = utils.CheckpointSaver(
        net, optimizer, args=args, model_ema=utils.ModelEmaV3(net), checkpoint_dir=tmp_path, recovery_dir=tmp_path
    )
    saver.save_checkpoint(3, metric=71.5)
    assert _same(build_model(STUDENT, 10, str(tmp_path / "last.pth.tar")), net)
    assert "took 'state_dict', and 'state_dict_ema' would fit as well" in caplog.text


class _Harm:
    def __reduce__(self) -> tuple:
        return (print, ("unpickled",))


def test_nothing_else_is_unpickled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = build_model(STUDENT, 10).state_dict()
    for number, harm in enumerate((_Harm(), argparse.Namespace(inside=_Harm()))):
        torch.save({"model": state, "args": harm}, tmp_path / f"{number}.pth")
        with pytest.raises(UserError, match=r"not a PyTorch file of plain tensors.*print") as caught:
            build_model(STUDENT, 10, str(tmp_path / f"{number}.pth"))
        assert "\n" not in str(caught.value)
    (tmp_path / "bare.ckpt").write_bytes(pickle.dumps(_Harm(), protocol=2))
    with pytest.raises(UserError, match="not a PyTorch file"):
        build_model(STUDENT, 10, str(tmp_path / "bare.ckpt"))
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "backbone.", "student.", "teacher.", "encoder.", "module.student.",
     "_orig_mod.module.", "model._orig_mod.backbone.", "classifier.", "1.", "detector.backbone.body."],
)  # fmt: skip
def test_prefixes(tmp_path: Path, prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    net = build_model(STUDENT, 10)
    beside = {"criterion.weight": torch.ones(3)}
    torch.save({"state_dict": {**_prefixed(net.state_dict(), prefix), **beside}}, tmp_path / "last.ckpt")
    assert _same(build_model(STUDENT, 10, str(tmp_path / "last.ckpt")), net)
    assert caplog.messages == [
        f"weights {tmp_path}/last.ckpt: took {prefix!r} off the names; left out 1 tensors beside it (criterion.weight)"
    ]


class _Wrapping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(12, 12)
        self.head = nn.Linear(12, 10)


def make_wrapping(num_classes: int) -> nn.Module:
    return _Wrapping()


def test_a_prefix_that_the_network_has_itself_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net = make_wrapping(10)
    for prefix in ("", "module."):
        torch.save(_prefixed(net.state_dict(), prefix), tmp_path / "w.pt")
        assert _same(build_model("test_checkpoint_keys:make_wrapping", 10, str(tmp_path / "w.pt")), net)
    assert caplog.messages == [f"weights {tmp_path}/w.pt: took 'module.' off the names"]


def test_the_network_that_fits_is_chosen_of_several(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net, other = build_model(STUDENT, 10), build_model("cifar/resnet14", 10)
    both = {**_prefixed(other.state_dict(), "student."), **_prefixed(net.state_dict(), "teacher.")}
    torch.save(both, tmp_path / "both.pt")
    assert _same(build_model(STUDENT, 10, str(tmp_path / "both.pt")), net)
    assert _same(build_model("cifar/resnet14", 10, str(tmp_path / "both.pt")), other)
    twin = build_model(STUDENT, 10)
    torch.save({"state_dict_ema": twin.state_dict(), "state_dict": net.state_dict()}, tmp_path / "two.pt")
    caplog.clear()
    assert _same(build_model(STUDENT, 10, str(tmp_path / "two.pt")), net)
    assert caplog.messages == [f"weights {tmp_path}/two.pt: took 'state_dict', and 'state_dict_ema' would fit as well"]


def test_counters_of_batch_norms_may_be_missing(tmp_path: Path) -> None:
    net = build_model(STUDENT, 10)
    state = {key: value for key, value in net.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    assert _same(build_model(STUDENT, 10, str(tmp_path / "old.pth")), net)


def test_a_file_without_an_ending_is_read_by_its_content(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    net = build_model(STUDENT, 10)
    torch.save({"model": net.state_dict()}, tmp_path / "student_best")
    save_file(net.state_dict(), tmp_path / "safe")
    for name in ("student_best", "safe"):
        assert _same(build_model(STUDENT, 10, str(tmp_path / name)), net)
