"""CRD against loops over images and negatives, with banks kept by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from rival_checks import BATCH, IDS, LABELS, ROWS, arrays, both, check, taps

from mimkd_ray.errors import UserError
from mimkd_ray.losses.methods import crd
from mimkd_ray.losses.methods.crd import CRD, TrainingRows

NEGATIVES = 12


@pytest.fixture(params=["whole bank", "gathered rows"])
def path(request, monkeypatch) -> None:
    """Both ways to score: these 30 rows are few, and 2 images' rows at a time."""
    if request.param == "gathered rows":
        monkeypatch.setattr(crd, "DENSE", 0)
        monkeypatch.setattr(crd, "CPU_CHUNK_BYTES", 2 * (NEGATIVES + 1) * 128 * 8)


def make(rows: TrainingRows = ROWS) -> CRD:
    torch.manual_seed(0)
    return CRD(taps(vectors=True), rows, NEGATIVES).double()


class Slow:
    """Copies of the embeddings, banks and normalisers of a loss, used in the order of its formula."""

    def __init__(self, loss: CRD) -> None:
        self.layers = [
            (layer.weight.detach().numpy().copy(), layer.bias.detach().numpy().copy())
            for layer in (loss.embed_student, loss.embed_teacher)
        ]
        self.student_bank, self.teacher_bank = loss.of_student_Nd.numpy().copy(), loss.of_teacher_Nd.numpy().copy()
        self.z: list[float | None] = [None, None]

    def embed(self, vector: np.ndarray, which: int) -> np.ndarray:
        weight, bias = self.layers[which]
        out = vector @ weight.T + bias
        return out / np.linalg.norm(out, axis=1, keepdims=True)

    def nce(self, own: np.ndarray, bank: np.ndarray, positions: list[list[int]], which: int) -> float:
        total, mass = 12, 30
        raw = np.array([[math.exp(own[b] @ bank[n] / 0.07) for n in row] for b, row in enumerate(positions)])
        if self.z[which] is None:
            self.z[which] = raw.mean() * mass
        share, loss = total / mass, 0.0
        for row in raw / self.z[which]:
            loss -= math.log(row[0] / (row[0] + share))
            loss -= sum(math.log(share / (x + share)) for x in row[1:])
        return loss / len(raw)

    def loss(self, teacher: np.ndarray, student: np.ndarray, positions: list[list[int]]) -> float:
        v_s, v_t = self.embed(student, 0), self.embed(teacher, 1)
        return self.nce(v_s, self.teacher_bank, positions, 0) + self.nce(v_t, self.student_bank, positions, 1)

    def remember(self, teacher: np.ndarray, student: np.ndarray, positions: list[list[int]]) -> None:
        for bank, own in ((self.student_bank, self.embed(student, 0)), (self.teacher_bank, self.embed(teacher, 1))):
            for b, row in enumerate(positions):
                mixed = 0.5 * bank[row[0]] + 0.5 * own[b]
                bank[row[0]] = mixed / np.linalg.norm(mixed)


def positions_of(loss: CRD, seed: int) -> list[list[int]]:
    """The rows that a call draws after this seed: its own, then the negatives."""
    own = [ROWS.ids_N.tolist().index(int(i)) for i in IDS]
    torch.manual_seed(seed)
    drawn = loss.draw(torch.tensor(own)).tolist()
    return [[first, *others] for first, others in zip(own, drawn, strict=True)]


@pytest.mark.usefixtures("path")
def test_three_steps_against_loops() -> None:
    """Values and gradients, the first batch's normalisers, and what the banks take in."""
    loss, seen = make(), []
    slow = Slow(loss)
    for step in range(3):
        teacher, student = both(step)
        positions = positions_of(loss, seed=step)
        of_teacher, of_student = arrays(teacher).vector, arrays(student).vector
        if step == 0:  # the first batch's own normaliser counts as a number, which differences would not see
            torch.manual_seed(step)
            value = loss(teacher, student, LABELS, IDS).item()
            assert value == pytest.approx(slow.loss(of_teacher, of_student, positions), rel=1e-9)
            assert loss.log_z_2.exp().tolist() == pytest.approx(slow.z, rel=1e-9)
        else:
            torch.manual_seed(step)
            value = check(loss, lambda t, s, own=positions: slow.loss(t.vector, s.vector, own), teacher, student)
        slow.remember(of_teacher, of_student, positions)
        assert np.allclose(loss.of_student_Nd.numpy(), slow.student_bank, rtol=1e-12)
        assert np.allclose(loss.of_teacher_Nd.numpy(), slow.teacher_bank, rtol=1e-12)
        assert loss.log_z_2.exp().tolist() == pytest.approx(slow.z, rel=1e-9)
        seen.append(value)
    assert len(set(seen)) == 3


@pytest.mark.usefixtures("path")
def test_gradients_of_the_embeddings_equal_autograd() -> None:
    """Of the published formula, with the banks as constants; the second call, whose normalisers are known."""
    loss = make()
    loss(*both(0), LABELS, IDS)
    teacher, student = both(1)
    rows_BK = torch.tensor(positions_of(loss, seed=9))
    weights = [p.detach().clone().requires_grad_() for p in loss.parameters()]
    expected = torch.zeros((), dtype=torch.float64)
    for which, (vector, bank) in enumerate(
        ((student.vectors["sv"], loss.of_teacher_Nd.clone()), (teacher.vectors["tv"], loss.of_student_Nd.clone()))
    ):
        embedded = vector @ weights[2 * which].T + weights[2 * which + 1]
        embedded = embedded / embedded.norm(dim=1, keepdim=True)
        x_BK = (torch.einsum("bd,bkd->bk", embedded, bank[rows_BK]) / 0.07).exp() / loss.log_z_2[which].exp()
        share = NEGATIVES / 30
        expected = expected - (x_BK[:, 0] / (x_BK[:, 0] + share)).log().mean()
        expected = expected - (share / (x_BK[:, 1:] + share)).log().sum(1).mean()
    expected.backward()
    torch.manual_seed(9)
    got = loss(teacher, student, LABELS, IDS)
    got.backward()
    assert got.item() == pytest.approx(expected.item(), rel=1e-9)
    for mine, reference in zip(loss.parameters(), weights, strict=True):
        assert torch.allclose(mine.grad, reference.grad, rtol=1e-9, atol=1e-12)


def test_negatives_are_of_other_classes_and_evenly_drawn() -> None:
    labels = torch.tensor([0] * 5 + [1] * 10 + [2] * 25)[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    loss = CRD(taps(vectors=True), TrainingRows(torch.arange(40), labels), negatives=60_000)
    torch.manual_seed(0)
    rows = torch.tensor([int((labels == cls).nonzero()[0]) for cls in range(3)])
    for own, drawn in zip(rows, loss.draw(rows), strict=True):
        others = labels != labels[own]
        counts = torch.bincount(drawn, minlength=40)
        assert counts[~others].sum() == 0
        expected = 60_000 / int(others.sum())
        assert ((counts[others] - expected).abs() < 5 * math.sqrt(expected)).all()


def test_ids_are_not_positions() -> None:
    """A subset keeps its ids: they are looked up."""
    ids = torch.tensor([4, 8, 9, 100, 1000])
    loss = CRD(taps(vectors=True), TrainingRows(ids, torch.tensor([0, 1, 2, 3, 0])), NEGATIVES)
    before = loss.of_student_Nd.clone()
    value = both(0)
    loss.double()(*value, LABELS, torch.tensor([9, 1000, 9, 9, 9]))
    changed = (loss.of_student_Nd != before).any(1)
    assert changed.tolist() == [False, False, True, False, True]


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_loaded_state_goes_on_bit_for_bit(compiled: bool) -> None:
    """Also one that is loaded into a loss which has gone on in another way meanwhile, and an untouched one."""
    torch._dynamo.reset()
    loss, other = make(), make()
    call, other_call = (
        (torch.compile(each, fullgraph=True, backend="eager") if compiled else each) for each in (loss, other)
    )
    fresh = {name: value.clone() for name, value in loss.state_dict().items()}

    def go_on(forward, step: int) -> torch.Tensor:
        torch.manual_seed(step)
        return forward(*both(step), LABELS, IDS).detach()

    start = go_on(call, 0)
    state = {name: value.clone() for name, value in loss.state_dict().items()}
    expected = [go_on(call, step) for step in (1, 2)]
    other.load_state_dict(state)
    assert [go_on(other_call, step) for step in (1, 2)] == expected
    other.load_state_dict(fresh)
    assert go_on(other_call, 0) == start
    assert torch.equal(other.log_z_2, state["log_z_2"])


def test_one_class_has_no_negatives() -> None:
    with pytest.raises(UserError, match="all 5 training images are of one class"):
        CRD(taps(vectors=True), TrainingRows(torch.arange(BATCH), torch.ones(BATCH, dtype=torch.long)))


def test_the_state_holds_banks_and_normalisers_and_no_data() -> None:
    names = set(make().state_dict())
    weights = {f"embed_{who}.{what}" for who in ("student", "teacher") for what in ("weight", "bias")}
    assert names == {"of_student_Nd", "of_teacher_Nd", "log_z_2"} | weights
