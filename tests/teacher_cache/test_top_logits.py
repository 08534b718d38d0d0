"""Top logits against NumPy in float64, class by class."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mimkd_ray.config.form.codec_spec import CodecSpec, parse_logits
from mimkd_ray.errors import UserError
from mimkd_ray.losses.methods.kd import kd_loss
from mimkd_ray.teacher_cache.codec import Shape, make_codec, row_bytes
from mimkd_ray.teacher_cache.keys import logits_entry
from mimkd_ray.teacher_cache.top_logits import TopLogits

CPU = torch.device("cpu")
CLASSES = 50


def logits(rows: int = 16, classes: int = CLASSES, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 4 * torch.randn(rows, classes, generator=generator) + 3


def slow_share(row_C: np.ndarray, kept: int) -> np.ndarray:
    """By its definition: the largest stay, and all others have the logarithm of the mean of their exponentials."""
    row_C = row_C.astype(np.float64)
    order = sorted(range(len(row_C)), key=lambda c: -row_C[c])
    shared = np.log(np.mean([np.exp(row_C[c]) for c in order[kept:]]))
    return np.array([row_C[c] if c in order[:kept] else shared for c in range(len(row_C))])


@pytest.mark.parametrize("kept", [1, 7, 49])
def test_apply_shares_the_mass_of_the_others_evenly(kept: int) -> None:
    batch = logits()
    got = TopLogits(kept, CLASSES).apply(batch)
    assert got.dtype == torch.float32
    for row, expected in zip(got.numpy(), batch.numpy(), strict=True):
        np.testing.assert_allclose(row, slow_share(expected, kept), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(TopLogits(kept, CLASSES).apply(got), got, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kept", [1, 7, 49])
def test_probabilities_of_the_kept_and_of_all_others_are_exact_at_temperature_one_alone(kept: int) -> None:
    batch = logits().double()
    top = batch.topk(kept).indices
    for temperature, exact in ((1.0, True), (4.0, kept == CLASSES - 1)):
        true, got = (F.softmax(x / temperature, 1) for x in (batch, TopLogits(kept, CLASSES).apply(batch)))
        same = [true.gather(1, top), got.gather(1, top)]
        assert torch.allclose(*same, rtol=1e-9, atol=0) == exact
        if not exact:
            assert (same[1] < same[0]).all(), "as the docstring says: the kept come out too small"


@pytest.mark.parametrize(
    ("classes", "number"), [(CLASSES, np.uint16), (65_536, np.uint16), (65_537, np.uint32), (100_000, np.uint32)]
)
def test_a_row_is_values_share_and_numbers(classes: int, number: type) -> None:
    """Read with NumPy: also class numbers that need all 16 bits, and more."""
    batch = logits(3, classes)
    batch[:, -1] = 40.0  # the last class is the largest
    codec = TopLogits(5, classes)
    rows = codec.pack(codec.apply(batch))
    assert rows.shape == (3, codec.row_bytes)
    assert codec.row_bytes == 5 * 2 + 2 + 5 * np.dtype(number).itemsize
    back = codec.decode(rows)
    for row, image, decoded in zip(rows.numpy(), batch.numpy(), back.numpy(), strict=True):
        order = np.argsort(-image, kind="stable")[:5]
        np.testing.assert_array_equal(np.frombuffer(row[12:].tobytes(), number), order)
        np.testing.assert_array_equal(np.frombuffer(row[:10].tobytes(), np.float16), image[order].astype(np.float16))
        others = np.delete(image.astype(np.float64), order)
        share = np.frombuffer(row[10:12].tobytes(), np.float16)[0]
        assert share == pytest.approx(np.log(np.exp(others).mean()), rel=2**-10)
        np.testing.assert_allclose(decoded, slow_share(image, 5), rtol=2**-10)
    assert codec.decode(rows, torch.float64).dtype == torch.float64


def test_decoded_is_applied_up_to_fp16() -> None:
    """Nothing but rounding lies between a cached run and a live one, in the logits and in the loss that reads them."""
    batch, codec = logits(64), TopLogits(8, CLASSES)
    live = codec.apply(batch)
    cached = codec.decode(codec.pack(live))
    torch.testing.assert_close(cached, live.half().float(), rtol=2**-10, atol=0)
    assert 0 < float((cached - live).norm() / live.norm()) < 2**-11
    student = torch.randn(64, CLASSES, generator=torch.Generator().manual_seed(1))
    for temperature in (1.0, 4.0):
        ours, theirs = kd_loss(student, cached, temperature), kd_loss(student, live, temperature)
        assert float(ours) == pytest.approx(float(theirs), rel=1e-3)
    assert float(kd_loss(student, live, 4.0)) != pytest.approx(float(kd_loss(student, batch, 4.0)), rel=1e-2)


def test_half_precision_and_zeros() -> None:
    codec = TopLogits(3, CLASSES)
    assert codec.apply(logits().bfloat16()).dtype == torch.float32
    zeros = codec.decode(torch.zeros(2, codec.row_bytes, dtype=torch.uint8))
    assert torch.isfinite(zeros).all(), "what is stored of an image that could not be decoded"


def test_too_large_for_fp16_comes_back_as_not_finite() -> None:
    """A build rejects such logits."""
    batch = logits(2)
    batch[1, 4] = 1e6
    codec = TopLogits(3, CLASSES)
    finite = torch.isfinite(codec.decode(codec.pack(codec.apply(batch)))).all(1)
    assert finite.tolist() == [True, False]


def test_specs() -> None:
    assert parse_logits("top32") == CodecSpec("fp16", top=32)
    for text in ("top32", "fp16", "bf16", "fp32"):
        assert str(parse_logits(text)) == text
    assert row_bytes(parse_logits("top32"), Shape(1000)) == 130
    assert row_bytes(parse_logits("fp16"), Shape(1000)) == 2000
    assert isinstance(make_codec(parse_logits("top3"), Shape(10), None, CPU), TopLogits)
    for text in ("top0", "top", "top-1", "top1.5", "uint8", "top8,fp32", "", "pool4,fp16"):
        with pytest.raises(UserError, match=r"cache.logits '.*' cannot be read: give fp16, .* K being 1 or more"):
            parse_logits(text)


@pytest.mark.parametrize("kept", [10, 11])
def test_as_many_as_there_are_classes(kept: int) -> None:
    message = f"cache.logits is top{kept}, and there are 10 classes: keep fewer, such as --cache.logits top2, or all"
    with pytest.raises(UserError, match=message):
        logits_entry(10, f"top{kept}")
    assert str(logits_entry(10, "top9").spec) == "top9"
