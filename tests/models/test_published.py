"""Networks and weights from elsewhere: URLs, hubs, folders; new heads; what to bring where there is no network."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mimkd_ray import console
from mimkd_ray.errors import UserError
from mimkd_ray.models.build_model import build_model

STUDENT = "cifar/resnet8_w4"


@pytest.fixture(autouse=True)
def _nothing_said() -> None:
    console.told.clear()


def _same(one: nn.Module, two: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


class _Signed(http.server.SimpleHTTPRequestHandler):
    """Gives a file only to who has the signature, and says nothing to who asks for its head, as object stores do."""

    def do_GET(self) -> None:
        self.send_error(403) if "Signature=s%2Fcret" not in self.path else super().do_GET()

    def do_HEAD(self) -> None:
        self.send_error(403)

    def log_message(self, *args: object) -> None:
        """Stay silent."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *args: _Signed(*args, directory=str(tmp_path))
    ) as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{served.server_address[1]}"
        served.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["w.pth", "ckpt.pth.tar", "w.safetensors", "blob"])
def test_a_url_with_a_signature(tmp_path: Path, server: str, name: str) -> None:
    net = build_model(STUDENT, 10)
    save_file(net.state_dict(), tmp_path / name) if name == "w.safetensors" else torch.save(
        {"model": net.state_dict()}, tmp_path / name
    )
    assert _same(build_model(STUDENT, 10, f"{server}/{name}?download=1&X-Amz-Signature=s%2Fcret"), net)


def test_signatures_are_in_no_message(tmp_path: Path, server: str) -> None:
    torch.save(build_model(STUDENT, 100).state_dict(), tmp_path / "w.pth")
    (tmp_path / "no.pth").write_bytes(b"nothing")
    for name, found in (("w.pth", "have 100 classes"), ("no.pth", "not a PyTorch file"), ("gone.pth", "no such file")):
        with pytest.raises(UserError, match=found) as caught:
            build_model(STUDENT, 10, f"{server}/{name}?Signature=s%2Fcret")
        assert "cret" not in str(caught.value)
    with pytest.raises(UserError, match=r"cannot be read: the server answers 403, .*copy the file here") as caught:
        build_model(STUDENT, 10, f"{server}/w.pth?Signature=wrong")
    assert "wrong" not in str(caught.value)


def _hub_folder(folder: Path, name: str, classes: int) -> nn.Module:
    """Write a folder as timm's models are on the hub; return the network."""
    timm = pytest.importorskip("timm")
    net = timm.create_model(name, num_classes=classes)
    folder.mkdir(exist_ok=True)
    save_file(net.state_dict(), folder / "model.safetensors")
    config = {"architecture": name, "num_classes": classes, "pretrained_cfg": dict(net.pretrained_cfg)}
    (folder / "config.json").write_text(json.dumps(config))
    return net


def test_a_folder_of_the_hub(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net = _hub_folder(tmp_path / "lcnet", "lcnet_035", 7)
    folder = f"local-dir:{tmp_path}/lcnet"
    assert _same(build_model("timm/lcnet_035", 7, folder), net)
    assert _same(build_model(folder, 7, "published"), net)
    assert not _same(build_model(folder, 7), net)
    assert build_model(folder, 3).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    with pytest.raises(UserError, match="have 7 classes, the data has 3"):
        build_model(folder, 3, "published")
    started = build_model(folder, 3, "published", new_head=True)
    assert torch.equal(started.conv_stem.weight, net.conv_stem.weight)
    assert caplog.messages == [
        f"weights published for {folder} have 7 classes, the data has 3: the classifier starts anew, all else is loaded"
    ]


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model.safetensors and no pytorch_model.bin in it"):
        build_model(STUDENT, 10, f"local-dir:{tmp_path}")
    pytest.importorskip("timm")
    with pytest.raises(UserError, match=r"config.json cannot be read as timm writes it \(FileNotFoundError"):
        build_model(f"local-dir:{tmp_path}", 10)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "bert", "num_classes": 2}))
    with pytest.raises(UserError, match="is a 'bert', which this timm does not know"):
        build_model(f"local-dir:{tmp_path}", 10)


def test_hub_names_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"needs timm, which is not installed: pip install mimkd-ray\[timm\]"):
        build_model("hf-hub:timm/resnet18.a1_in1k", 5)
    with pytest.raises(UserError, match=r"need timm, .*download https://huggingface.co/org/net/resolve/main/model.saf"):
        build_model(STUDENT, 5, "hf-hub:org/net")


def test_weights_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    net, asked = build_model(STUDENT, 10), []
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")

    def download(repository: str, name: str, revision: str | None = None) -> str:
        asked.append((repository, name, revision))
        if name == "model.safetensors":
            raise hub.errors.EntryNotFoundError("404")
        return str(tmp_path / name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert _same(build_model(STUDENT, 10, "hf-hub:org/net@v2"), net)
    assert asked == [("org/net", "model.safetensors", "v2"), ("org/net", "pytorch_model.bin", "v2")]


def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        try:
            raise OSError("Name or service not known")
        except OSError as error:
            raise RuntimeError("cannot send\na request") from error

    for place in ("torchvision.models._api.load_state_dict_from_url", "timm.models._builder.load_state_dict_from_hf"):
        monkeypatch.setattr(place, fail)
    for place in ("timm.models._hub.hf_hub_download", "huggingface_hub.hf_hub_download"):
        monkeypatch.setattr(place, fail)


def test_without_a_network_one_line_says_what_to_bring_and_where_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("timm")
    _no_network(monkeypatch)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cases = {
        ("squeezenet1_1", "published"): (
            r"download https://download.pytorch.org/models/(squeezenet1_1-\w+\.pth), copy the file here and put it at "
            rf"{tmp_path}/checkpoints/\1, where it is looked for first, or pass its path as weights$"
        ),
        ("timm/resnet18", "published"): (
            r"download https://huggingface.co/timm/resnet18.a1_in1k/resolve/main/model.safetensors, copy the file here "
            r"and pass its path as weights$"
        ),
        ("resnet18", "hf-hub:org/net"): r"download https://huggingface.co/org/net/resolve/main/model.safetensors, copy",
        ("hf-hub:org/net", "published"): r"bring the folder of .*org/net.* and name the network local-dir:FOLDER$",
        ("hf-hub:org/net", "random"): r"bring the folder of .*org/net.* and name the network local-dir:FOLDER$",
    }
    for (name, weights), advice in cases.items():
        with pytest.raises(
            UserError, match=rf"could not be downloaded: Name or service not known; .*{advice}"
        ) as caught:
            build_model(name, 1000, weights)
        assert "\n" not in str(caught.value)


def test_a_new_head_for_a_file_of_other_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net = build_model(STUDENT, 100)
    torch.save({"state_dict": net.state_dict()}, tmp_path / "w.pth")
    torch.manual_seed(3)
    random = build_model(STUDENT, 10)
    torch.manual_seed(3)
    started = build_model(STUDENT, 10, str(tmp_path / "w.pth"), new_head=True)
    for name, value in started.state_dict().items():
        assert torch.equal(value, (random if name.startswith("head.") else net).state_dict()[name]), name
    assert caplog.messages == [
        f"weights {tmp_path}/w.pth have 100 classes, the data has 10: the classifier starts anew, all else is loaded"
    ]
    with pytest.raises(UserError, match="have 100 classes, the data has 10"):
        build_model(STUDENT, 10, str(tmp_path / "w.pth"))


def test_a_new_head_for_a_file_without_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net = build_model(STUDENT, 10)
    state = {f"encoder.{key}": value for key, value in net.state_dict().items() if not key.startswith("head.")}
    torch.save(state, tmp_path / "w.pth")
    started = build_model(STUDENT, 10, str(tmp_path / "w.pth"), new_head=True)
    assert torch.equal(started.stem[0].weight, net.stem[0].weight)
    assert caplog.messages[1].startswith(f"weights {tmp_path}/w.pth have no classifier, the data has 10")
    with pytest.raises(UserError, match="2 missing keys"):
        build_model(STUDENT, 10, str(tmp_path / "w.pth"))


def test_a_new_head_excuses_nothing_else(tmp_path: Path) -> None:
    state = build_model(STUDENT, 100).state_dict()
    state["stem.0.weight"] = torch.zeros(4, 3, 5, 5)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match="3 keys of another shape"):
        build_model(STUDENT, 10, str(tmp_path / "w.pth"), new_head=True)
    del state["stem.0.weight"], state["stage1.0.body.0.weight"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match="2 missing keys"):
        build_model(STUDENT, 10, str(tmp_path / "w.pth"), new_head=True)


@pytest.mark.parametrize("name", ["squeezenet1_1", "googlenet"])
def test_published_weights_of_other_classes_start_a_new_head(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torchvision import models

    options = {"init_weights": False} if name == "googlenet" else {}
    full = models.get_model(name, **options).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *args, **options: full)
    started = build_model(name, 10, "published", new_head=True)
    own = started.state_dict()
    changed = {key for key in own if own[key].shape != full[key].shape}
    assert {key.rpartition(".")[0] for key in changed} == {"fc" if name == "googlenet" else "classifier.1"}
    assert all(torch.equal(own[key], full[key]) for key in own if key not in changed)
    assert started.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
    assert f"published for {name} have 1000 classes, the data has 10" in caplog.text
