"""Lower bounds on mutual information, from the scores of a critic.

Scores come per location: ``positive_LB[l, i]`` scores the pair (student i, teacher i) at location l, and
``negative_LBK[l, i, k]`` a pair of student i with some other image's teacher. L is 1 for vectors. A bound is
evaluated at each location on its own and the caller averages, so the chunks of a map can be added up.

With u the scores of positives, v those of negatives, sp = softplus and r the density ratio p(t,s) / p(t)p(s):

==========  ===========================================  =======================  ==========================
name        objective to maximise                        optimal critic           reading in nats
==========  ===========================================  =======================  ==========================
jsd         E[-sp(-u)] - E[sp(v)]                        log r                    DV of the scores
dv          E[u] - log E[e^v]                            log r + c                itself
nwj         E[u] - E[e^(v-1)]                            1 + log r                itself
infonce     E[u - logmeanexp(candidates)]                log r + c(student)       itself, at most ln(candidates)
smile       as jsd                                       log r                    DV with v in [-5, 5]
==========  ===========================================  =======================  ==========================

Sources: JSD as in f-GAN (Nowozin 2016) and Deep InfoMax (Hjelm 2019); Donsker-Varadhan as in MINE (Belghazi
2018); NWJ (Nguyen 2010); InfoNCE (van den Oord 2018); SMILE (Song & Ermon 2020). The candidates of InfoNCE are
the positive and the negatives. The jsd objective is not mutual information in nats (it lies in [-2 ln 2, 0]); its
critic is, and is read by DV. A reading of one negative per positive is noisy: read over all pairs, on held-out data.
Temperature and its limit belong to the critic (critics.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mimkd_ray.config.loss_presets import BoundName

SMILE_CLIP = 5.0
"""Limit to which SMILE clips the scores of negatives when it estimates: [-5, 5]."""

NWJ_LINEAR_FROM = 11.0
"""Score above which NWJ's loss continues e^(v-1) linearly. A negative's slope is then at most e^10, or 5.5 averaged
over all pairs of a lane of 64, where a positive's is 1/64. Scores of a learned temperature reach 100, and one step with
slopes of e^59 ends training. Ratios up to e^10 = 22,026, more than the 16,384 negatives of a queue can resolve, keep
their optimum; an estimate of I nats has a variance of at least (e^I - 1) / pairs, so more than 10 nats could hardly be
estimated."""

NWJ_READ_TO = 60.0
"""Largest score for which NWJ estimates with e^(v-1) itself, within float32's range; above it the estimate is NaN."""


class BoundValue(NamedTuple):
    """The loss and the estimate of a bound at each location."""

    loss_L: Tensor  #: to minimise
    nats_L: Tensor  # : mutual information in nats; NaN if the estimate is invalid


Bound = Callable[[Tensor, Tensor, Tensor], BoundValue]
"""(positive_LB, negative_LBK, valid_BK) -> BoundValue. ``valid_BK`` is False for pairs to leave out; it may also differ
by location, (L, B, K)."""


def _masked_mean(value_LBK: Tensor, valid_BK: Tensor) -> Tensor:
    """Return the mean over the valid pairs of each location: (L, B, K) -> (L,); 0 if no pair is valid."""
    return torch.where(valid_BK, value_LBK, 0.0).sum((1, 2)) / valid_BK.sum((-2, -1)).clamp(min=1)


def _log_mean_exp(value_LBK: Tensor, valid_BK: Tensor) -> Tensor:
    """Return the log of the mean of e^value over the valid pairs: (L, B, K) -> (L,); 0 if no pair is valid."""
    count = valid_BK.sum((-2, -1))
    total_L = value_LBK.masked_fill(~valid_BK, -math.inf).flatten(1).logsumexp(1)
    return torch.where(count > 0, total_L - count.clamp(min=1).to(total_L.dtype).log(), 0.0)


def _dv_nats(positive_LB: Tensor, negative_LBK: Tensor, valid_BK: Tensor) -> Tensor:
    return positive_LB.mean(1) - _log_mean_exp(negative_LBK, valid_BK)


def jsd(positive_LB: Tensor, negative_LBK: Tensor, valid_BK: Tensor) -> BoundValue:
    """Jensen-Shannon: a binary classifier of positives against negatives, whose logit estimates log r."""
    loss_L = F.softplus(-positive_LB).mean(1) + _masked_mean(F.softplus(negative_LBK), valid_BK)
    with torch.no_grad():
        return BoundValue(loss_L, _dv_nats(positive_LB, negative_LBK, valid_BK))


def dv(positive_LB: Tensor, negative_LBK: Tensor, valid_BK: Tensor) -> BoundValue:
    """Donsker-Varadhan: mean of the positives minus log-mean-exp of the negatives."""
    nats_L = _dv_nats(positive_LB, negative_LBK, valid_BK)
    return BoundValue(-nats_L, nats_L.detach())


def nwj(positive_LB: Tensor, negative_LBK: Tensor, valid_BK: Tensor) -> BoundValue:
    """Nguyen-Wainwright-Jordan: mean of the positives minus the mean of e^(v-1) over the negatives.

    The loss is -nats unless a score of a valid negative is above NWJ_LINEAR_FROM, where it continues linearly. The
    estimate does not continue linearly, because it would no longer be a bound: it falls steeply with such scores and is
    NaN above NWJ_READ_TO.
    """
    capped_LBK = negative_LBK.clamp(max=NWJ_LINEAR_FROM)
    exp_LBK = (capped_LBK - 1.0).exp() * (1.0 + negative_LBK - capped_LBK)
    loss_L = _masked_mean(exp_LBK, valid_BK) - positive_LB.mean(1)
    with torch.no_grad():
        read_LBK = (negative_LBK.clamp(max=NWJ_READ_TO) - 1.0).exp()
        beyond_L = ((negative_LBK > NWJ_READ_TO) & valid_BK).flatten(1).any(1)
        nats_L = (positive_LB.mean(1) - _masked_mean(read_LBK, valid_BK)).masked_fill(beyond_L, math.nan)
    return BoundValue(loss_L, nats_L)


def infonce(positive_LB: Tensor, negative_LBK: Tensor, valid_BK: Tensor) -> BoundValue:
    """InfoNCE: the log-probability of the positive among its candidates, plus ln(candidates)."""
    others_LB = negative_LBK.masked_fill(~valid_BK, -math.inf).logsumexp(2)
    candidates_B = (valid_BK.sum(-1) + 1).to(positive_LB.dtype)  # the log of an integer is float32
    nats_LB = positive_LB - torch.logaddexp(positive_LB, others_LB) + candidates_B.log()
    nats_L = nats_LB.mean(1)
    return BoundValue(-nats_L, nats_L.detach())


def soft_cross_entropy(
    positive_LB: Tensor,
    negative_LBK: Tensor,
    valid_BK: Tensor,
    similarity_LBK: Tensor,
    temperature: float,
) -> Tensor:
    """Return the cross-entropy of the teacher's distribution over the candidates against the critic's, less
    ln(candidates): (L,).

    The candidates of image i are its own teacher feature (the positive) and the valid negatives. The teacher gives
    candidate k the weight exp(similarity / temperature), with ``similarity_LBK`` the cosine of the teacher's features
    of i and k (1 for the positive); the critic gives it exp(score). As the temperature falls to 0 this becomes the
    InfoNCE loss, whose target is the positive alone. The soft target keeps similar images together, which InfoNCE
    pushes apart.
    """
    log_q_positive_LB, log_q_LBK = _log_softmax(positive_LB, negative_LBK, valid_BK)
    certain_LB = torch.full_like(positive_LB, 1 / temperature)
    log_p_positive_LB, log_p_LBK = _log_softmax(certain_LB, similarity_LBK / temperature, valid_BK)
    # 0 * -inf is NaN, so pairs that do not count get the share 0.
    negative_LB = torch.where(valid_BK, log_p_LBK.exp() * log_q_LBK.masked_fill(~valid_BK, 0.0), 0.0).sum(2)
    candidates_B = (valid_BK.sum(-1) + 1).to(positive_LB.dtype)
    return -(log_p_positive_LB.exp() * log_q_positive_LB + negative_LB + candidates_B.log()).mean(1)


def _log_softmax(positive_LB: Tensor, negative_LBK: Tensor, valid_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of the positive (L, B) and of each negative (L, B, K) among the valid candidates."""
    others_LB = negative_LBK.masked_fill(~valid_BK, -math.inf).logsumexp(2)
    total_LB = torch.logaddexp(positive_LB, others_LB)
    return positive_LB - total_LB, negative_LBK - total_LB.unsqueeze(2)


def smile(positive_LB: Tensor, negative_LBK: Tensor, valid_BK: Tensor) -> BoundValue:
    """SMILE: trained as jsd, estimated by DV with clipped negatives. Less variance than DV; not a lower bound."""
    loss_L = jsd(positive_LB, negative_LBK, valid_BK).loss_L
    with torch.no_grad():
        clipped_LBK = negative_LBK.clamp(-SMILE_CLIP, SMILE_CLIP)
        return BoundValue(loss_L, _dv_nats(positive_LB, clipped_LBK, valid_BK))


BOUNDS: dict[BoundName, Bound] = {"infonce": infonce, "jsd": jsd, "dv": dv, "nwj": nwj, "smile": smile}


def ceiling(name: BoundName, valid_BK: Tensor, share: float = 1.0) -> Tensor:
    """Return the highest estimate that the bound can give, in nats: mean ln(candidates) for InfoNCE, infinite for the
    others. ``share`` of the negatives are used, at least one."""
    if name != "infonce":
        return torch.full((), math.inf, device=valid_BK.device)
    counts_B = valid_BK.sum(-1)
    if share < 1:
        counts_B = (counts_B * share).ceil().clamp(min=1)
    return (counts_B + 1).log().mean()
