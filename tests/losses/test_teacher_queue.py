"""The queue of teacher vectors, against a plain list."""

from __future__ import annotations

import pytest
import torch

from mimkd_ray.errors import UserError
from mimkd_ray.losses.teacher_queue import MOST_BYTES, TeacherQueue


@pytest.mark.parametrize("sizes", [(3, 3, 3, 3), (5, 2, 7), (1,), (20, 3)])
def test_holds_the_newest_whatever_the_steps(sizes: tuple[int, ...]) -> None:
    queue = TeacherQueue(8, {"a": 2, "b.c": 3})
    seen: list[tuple[int, int]] = []
    generator = torch.Generator().manual_seed(0)
    vectors: dict[int, torch.Tensor] = {}
    for size in sizes:
        ids = torch.arange(len(vectors), len(vectors) + size)
        labels = torch.randint(5, (size,), generator=generator)
        a, b = torch.randn(size, 2, generator=generator), torch.randn(size, 3, generator=generator)
        queue.push({"a": a, "b.c": b}, ids, labels)
        vectors |= {int(number): torch.cat([x, y]) for number, x, y in zip(ids, a, b, strict=True)}
        seen += list(zip(ids.tolist(), labels.tolist(), strict=True))
    newest = sorted(seen[-8:])
    filled = queue.filled_Q
    assert int(filled.sum()) == len(newest)
    assert sorted(zip(queue.ids_Q[filled].tolist(), queue.labels_Q[filled].tolist(), strict=True)) == newest
    stored = torch.cat([queue.vectors("a"), queue.vectors("b.c")], dim=1)
    for number, row in zip(queue.ids_Q[filled].tolist(), stored[filled], strict=True):
        torch.testing.assert_close(row, vectors[number].half().float(), rtol=0, atol=0)


def test_moves_with_the_loss_and_is_saved_in_half_precision() -> None:
    queue = TeacherQueue(4, {"t": 2})
    queue.push({"t": torch.tensor([[1.5, -2.25], [1e9, -1e9]])}, torch.tensor([1, 2]), torch.tensor([0, 1]))
    queue.double()
    assert queue.vectors("t").dtype == torch.float64
    assert queue.vectors("t")[0].tolist() == [1.5, -2.25]
    assert queue.vectors("t")[1].tolist() == [65504.0, -65504.0], (
        "what half precision cannot hold is its largest number"
    )
    assert len(queue.vectors("t", 1)) == 1
    again = TeacherQueue(4, {"t": 2})
    state = queue.state_dict()
    assert sum(value.nbytes for key, value in state.items() if "vectors" in key) == 4 * 2 * 2
    again.load_state_dict(state)
    assert again.vectors("t").dtype == torch.float32
    assert torch.equal(again.vectors("t").double(), queue.vectors("t"))


def test_is_bounded_and_the_error_says_by_what() -> None:
    assert TeacherQueue(16_384, {"t": 2048}).size * 2 * 2048 == MOST_BYTES
    with pytest.raises(UserError, match=r"loss.queue is 16385 .* 2048 channels: 64 MiB.*--loss.queue 16384 or less"):
        TeacherQueue(16_385, {"t": 2048})
