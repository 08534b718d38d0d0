"""Cost of the loss: its share of a ResNet-18 training step, and its memory over the size of its inputs.

Share of a step: forward, backward and SGD of a ResNet-18 at 224 px with cross-entropy alone, against the same with the
MIMKD loss in its default configuration, and the same with all three terms and the queue against the default of release
0.1 (preset two_sided). The ResNet-34 teacher's features are given (random values of its true shapes), because the cost
of a teacher does not depend on the loss. The two arms take turns in one process, and the figure is the median over
rounds, so that other load on the machine affects both.

Memory: the local term over all pairs (InfoNCE) on embeddings, B = 256, 14x14 locations, d = 128: the peak of what
forward and backward allocate, over the size of the embeddings; and the same with all scores held at once.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from report import Targets, finish, parser, table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from mimkd_ray.config import CriticConfig, LossConfig
from mimkd_ray.config.loss_presets import Kind
from mimkd_ray.losses.critics import DotCritic
from mimkd_ray.losses.features import Features
from mimkd_ray.losses.mimkd_loss import MIMKDLoss
from mimkd_ray.losses.negatives import valid_pairs
from mimkd_ray.losses.terms import Candidates, Objective, Term, score_term

CLASSES = 1000
SHAPES = {"layer3": (256, 14, 14), "layer4": (512, 7, 7)}
"""Maps of ResNet-18 and ResNet-34 at 224 px; both networks' vectors have 512 channels."""
VECTOR = 512
ALL_AT_ONCE = 2**62  # bytes that scores may take

PAIRS: tuple[tuple[Kind, str, str], ...] = (
    ("global", "pool", "pool"),
    ("local", "pool", "layer4"),
    ("feature", "layer3", "layer3"),
    ("feature", "layer4", "layer4"),
)


def make_loss(config: LossConfig, kinds: tuple[Kind, ...] = ("global", "local", "feature")) -> MIMKDLoss:
    """Return the loss with the default tap pairs of a ResNet-18 under a ResNet-34."""

    def channels(tap: str) -> int:
        return SHAPES[tap][0] if tap in SHAPES else VECTOR

    return MIMKDLoss(
        config,
        [
            Term(
                kind=kind,
                teacher=teacher,
                student=student,
                weight=config.weight(kind),
                teacher_channels=channels(teacher),
                student_channels=channels(student),
            )
            for kind, teacher, student in PAIRS
            if kind in kinds and config.weight(kind)
        ],
    )


class Student(nn.Module):
    """The ResNet-18 of torchvision, which also returns the features that the loss reads."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torchvision.models.resnet18(weights=None)

    def forward(self, images: Tensor) -> Features:
        net = self.net
        value = net.layer2(net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(images))))))
        layer3 = net.layer3(value)
        layer4 = net.layer4(layer3)
        vector = net.avgpool(layer4).flatten(1)
        return Features(net.fc(vector), {"pool": vector}, {"layer3": layer3, "layer4": layer4})


class Times(NamedTuple):
    """Wall-clock seconds, and CPU seconds of all threads. Other load hardly affects the second."""

    wall: float
    cpu: float


@dataclass
class Bench:
    """The student, one batch of images and the teacher's features, on one device."""

    device: torch.device
    batch: int

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.low_precision = self.device.type == "cuda"
        self.student = Student().to(self.device).to(memory_format=torch.channels_last)
        self.images = self._last(torch.randn(self.batch, 3, 224, 224))
        self.labels = torch.randint(CLASSES, (self.batch,), device=self.device)
        self.ids = torch.arange(self.batch, device=self.device)
        dtype = torch.bfloat16 if self.low_precision else torch.float32
        self.teacher = Features(
            torch.randn(self.batch, CLASSES).to(self.device, dtype),
            {"pool": torch.rand(self.batch, VECTOR).to(self.device, dtype)},
            {tap: self._last(torch.rand(self.batch, *shape)).to(dtype) for tap, shape in SHAPES.items()},
        )

    def _last(self, value: Tensor) -> Tensor:
        return value.to(self.device, memory_format=torch.channels_last)

    def forward(self) -> Features:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.low_precision):
            return self.student(self.images)

    def times(self, run: Callable[[], object]) -> Times:
        """Return the duration of one call."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return Times(time.perf_counter() - wall, time.process_time() - cpu)

    def step(self, loss: MIMKDLoss | None) -> Callable[[], None]:
        """Return one training step, with cross-entropy alone if no loss is given."""
        modules = [self.student] if loss is None else [self.student, loss]
        parameters = [parameter for module in modules for parameter in module.parameters()]
        # A rate of zero: every round works on the same weights, at the full cost of an update.
        optimiser = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=1e-4)

        def run() -> None:
            student = self.forward()
            if loss is None:
                total = F.cross_entropy(student.logits_BC.float(), self.labels)
            else:
                total = loss(self.teacher, student, self.labels, self.ids).total
            optimiser.zero_grad(set_to_none=True)
            total.backward()
            optimiser.step()
            if loss is not None:
                loss.observe(self.teacher, self.labels, self.ids)
                loss.after_step()

        return run

    def loss_alone(self, loss: MIMKDLoss) -> Callable[[], None]:
        """Return forward and backward of the loss on given features, including cross-entropy."""
        with torch.no_grad():
            found = self.forward()
        student = Features(
            found.logits_BC.requires_grad_(),
            {tap: value.requires_grad_() for tap, value in found.vectors.items()},
            {tap: value.requires_grad_() for tap, value in found.maps.items()},
        )
        wanted = [student.logits_BC, *student.vectors.values(), *student.maps.values(), *loss.parameters()]

        def run() -> None:
            total = loss(self.teacher, student, self.labels, self.ids).total
            torch.autograd.grad(total, wanted, allow_unused=True)

        return run

    def multiply_adds(self, run: Callable[[], object]) -> float:
        """Return the multiply-adds of convolutions and matrix products in one call."""
        counter = FlopCounterMode(display=False)
        with counter:
            run()
        return counter.get_total_flops() / 2


def share_of_step(bench: Bench, rounds: int) -> dict[str, float]:
    """Return the headline figure, and rows for every kind of term and for other widths."""
    default = make_loss(LossConfig()).to(bench.device)
    three = make_loss(LossConfig(local_weight=1.0)).to(bench.device)
    earlier = make_loss(LossConfig(preset="two_sided")).to(bench.device)
    steps = [bench.step(None), bench.step(default), bench.step(three), bench.step(earlier)]
    for warm_up in steps:
        warm_up()
        warm_up()
    base: list[Times] = []
    full: list[Times] = []
    threes: list[Times] = []
    earliers: list[Times] = []
    for index in range(rounds):
        arms = list(zip((base, full, threes, earliers), steps, strict=True))
        for times, run in arms if index % 2 == 0 else arms[::-1]:  # neither arm always follows the other
            times.append(bench.times(run))
    shares = [b.wall / a.wall - 1 for a, b in zip(base, full, strict=True)]
    low, _, high = statistics.quantiles(shares, n=4)
    figures = {
        "loss_share_of_step": statistics.median(shares),
        # Of a median, from the quartiles, as for a normal distribution: 1.253 * (spread / 1.349) / sqrt(rounds).
        "loss_share_standard_error": 1.253 * (high - low) / 1.349 / math.sqrt(rounds),
        "loss_share_of_step_by_minima": min(b.wall for b in full) / min(a.wall for a in base) - 1,
        "loss_share_of_cpu_time": statistics.median(b.cpu / a.cpu - 1 for a, b in zip(base, full, strict=True)),
        "three_terms_and_queue_over_two_sided": statistics.median(
            a.wall / b.wall for a, b in zip(threes, earliers, strict=True)
        ),
        "step_seconds": statistics.median(a.wall for a in base),
        "step_seconds_with_loss": statistics.median(b.wall for b in full),
    }
    print(
        f"ResNet-18 step, batch {bench.batch}, {bench.device.type}, {rounds} rounds: "
        f"{figures['step_seconds']:.4f} s alone, {figures['step_seconds_with_loss']:.4f} s with the loss\n"
        f"share of the step: median {figures['loss_share_of_step']:.2%}, quartiles {low:.2%} to {high:.2%}, by minima "
        f"{figures['loss_share_of_step_by_minima']:.2%}, of CPU time {figures['loss_share_of_cpu_time']:.2%}\n"
        "three terms and the queue over the default of release 0.1, whole steps: "
        f"{figures['three_terms_and_queue_over_two_sided']:.3f}\n"
    )

    variants: dict[str, MIMKDLoss] = {"cross-entropy alone": make_loss(LossConfig(), ())}
    for kind in ("global", "local", "feature"):
        variants[f"{kind} terms only"] = make_loss(LossConfig(local_weight=1.0), (kind,))
    variants["all terms"] = make_loss(LossConfig(local_weight=1.0))
    for queue in (4096, 65_536):
        variants[f"global term, queue of {queue}"] = make_loss(LossConfig(queue=queue), ("global",))
    for width in (64, 128, 256):
        own = LossConfig(preset="two_sided", critic=CriticConfig(width=width))
        variants[f"two_sided preset, width {width}"] = make_loss(own)
    variants["all terms, paper preset"] = make_loss(LossConfig(preset="paper"))
    student_cost = bench.multiply_adds(bench.forward)
    rows: list[list[object]] = []
    for name, variant in variants.items():
        loss = variant.to(bench.device)
        run = bench.loss_alone(loss)
        features = bench.forward()
        cost = bench.multiply_adds(lambda f=features, m=loss: m(bench.teacher, f, bench.labels, bench.ids))  # type: ignore[misc]
        run()
        # Minima: these rows are absolute times and have no partner to take turns with.
        seconds = min(bench.times(run).wall for _ in range(max(5, rounds)))
        share, arithmetic = seconds / min(a.wall for a in base), cost / student_cost
        rows.append([name, f"{seconds * 1e3:.2f}", f"{share:.2%}", f"{arithmetic:.2%}"])
        key = name.replace(" ", "_").replace(",", "")
        figures[f"{key}/share_of_step"] = share
        figures[f"{key}/share_of_forward_arithmetic"] = arithmetic
    print(
        table(["loss alone, forward + backward", "ms", "of a step", "multiply-adds of the forward"], rows),
        "\n",
    )
    return figures


class Embedded(DotCritic):
    """A dot critic whose inputs are embeddings already, so that only the scoring is measured."""

    def embed_teacher(self, reduced_LKC: Tensor, lane: int | None = None) -> Tensor:
        return reduced_LKC

    def embed_student(self, feature: Tensor) -> Tensor:
        return feature


def peak_extra_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the highest sum of memory allocated and not yet freed while ``run`` ran."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    recorded = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(recorded, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def memory(device: torch.device, batch: int = 256, locations: int = 196, width: int = 128) -> dict[str, float]:
    """Return the peak extra memory of the local term over the size of its inputs, ours and with all scores at once."""
    torch.manual_seed(0)
    critic = Embedded(1, 1, CriticConfig(width=width)).to(device)
    teacher, student = (
        F.normalize(torch.randn(count, batch, width, device=device), dim=-1).requires_grad_()
        for count in (1, locations)
    )
    valid = valid_pairs(torch.arange(batch, device=device), "all")
    inputs = teacher.nbytes + student.nbytes

    def run(score_bytes: int = 0) -> None:
        loss, _ = score_term(critic, Objective("infonce"), Candidates(teacher, valid), student, score_bytes=score_bytes)
        torch.autograd.grad(loss, [teacher, student])

    run()
    ours = peak_extra_bytes(run, device) / inputs
    naive = peak_extra_bytes(lambda: run(ALL_AT_ONCE), device) / inputs
    rows: list[list[object]] = [["ours", ours], ["all scores at once", naive]]
    print(f"local term, B = {batch}, {locations} locations, d = {width}: inputs of {inputs / 2**20:.1f} MiB")
    print(table(["memory", "peak extra / inputs"], rows))
    return {"memory_over_inputs": ours, "memory_over_inputs_naive": naive}


def main() -> int:
    options = parser(__doc__)
    cuda = torch.cuda.is_available()
    options.add_argument("--batch", type=int, default=256 if cuda else 16, help="images of a step")
    options.add_argument("--rounds", type=int, default=30 if cuda else 15, help="rounds of both arms")
    options.add_argument("--device", default="cuda" if cuda else "cpu", help="cpu or cuda")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    figures = share_of_step(Bench(device, args.batch), args.rounds) | memory(device)
    # A busy machine can give any share, even a negative one: without the second target that would pass.
    targets: Targets = {
        "loss_share_of_step": ("<=", 0.08),
        "loss_share_standard_error": ("<=", 0.02),
        "three_terms_and_queue_over_two_sided": ("<=", 1.0),
        "memory_over_inputs": ("<=", 3.0),
    }
    return finish("loss", figures, targets, args.json)


if __name__ == "__main__":
    sys.exit(main())
