"""Other people's names for the tensors of a network: prefixes of wrappers, and other code for the same CIFAR networks.

`best_fit` tries what a file's names can be made of and keeps what agrees best with the network, by names and shapes.
The tables are for the CIFAR networks of the distillation literature as RepDistiller and mdistiller save them (both use
the same names), ResNets also as the common CIFAR code that copies torchvision's names; one is for torchvision's
MobileNetV2 as timm names it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

Rule = tuple[str, str | Callable[[re.Match[str]], str]]
"""A pattern of a module's whole path and what it is here."""

_HEAD: Rule = (r"fc|linear|classifier(?:\.0)?", "head")
_STEM: tuple[Rule, ...] = ((r"conv1", "stem.0"), (r"bn1", "stem.1"))


def _layers(kind: str, places: Mapping[int, int], block: str = r"\d+") -> Rule:
    """`layerL.B.convN` and `bnN`: convolutions at the places of a block's body, batch norms one behind."""
    numbers = "".join(map(str, places))
    return (
        rf"layer(\d)\.({block})\.({kind})([{numbers}])",
        lambda m: f"stage{m[1]}.{m[2]}.body.{places[int(m[4])] + (m[3] == 'bn')}",
    )


def _mobile(match: re.Match[str]) -> str:
    stage, first = ((1, 0), (1, 1), (2, 0), (3, 0), (3, 4), (4, 0), (4, 3))[int(match[1])]
    return f"stage{stage}.{first + int(match[2])}.body.{match[3]}"


def _side(match: re.Match[str]) -> str:
    return f"stage{match[1]}.0.side.{2 * int(match[3]) - 2 + (match[2] == 'bn')}"


def _mobilenet_v2_in_timm() -> dict[str, str]:
    names = {"features.0.0": "conv_stem", "features.0.1": "bn1", "features.18.0": "conv_head", "features.18.1": "bn2"}
    blocks = [(stage, block) for stage, blocks in enumerate((1, 2, 3, 4, 3, 3, 1)) for block in range(blocks)]
    narrow = {"0.0": "conv_dw", "0.1": "bn1", "1": "conv_pw", "2": "bn2"}
    wide = {"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2", "2": "conv_pwl", "3": "bn3"}
    for number, (stage, block) in enumerate(blocks, 1):
        for here, there in (narrow if number == 1 else wide).items():
            names[f"features.{number}.conv.{here}"] = f"blocks.{stage}.{block}.{there}"
    return {**names, "classifier.1": "classifier"}


MOBILENET_V2_IN_TIMM: Mapping[str, str] = _mobilenet_v2_in_timm()
"""Modules of torchvision's mobilenet_v2 -> what they are called in timm's mobilenetv2_100, the same network."""

_BLOCK = "conv|bn"
FAMILIES: Mapping[str, tuple[Rule, ...]] = {
    "ResNet": (
        *_STEM,
        _layers(_BLOCK, {1: 0, 2: 3, 3: 6}),
        (r"layer(\d)\.(\d+)\.(?:downsample|shortcut)\.([01])", r"stage\1.\2.shortcut.\3"),
        _HEAD,
    ),
    "wide ResNet": (
        (r"conv1", "stem"),
        (r"block(\d)\.layer\.(\d+)\.bn1", r"stage\1.\2.before.0"),
        (r"block(\d)\.layer\.(\d+)\.conv1", r"stage\1.\2.body.0"),
        (r"block(\d)\.layer\.(\d+)\.bn2", r"stage\1.\2.body.1"),
        (r"block(\d)\.layer\.(\d+)\.conv2", r"stage\1.\2.body.3"),
        (r"block(\d)\.layer\.(\d+)\.convShortcut", r"stage\1.\2.shortcut"),
        (r"bn1", "tail.0"),
        _HEAD,
    ),
    "VGG": (
        (r"block0\.(\d+)", r"stem.\1"),
        (r"block([123])\.(\d+)", lambda m: f"stage{m[1]}.{int(m[2]) + 1}"),  # behind the pooling, which is inside here
        (r"block4\.(\d+)", r"stage4.\1"),
        _HEAD,
    ),
    "MobileNetV2": (
        (r"conv1\.([01])", r"stem.\1"),
        (r"blocks\.([0-6])\.(\d+)\.conv\.(\d)", _mobile),
        (r"conv2\.([01])", r"tail.\1"),
        _HEAD,
    ),
    "MobileNetV2 of timm": tuple((re.escape(there), here) for here, there in MOBILENET_V2_IN_TIMM.items()),
    "ShuffleNetV1": (*_STEM, _layers(_BLOCK, {1: 0, 2: 4, 3: 7}), _HEAD),
    "ShuffleNetV2": (
        *_STEM,
        (r"layer(\d)\.0\.(conv|bn)([12])", _side),
        _layers(_BLOCK, {3: 0, 4: 3, 5: 5}, "0"),
        _layers(_BLOCK, {1: 0, 2: 3, 3: 5}, r"[1-9]\d*"),
        (r"conv2", "tail.0"),
        (r"bn2", "tail.1"),
        _HEAD,
    ),
}
"""Family -> how the names of its networks there become ours."""


@dataclass(frozen=True)
class Fit:
    """A file's tensors under the names that agree best with a network."""

    state: dict[str, Tensor]
    agreeing: int
    """Tensors whose name and shape are the network's."""
    key: str = ""
    """What the state dict stood under in the file."""
    prefix: str = ""
    """What was taken off the names."""
    family: str = ""
    """The table by which they were translated."""
    left: tuple[str, ...] = ()
    """Names of the file that do not have the prefix."""
    others: tuple[str, ...] = ()
    """Other keys and prefixes under which the file has as many tensors that agree."""

    def told(self) -> str:
        """Return what was done to the file's names, for people; "" where nothing was."""
        parts = []
        if self.prefix:
            parts.append(f"took {self.prefix!r} off the names")
        if self.family:
            parts.append(f"translated other code's names of a {self.family}")
        if self.left:
            parts.append(f"left out {len(self.left)} tensors beside it ({', '.join(self.left[:3])})")
        if self.others:
            taken = repr(self.key or self.prefix)
            parts.append(f"took {taken}, and {', '.join(map(repr, self.others))} would fit as well")
        return "; ".join(parts)


def best_fit(own: Mapping[str, Tensor], states: Mapping[str, Mapping[str, Tensor]]) -> Fit:
    """The state dict in a file, and the names in it, that agree best with `own`; of equals the first and plainest."""
    candidates = list(_candidates(own, states))
    best = max(candidates, key=lambda fit: fit.agreeing)  # of equals max gives the first
    others = [
        f"{fit.key}.{fit.prefix}".strip(".")
        for fit in candidates
        if best.agreeing and fit.agreeing == best.agreeing and (fit.key, fit.prefix) != (best.key, best.prefix)
    ]
    return Fit(best.state, best.agreeing, best.key, best.prefix, best.family, best.left, tuple(others))


def _candidates(own: Mapping[str, Tensor], states: Mapping[str, Mapping[str, Tensor]]) -> Iterator[Fit]:
    for key, state in states.items():
        for prefix in _prefixes(state, len(own) // 2):
            inner = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            left = tuple(name for name in state if not name.startswith(prefix))
            plain = Fit(inner, _agreeing(own, inner), key, prefix, left=left)
            yield plain
            if plain.agreeing == len(own):
                continue
            for family, rules in FAMILIES.items():
                renamed = {_translated(name, rules): value for name, value in inner.items()}
                if len(renamed) == len(inner):
                    yield Fit(renamed, _agreeing(own, renamed), key, prefix, family, left)


def _agreeing(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> int:
    return sum(name in own and own[name].shape == value.shape for name, value in state.items())


def _prefixes(names: Iterable[str], least: int) -> list[str]:
    """Return "" and the dotted fronts that at least so many names share, shortest first: what wrappers (of data
    parallelism, compilation, Lightning, detection) put in front of a network's own names is in front of most."""
    shared = Counter(name[: at + 1] for name in names for at, letter in enumerate(name) if letter == ".")
    return ["", *sorted((front for front, number in shared.items() if number >= least), key=len)]


def _translated(name: str, rules: Iterable[Rule]) -> str:
    module, _, tensor = name.rpartition(".")
    for pattern, replacement in rules:
        match = re.fullmatch(pattern, module)
        if match:
            here = match.expand(replacement) if isinstance(replacement, str) else replacement(match)
            return f"{here}.{tensor}"
    return name
