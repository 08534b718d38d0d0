"""Memory of the all-pairs terms: linear in the inputs, where scoring all pairs of all locations at once is not."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mimkd_ray.config import CriticConfig
from mimkd_ray.losses import terms
from mimkd_ray.losses.critics import DotCritic
from mimkd_ray.losses.negatives import valid_pairs
from mimkd_ray.losses.terms import Candidates, Objective, score_term

BATCH, LOCATIONS, WIDTH = 256, 49, 128
ALL_AT_ONCE = 2**62  # bytes that scores may take


class Embedded(DotCritic):
    """A dot critic whose inputs are embeddings already, so that only the scoring is measured."""

    def embed_teacher(self, reduced_LKC, lane=None):
        return reduced_LKC

    def embed_student(self, feature):
        return feature


def peak_extra_bytes(run) -> int:
    """Highest sum of what was allocated and not yet freed while ``run`` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events, "the profiler recorded no allocation"
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def local_term(teacher, student, critic, score_bytes=0):
    candidates = Candidates(teacher, valid_pairs(torch.arange(BATCH), "all"))
    loss, _ = score_term(critic, Objective("infonce"), candidates, student, score_bytes=score_bytes)
    loss.backward()


def test_the_meter_counts_what_is_alive():
    def run():
        first = torch.empty(1000, 1000)
        second = torch.empty(500, 1000)
        del first
        third = torch.empty(100, 1000)
        return second.numel() + third.numel()

    assert peak_extra_bytes(run) == pytest.approx(6e6, rel=0.01)


@pytest.mark.parametrize("teacher_locations", [1, LOCATIONS])
def test_extra_memory_is_under_three_times_the_inputs(teacher_locations, monkeypatch):
    """Beside the few MiB of scores that are always computed at once."""
    monkeypatch.setattr(terms, "SMALL_SCORE_BYTES", 0)
    torch.manual_seed(0)
    critic = Embedded(4, 4, CriticConfig(width=WIDTH))
    teacher, student = (
        torch.nn.functional.normalize(torch.randn(count, BATCH, WIDTH), dim=-1)
        for count in (teacher_locations, LOCATIONS)
    )
    student.requires_grad_()
    teacher.requires_grad_()  # embeddings of a teacher have a gradient: its projection learns
    inputs = teacher.nbytes + student.nbytes
    ours = peak_extra_bytes(lambda: local_term(teacher, student, critic)) / inputs
    student.grad = teacher.grad = None
    naive = peak_extra_bytes(lambda: local_term(teacher, student, critic, ALL_AT_ONCE)) / inputs
    print(f"extra memory / inputs: ours {ours:.2f}, all at once {naive:.2f}")
    assert ours < 3
    assert naive > (6 if teacher_locations == 1 else 4)  # twice the inputs, the same scores
