"""Search spaces: every answer of a grid, conditions, names, and the spaces that come with the package."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import tiny_config
from tiny_search import width

from mimkd_ray.cli.preflight import preflight
from mimkd_ray.config import Config
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.errors import UserError
from mimkd_ray.search.spaces import SPACES, find_spaces
from mimkd_ray.search.suggest import Asked, Candidates, Range, Suggest, compose, every_answer
from mimkd_ray.search.tap_candidates import draws, find_candidates, flat_space, near_pairs, widest
from mimkd_ray.taps.default_stages import Stages
from mimkd_ray.train.networks.build import plan_taps

NONE = Candidates((), (), {})


def test_a_grid_is_the_product_of_its_choices() -> None:
    def build(trial: Suggest) -> Config:
        trial.suggest_categorical("a", (1, 2, 3))
        trial.suggest_categorical("b", ("x", "y"))
        trial.suggest_float("c", 1.0, 100.0, log=True)
        return Config()

    found = [tuple(params.values()) for params in every_answer(build, 3)]
    assert found == list(itertools.product((1, 2, 3), ("x", "y"), (1.0, pytest.approx(10.0), 100.0)))


def test_a_grid_follows_conditions() -> None:
    """A tree of unequal depth, against its leaves by hand."""

    def build(trial: Suggest) -> Config:
        if trial.suggest_categorical("on", (True, False)):
            if trial.suggest_categorical("kind", ("p", "q")) == "q":
                trial.suggest_categorical("deep", (1, 2))
            trial.suggest_categorical("kind", ("p", "q"))  # asked again: the same answer, and no new branch
        return Config()

    assert list(every_answer(build, 2)) == [
        {"on": True, "kind": "p"},
        {"on": True, "kind": "q", "deep": 1},
        {"on": True, "kind": "q", "deep": 2},
        {"on": False},
    ]


@given(low=st.floats(1e-3, 10), factor=st.floats(1.01, 1e3), points=st.integers(2, 9), log=st.booleans())
def test_values_of_a_grid_are_even_and_reach_the_ends(low: float, factor: float, points: int, log: bool) -> None:
    values = Range(low, low * factor, log).values(points)
    assert (values[0], values[-1], len(values)) == (low, low * factor, points)
    on_scale = [math.log(value) if log else value for value in values]
    steps = [b - a for a, b in itertools.pairwise(on_scale)]
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-6, abs=1e-12)


def test_spaces_are_found_in_the_order_in_which_they_depend() -> None:
    names = ["weights", "tiny_search:width", "taps", "temperature"]
    assert find_spaces(names) == [SPACES["temperature"], SPACES["taps"], SPACES["weights"], width]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tempreature", r"'tempreature' is unknown; did you mean 'temperature'.*spaces: critic, temperature, bound"),
        ("no.such.module:f", r"'no.such.module:f': cannot import 'no.such.module': No module named 'no'"),
        ("tiny_search:nothing", r"tiny_search has no function 'nothing'"),
    ],
)
def test_a_space_that_is_not_there(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_spaces([name])


def test_candidates_are_stages_at_most_one_apart() -> None:
    teacher, student = Stages(("t1", "t2", "t3"), "t"), ("s2", "s3")
    assert near_pairs(teacher, student) == ("t1:s2", "t2:s2", "t2:s3", "t3:s2", "t3:s3")
    assert len(near_pairs(Stages(("a",), "v"), ("b",))) == 1


def test_candidates_of_two_networks() -> None:
    found = find_candidates(tiny_config(loss={"feature_pairs": ()}), 10)
    near = "stage1:stage1 stage1:stage2 stage2:stage1 stage2:stage2 stage2:stage3 stage3:stage2 stage3:stage3"
    assert found.feature == tuple(near.split()), "all but those two stages apart"
    assert found.local == ("pool:stage1", "pool:stage2", "pool:stage3")
    assert found.default["global"] == ("pool:pool",)
    named = find_candidates(tiny_config(), 10)
    assert named.feature == ("stage3:stage3",), "pairs that the config names are the candidates"


def fixed(**answers: object) -> Asked:
    """Answers with given values, else the highest number or the first choice."""
    return Asked(lambda name, asked: answers.get(name, asked.high if isinstance(asked, Range) else asked[0]))


def test_a_temperature_only_where_there_is_one() -> None:
    build = compose([SPACES["critic"], SPACES["temperature"]], tiny_config(), NONE)
    concat = fixed(**{"critic.kind": "concat"})
    assert build(concat).loss.critic.kind == "concat"
    assert list(concat.asked) == ["critic.kind", "critic.width"]
    dot = fixed(**{"critic.temperature": 0.02})
    config = build(dot)
    assert config.loss.critic.temperature == 0.02
    assert list(dot.asked) == [
        "critic.kind",
        "critic.teacher",
        "critic.student",
        "critic.learn_temperature",
        "critic.temperature",
    ]


def test_no_pair_chosen_turns_feature_terms_off_and_asks_for_no_weight() -> None:
    pairs = Candidates(("a:b", "c:d"), ("v:b",), {})
    build = compose([SPACES["taps"], SPACES["weights"]], tiny_config(), pairs)
    none = fixed(**{"feature a:b": False, "feature c:d": False})
    config = build(none)
    assert config.loss.feature_weight == 0
    assert not any("feature_weight" in name for name in none.asked)
    one = build(fixed(**{"feature a:b": False, "global terms": False}))
    assert one.loss.feature_pairs == ("c:d",)
    assert (one.loss.global_weight, one.loss.feature_weight) == (0.0, 30.0)


def test_a_student_alone_is_not_drawn() -> None:
    """With every answer no, the last kind is on without a question, unless KD reads the teacher."""
    off = {f"{kind} terms": False for kind in ("global", "local", "feature")}
    build = compose([SPACES["taps"], SPACES["kd"], SPACES["weights"]], tiny_config(), Candidates((), ("v:b",), {}))
    alone = fixed(kd=False, **off)
    loss = build(alone).loss
    assert (loss.global_weight, loss.local_weight, loss.feature_weight) == (0.0, 30.0, 0.0)
    assert list(alone.asked) == ["kd", "global terms", "local_weight"]
    with_kd = build(fixed(kd=True, **off)).loss
    assert (with_kd.uses_features, with_kd.kd_weight) == (False, 3.0)
    standardised = tiny_config(loss={"kd_logits": "standardised"})
    assert SPACES["kd"](fixed(kd=True), standardised, NONE).loss.kd_weight == 30.0, "it is published with 9"


def test_a_rivals_factor_only_where_there_is_one() -> None:
    none = fixed()
    assert compose([SPACES["rival"]], tiny_config(), NONE)(none) == tiny_config()  # type: ignore[arg-type]
    assert not none.asked
    for name in ("kd", "rkd"):
        base = tiny_config(loss={"name": ("mimkd", name)})
        config = compose([SPACES["rival"]], base, NONE)(fixed(rival_weight=0.2))
        assert config.loss.weight_of(name) == pytest.approx(0.2 * base.loss.weight_of(name))


def test_the_widest_config_names_all_methods_that_are_drawn() -> None:
    base = tiny_config(loss={"name": (), "feature_pairs": ()})

    def method(trial: Suggest, config: Config, pairs: Candidates) -> Config:
        name = trial.suggest_categorical("method", ("dist", "sp", "mimkd"))
        return replace(config, loss=replace(config.loss, name=(name,)))  # type: ignore[arg-type]

    candidates = find_candidates(base, 10)
    wide = widest(compose([method], base, candidates), candidates)
    assert set(wide.loss.name) == {"dist", "sp", "mimkd"}
    assert wide.loss.weight("feature")
    assert wide.loss.feature_pairs == candidates.default["feature"]


def _space(ask: Callable[[Suggest, Config], object]) -> Callable[[Suggest], Config]:
    def mine(trial: Suggest, config: Config, pairs: Candidates) -> Config:
        return ask(trial, config)  # type: ignore[return-value]

    return compose([mine], tiny_config(), NONE)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda trial, config: None, "search.space mine returned None: return the changed config"),
        (lambda trial, config: trial.suggest_float("lr", 0.2, 0.1), "range of 'lr' is 0.2 to 0.1: .* low <= high"),
        (
            lambda trial, config: trial.suggest_float("lr", 0, 1, log=True),
            "'lr' is 0 to 1: .* 0 < low <= high",
        ),
        (lambda trial, config: trial.suggest_float("lr", 0, math.inf), "give finite numbers"),
        (lambda trial, config: trial.suggest_categorical("kind", ()), "'kind' has no choices"),
        (lambda trial, config: trial.suggest_int("n", 1, 2), "AttributeError.*asks by suggest_float and suggest_cat"),
        (lambda trial, config: replace(config, rate=1), f"mine raised TypeError: .*'rate' \\({__file__}, line"),
        (
            lambda trial, config: replace(config, optim=replace(config.optim, lr="1")),
            "mine: optim.lr is '1': give",
        ),
    ],
)
def test_a_mistake_in_a_space_is_told_before_the_search(ask: Callable[..., object], message: str) -> None:
    build = _space(ask)
    for look in (lambda: widest(build, NONE), lambda: list(every_answer(build, 2))):
        with pytest.raises(UserError, match=message):
            look()


def test_choices_that_differ_between_trials_are_refused() -> None:
    """Optuna would refuse them in the middle of the search."""

    def ask(trial: Suggest, config: Config) -> Config:
        trial.suggest_categorical("kind", (1, 2) if trial.suggest_categorical("on", (True, False)) else (1,))
        return config

    with pytest.raises(UserError, match="for 'kind' in one trial"):
        widest(_space(ask), NONE)

    def mixed(trial: Suggest, config: Config) -> Config:
        if trial.suggest_categorical("on", (True, False)):
            trial.suggest_categorical("x", (1, 2))
        else:
            trial.suggest_float("x", 1, 2)
        return config

    with pytest.raises(UserError, match="for 'x' in one trial"):
        widest(_space(mixed), NONE)

    def two_scales(trial: Suggest, config: Config) -> Config:
        trial.suggest_float("x", 1, 2, log=trial.suggest_categorical("on", (True, False)))
        return config

    with pytest.raises(UserError, match="for 'x' in one trial"):
        widest(_space(two_scales), NONE)


def test_a_flat_space_has_every_range() -> None:
    """Of a number whose range depends on a choice: a searcher that knows no conditions may choose from all of it."""

    def build(trial: Suggest) -> Config:
        low, high = trial.suggest_categorical("range", ((0.1, 1.0), (0.5, 4.0), (0.7, 0.9)))
        trial.suggest_float("x", low, high, log=True)
        return Config()

    assert flat_space(build)["x"] == Range(0.1, 4.0, True)


def test_whatever_is_drawn_can_be_trained() -> None:
    """All spaces together: every config is valid, its taps exist, and the widest one covers them."""
    base = tiny_config(loss={"feature_pairs": ()})
    candidates = find_candidates(base, open_data(base.data).num_classes)
    build = compose(list(SPACES.values()), base, candidates)
    wide = widest(build, candidates)
    assert wide.loss.kd_weight
    for _, config in draws(build)[:12]:
        assert config.loss.uses_teacher
        preflight(config)
        for kind in ("global", "local", "feature"):
            if config.loss.weight(kind):
                own = getattr(config.loss, f"{kind}_pairs") or candidates.default[kind]
                assert set(own) <= set(getattr(wide.loss, f"{kind}_pairs"))
                assert wide.loss.weight(kind)


def test_the_default_pairs_are_those_of_training() -> None:
    from mimkd_ray.models.build_model import build_model

    base = tiny_config(loss={"feature_pairs": ()})
    candidates = find_candidates(base, 10)
    networks = [build_model(name, 10, "random", 32) for name in (base.teacher.name, base.student.name)]
    plan = plan_taps(base.loss, networks[0], networks[1], base.data.image_size)
    for kind in ("global", "local", "feature"):
        own = tuple(f"{term.teacher}:{term.student}" for term in plan.terms if term.kind == kind)
        assert candidates.default[kind] == own
