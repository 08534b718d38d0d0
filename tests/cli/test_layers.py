"""`python -m mimkd_ray layers NAME`."""

from __future__ import annotations

import runpy
import sys

import pytest

from mimkd_ray import __main__ as command
from mimkd_ray.__main__ import main


def _rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, list[str]]:
    assert main(["layers", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("LAYER@input is what a layer is given")
    return {line.split()[0]: line.split()[1:] for line in lines[2:-1]}


def test_table_of_resnet18(capsys: pytest.CaptureFixture[str]) -> None:
    rows = _rows(capsys, "resnet18")
    # 512 * 7 * 7 values of two bytes are 50,176 bytes.
    assert rows["layer4"] == ["map", "512x7x7", "50.2", "map"]
    assert rows["avgpool"] == ["map", "512x1x1", "1.0", "vector"]
    assert rows["fc"] == ["vector", "1000", "2.0"]
    assert [name for name, cells in rows.items() if cells[-1] == "map"] == [
        "layer1",
        "layer2",
        "layer3",
        "layer4",
    ]
    assert "layer1.0" in rows
    assert "layer1.0.conv1" not in rows


def test_the_last_line_names_the_default_taps_before_their_activation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layers", "cifar/resnet14"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "LAYER@input is what a layer is given; default taps before their activation: "
        "stage1.1.relu@input stage2.1.relu@input stage3.1.relu@input"
    )
    assert main(["layers", "cifar/wrn_16_2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "LAYER@input is what a layer is given"


def test_all_and_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    rows = _rows(capsys, "cifar/resnet8", "--all", "--num-classes", "10")
    assert rows["stage3"] == ["map", "64x8x8", "8.2", "map"], "32 pixels are the default of cifar networks"
    assert rows["head"] == ["vector", "10", "0.0"]
    assert "stage1.0.body.0" in rows
    assert _rows(capsys, "cifar/resnet8", "--image-size", "64")["stage3"][1] == "64x16x16"


def test_tokens_and_networks_that_meta_cannot_build(capsys: pytest.CaptureFixture[str]) -> None:
    assert _rows(capsys, "vit_b_32")["encoder"] == ["tokens", "(7*7+1)x768", "76.8", "vector"]
    assert _rows(capsys, "regnet_x_400mf")["avgpool"] == ["map", "400x1x1", "0.8", "vector"]


def test_errors_are_one_line_and_exit_status_two(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["mimkd_ray", "layers", "resnet35"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(command.__file__, run_name="__main__")
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("python -m mimkd_ray layers: unknown model 'resnet35'")
    assert "did you mean" in said.err
    assert said.err.count("\n") == 1
