"""The negatives of a term: which teachers a student is told apart from.

A negative pair is a student with the teacher of *another image*, at the same location. By `loss.negatives`:

* ``rolled``: the previous image of the lane, or with mixing the one before it (neighbours are mixed)
* ``all``: every other image of the lane
* ``step`` (terms of teacher vectors only): also every image of all lanes of the step
* ``queue`` (the same terms): also vectors of earlier steps
* ``cache`` (the same terms): also random images of the training set

Pairs of equal ids are left out and, if configured, pairs of equal classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mimkd_ray.config.loss_presets import Negatives
from mimkd_ray.losses.critic_sides import FrozenSide
from mimkd_ray.losses.critics import Critic
from mimkd_ray.losses.terms import Candidates


def roll_of(mixed: bool) -> int:
    """Return how many places before an image its rolled negative is. Mixing (data/augment/mixing.py) rolls by 1, so
    mixed images share a part with their neighbour."""
    return 2 if mixed else 1


def valid_pairs(ids_B: Tensor, negatives: Negatives, mixed: bool = False) -> Tensor:
    """Return the mask of the lane's valid negatives: (B, 1) for rolled, else (B, B), never the diagonal. Pairs of equal
    ids are not valid; of 2 or 3 ``mixed`` images no rolled pair is, because all of them share a part."""
    if negatives != "rolled":
        return ids_B.unsqueeze(1) != ids_B.unsqueeze(0)
    apart = len(ids_B) > 3 or not mixed
    return ((ids_B != ids_B.roll(roll_of(mixed))) & apart).unsqueeze(1)


def with_queue(candidates: Candidates, critic: Critic, vectors_MC: Tensor, valid_BM: Tensor) -> Candidates:
    """Return candidates of one location with reduced teacher vectors of earlier steps added as negatives: by a frozen
    side as they are, without a copy."""
    if not isinstance(critic.teacher, FrozenSide):
        return with_more(candidates, vectors_MC, valid_BM)
    valid_BK = torch.cat([candidates.valid_BK, valid_BM], dim=1)
    return candidates._replace(
        valid_BK=valid_BK, queue=critic.teacher.centred(vectors_MC.to(candidates.reduced_LKC.dtype))
    )


def with_more(candidates: Candidates, more_MC: Tensor, valid_BM: Tensor) -> Candidates:
    """Return candidates of one location with more reduced teacher vectors added as negatives."""
    own_1KC, valid_BK, _ = candidates
    more_1MC = more_MC.to(own_1KC.dtype).unsqueeze(0)
    return Candidates(torch.cat([own_1KC, more_1MC], dim=1), torch.cat([valid_BK, valid_BM], dim=1))
