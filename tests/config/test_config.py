from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256

import pytest
from tiny_run import tiny_config

from mimkd_ray.config import Config, CriticConfig, ExportConfig, LossConfig, TrainConfig
from mimkd_ray.config.digest import changes, differences, digest, training_dict
from mimkd_ray.config.form.json_form import from_dict, to_dict
from mimkd_ray.config.jobs.evaluate import EvaluateConfig
from mimkd_ray.errors import UserError
from mimkd_ray.recipes import CIFAR_RECIPES as RECIPES


def test_json_round_trip_keeps_every_field() -> None:
    config = tiny_config(loss={"bound": "smile", "local_pairs": ("a:b", "c:d:0.5")}, train={"ema_decay": 0.99})
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config


def test_values_of_evaluations_and_exports_are_checked_as_all_others() -> None:
    with pytest.raises(UserError, match=r"eval\.rows is 1\.5: give a whole number"):
        EvaluateConfig(rows=1.5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"calibration is nan: give a whole number"):
        ExportConfig(calibration=float("nan"))  # type: ignore[arg-type]
    assert "secret" not in EvaluateConfig(out="http://me:secret@host/out").out


def test_unknown_name_is_refused_with_its_place() -> None:
    value = to_dict(tiny_config())
    value["loss"]["critic"]["widht"] = 3
    with pytest.raises(UserError, match=r"widht.*critic"):
        from_dict(Config, value)


def test_wrong_type_is_refused_with_its_place() -> None:
    value = to_dict(tiny_config())
    value["train"]["epochs"] = "many"
    with pytest.raises(UserError, match=r"epochs"):
        from_dict(Config, value)


def test_wrong_choice_is_refused() -> None:
    value = to_dict(tiny_config())
    value["loss"]["bound"] = "nce"
    with pytest.raises(UserError, match=r"bound"):
        from_dict(Config, value)


def test_a_validation_error_keeps_its_own_words() -> None:
    value = to_dict(tiny_config())
    value["train"]["lane_batch"] = 1
    with pytest.raises(UserError, match="a lane needs 2 images"):
        from_dict(Config, value)


@pytest.mark.parametrize(
    ("section", "fields", "same"),
    [
        ("run", {"root": "elsewhere"}, True),
        ("launch", {"workers": 1}, True),
        ("train", {"log_every": 7}, True),
        ("data", {"loader_workers": 2}, True),
        ("train", {"seed": 1}, False),
        ("loss", {"feature_weight": 0.5}, False),
        ("data", {"subset": 100}, False),
        ("teacher", {"weights": "elsewhere.safetensors"}, False),
    ],
)
def test_digest_changes_exactly_with_what_is_trained(section: str, fields: dict, same: bool) -> None:
    assert (digest(tiny_config()) == digest(tiny_config(**{section: fields}))) is same


def test_a_run_from_before_a_field_existed_is_the_same_run_at_the_field_s_default() -> None:
    config = tiny_config()
    old = to_dict(config)
    del old["loss"]["symmetric"], old["loss"]["critic"]["frozen_width"], old["train"]["ema_decay"]
    assert changes(old, config) == []
    used = tiny_config(loss={"symmetric": True})
    assert changes(old, used) == ["loss.symmetric: False -> True"]


def test_the_digest_is_of_the_fields_that_are_not_at_their_defaults() -> None:
    """So that a new field leaves the digests of older configs, by which directories are named, as they were."""
    config = Config(train=TrainConfig(seed=3), loss=LossConfig(critic=CriticConfig(temperature=0.25)))
    chosen = b'{"loss": {"critic": {"temperature": 0.25}}, "train": {"seed": 3}}'
    assert digest(config) == sha256(chosen).hexdigest()


def test_differences_name_the_fields_and_both_values() -> None:
    old, new = training_dict(tiny_config()), training_dict(tiny_config(train={"seed": 5}, optim={"lr": 0.1}))
    assert differences(old, new) == ["optim.lr: 0.05 -> 0.1", "train.seed: 0 -> 5"]


def test_more_workers_than_lanes_is_refused_with_the_remedy() -> None:
    config = tiny_config()
    with pytest.raises(UserError, match=r"launch\.workers is 3 and train\.lanes 2.*--train\.lanes 3"):
        replace(config, launch=replace(config.launch, workers=3))


def test_a_config_from_before_the_fields_of_rivals_and_decay_means_what_it_meant() -> None:
    """Whatever the recipe has today: DKD with beta 8, temperatures 4, and no decay of norms and biases."""
    value = to_dict(RECIPES["resnet56_resnet20"]())
    for name in ("dkd_beta", "dkd_temperature", "dist_temperature"):
        del value["loss"][name]
    del value["optim"]["decay"]
    config = from_dict(Config, value)
    loss = config.loss
    assert (loss.dkd_beta, loss.dkd_temperature, loss.dist_temperature, loss.rival_warmup) == (8.0, 4.0, 4.0, 20.0)
    assert config.optim.decay == "weights"


def test_a_config_of_release_0_1_means_what_it_meant() -> None:
    """Its preset `accuracy` had critics that learn on both sides, a learned temperature, and the lane's negatives."""
    value = to_dict(tiny_config(loss={"preset": "accuracy", "global_weight": 0.1}))
    assert from_dict(Config, value).loss.preset == "accuracy"
    for name in ("teacher", "student", "frozen_width"):
        del value["loss"]["critic"][name]
    for name in ("queue", "same_class", "hard_share", "soft_temperature", "symmetric", "schedule", "pair_weights"):
        del value["loss"][name]
    loss = from_dict(Config, value).loss
    critic = loss.resolved_critic
    assert (critic.teacher, critic.student, critic.learn_temperature) == ("mlp", "mlp", True)
    assert (loss.resolved_negatives, loss.resolved_same_class, loss.weight("global")) == ("all", "keep", 0.1)
    by_hand = {**to_dict(tiny_config()), "loss": {"preset": "accuracy", "critic": {"temperature": 0.2, "kind": "dot"}}}
    assert from_dict(Config, by_hand).loss.preset == "accuracy", "it names a few fields of today's critic"
