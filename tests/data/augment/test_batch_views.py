from __future__ import annotations

import hashlib
import pickle
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimkd_ray.data.augment.batch_views import CropFlip, crop_flip, crop_flip_parameters, splitmix64, view_key

INT64 = st.integers(-(2**63), 2**63 - 1)


def reference_splitmix64(counter: int, seed: int) -> int:
    """One number, in Python's unbounded integers."""
    mask = 2**64 - 1
    x = (seed + (counter + 1) * 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def reference_parameters(id: int, view: int, seed: int, padding: int) -> tuple[int, int, bool]:
    digest = hashlib.blake2b(struct.pack("<QQ", seed % 2**64, view % 2**64), digest_size=8).digest()
    bits = reference_splitmix64(id, int.from_bytes(digest, "little"))
    high, low = bits >> 32, bits & (2**32 - 1)
    places = 2 * padding + 1
    return (high >> 1) * places >> 31, low * places >> 32, high % 2 == 1


def test_published_outputs() -> None:
    """The first five numbers of seed 1234567, as the reference implementation gives them."""
    ours = [value % 2**64 for value in splitmix64(torch.arange(5), 1234567).tolist()]
    assert ours == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(counters=st.lists(INT64, min_size=1, max_size=9), seed=INT64)
@settings(max_examples=100, deadline=None)
def test_bits_are_those_of_unbounded_integers(counters: list[int], seed: int) -> None:
    ours = [value % 2**64 for value in splitmix64(torch.tensor(counters), seed).tolist()]
    assert ours == [reference_splitmix64(counter, seed) for counter in counters]


@given(
    ids=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=6),
    view=st.integers(0, 2**40),
    seed=INT64,
    padding=st.integers(0, 5),
    flip=st.booleans(),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    channels_last=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_equals_padding_and_slicing(
    ids: list[int],
    view: int,
    seed: int,
    padding: int,
    flip: bool,
    shape: tuple[int, int, int],
    channels_last: bool,
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (len(ids), *shape), dtype=np.uint8)
    given_images = torch.from_numpy(images.copy())
    if channels_last:
        given_images = given_images.contiguous(memory_format=torch.channels_last)
    ours = crop_flip(given_images, torch.tensor(ids), view_key(view, seed), padding, flip)
    assert ours.dtype == torch.uint8
    for image, id, result in zip(images, ids, ours.numpy(), strict=True):
        top, left, mirrored = reference_parameters(id, view, seed, padding)
        padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
        expected = padded[:, top : top + shape[1], left : left + shape[2]]
        np.testing.assert_array_equal(result, expected[:, :, ::-1] if flip and mirrored else expected)
    np.testing.assert_array_equal(given_images.numpy(), images)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    images = torch.arange(6 * 3 * 8 * 8, dtype=torch.int64).remainder(251).to(torch.uint8).view(6, 3, 8, 8)
    ids = torch.tensor([5, 3, 9, 2**40, 0, 7])
    whole = crop_flip(images, ids, view_key(2, 1), 2, True)
    for place in range(6):
        alone = crop_flip(images[place : place + 1], ids[place : place + 1], view_key(2, 1), 2, True)
        assert torch.equal(alone[0], whole[place])


@given(key=st.integers(-(2**63), 2**63 - 1), id=st.integers(0, 2**62))
def test_a_key_on_the_device_means_what_a_number_does(key: int, id: int) -> None:
    ids = torch.tensor([id])
    assert torch.equal(splitmix64(ids, torch.tensor(key)), splitmix64(ids, key))


def test_draws_are_uniform_and_differ_by_every_key() -> None:
    count, padding = 40_000, 1
    top, left, flip = crop_flip_parameters(torch.arange(count), view_key(0, 0), padding)
    cells = torch.bincount((top * 3 + left) * 2 + flip.long(), minlength=18)
    expected = count / 18
    assert len(cells) == 18
    assert (cells - expected).abs().max() < 5 * expected**0.5  # five standard deviations
    for view, seed in ((1, 0), (0, 1), (0, -1)):
        other = crop_flip_parameters(torch.arange(count), view_key(view, seed), padding)
        same = (top == other[0]) & (left == other[1]) & (flip == other[2])
        assert abs(same.sum().item() - expected) < 5 * expected**0.5  # as often as unrelated draws agree


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_equals_cpu_without_waiting() -> None:
    images = torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8)
    ids = torch.arange(32) * 2**33
    torch.cuda.set_sync_debug_mode("error")
    try:
        theirs = crop_flip(images.cuda(), ids.pin_memory(), view_key(3, 4), 4, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(theirs.cpu(), crop_flip(images, ids, view_key(3, 4), 4, True))


def test_pickles() -> None:
    batch = CropFlip(padding=1, flip=True)
    images, ids = torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4), torch.tensor([4])
    again = pickle.loads(pickle.dumps(batch))  # noqa: S301
    assert torch.equal(again(images, ids, 5), crop_flip(images, ids, 5, 1, True))
