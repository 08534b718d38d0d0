"""MIMKDLoss against loops over locations, images and pairs in float64, and what its configuration promises."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mimkd_ray.config import CriticConfig, LossConfig
from mimkd_ray.errors import UserError
from mimkd_ray.losses import terms
from mimkd_ray.losses.bounds import BOUNDS, SMILE_CLIP
from mimkd_ray.losses.critics import DotCritic, build_critic
from mimkd_ray.losses.features import Features
from mimkd_ray.losses.methods.kd import kd_loss
from mimkd_ray.losses.mimkd_loss import MIMKDLoss
from mimkd_ray.losses.negatives import valid_pairs
from mimkd_ray.losses.terms import Candidates, Objective, Term, score_term

BATCH, CLASSES, WIDTH = 4, 5, 6
IDS = torch.tensor([7, 3, 7, 9])  # images 0 and 2 are the same
LABELS = torch.tensor([0, 4, 1, 1])

TERMS = (
    Term(kind="global", teacher="pool", student="pool", weight=0.3, teacher_channels=8, student_channels=5),
    Term(kind="local", teacher="pool", student="late", weight=0.2, teacher_channels=8, student_channels=5),
    Term(kind="feature", teacher="late", student="late", weight=0.7, teacher_channels=8, student_channels=5),
    Term(kind="feature", teacher="wide", student="early", weight=0.5, teacher_channels=4, student_channels=3),
)


def make_features(seed: int, requires_grad: bool = False) -> tuple[Features, Features]:
    """Maps of unequal sizes: late 4x6 against 2x3 (teacher larger), wide 2x6 against early 4x3 (either is)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64).requires_grad_(requires_grad)

    teacher = Features(draw(CLASSES), {"pool": draw(8)}, {"late": draw(8, 4, 6), "wide": draw(4, 2, 6)})
    student = Features(draw(CLASSES), {"pool": draw(5)}, {"late": draw(5, 2, 3), "early": draw(3, 4, 3)})
    return teacher, student


def make_loss(terms=TERMS, seed: int = 0, **fields) -> MIMKDLoss:
    """In float64, with every critic parameter away from its start, and concat critics in the midst of training."""
    torch.manual_seed(seed)
    kind = fields.pop("kind", "dot")
    critic = CriticConfig(kind=kind, width=WIDTH, temperature=0.3)
    loss = MIMKDLoss(LossConfig(**{"preset": "two_sided", "critic": critic} | fields), terms).double()
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for critic in loss.critics if kind == "concat" else ():
            for standard in critic.standard:
                standard.steps.fill_(3)
                standard.moments_2C.copy_(0.5 + torch.rand_like(standard.moments_2C))
    return loss


def leaves(features: Features) -> list[torch.Tensor]:
    return [features.logits_BC, *features.vectors.values(), *features.maps.values()]


def slow_score(critic, kind: str, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """The score of one pair, from what the critic's two sides make of the features."""
    if kind == "dot":
        return (student @ teacher) / (student.norm() * teacher.norm()) * critic.log_scale.exp() + critic.bias
    hidden = (student + teacher).clamp(min=0)
    return critic.output((critic.hidden(hidden)).clamp(min=0))[0]


def slow_embedding(critic, who: int, feature: torch.Tensor) -> torch.Tensor:
    """Return the output of a critic's side for one feature: 0 is the teacher's, 1 the student's."""
    side = (critic.teacher, critic.student)[who]
    if isinstance(critic, DotCritic):
        return side(feature)
    mean, variance = critic.standard[who].moments_2C
    return side.weight @ ((feature - mean) / (variance + 1e-5).sqrt()) + (0 if side.bias is None else side.bias)


def slow_bound(name: str, u: list[torch.Tensor], rows: list[list[torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, nats) of one location from the definitions; rows[i] are the scores of image i's negatives."""
    positive, negative = torch.stack(u), torch.stack([value for row in rows for value in row])
    dv = positive.mean() - negative.exp().mean().log()
    classifier = (1 + (-positive).exp()).log().mean() + (1 + negative.exp()).log().mean()
    if name == "jsd":
        return classifier, dv
    if name == "smile":
        return classifier, positive.mean() - negative.clamp(-SMILE_CLIP, SMILE_CLIP).exp().mean().log()
    if name == "dv":
        return -dv, dv
    if name == "nwj":
        nats = positive.mean() - (negative - 1).exp().mean()
        return -nats, nats
    each = [value - torch.stack([value, *row]).exp().mean().log() for value, row in zip(u, rows, strict=True)]
    return -torch.stack(each).mean(), torch.stack(each).mean()


def block_mean(feature: torch.Tensor, i: int, y: int, x: int, height: int, width: int) -> torch.Tensor:
    """Mean of the block of image i's map that falls onto (y, x) of a height x width map."""
    rows, columns = feature.shape[2] // height, feature.shape[3] // width
    total = torch.zeros(feature.shape[1], dtype=feature.dtype)
    for dy in range(rows):
        for dx in range(columns):
            total = total + feature[i, :, y * rows + dy, x * columns + dx]
    return total / (rows * columns)


def slow_term(term: Term, critic, config: LossConfig, negatives: str, teacher: Features, student: Features):
    """(loss, nats, mean u, mean v) of one term, averaged over locations."""
    height, width = 1, 1
    if term.kind == "local":
        height, width = student.maps[term.student].shape[2:]
    elif term.kind == "feature":
        t, s = teacher.maps[term.teacher].shape, student.maps[term.student].shape
        height, width = min(t[2], s[2]), min(t[3], s[3])
    found = []
    for y in range(height):
        for x in range(width):

            def side(features: Features, tap: str, i: int, is_map: bool, y=y, x=x) -> torch.Tensor:
                if not is_map:
                    return features.vectors[tap][i]
                return block_mean(features.maps[tap], i, y, x, height, width)

            teachers = [
                slow_embedding(critic, 0, side(teacher, term.teacher, i, term.kind == "feature")) for i in range(BATCH)
            ]
            students = [
                slow_embedding(critic, 1, side(student, term.student, i, term.kind != "global")) for i in range(BATCH)
            ]
            u, rows = [], []
            for i in range(BATCH):
                u.append(slow_score(critic, config.critic.kind, teachers[i], students[i]))
                others = range(BATCH) if negatives == "all" else [i - 1]
                rows.append(
                    [
                        slow_score(critic, config.critic.kind, teachers[k], students[i])
                        for k in others
                        if IDS[k] != IDS[i]
                    ]
                )
            v = torch.stack([value for row in rows for value in row])
            found.append(torch.stack([*slow_bound(config.resolved_bound, u, rows), torch.stack(u).mean(), v.mean()]))
    return torch.stack(found).mean(0)


@pytest.mark.parametrize("kind", ["dot", "concat"])
@pytest.mark.parametrize("negatives", ["all", "rolled"])
@pytest.mark.parametrize("bound", sorted(BOUNDS))
def test_every_term_equals_loops(bound, negatives, kind):
    loss = make_loss(bound=bound, negatives=negatives, kind=kind)
    teacher, student = make_features(1, requires_grad=True)
    output = loss(teacher, student, LABELS, IDS)
    expected = F.cross_entropy(student.logits_BC, LABELS)
    for term, critic in zip(TERMS, loss.critics, strict=True):
        value, nats, mean_u, mean_v = slow_term(term, critic, loss.config, negatives, teacher, student)
        expected = expected + term.weight * value
        log = {key: output.log[f"{term.name}/{key}"].item() for key in ("loss", "nats", "mean_u", "mean_v")}
        assert log == pytest.approx(
            {"loss": value.item(), "nats": nats.item(), "mean_u": mean_u.item(), "mean_v": mean_v.item()},
            rel=1e-9,
        )
        assert output.terms[term.name].item() == pytest.approx(term.weight * value.item(), rel=1e-9)
    assert output.total.item() == pytest.approx(expected.item(), rel=1e-9)
    wanted = [*leaves(student), *loss.parameters()]
    fast, slow = (
        torch.autograd.grad(output.total, wanted),
        torch.autograd.grad(expected, wanted, allow_unused=True),
    )
    for mine, reference in zip(fast, slow, strict=True):
        reference = torch.zeros_like(mine) if reference is None else reference
        assert torch.allclose(mine, reference, rtol=1e-9, atol=1e-12)


def test_log_of_a_term():
    loss = make_loss()
    log = loss(*make_features(1), LABELS, IDS).log
    keys = {key.rpartition("/")[2] for key in log if key.startswith("local/pool-late/")}
    assert keys == {"loss", "nats", "ceiling", "scale", "bias", "mean_u", "mean_v"}
    # Images 0 and 2 have two candidates besides themselves, 1 and 3 have three.
    assert log["local/pool-late/ceiling"].item() == pytest.approx((math.log(3) + math.log(4)) / 2)
    assert log["local/pool-late/scale"].item() == pytest.approx(loss.critics[1].log_scale.exp().item())
    assert log["local/pool-late/bias"].item() == pytest.approx(loss.critics[1].bias.item())
    assert not any(value.requires_grad for value in log.values())


def test_terms_sum_to_total():
    loss = make_loss(kd_weight=0.5, ce_weight=0.25)
    output = loss(*make_features(1, requires_grad=True), LABELS, IDS)
    assert set(output.terms) == {"ce", "kd", *(term.name for term in TERMS)}
    assert sum(value.item() for value in output.terms.values()) == pytest.approx(output.total.item(), rel=1e-12)
    assert output.log["loss"].item() == output.total.item()
    assert output.terms["ce"].item() == pytest.approx(0.25 * output.log["ce"].item(), rel=1e-12)
    assert output.terms["kd"].item() == pytest.approx(0.5 * output.log["kd"].item(), rel=1e-12)


def test_cross_entropy_and_kd_equal_their_formulas():
    teacher, student = make_features(2)
    loss = make_loss(terms=(), kd_weight=0.5, kd_temperature=3.0, label_smoothing=0.1)
    output = loss(teacher, student, LABELS, IDS)
    ce = kd = 0.0
    for s, t, label in zip(student.logits_BC.tolist(), teacher.logits_BC.tolist(), LABELS.tolist(), strict=True):
        log_z = math.log(sum(map(math.exp, s)))
        for c in range(CLASSES):
            ce -= (0.9 * (c == label) + 0.1 / CLASSES) * (s[c] - log_z) / BATCH
        p = [math.exp(value / 3) / sum(math.exp(other / 3) for other in t) for value in t]
        q = [math.exp(value / 3) / sum(math.exp(other / 3) for other in s) for value in s]
        kd += 9 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / BATCH
    assert output.log["ce"].item() == pytest.approx(ce, rel=1e-12)
    assert output.log["kd"].item() == pytest.approx(kd, rel=1e-12)
    assert output.total.item() == pytest.approx(ce + 0.5 * kd, rel=1e-12)


def test_kd_reads_the_logits_that_the_config_names():
    teacher, student = make_features(2)
    loss = make_loss(terms=(), kd_weight=9.0, kd_temperature=2.0, kd_logits="standardised")
    output = loss(teacher, student, LABELS, IDS)
    expected = kd_loss(student.logits_BC, teacher.logits_BC, 2.0, standardise=True).item()
    assert output.terms["kd"].item() == pytest.approx(9 * expected, rel=1e-12)


def test_layout_of_the_maps_does_not_matter():
    loss = make_loss()
    teacher, student = make_features(3)
    last = [
        features._replace(
            maps={tap: value.contiguous(memory_format=torch.channels_last) for tap, value in features.maps.items()}
        )
        for features in (teacher, student)
    ]
    first = loss(teacher, student, LABELS, IDS).total.item()
    assert loss(*last, LABELS, IDS).total.item() == pytest.approx(first, rel=1e-12)


def test_images_of_equal_ids_are_no_negatives_of_each_other():
    loss = make_loss(terms=TERMS[:3])
    teacher, student = make_features(4, requires_grad=True)
    output = loss(teacher, student, LABELS, IDS)
    all_different = loss(teacher, student, LABELS, torch.arange(BATCH))
    assert output.total.item() != pytest.approx(all_different.total.item())
    # A lane of one image repeated has no negative at all: finite, and InfoNCE reads ln 1.
    same = loss(teacher, student, LABELS, torch.zeros(BATCH, dtype=torch.long))
    gradients = torch.autograd.grad(same.total, [*leaves(student)[:2], *loss.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert same.log["global/pool-pool/nats"].item() == 0
    assert same.log["global/pool-pool/ceiling"].item() == 0


def test_valid_pairs():
    different = torch.arange(4)
    assert torch.equal(valid_pairs(different, "all"), ~torch.eye(4, dtype=torch.bool))
    assert valid_pairs(different, "rolled").tolist() == [[True]] * 4
    assert valid_pairs(IDS, "all")[0].tolist() == [False, True, False, True]
    assert valid_pairs(torch.tensor([1, 2, 2, 3]), "rolled").tolist() == [[True], [True], [False], [True]]


def test_no_gradient_reaches_the_teacher():
    loss = make_loss(kd_weight=1.0)
    teacher, student = make_features(5, requires_grad=True)
    loss(teacher, student, LABELS, IDS).total.backward()
    assert all(value.grad is None for value in leaves(teacher))
    assert all(value.grad is not None and bool((value.grad != 0).any()) for value in leaves(student))


@pytest.mark.parametrize("kind", ["dot", "concat"])
@pytest.mark.parametrize("negatives", ["all", "rolled"])
def test_every_critic_parameter_learns(kind, negatives):
    loss = make_loss(bound="jsd", negatives=negatives, kind=kind)
    loss(*make_features(6), LABELS, IDS).total.backward()
    for name, parameter in loss.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).any()), name


@pytest.mark.parametrize("kind", ["dot", "concat"])
def test_autocast_changes_nothing(kind):
    """bfloat16 features under autocast give exactly what the same rounded values give in float32."""
    loss = make_loss(kind=kind, kd_weight=1.0).float()
    results = []
    for dtype, autocast in ((torch.bfloat16, True), (torch.float32, False)):
        teacher, student = (
            Features(
                features.logits_BC.bfloat16().to(dtype).requires_grad_(),
                {tap: value.bfloat16().to(dtype).requires_grad_() for tap, value in features.vectors.items()},
                {tap: value.bfloat16().to(dtype).requires_grad_() for tap, value in features.maps.items()},
            )
            for features in make_features(7)
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = loss(teacher, student, LABELS, IDS)
        assert output.total.dtype == torch.float32
        gradients = torch.autograd.grad(output.total, [*leaves(student), *loss.parameters()])
        results.append((output.total, gradients))
    (low, low_gradients), (full, full_gradients) = results
    assert torch.equal(low, full)
    for mine, reference in zip(low_gradients, full_gradients, strict=True):
        assert torch.equal(mine, reference.to(mine.dtype))


def test_float64_stays_float64():
    loss = make_loss(kd_weight=1.0)
    output = loss(*make_features(8), LABELS, IDS)
    assert output.total.dtype == torch.float64
    assert all(value.dtype == torch.float64 for value in output.terms.values())
    single = loss.float()(
        *(
            Features(
                features.logits_BC.float(),
                {tap: value.float() for tap, value in features.vectors.items()},
                {tap: value.float() for tap, value in features.maps.items()},
            )
            for features in make_features(8)
        ),
        LABELS,
        IDS,
    )
    assert single.total.dtype == torch.float32
    assert single.total.item() == pytest.approx(output.total.item(), rel=1e-5)
    assert single.total.item() != output.total.item()


def test_reading_takes_all_pairs_whatever_trains():
    teacher, student = make_features(9)
    rolled, square = make_loss(preset="paper"), make_loss(preset="paper", negatives="all")
    trained, read = (rolled(teacher, student, LABELS, IDS, reading=reading).log for reading in (False, True))
    expected = square(teacher, student, LABELS, IDS).log
    for term in TERMS:
        assert read[f"{term.name}/nats"].item() == expected[f"{term.name}/nats"].item()
        assert read[f"{term.name}/nats"].item() != trained[f"{term.name}/nats"].item()


@pytest.mark.parametrize("teacher_locations", [1, 9])
@pytest.mark.parametrize("kind", ["dot", "concat"])
@pytest.mark.parametrize("bound", ["infonce", "jsd"])
def test_chunks_change_nothing(bound, kind, teacher_locations, monkeypatch):
    torch.manual_seed(0)
    critic = build_critic(CriticConfig(kind=kind, width=8), 5, 4).double()
    teacher = torch.randn(teacher_locations, 6, 5, dtype=torch.float64)
    student = torch.randn(9, 6, 4, dtype=torch.float64, requires_grad=True)
    valid = valid_pairs(torch.arange(6), "all")
    calls = []
    score = critic.all_pairs
    monkeypatch.setattr(
        critic, "all_pairs", lambda s, t, q: calls.append((len(s), len(t))) or score(s, t), raising=False
    )

    def run(score_bytes=0):
        calls.clear()
        candidates = Candidates(teacher, valid)
        loss, stats = score_term(critic, Objective(bound), candidates, student, score_bytes=score_bytes)
        forward = list(calls)
        return (
            forward,
            loss,
            stats,
            torch.autograd.grad(loss, [student, *critic.parameters()], allow_unused=True),
        )

    assert len(run()[0]) == 1, "small scores"
    monkeypatch.setattr(terms, "SMALL_SCORE_BYTES", 0)
    chunks, loss, stats, gradients = run()
    assert len(chunks) > 1
    assert sum(students for students, _ in chunks) == 9
    assert len(calls) == 2 * len(chunks)  # scored again in the backward pass
    with torch.no_grad():
        evaluated, _ = score_term(critic, Objective(bound), Candidates(teacher, valid), student)
    two_locations = 2 * 6 * 6 * critic.pair_width * 8  # scores of 6 images and 6 candidates in float64
    assert [students for students, _ in run(two_locations)[0]] == [2, 2, 2, 2, 1]
    assert len(run(1)[0]) == 9
    whole, plain_loss, plain_stats, plain_gradients = run(2**40)
    assert whole == [(9, teacher_locations)]
    assert len(calls) == 1, "nothing is computed again"
    assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-12)
    assert evaluated.item() == pytest.approx(plain_loss.item(), rel=1e-12)
    for key in stats:
        assert stats[key].item() == pytest.approx(plain_stats[key].item(), rel=1e-12)
    for mine, reference in zip(gradients, plain_gradients, strict=True):
        assert torch.allclose(mine, reference, rtol=1e-10, atol=1e-13)


def test_constrain_reaches_every_critic():
    loss = make_loss()
    with torch.no_grad():
        for critic in loss.critics:
            critic.log_scale.fill_(50.0)
    loss.after_step()
    assert [critic.log_scale.item() for critic in loss.critics] == pytest.approx([math.log(100)] * len(TERMS))


def test_a_lane_of_one_has_no_negative():
    loss = make_loss(terms=TERMS[:1])
    one = [
        Features(features.logits_BC[:1], {tap: value[:1] for tap, value in features.vectors.items()}, {})
        for features in make_features(1)
    ]
    with pytest.raises(UserError, match=r"\(lane\) of 1 image has no negatives"):
        loss(*one, LABELS[:1], IDS[:1])
    assert make_loss(terms=())(None, one[1], LABELS[:1], IDS[:1]).total.isfinite()


def test_a_pair_stands_once():
    with pytest.raises(UserError, match="local/pool-late"):
        make_loss(terms=(*TERMS, TERMS[1]))


def test_presets_and_what_overrides_them():
    assert (LossConfig().resolved_bound, LossConfig().resolved_negatives) == ("infonce", "queue")
    critic = LossConfig().resolved_critic
    assert (critic.teacher, critic.student, critic.learn_temperature) == ("frozen", "linear", False)
    paper = LossConfig(preset="paper")
    assert (paper.resolved_bound, paper.resolved_negatives) == ("jsd", "rolled")
    mixed = LossConfig(preset="paper", bound="dv", negatives="all")
    assert (mixed.resolved_bound, mixed.resolved_negatives) == ("dv", "all")
    assert [paper.weight(kind) for kind in ("global", "local", "feature")] == [0.1, 0.1, 1.0]
    assert paper.resolved_critic == replace(CriticConfig(), teacher="mlp", student="mlp", learn_temperature=True)
    best = LossConfig(preset="best")
    assert (best.resolved_ce_weight, best.resolved_kd_weight) == (0.1, 0.9)
    alone = replace(best, name=())
    assert (alone.resolved_ce_weight, alone.resolved_kd_weight) == (1.0, 0.0)


def test_what_needs_a_teacher():
    plain = LossConfig(global_weight=0, local_weight=0, feature_weight=0)
    assert not plain.uses_features
    assert not plain.uses_teacher
    logits_only = LossConfig(global_weight=0, local_weight=0, feature_weight=0, kd_weight=1)
    assert not logits_only.uses_features
    assert logits_only.uses_teacher
    for kind in ("global", "local", "feature"):
        weights = {f"{name}_weight": float(name == kind) for name in ("global", "local", "feature")}
        assert LossConfig(**weights).uses_features


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"feature_weight": -0.1}, "loss.feature_weight is -0.1"),
        ({"global_weight": math.inf}, "loss.global_weight is inf"),
        ({"ce_weight": math.nan}, "loss.ce_weight is nan"),
        ({"label_smoothing": 1.0}, "loss.label_smoothing is 1.0"),
        ({"kd_temperature": 0.0}, "loss.kd_temperature is 0.0"),
    ],
)
def test_bad_configs_name_the_field(fields, message):
    with pytest.raises(UserError, match=message):
        LossConfig(**fields)
