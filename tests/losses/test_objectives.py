"""Frozen sides, queues and the choices of negatives and targets, against loops over single pairs in float64."""

from __future__ import annotations

import math

import pytest
import torch

from mimkd_ray.config import CriticConfig, LossConfig
from mimkd_ray.errors import UserError
from mimkd_ray.losses.critic_sides import FrozenSide
from mimkd_ray.losses.critics import DotCritic
from mimkd_ray.losses.features import Features
from mimkd_ray.losses.mimkd_loss import MIMKDLoss
from mimkd_ray.losses.negatives import with_queue
from mimkd_ray.losses.terms import Candidates, Objective, Term, hardest, score_term

B, CT, CS, SIDE = 5, 6, 4, 2
TEMPERATURE = math.exp(float(torch.tensor(math.log(0.2))))  # its logarithm is kept in float32
GLOBAL = Term(kind="global", teacher="t", student="s", weight=1.0, teacher_channels=CT, student_channels=CS)
FEATURE = Term(kind="feature", teacher="t", student="s", weight=1.0, teacher_channels=CT, student_channels=CS)
LOCAL = Term(kind="local", teacher="t", student="s", weight=1.0, teacher_channels=CT, student_channels=CS)


def make_loss(term: Term, **fields) -> MIMKDLoss:
    torch.manual_seed(0)
    critic = CriticConfig(temperature=TEMPERATURE, **fields.pop("critic", {}))
    return MIMKDLoss(LossConfig(**{"queue": 8, "critic": critic, "same_class": "keep"} | fields), [term]).double()


def lane(step: int) -> tuple[Features, Features, torch.Tensor, torch.Tensor]:
    """Features of step ``step``; the teacher's are far from centred. One image comes again in every step."""
    generator = torch.Generator().manual_seed(100 + step)

    def draw(channels: int, *size: int) -> torch.Tensor:
        return torch.randn(B, channels, *size, generator=generator, dtype=torch.float64)

    teacher = Features(draw(3), {"t": draw(CT) + 2.0}, {"t": draw(CT, SIDE, SIDE) + 2.0})
    student = Features(draw(3), {"s": draw(CS)}, {"s": draw(CS, SIDE, SIDE)})
    ids = torch.tensor([7, *range(10 * step + 20, 10 * step + 19 + B)])
    return teacher, student, torch.randint(3, (B,), generator=generator), ids


def after(loss: MIMKDLoss, steps: int) -> MIMKDLoss:
    """The loss after it has seen some steps."""
    for step in range(steps):
        teacher, _, labels, ids = lane(step)
        loss.observe(teacher, labels, ids)
        loss.after_step()
    return loss


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a @ b / (a.norm() * b.norm())).detach())


def slow_infonce(scores: list[float], positive: float) -> float:
    """Minus the bound: of one image, from the scores of its negatives."""
    total = math.exp(positive) + sum(map(math.exp, scores))
    return -(positive - math.log(total) + math.log(len(scores) + 1))


def earlier(steps: int) -> list[tuple[torch.Tensor, int, int]]:
    """(vector, id, label) of every image of the steps before, oldest first."""
    return [
        (vector, int(number), int(label))
        for step in range(steps)
        for vector, number, label in zip(
            lane(step)[0].vectors["t"], lane(step)[3].tolist(), lane(step)[2].tolist(), strict=True
        )
    ]


@pytest.mark.parametrize("same_class", ["keep", "leave_out"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_global_term_with_a_queue_equals_loops(steps: int, same_class: str) -> None:
    """The newest 8 vectors are candidates beside the lane's, centred by the mean of all images of earlier steps."""
    loss = after(make_loss(GLOBAL, same_class=same_class), steps)
    teacher, student, labels, ids = lane(steps)
    history = earlier(steps)
    mean = torch.stack([vector for vector, _, _ in history]).mean(0)
    total, counts = 0.0, []
    for i in range(B):
        embedded = loss.critics[0].student(student.vectors["s"][i])
        candidates = [(teacher.vectors["t"][k], int(ids[k]), int(labels[k])) for k in range(B) if k != i]
        candidates += [(vector.half().double(), number, label) for vector, number, label in history[-8:]]
        scores = [
            cosine(embedded, vector - mean) / TEMPERATURE
            for vector, number, label in candidates
            if number != int(ids[i]) and (same_class == "keep" or label != int(labels[i]))
        ]
        counts.append(len(scores))
        total += slow_infonce(scores, cosine(embedded, teacher.vectors["t"][i] - mean) / TEMPERATURE) / B
    output = loss(teacher, student, labels, ids)
    assert output.log[f"{GLOBAL.name}/loss"].item() == pytest.approx(total, rel=1e-9)
    ceiling = sum(math.log(count + 1) for count in counts) / B
    assert output.log[f"{GLOBAL.name}/ceiling"].item() == pytest.approx(ceiling, rel=1e-6)


def test_first_step_is_centred_by_the_lane_itself() -> None:
    loss = make_loss(GLOBAL)
    teacher, student, labels, ids = lane(0)
    mean = teacher.vectors["t"].mean(0)
    total = 0.0
    for i in range(B):
        embedded = loss.critics[0].student(student.vectors["s"][i])
        scores = [cosine(embedded, vector - mean) / TEMPERATURE for vector in teacher.vectors["t"]]
        total += slow_infonce([score for k, score in enumerate(scores) if k != i], scores[i]) / B
    assert loss(teacher, student, labels, ids).log[f"{GLOBAL.name}/loss"].item() == pytest.approx(total, rel=1e-9)


def test_reading_has_the_queue_and_the_lane_beside_it() -> None:
    """Held-out images are in no queue, so all of it counts, whatever ids and classes say."""
    loss = after(make_loss(GLOBAL, same_class="leave_out"), 3)
    teacher, student, labels, ids = lane(1)
    log = loss(teacher, student, labels, ids, reading=True).log
    assert log[f"{GLOBAL.name}/ceiling"].item() == pytest.approx(math.log(B + 8))
    assert log[f"{GLOBAL.name}/lane_ceiling"].item() == pytest.approx(math.log(B))
    without = make_loss(GLOBAL, negatives="all")
    without.load_state_dict(loss.state_dict(), strict=False)
    lone = without(teacher, student, labels, ids, reading=True).log
    assert log[f"{GLOBAL.name}/lane_nats"].item() == lone[f"{GLOBAL.name}/nats"].item()
    assert log[f"{GLOBAL.name}/nats"].item() != lone[f"{GLOBAL.name}/nats"].item()


def test_a_local_term_takes_its_share_of_the_queue() -> None:
    loss = after(make_loss(LOCAL), 4)
    teacher, student, labels, ids = lane(9)
    output = loss(teacher, student, labels, ids)
    filled = [number for number in loss.queue.ids_Q[: 8 // SIDE**2].tolist() if number != 7]
    counts = [B - 1 + sum(number != int(own) for number in loss.queue.ids_Q[:2].tolist()) for own in ids]
    assert len(filled) >= 1
    ceiling = sum(math.log(count + 1) for count in counts) / B
    assert output.log[f"{LOCAL.name}/ceiling"].item() == pytest.approx(ceiling, rel=1e-6)


@pytest.mark.parametrize("everywhere", [False, True])
def test_feature_term_takes_one_or_all_locations_of_other_images(everywhere: bool) -> None:
    loss = after(make_loss(FEATURE, feature_negatives="all" if everywhere else "same"), 1)
    mean = lane(0)[0].maps["t"].mean((0, 2, 3))
    teacher, student, labels, ids = lane(1)
    places = [(y, x) for y in range(SIDE) for x in range(SIDE)]
    total = 0.0
    for y, x in places:
        for i in range(B):
            embedded = loss.critics[0].student(student.maps["s"][i, :, y, x])
            of = places if everywhere else [(y, x)]
            scores = [
                cosine(embedded, teacher.maps["t"][k, :, v, u] - mean) / TEMPERATURE
                for k in range(B)
                for v, u in of
                if k != i
            ]
            positive = cosine(embedded, teacher.maps["t"][i, :, y, x] - mean) / TEMPERATURE
            total += slow_infonce(scores, positive) / (B * len(places))
    output = loss(teacher, student, labels, ids)
    assert output.log[f"{FEATURE.name}/loss"].item() == pytest.approx(total, rel=1e-9)


def test_symmetric_averages_with_the_other_direction() -> None:
    loss = make_loss(GLOBAL, symmetric=True, negatives="all")
    teacher, student, labels, ids = lane(0)
    mean = teacher.vectors["t"].mean(0)
    embedded = [loss.critics[0].student(student.vectors["s"][i]) for i in range(B)]
    table = [[cosine(embedded[i], vector - mean) / TEMPERATURE for vector in teacher.vectors["t"]] for i in range(B)]
    forward = sum(slow_infonce([table[i][k] for k in range(B) if k != i], table[i][i]) for i in range(B)) / B
    backward = sum(slow_infonce([table[k][i] for k in range(B) if k != i], table[i][i]) for i in range(B)) / B
    output = loss(teacher, student, labels, ids)
    assert output.log[f"{GLOBAL.name}/loss"].item() == pytest.approx((forward + backward) / 2, rel=1e-9)


@pytest.mark.parametrize("soft", [0.05, 0.5, 1e-3])
def test_soft_targets_are_the_teachers_similarities(soft: float) -> None:
    loss = after(make_loss(GLOBAL, soft_temperature=soft), 1)
    teacher, student, labels, ids = lane(1)
    history = earlier(1)
    mean = torch.stack([vector for vector, _, _ in history]).mean(0)
    total = 0.0
    for i in range(B):
        embedded = loss.critics[0].student(student.vectors["s"][i])
        own = teacher.vectors["t"][i] - mean
        others = [teacher.vectors["t"][k] - mean for k in range(B) if k != i]
        others += [vector.half().double() - mean for vector, number, _ in history if number != int(ids[i])]
        scores = torch.tensor([cosine(embedded, vector) / TEMPERATURE for vector in (own, *others)])
        target = torch.tensor([cosine(own, vector) / soft for vector in (own, *others)], dtype=torch.float64).softmax(0)
        total -= float((target * scores.double().log_softmax(0)).sum() + math.log(len(scores))) / B
    output = loss(teacher, student, labels, ids)
    assert output.log[f"{GLOBAL.name}/loss"].item() == pytest.approx(total, rel=1e-6)
    if soft == 1e-3:
        plain = after(make_loss(GLOBAL), 1)(teacher, student, labels, ids)
        assert output.total.item() == pytest.approx(plain.total.item(), rel=1e-9), "the limit is the positive alone"


def test_hard_negatives_are_those_most_like_the_positive() -> None:
    similarity = torch.tensor([[[1.0, 0.9, 0.1, 0.5], [0.9, 1.0, 0.2, 0.3]]])
    valid = torch.tensor([[False, True, True, True], [True, False, True, True]])
    assert hardest(similarity, valid, 0.3).tolist() == [[[False, True, False, False], [True, False, False, False]]]
    assert hardest(similarity, valid, 0.6).tolist() == [[[False, True, False, True], [True, False, False, True]]]
    assert torch.equal(hardest(similarity, valid, 1.0)[0], valid)
    loss = make_loss(GLOBAL, hard_share=0.5, negatives="all")
    teacher, student, labels, ids = lane(0)
    mean = teacher.vectors["t"].mean(0)
    total = 0.0
    for i in range(B):
        embedded = loss.critics[0].student(student.vectors["s"][i])
        centred = [vector - mean for vector in teacher.vectors["t"]]
        near = sorted((k for k in range(B) if k != i), key=lambda k: -cosine(centred[i], centred[k]))[:2]
        scores = [cosine(embedded, centred[k]) / TEMPERATURE for k in near]
        total += slow_infonce(scores, cosine(embedded, centred[i]) / TEMPERATURE) / B
    output = loss(teacher, student, labels, ids)
    assert output.log[f"{GLOBAL.name}/loss"].item() == pytest.approx(total, rel=1e-9)
    assert output.log[f"{GLOBAL.name}/ceiling"].item() == pytest.approx(math.log(3))


def test_logits_can_be_a_tap() -> None:
    term = Term(kind="global", teacher="logits", student="logits", weight=1.0, teacher_channels=3, student_channels=3)
    same = Term(kind="global", teacher="t", student="s", weight=1.0, teacher_channels=3, student_channels=3)
    teacher, student, labels, ids = lane(0)
    named = teacher._replace(vectors={"t": teacher.logits_BC}), student._replace(vectors={"s": student.logits_BC})
    ours, theirs = make_loss(term)(teacher, student, labels, ids), make_loss(same)(*named, labels, ids)
    assert ours.total.item() == theirs.total.item()


@pytest.mark.parametrize("schedule", ["constant", "warmup", "rise", "fall"])
def test_schedules_scale_the_terms_alone(schedule: str) -> None:
    loss = make_loss(GLOBAL, schedule=schedule)
    teacher, student, labels, ids = lane(0)
    expected = {
        "constant": (1.0, 1.0, 1.0),
        "warmup": (0.0, 1.0, 1.0),
        "rise": (0.0, 0.5, 1.0),
        "fall": (1.0, 0.5, 0.0),
    }[schedule]
    for progress, factor in zip((0.0, 0.5, 1.0), expected, strict=True):
        loss.begin_step(0.0, progress)
        output = loss(teacher, student, labels, ids)
        raw = output.log[f"{GLOBAL.name}/loss"].item()
        assert output.terms[GLOBAL.name].item() == pytest.approx(factor * raw, abs=1e-7)
        assert output.terms["ce"].item() == output.log["ce"].item()


def test_frozen_sides_have_nothing_to_learn_and_wide_ones_keep_angles() -> None:
    critic = DotCritic(
        64, 5, CriticConfig(teacher="frozen", student="linear", frozen_width=32, learn_temperature=False)
    )
    assert not list(critic.teacher.parameters())
    assert {name for name, _ in critic.named_parameters()} == {"student.weight", "student.bias", "bias"}
    side = critic.teacher
    assert isinstance(side, FrozenSide)
    rows = side.reduce(torch.eye(64))
    torch.testing.assert_close(rows.T @ rows, torch.eye(32), atol=1e-5, rtol=0)
    again = DotCritic(64, 7, CriticConfig(teacher="frozen", student="mlp", frozen_width=32))
    assert torch.equal(again.teacher.reduce(torch.eye(64)), rows), "one projection for all critics of a width"
    narrow = FrozenSide(16, 32)
    assert torch.equal(narrow.reduce(torch.eye(16)), torch.eye(16))


@pytest.mark.parametrize("sizes", [(4, 4), (3, 5)])
def test_running_mean_is_that_of_all_images(sizes: tuple[int, int]) -> None:
    side = FrozenSide(3, 8).double()
    parts = [torch.randn(size, 3, dtype=torch.float64) for size in sizes]
    for part in parts:
        side.update(part.mean(0), len(part))
    torch.testing.assert_close(side.mean_d, torch.cat(parts).mean(0), rtol=1e-12, atol=0)


def test_queued_vectors_score_as_those_of_the_lane() -> None:
    """The queue is compared without a centred copy of it: the same cosines."""
    critic = DotCritic(CT, CS, CriticConfig(teacher="frozen", student="linear")).double()
    side = critic.teacher
    assert isinstance(side, FrozenSide)
    side.update(torch.full((CT,), 2.0, dtype=torch.float64), 10)
    queue = torch.randn(7, CT, dtype=torch.float64) + 2
    student = torch.randn(3, B, CS, dtype=torch.float64, requires_grad=True)
    embedded = critic.embed_student(student)
    own = torch.randn(1, B, CT, dtype=torch.float64)
    fast = critic.all_pairs(embedded, critic.embed_teacher(own), side.centred(queue))
    slow = critic.all_pairs(embedded, critic.embed_teacher(torch.cat([own[0], queue]).unsqueeze(0)))
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)
    grads = [torch.autograd.grad(scores.square().sum(), student, retain_graph=True)[0] for scores in (fast, slow)]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-9)


def test_a_queued_vector_without_a_direction_has_no_large_score() -> None:
    """A teacher that says the same of all images: what is left after centring is rounding, which is not blown up."""
    side = FrozenSide(64, 64)
    vector = torch.rand(64, generator=torch.Generator().manual_seed(0)) + 3
    side.update(vector.half().float(), 5)
    directions = torch.nn.functional.normalize(torch.randn(1, 500, 64), dim=-1)
    queue = vector.half().float() * (1 + torch.linspace(-1e-6, 1e-6, 7)).unsqueeze(1)
    assert float(side.centred(queue).cosines(directions).abs().max()) < 1
    assert torch.equal(side.centred(torch.zeros(1, 64)).cosines(directions).isfinite().all(), torch.tensor(True))


class ExactCritic(DotCritic):
    """The log of the density ratio of two standard Gaussians with correlation rho in each of d dimensions."""

    def __init__(self, rho: float, d: int) -> None:
        super().__init__(d, d, CriticConfig())
        self.rho = rho

    def embed_teacher(self, reduced_LKC: torch.Tensor, lane: int | None = None) -> torch.Tensor:
        return reduced_LKC

    def embed_student(self, feature: torch.Tensor) -> torch.Tensor:
        return feature

    def all_pairs(self, student_LBd: torch.Tensor, teacher_LKd: torch.Tensor, queue: None = None) -> torch.Tensor:
        squares = student_LBd.square().sum(-1).unsqueeze(2) + teacher_LKd.square().sum(-1).unsqueeze(1)
        cross = student_LBd @ teacher_LKd.transpose(1, 2)
        rest = 1 - self.rho**2
        constant = -0.5 * student_LBd.shape[2] * math.log(rest)
        return constant - (self.rho**2 * squares - 2 * self.rho * cross) / (2 * rest)


def test_a_queue_reads_eight_nats_of_gaussians_and_a_lane_cannot() -> None:
    """20 dimensions with rho = 0.7421 have 8 nats; the best critic is known: only the candidates limit the reading."""
    d, rho, queue, lanes = 20, 0.7421, 16_384, 24
    torch.manual_seed(0)
    critic = ExactCritic(rho, d)
    queued = torch.randn(queue, d)
    read = {"lane": 0.0, "queue": 0.0}
    for _ in range(lanes):
        teacher = torch.randn(64, d)
        student = rho * teacher + math.sqrt(1 - rho**2) * torch.randn(64, d)
        valid = ~torch.eye(64, dtype=torch.bool)
        small = Candidates(teacher.unsqueeze(0), valid)
        large = with_queue(small, critic, queued, torch.ones(64, queue, dtype=torch.bool))
        for name, candidates in (("lane", small), ("queue", large)):
            _, stats = score_term(critic, Objective("infonce"), candidates, student.unsqueeze(0))
            read[name] += stats["nats"].item() / lanes
    assert read["lane"] <= math.log(64)
    assert read["queue"] == pytest.approx(8.0, rel=0.1)


@pytest.mark.parametrize("bound", ["jsd", "dv", "smile", "nwj"])
def test_without_a_negative_there_is_no_loss(bound: str) -> None:
    """Nothing is left to tell the positive from, and its score must not rise for ever."""
    loss = make_loss(GLOBAL, bound=bound, negatives="all")
    teacher, student, labels, _ = lane(0)
    student.vectors["s"].requires_grad_()
    output = loss(teacher, student, labels, torch.zeros(B, dtype=torch.int64))
    assert output.log[f"{GLOBAL.name}/loss"].item() == 0
    assert math.isnan(output.log[f"{GLOBAL.name}/nats"].item())
    (gradient,) = torch.autograd.grad(output.terms[GLOBAL.name], student.vectors["s"])
    assert not gradient.any()


def test_mixed_labels_leave_no_class_out() -> None:
    loss = make_loss(GLOBAL, same_class="leave_out", negatives="all")
    teacher, student, _, ids = lane(0)
    output = loss(teacher, student, torch.full((B, 3), 1 / 3), ids)
    assert output.log[f"{GLOBAL.name}/ceiling"].item() == pytest.approx(math.log(B))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"soft_temperature": 0.1, "bound": "jsd"},
            "loss.soft_temperature is a form of InfoNCE, and loss.bound is jsd",
        ),
        ({"symmetric": True, "preset": "paper"}, "loss.symmetric chooses among many negatives"),
        ({"hard_share": 0.0}, "loss.hard_share is 0.0"),
        ({"hard_share": 0.5, "critic": CriticConfig(kind="concat")}, "reads the teacher's cosines"),
        ({"feature_negatives": "all", "negatives": "rolled", "bound": "jsd"}, "loss.feature_negatives is all"),
        ({"queue": 0}, "loss.queue is 0"),
        ({"negatives": "step", "global_pairs": ("logits:logits",)}, "vectors of layers alone, and logits:logits reads"),
        ({"local_pairs": ("a:b",)}, "loss.local_pairs names pairs, and preset accuracy gives local terms no weight"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LossConfig(**fields)
