"""Checks that compare what nodes say of themselves, given as data."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from mimkd_ray.doctor.node_facts import (
    NodeFacts,
    check_authentication,
    check_clock,
    check_gpus,
    check_memory,
    check_versions,
    look,
    source_digest,
)

NODE = NodeFacts(
    node="10.0.0.1",
    versions={"torch": "2.15.0", "mimkd_ray source": "aaaa"},
    ray_gpus=4,
    torch_gpus=4,
    shm_bytes=20 * 10**9,
    object_store_bytes=10 * 10**9,
    auth_mode="token",
)
OTHER = replace(NODE, node="10.0.0.2")


def test_equal_nodes_pass() -> None:
    for check in (check_versions, check_gpus, check_authentication):
        assert check([NODE, OTHER]).status == "pass"
    assert check_versions([NODE, OTHER]).text == "2 nodes: torch 2.15.0, mimkd_ray source aaaa"
    assert check_gpus([NODE, OTHER]).figures == {"ray_gpus": 8, "torch_gpus": 8}
    assert check_memory(NODE).status == "pass"
    assert check_gpus([replace(NODE, ray_gpus=0, torch_gpus=0)]).text.startswith("none")


@pytest.mark.parametrize(("name", "value"), [("torch", "2.14.0"), ("mimkd_ray source", "bbbb")])
def test_versions_that_differ_are_named_with_their_nodes(name: str, value: str) -> None:
    found = check_versions([NODE, replace(OTHER, versions={**NODE.versions, name: value})])
    assert found.status == "fail"
    assert found.text == f"{name} {NODE.versions[name]} on 10.0.0.1, {value} on 10.0.0.2"
    assert "constraints.txt" in found.remedy


def test_a_package_that_is_missing_everywhere_fails_too() -> None:
    assert check_versions([replace(NODE, versions={"torchvision": "not installed"})]).status == "fail"


def test_gpus_that_differ() -> None:
    found = check_gpus([NODE, replace(OTHER, torch_gpus=0)])
    assert (found.status, found.text) == ("fail", "Ray has 4 and torch 0 on 10.0.0.2")
    assert found.remedy


def test_authentication_that_differs_or_is_off() -> None:
    found = check_authentication([NODE, replace(OTHER, auth_mode="disabled")])
    assert (found.status, found.text) == ("fail", "RAY_AUTH_MODE differs: token on 10.0.0.1, disabled on 10.0.0.2")
    off = check_authentication([replace(NODE, auth_mode=""), replace(OTHER, auth_mode="")])
    assert off.status == "warn"
    assert "unset on 10.0.0.1, 10.0.0.2" in off.text


@pytest.mark.parametrize(("shm", "status"), [(0, "fail"), (64 << 20, "fail"), (9 * 10**9, "warn"), (10**10, "pass")])
def test_shared_memory_must_hold_the_object_store(shm: int, status: str) -> None:
    found = check_memory(replace(NODE, shm_bytes=shm))
    assert found.status == status
    assert f"{shm / 1e9:.1f} GB" in found.text
    assert bool(found.remedy) == (status != "pass")


@pytest.mark.parametrize(
    ("difference", "uncertain", "status"),
    [(0.4, 0.1, "pass"), (-1.2, 0.1, "warn"), (1.2, 0.5, "pass"), (400.0, 1.0, "fail"), (-400.0, 1.0, "fail")],
)
def test_clocks(difference: float, uncertain: float, status: str) -> None:
    found = check_clock("10.0.0.2", difference, uncertain)
    assert found.status == status
    assert found.figures["difference_s"] == difference


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    found = look("here", 3, 77)
    assert (found.node, found.ray_gpus, found.object_store_bytes, found.auth_mode) == ("here", 3, 77, "token")
    assert found.versions["mimkd_ray source"] == source_digest()
    assert {"python", "torch", "torchvision", "ray", "pyarrow", "mimkd-ray"} <= set(found.versions)
    shm = os.statvfs("/dev/shm")
    assert found.shm_bytes == shm.f_blocks * shm.f_frsize
