"""Calibrations against NumPy on the whole sample, and their files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_codec import CPU, MAP, VECTOR, features

from mimkd_ray.config.form.codec_spec import parse_spec
from mimkd_ray.errors import DamagedDataError
from mimkd_ray.teacher_cache import calibration as module
from mimkd_ray.teacher_cache.calibration import Fitter, Moments, from_bytes, principal, publish, ranges, read, to_bytes
from mimkd_ray.teacher_cache.codec import Shape


def test_moments_are_those_of_all_rows_together() -> None:
    """Far from zero, where a sum of squares in float32 would lose all digits."""
    rows = torch.randn(1000, 5, dtype=torch.float64) * 1e-3 + 1e3
    moments = Moments(5, CPU)
    for part in rows.split([1, 400, 99, 500]):
        moments.add(part)
    np.testing.assert_allclose(moments.mean_C, rows.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.scatter_CC / 1000, np.cov(rows.numpy().T, bias=True), rtol=1e-6, atol=1e-15)


def test_components_are_those_of_a_singular_value_decomposition() -> None:
    fitter = Fitter(parse_spec("pool4,pca5,fp32"), MAP, 256, CPU)
    rows = []
    for seed in range(4):
        batch = features(MAP, 64, seed)
        fitter.add(batch)
        rows.append(torch.nn.functional.adaptive_avg_pool2d(batch, 4).permute(0, 2, 3, 1).reshape(-1, 12))
    found = fitter.finish()
    table = torch.cat(rows).double().numpy()
    _, sizes, right = np.linalg.svd(table - table.mean(0), full_matrices=False)
    assert found.rows == 256
    assert found.low_K is None
    assert found.retained == pytest.approx((sizes[:5] ** 2).sum() / (sizes**2).sum(), rel=1e-9)
    dots = np.einsum("kc,kc->k", found.components_KC.double().numpy(), right[:5])
    np.testing.assert_allclose(np.abs(dots), 1, atol=1e-6)
    peaks = found.components_KC.gather(1, found.components_KC.abs().argmax(1, keepdim=True))
    assert (peaks > 0).all(), "signs are fixed"


def test_nothing_varies() -> None:
    components, retained = principal(torch.zeros(4, 4, dtype=torch.float64), 2)
    assert retained == 1
    torch.testing.assert_close(components @ components.T, torch.eye(2, dtype=torch.float64))
    low, step = ranges(torch.full((10, 3), 2.5))
    assert low.tolist() == [2.5] * 3
    assert step.tolist() == [1.0] * 3


def test_ranges_leave_out_a_tail_that_costs_more_than_it_is_worth() -> None:
    """Each channel has the least squared error of all tails, computed here one by one."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(20_000, 3, generator=generator)
    values[:, 1] = torch.rand(20_000, generator=generator) * 2 - 1
    values[:2, 1] = torch.tensor([-1.01, 1.01])
    values[0, 2] = 1e5  # one stray value
    low, step = ranges(values)

    def cost(channel: int, low: float, step: float) -> float:
        x = values[:, channel].double().numpy()
        return float(((np.clip(np.round((x - low) / step), 0, 255) * step + low - x) ** 2).sum())

    for channel in range(3):
        ordered = np.sort(values[:, channel].double().numpy())
        costs = []
        for tail in module.TAILS:
            cut = round(tail * 19_999)
            costs.append(cost(channel, ordered[cut], (ordered[-1 - cut] - ordered[cut]) / 255))
        assert cost(channel, float(low[channel]), float(step[channel])) == pytest.approx(min(costs), rel=1e-3)
    assert float(low[1]) > -1.001, "a stray value on either side is clipped"
    assert float(low[1] + 255 * step[1]) < 1.001
    assert float(low[2] + 255 * step[2]) > 9e4, "a value that large is worth its range"


def test_a_batch_of_damaged_images_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(20, 6, 3, 3, generator=generator) for _ in range(2)]
    fitted = []
    for empty in (False, True):
        fitter = Fitter(parse_spec("pca4,uint8"), Shape(6, 3, 3), 40, CPU)
        for batch in batches:
            if empty:
                fitter.add(batch[:0])
            fitter.add(batch)
        fitted.append(to_bytes(fitter.finish()))
    assert fitted[0] == fitted[1]


def test_a_sample_without_an_image_is_no_calibration() -> None:
    fitter = Fitter(parse_spec("uint8"), Shape(6, 3, 3), 40, CPU)
    fitter.add(torch.empty(0, 6, 3, 3))
    with pytest.raises(DamagedDataError, match=r"none of the 40 images .* --cache.calibration-rows"):
        fitter.finish()


def test_kept_values_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_VALUES", 1200)
    fitter = Fitter(parse_spec("uint8"), MAP, 128, CPU)
    for seed in range(2):
        fitter.add(features(MAP, 64, seed))
    kept = torch.cat(fitter.kept)
    every = torch.cat([features(MAP, 64, seed).permute(0, 2, 3, 1).reshape(-1, 12) for seed in range(2)])
    assert kept.numel() <= 1200
    assert torch.equal(kept, every[:: fitter.every]), "evenly over all batches"


@pytest.mark.parametrize("text", ["pool4,pca5,uint8", "pca5,fp16", "uint8"])
def test_files(tmp_path: Path, text: str) -> None:
    fitter = Fitter(parse_spec(text), MAP, 64, CPU)
    fitter.add(features(MAP))
    made = fitter.finish()
    data = to_bytes(made)
    assert to_bytes(made) == data
    back = from_bytes(data, "x")
    assert (back.rows, back.retained) == (made.rows, made.retained)
    for name in ("mean_C", "components_KC", "low_K", "step_K"):
        ours, theirs = getattr(back, name), getattr(made, name)
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    url = str(tmp_path / "calibrations" / "a.safetensors")
    assert read(url) is None
    assert publish(url, data) == data
    assert publish(url, b"another one") == data, "the first one counts"
    for damaged in (data[:-1], data[:20], b"", b"\xff" * 40):
        with pytest.raises(DamagedDataError, match="is no calibration of a codec"):
            from_bytes(damaged, url)


def test_a_vector_is_one_location() -> None:
    fitter = Fitter(parse_spec("pca3,uint8"), VECTOR, 64, CPU)
    fitter.add(features(VECTOR))
    assert fitter.finish().components_KC.shape == (3, 12)
