"""Networks by name and weights from files: round trips, and errors that name the remedy."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mimkd_ray.config import ModelConfig
from mimkd_ray.errors import UserError
from mimkd_ray.models.build_model import build_model, model_names

STUDENT = "cifar/resnet8_w4"


def make_linear(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))


def make_compiled(num_classes: int) -> nn.Module:
    compiled: nn.Module = torch.compile(make_linear(num_classes))
    return compiled


def make_number(num_classes: int) -> int:
    return num_classes


def make_wrong(classes: int) -> nn.Module:
    return make_linear(classes)


def _same(one: nn.Module, two: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_names() -> None:
    names = model_names()
    assert {"resnet34", "vit_b_16", "cifar/resnet8x4"} <= set(names)
    assert not {"fcn_resnet50", "fasterrcnn_resnet50_fpn", "r3d_18"} & set(names), "not classifiers of images"


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_classifiers_are_left_out(name: str) -> None:
    with torch.device("meta"):
        net = build_model(name, 7)
        for training in (True, False):
            logits = net.train(training)(torch.empty(2, 3, 299, 299))
            assert logits.shape == (2, 7)


def test_weights_of_a_network_with_auxiliary_classifiers_load(tmp_path: Path) -> None:
    from torchvision import models

    full = models.googlenet(num_classes=3, aux_logits=True, init_weights=False)
    torch.save(full.state_dict(), tmp_path / "full.pth")
    net = build_model("googlenet", 3, str(tmp_path / "full.pth"))
    assert torch.equal(net.fc.weight, full.fc.weight)


def test_image_size_reaches_networks_of_one_size() -> None:
    with torch.device("meta"):
        assert build_model("vit_b_32", 3, image_size=96)(torch.empty(1, 3, 96, 96)).shape == (1, 3)
        assert build_model("maxvit_t", 3, image_size=448)(torch.empty(1, 3, 448, 448)).shape == (1, 3)
    with pytest.raises(UserError, match="vit_b_32 cannot be built for images of 100 pixels"):
        build_model("vit_b_32", 3, image_size=100)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
@pytest.mark.parametrize("half", [False, True])
def test_round_trip(tmp_path: Path, suffix: str, half: bool) -> None:
    net = build_model(STUDENT, 10)
    state = net.state_dict()
    if half:
        state = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    path = tmp_path / f"w{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    loaded = build_model(STUDENT, 10, str(path))
    assert all(value.dtype == torch.float32 for value in loaded.parameters())
    expected = {key: state[key].to(value.dtype) for key, value in net.state_dict().items()}
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    assert _same(loaded, net) is not half


@pytest.mark.parametrize("key", ["state_dict", "model", "student"])
def test_wrapped_and_prefixed_state_dicts(tmp_path: Path, key: str) -> None:
    net = build_model(STUDENT, 10)
    state = {f"module.{name}": value for name, value in net.state_dict().items()}
    torch.save({key: state, "epoch": 3}, tmp_path / "w.pt")
    assert _same(build_model(STUDENT, 10, str(tmp_path / "w.pt")), net)


def test_weights_come_from_any_fsspec_url() -> None:
    import fsspec

    net = build_model(STUDENT, 10)
    with fsspec.open("memory://zoo/w.pt", "wb") as file:
        torch.save(net.state_dict(), file)
    assert _same(build_model(STUDENT, 10, "memory://zoo/w.pt"), net)


def test_other_number_of_classes_names_both(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(build_model(STUDENT, 100).state_dict(), path)
    with pytest.raises(UserError) as caught:
        build_model(STUDENT, 10, str(path))
    assert str(caught.value) == (
        f"weights {path} have 100 classes, the data has 10: pass other weights, or --data.num-classes 100 for data "
        "whose labels are numbers of these; to evaluate on some of them name all with --eval.classes FILE; for a "
        "teacher with classes of its own pass --teacher.classes 100"
    )


def test_published_weights_of_another_number_of_classes() -> None:
    with pytest.raises(UserError, match=r"published for resnet18 have 1000 classes, the data has 10: .* 1000 for"):
        build_model("resnet18", 10, "published")
    pytest.importorskip("timm")
    with pytest.raises(UserError, match="timm/resnet18 have 1000 classes, the data has 10"):
        build_model("timm/resnet18", 10, "published")


def test_a_failed_download_names_the_way_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(UserError, match=r"squeezenet1_1 could not be downloaded: no route to host; .*pass its path"):
        build_model("squeezenet1_1", 1000, "published")


def test_foreign_keys_are_counted_and_named(tmp_path: Path) -> None:
    state = build_model(STUDENT, 10).state_dict()
    moved = {f"x{key}" if key.startswith("head") else key: value for key, value in state.items()}
    moved["stem.0.weight"] = torch.zeros(4, 3, 5, 5)
    torch.save(moved, tmp_path / "w.pt")
    with pytest.raises(UserError) as caught:
        build_model(STUDENT, 10, str(tmp_path / "w.pt"))
    message = str(caught.value)
    assert "w.pt do not fit" in message
    assert "2 missing keys (head.weight, head.bias)" in message
    assert "2 unexpected keys (xhead.weight, xhead.bias)" in message
    assert "1 keys of another shape (stem.0.weight: file 4x3x5x5, model 4x3x3x3)" in message


def test_only_three_keys_are_named(tmp_path: Path) -> None:
    state = {f"k{number}": torch.zeros(1) for number in range(5)}
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"5 unexpected keys \(k0, k1, k2 and 2 more\)"):
        build_model(STUDENT, 10, str(tmp_path / "w.pt"))


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet35", "random", "unknown model 'resnet35'.*did you mean 'resnet"),
        ("cifar/resnet21", "random", "unknown model 'cifar/resnet21'.*did you mean 'cifar/resnet"),
        ("cifar/resnet20", "published", "no published weights for cifar/resnet20"),
        ("nowhere.at.all:net", "random", "cannot import 'nowhere.at.all'"),
        ("test_build_model:make_liner", "random", "no function 'make_liner'; did you mean 'make_linear'"),
        ("test_build_model:make_number", "random", "returned int, expected a torch.nn.Module"),
        (
            "test_build_model:make_wrong",
            "random",
            "called with num_classes=5, but missing a required argument: 'classes'",
        ),
        ("test_build_model:make_linear", "published", "no published weights for test_build_model:make_linear"),
        (STUDENT, "/no/such/file.pt", "weights /no/such/file.pt: no such file"),
        (STUDENT, "weights.txt", "weights 'weights.txt': expected 'random', 'published' or a file ending in"),
        (STUDENT, "nosuch://host/file.pt", "weights nosuch://host/file.pt: cannot be read"),
    ],
)
def test_errors(name: str, weights: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(name, 5, weights)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_damaged_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(b"certainly no tensors in here")
    with pytest.raises(UserError, match=f"w{suffix}: not a .*28 bytes"):
        build_model(STUDENT, 10, str(path))
    torch.save({"epoch": 3}, tmp_path / "e.pt")
    with pytest.raises(UserError, match=r"no state dict in it \(found epoch\)"):
        build_model(STUDENT, 10, str(tmp_path / "e.pt"))


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "w.pt")
    with pytest.raises(UserError, match="not a PyTorch file of plain tensors"):
        build_model(STUDENT, 10, str(tmp_path / "w.pt"))


def test_a_function_by_import_path() -> None:
    net = build_model("test_build_model:make_linear", 5)
    assert net(torch.zeros(2, 3, 2, 2)).shape == (2, 5)
    with pytest.raises(UserError, match=r"'test_build_model:make_compiled' is compiled already.* --train\.compile on"):
        build_model("test_build_model:make_compiled", 5)


def test_timm() -> None:
    pytest.importorskip("timm")
    net = build_model("timm/vit_tiny_patch16_224", 5, image_size=64)
    assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 5)
    with pytest.raises(UserError, match="unknown timm model 'resnet19'; did you mean"):
        build_model("timm/resnet19", 5)


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install mimkd-ray\[timm\]"):
        build_model("timm/resnet18", 5)


def test_config_refuses_empty_names() -> None:
    assert ModelConfig(name="resnet18").weights == "random"
    with pytest.raises(UserError, match="model name is empty"):
        ModelConfig(name=" ")


@pytest.mark.parametrize("written", ["~/own weights.safetensors", "file://{home}/own%20weights.safetensors"])
def test_weights_are_found_where_a_user_says(written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.manual_seed(3)
    trained = build_model("cifar/resnet8_w4", 10)
    save_file(trained.state_dict(), tmp_path / "own weights.safetensors")
    torch.manual_seed(4)
    loaded = build_model("cifar/resnet8_w4", 10, written.format(home=tmp_path))
    for name, value in trained.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
