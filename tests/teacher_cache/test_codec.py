"""Codecs against NumPy, row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mimkd_ray.config.form.codec_spec import CodecSpec, parse_spec
from mimkd_ray.errors import UserError
from mimkd_ray.teacher_cache.calibration import Fitter
from mimkd_ray.teacher_cache.codec import Calibration, Codec, Shape, coded_shape, needs_calibration

CPU = torch.device("cpu")
MAP, VECTOR = Shape(12, 7, 7), Shape(12)


def features(shape: Shape, rows: int = 64, seed: int = 0) -> torch.Tensor:
    """Correlated channels of very different sizes, half of them one-sided, as after a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(shape.channels, shape.channels, generator=torch.Generator().manual_seed(9))
    noise = torch.randn(rows, shape.locations, shape.channels, generator=generator)
    values = noise @ mixing * torch.logspace(-2, 2, shape.channels)
    values[..., ::2].relu_()
    values = values.transpose(1, 2)
    return values.unflatten(2, (shape.height, shape.width)) if shape.is_map else values[..., 0]


def fitted(text: str, shape: Shape) -> tuple[Codec, Calibration | None]:
    spec = parse_spec(text)
    calibration = None
    if needs_calibration(spec, shape):
        fitter = Fitter(spec, shape, 256, CPU)
        for seed in range(4):
            fitter.add(features(shape, 64, seed))
        calibration = fitter.finish()
    return Codec(spec, shape, calibration, CPU), calibration


def slow_pool(image_CHW: np.ndarray, side: int) -> np.ndarray:
    """Adaptive average pooling by its definition: cell i covers rows floor(i H / side) to ceil((i + 1) H / side)."""
    channels, height, width = image_CHW.shape
    rows, columns = min(side, height), min(side, width)
    out = np.zeros((channels, rows, columns))
    for r in range(rows):
        for c in range(columns):
            top, bottom = r * height // rows, -(-(r + 1) * height // rows)
            left, right = c * width // columns, -(-(c + 1) * width // columns)
            out[:, r, c] = image_CHW[:, top:bottom, left:right].mean((1, 2))
    return out


@pytest.mark.parametrize("text", ["fp32", "pool4,fp32", "pca5,fp32", "pool3,pca5,uint8", "pool4,pca99,fp16", "bf16"])
def test_apply_is_pool_and_projection(text: str) -> None:
    codec, calibration = fitted(text, MAP)
    batch = features(MAP, 3, 7)
    got = codec.apply(batch)
    assert got.shape[1:] == tuple(codec.coded)
    assert got.dtype == torch.float32
    for image, row in zip(batch.double().numpy(), got.numpy(), strict=True):
        expected = slow_pool(image, codec.spec.pool or 7)
        if calibration is not None and calibration.components_KC is not None:
            centred = expected - calibration.mean_C.double().numpy()[:, None, None]
            expected = np.einsum("kc,chw->khw", calibration.components_KC.double().numpy(), centred)
        np.testing.assert_allclose(row, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("shape", [MAP, VECTOR])
@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16"])
def test_floats_come_back_rounded_once(shape: Shape, kind: str) -> None:
    codec, _ = fitted(kind, shape)
    batch = features(shape)
    rows = codec.pack(codec.apply(batch))
    assert rows.dtype == torch.uint8
    assert rows.shape == (64, codec.row_bytes)
    numbers = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    assert torch.equal(codec.decode(rows), batch.to(numbers[kind]).float())


def test_a_row_is_channels_last_in_its_type() -> None:
    codec, _ = fitted("fp16", MAP)
    image = features(MAP, 1)
    row = codec.pack(codec.apply(image))[0].numpy().tobytes()
    values = np.frombuffer(row, np.float16).reshape(7, 7, 12)
    np.testing.assert_array_equal(values, image[0].permute(1, 2, 0).numpy().astype(np.float16))


@pytest.mark.parametrize("text", ["uint8", "pool4,pca6,uint8"])
@pytest.mark.parametrize("shape", [MAP, VECTOR])
def test_uint8_is_rounding_in_each_channels_range(text: str, shape: Shape) -> None:
    text = text if shape.is_map else text.removeprefix("pool4,")
    codec, calibration = fitted(text, shape)
    assert calibration is not None
    low, step = calibration.low_K.numpy(), calibration.step_K.numpy()
    coded = codec.apply(features(shape))
    rows = codec.pack(coded)
    wanted = coded.permute(0, 2, 3, 1).flatten(1) if shape.is_map else coded
    grid = wanted.reshape(-1, codec.coded.channels).numpy().astype(np.float64)
    stored = np.clip(np.round((grid - low) / step), 0, 255)
    got = rows.reshape(-1, codec.coded.channels).numpy()
    assert (np.abs(got - stored) <= 1).all()
    assert (got != stored).mean() < 1e-3, "ties and float32 may round otherwise"
    back = codec.decode(rows).permute(0, 2, 3, 1) if shape.is_map else codec.decode(rows)
    off = np.abs(back.reshape(-1, codec.coded.channels).numpy() - (low + got.astype(np.float64) * step))
    assert (off < 1e-4 * step).all(), "float32 over 255 steps"
    inside = (grid >= low) & (grid <= low + 255 * step)
    error = np.abs(back.reshape(-1, codec.coded.channels).numpy() - grid)
    assert (error <= 0.51 * step)[inside].all()
    assert inside.mean() > 0.97


def test_relative_error_of_each_type() -> None:
    batch = features(MAP)
    errors = {}
    for text in ("fp32", "fp16", "bf16", "uint8"):
        codec, _ = fitted(text, MAP)
        coded = codec.apply(batch)
        errors[text] = float((codec.decode(codec.pack(coded)) - coded).norm() / coded.norm())
    assert errors["fp32"] == 0
    assert errors["fp16"] < 3e-4 < errors["bf16"] < 3e-3 < errors["uint8"] < 0.02


def test_shapes_and_sizes() -> None:
    assert coded_shape(CodecSpec("uint8", 4, 256), Shape(1024, 14, 14)) == Shape(256, 4, 4)
    assert Codec(CodecSpec("fp16"), Shape(1024, 14, 14), None, CPU).row_bytes == 401_408
    default = coded_shape(parse_spec("pool4,pca256,uint8"), Shape(2048, 7, 7))
    assert default.channels * default.locations == 4096
    assert coded_shape(parse_spec("pool4,pca256,fp32"), Shape(64, 3, 2)) == Shape(64, 3, 2)


def test_decode_gives_maps_channels_last_and_float64_where_asked() -> None:
    codec, _ = fitted("pool4,pca6,uint8", MAP)
    back = codec.decode(codec.pack(codec.apply(features(MAP))), torch.float64)
    assert back.dtype == torch.float64
    assert back.is_contiguous(memory_format=torch.channels_last)
    assert codec.apply(features(MAP).double()).dtype == torch.float64


def test_autocast_changes_nothing() -> None:
    codec, _ = fitted("pool4,pca6,uint8", MAP)
    batch = features(MAP)
    plain = codec.pack(codec.apply(batch))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec.pack(codec.apply(batch)), plain)


@pytest.mark.parametrize("text", ["pool4", "pca0,fp16", "pca4,pool4,fp16", "pool4,pool2,uint8", "int8", "", "fp16,"])
def test_senseless_specs(text: str) -> None:
    with pytest.raises(UserError, match=r"cannot be read: give .*such as pool4,pca256,uint8 or fp16"):
        parse_spec(text)


def test_specs_read_as_they_are_written() -> None:
    for text in ("pool4,pca256,uint8", "pca32,bf16", "fp16"):
        assert str(parse_spec(text)) == text
    with pytest.raises(UserError, match="a vector of 12 channels has no locations"):
        coded_shape(parse_spec("pool4,uint8"), VECTOR)
