"""The promises of all rivals, and their use in MIMKDLoss and LossConfig."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from rival_checks import IDS, LABELS, ROWS, both, build, leaves, taps

from mimkd_ray.config import LossConfig
from mimkd_ray.errors import UserError
from mimkd_ray.losses.features import Features
from mimkd_ray.losses.methods.base import RivalTaps
from mimkd_ray.losses.methods.build_method import RivalPlan
from mimkd_ray.losses.methods.kd import kd_loss
from mimkd_ray.losses.methods.registry import RIVALS, Method
from mimkd_ray.losses.mimkd_loss import MIMKDLoss
from mimkd_ray.losses.terms import Term

OWN_LOSS = [method for method in RIVALS if method != "kd"]
TERM = Term(kind="global", teacher="tv", student="sv", weight=0.3, teacher_channels=6, student_channels=3)


def taps_of(method: Method) -> RivalTaps:
    counts = {"none": 0, "second": 1, "deepest": 1, "all": 3}
    return taps(vectors=RIVALS[method].vectors, maps=counts[RIVALS[method].maps])


def with_leaves(value: Features, cast) -> Features:
    return Features(
        cast(value.logits_BC),
        {tap: cast(each) for tap, each in value.vectors.items()},
        {tap: cast(each) for tap, each in value.maps.items()},
    )


def test_every_method_is_known() -> None:
    assert set(get_args(Method)) == {"mimkd", *RIVALS}


@pytest.mark.parametrize("method", OWN_LOSS)
def test_autocast_changes_nothing_and_the_teacher_has_no_gradient(method) -> None:
    rival = build(method, taps_of(method)).float()
    teacher, student = (with_leaves(value, lambda each: each.detach().bfloat16().requires_grad_()) for value in both())
    torch.manual_seed(1)
    plain = rival(
        *(with_leaves(value, lambda each: each.detach().float()) for value in (teacher, student)), LABELS, IDS
    )
    rival = build(method, taps_of(method)).float()  # CRD remembers its first call
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = rival(teacher, student, LABELS, IDS)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    loss.backward()
    assert all(leaf.grad is None for leaf in leaves(teacher))
    assert any(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in leaves(student))
    for name, parameter in rival.named_parameters():
        assert parameter.grad is not None, name


@pytest.mark.parametrize("method", OWN_LOSS)
def test_compiles_without_a_graph_break(method) -> None:
    torch._dynamo.reset()
    teacher, student = both()
    for leaf in leaves(student):
        leaf.requires_grad_()
    expected = build(method, taps_of(method))
    rival = build(method, taps_of(method))
    compiled = torch.compile(rival, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # CRD's first call is unlike the others
        torch.manual_seed(1)
        want = expected(teacher, student, LABELS, IDS)
        torch.manual_seed(1)
        got = compiled(teacher, student, LABELS, IDS)
        assert got.item() == pytest.approx(want.item(), rel=1e-9)
        inputs = [*leaves(student), *rival.parameters()], [*leaves(student), *expected.parameters()]
        mine, theirs = (
            torch.autograd.grad(loss, over, allow_unused=True) for loss, over in zip((got, want), inputs, strict=True)
        )
        for ours, reference in zip(mine, theirs, strict=True):
            assert (ours is None) == (reference is None)
            assert ours is None or torch.allclose(ours, reference, rtol=1e-9, atol=1e-12)
    for name, value in expected.state_dict().items():
        assert torch.allclose(rival.state_dict()[name], value, rtol=1e-9, atol=1e-12), name


def make(name: tuple[Method, ...], **fields) -> tuple[MIMKDLoss, LossConfig]:
    config = LossConfig(name=name, preset="two_sided", **fields)
    torch.manual_seed(0)
    terms = [TERM] if config.uses_features else []
    plans = [RivalPlan(method, taps_of(method)) for method in config.rivals]
    return MIMKDLoss(config, terms, plans, ROWS).double(), config


def test_parts_add_up_beside_mimkd_and_kd() -> None:
    teacher, student = both()
    loss, _ = make(("mimkd", "rkd", "dist"), kd_weight=0.5, rival_weight=0.2)
    output = loss(teacher, student, LABELS, IDS)
    assert list(output.terms) == ["ce", "kd", TERM.name, "rival/rkd", "rival/dist"]
    assert output.total.item() == pytest.approx(sum(part.item() for part in output.terms.values()), rel=1e-12)
    for method in ("rkd", "dist"):
        plain = build(method, taps_of(method))(teacher, student, LABELS, IDS)
        assert output.log[f"rival/{method}"].item() == pytest.approx(plain.item(), rel=1e-12)
        assert output.terms[f"rival/{method}"].item() == pytest.approx(0.2 * plain.item(), rel=1e-12)
    read = loss(teacher, student, LABELS, IDS, reading=True)
    assert list(read.terms) == ["ce", "kd", TERM.name]


def test_published_weights() -> None:
    weights = {method: LossConfig(name=(method,)).weight_of(method) for method in RIVALS}
    published = {"kd": 0.9, "fitnet": 100, "at": 1000, "sp": 3000, "cc": 100, "vid": 1, "rkd": 1, "pkt": 30_000}
    published |= {"crd": 0.8, "dkd": 1, "dist": 1, "review": 1}
    assert weights == published
    assert LossConfig(name=("pkt",), rival_weight=0.1).weight_of("pkt") == pytest.approx(3000)


def test_kd_alone_is_a_tenth_cross_entropy_and_nine_tenths_kd() -> None:
    teacher, student = both()
    ce = F.cross_entropy(student.logits_BC, LABELS).item()
    kd = kd_loss(student.logits_BC, teacher.logits_BC, 4.0).item()
    for fields, ce_weight, kd_weight in (
        ({"name": ("kd",)}, 0.1, 0.9),
        ({"name": ("kd",), "ce_weight": 2.0, "rival_weight": 0.5, "kd_weight": 0.3}, 0.2, 0.75),
        ({"name": ("kd", "dist")}, 1.0, 0.9),
        ({"name": (), "kd_weight": 0.7}, 1.0, 0.7),
    ):
        loss, _ = make(**fields)
        terms = loss(teacher, student, LABELS, IDS).terms
        assert terms["ce"].item() == pytest.approx(ce_weight * ce, rel=1e-12)
        assert terms["kd"].item() == pytest.approx(kd_weight * kd, rel=1e-12)


def test_dkd_rises_to_its_weight_epoch_by_epoch() -> None:
    teacher, student = both()
    loss, _ = make(("dkd", "dist"), rival_warmup=4.0)
    whole = build("dkd", taps())(teacher, student, LABELS, IDS).item()
    for epoch, share in ((0.0, 0.25), (0.99, 0.25), (1.0, 0.5), (3.5, 1.0), (7.0, 1.0), (0.5, 0.25)):
        loss.begin_step(epoch)
        output = loss(teacher, student, LABELS, IDS)
        assert output.terms["rival/dkd"].item() == pytest.approx(share * whole, rel=1e-12)
        assert output.log["rival/dkd"].item() == pytest.approx(whole, rel=1e-12)
        assert output.terms["rival/dist"].item() == output.log["rival/dist"].item()
    assert "warmth" not in loss.state_dict()  # it follows from the step
    at_once, _ = make(("dkd",), rival_warmup=0.0)
    at_once.begin_step(0.0)
    assert at_once(teacher, student, LABELS, IDS).terms["rival/dkd"].item() == pytest.approx(whole, rel=1e-12)


def test_the_fields_of_a_rival_reach_it() -> None:
    teacher, student = both()
    loss, _ = make(("dkd", "dist"), dkd_beta=0.5, dkd_temperature=1.0, dist_temperature=2.0)
    log = loss(teacher, student, LABELS, IDS).log
    dkd = build("dkd", taps(), dkd_beta=0.5, dkd_temperature=1.0)(teacher, student, LABELS, IDS).item()
    dist = build("dist", taps(), dist_temperature=2.0)(teacher, student, LABELS, IDS).item()
    assert (log["rival/dkd"].item(), log["rival/dist"].item()) == pytest.approx((dkd, dist), rel=1e-12)
    assert dkd != pytest.approx(build("dkd", taps())(teacher, student, LABELS, IDS).item())
    assert dist != pytest.approx(build("dist", taps())(teacher, student, LABELS, IDS).item())


def test_what_a_name_turns_on() -> None:
    assert LossConfig().name == ("mimkd",)
    nothing = LossConfig(name=())
    assert (nothing.uses_features, nothing.uses_teacher, nothing.uses_logits) == (False, False, False)
    assert LossConfig(name=(), kd_weight=0.1).uses_logits
    vectors = LossConfig(name=("rkd",))
    assert (vectors.uses_features, vectors.uses_teacher, vectors.uses_logits) == (False, True, False)
    assert [vectors.weight(kind) for kind in ("global", "local", "feature")] == [0, 0, 0]
    assert LossConfig(name=("dist",)).uses_logits
    assert LossConfig(name=("rkd", "mimkd")).uses_features
    off = LossConfig(name=("rkd", "kd"), rival_weight=0.0)
    assert (off.uses_teacher, off.rivals) == (False, ())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ("rkd", "mimkd", "rkd")}, "loss.name is rkd mimkd rkd: name each method once"),
        ({"rival_weight": -1.0}, "loss.rival_weight is -1.0"),
        ({"rival_warmup": math.inf}, "loss.rival_warmup is inf"),
        ({"dkd_beta": -1.0}, "loss.dkd_beta is -1.0"),
        ({"dkd_temperature": 0.0}, "loss.dkd_temperature is 0.0"),
        ({"dist_temperature": math.inf}, "loss.dist_temperature is inf"),
    ],
)
def test_bad_configs_name_the_field(fields, message) -> None:
    with pytest.raises(UserError, match=message):
        LossConfig(**fields)
