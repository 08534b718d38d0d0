from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from mimkd_ray.config import MixConfig
from mimkd_ray.data.augment.mixing import Mix, draw_mix, mix, mix_by_numbers, mix_numbers
from mimkd_ray.errors import UserError

BOTH = MixConfig(mixup_alpha=0.4, cutmix_alpha=1.0)


def batch(size: int = 5, height: int = 9, width: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn((size, 3, height, width), generator=generator)
    return images, torch.randint(0, 7, (size,), generator=generator)


def forced(transform: Any, what: Mix) -> Any:
    """torchvision's transform with our numbers in place of its own."""
    own = {"lam": what.own} if what.box is None else {"box": what.box, "lam_adjusted": what.own}
    transform.make_params = lambda flat_inputs: own
    return transform


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_equals_torchvision(kind: str) -> None:
    config = MixConfig(**{f"{kind}_alpha": 1.0})
    images, labels = batch()
    kept = images.clone()
    for step in range(12):
        what = draw_mix(config, 3, step, 1, 9, 12)
        assert what is not None
        assert (what.box is None) == (kind == "mixup")
        theirs = forced((v2.MixUp if kind == "mixup" else v2.CutMix)(num_classes=7), what)
        expected_images, expected_labels = theirs(images, labels)
        ours_images, ours_labels = mix(images, labels, 7, what)
        torch.testing.assert_close(ours_images, expected_images, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours_labels, expected_labels, rtol=0, atol=1e-6)
        assert torch.equal(images, kept)


@pytest.mark.parametrize("config", [MixConfig(mixup_alpha=0.4), MixConfig(cutmix_alpha=1.0), MixConfig()])
def test_numbers_that_a_graph_reads_mix_alike(config: MixConfig) -> None:
    images, labels = batch()
    for step in range(12):
        what = draw_mix(config, 3, step, 1, 9, 12)
        ours_images, ours_labels = mix_by_numbers(images, labels, 7, mix_numbers(what))
        expected_images, expected_labels = mix(images, labels, 7, what)
        rounding = 1e-6 if config.mixup_alpha else 0.0
        torch.testing.assert_close(ours_images, expected_images, rtol=0, atol=rounding)
        torch.testing.assert_close(ours_labels, expected_labels, rtol=0, atol=1e-6)


@given(
    seed=st.integers(0, 2**63),
    step=st.integers(0, 10**9),
    lane=st.integers(0, 1000),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    alpha=st.floats(0.05, 20),
)
@settings(max_examples=100, deadline=None)
def test_shares(seed: int, step: int, lane: int, height: int, width: int, alpha: float) -> None:
    config = MixConfig(mixup_alpha=alpha, cutmix_alpha=alpha)
    own = torch.zeros(2, 1, height, width)
    own[1] = 1  # image 1 counts its own pixels
    images, labels = mix(own, torch.tensor([0, 1]), 3, draw_mix(config, seed, step, lane, height, width))
    torch.testing.assert_close(labels.sum(1), torch.ones(2))
    assert labels.dtype == torch.float32
    assert labels.min() >= 0
    assert labels[:, 2].tolist() == [0, 0]
    # The label's share is the image's exact share, be it of area or of brightness.
    assert images[1].mean().item() == pytest.approx(labels[1, 1].item(), abs=1e-5)
    assert images[0].mean().item() == pytest.approx(labels[0, 1].item(), abs=1e-5)


def test_a_function_of_seed_step_and_lane() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    draws = [draw_mix(BOTH, *key, 224, 224) for key in keys]
    assert len(set(draws)) == len(keys)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    assert [draw_mix(BOTH, *key, 224, 224) for key in keys] == draws


def test_draws_never_change() -> None:
    """Frozen values: a resumed run must mix as the run before it, whatever NumPy has become."""
    mixup = draw_mix(MixConfig(mixup_alpha=0.2), 5, 7, 1, 32, 32)
    cutmix = draw_mix(MixConfig(cutmix_alpha=1.0), 5, 7, 1, 32, 32)
    assert mixup == (pytest.approx(0.4976029739686257, rel=1e-12), None)
    assert cutmix == (0.9296875, (0, 13, 6, 25))


def test_probabilities() -> None:
    config = MixConfig(mixup_alpha=1.0, cutmix_alpha=1.0, probability=0.6, switch_probability=0.25)
    draws = [draw_mix(config, 0, step, 0, 32, 32) for step in range(2000)]
    mixed = [what for what in draws if what is not None]
    assert len(mixed) / 2000 == pytest.approx(0.6, abs=0.05)
    assert sum(what.box is not None for what in mixed) / len(mixed) == pytest.approx(0.25, abs=0.06)
    shares = [what.own for what in mixed if what.box is None]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.04)  # Beta(1, 1) is uniform
    assert np.var(shares) == pytest.approx(1 / 12, abs=0.01)
    always = MixConfig(mixup_alpha=1.0, cutmix_alpha=1.0, switch_probability=1)
    assert all(draw_mix(always, 0, step, 0, 32, 32).box for step in range(50))  # type: ignore[union-attr]


@pytest.mark.parametrize("config", [MixConfig(), MixConfig(mixup_alpha=1.0, probability=0)])
def test_off(config: MixConfig) -> None:
    images, labels = batch()
    same, one_hot = mix(images, labels, 7, draw_mix(config, 0, 0, 0, 9, 12))
    assert same is images
    assert torch.equal(one_hot.argmax(1), labels)
    assert one_hot.sum().item() == 5
    assert not config.active


@pytest.mark.parametrize(
    ("field", "value"),
    [("mixup_alpha", -0.1), ("cutmix_alpha", float("nan")), ("probability", 1.1), ("switch_probability", -1)],
)
def test_bad_settings(field: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"{field} (=|is) .*give"):
        MixConfig(**{field: value})
