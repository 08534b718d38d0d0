"""Credentials in URLs: used where a file is opened, and in nothing that is printed or saved."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from secret_server import no_secret_in, saved, server, url_of
from tiny_run import tiny_config

from mimkd_ray import secret_urls, storage
from mimkd_ray.cli import command_line
from mimkd_ray.cli.training import run, run_directory
from mimkd_ray.config import Config, ModelConfig, PrepareConfig
from mimkd_ray.config.digest import digest
from mimkd_ray.config.form.json_form import from_dict, to_dict
from mimkd_ray.errors import UserError
from mimkd_ray.recipes import IMAGENET_RECIPES
from mimkd_ray.secret_urls import redacted, revealed, scrubbed

__all__ = ["server"]  # a fixture


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(secret_urls.VARIABLE, "{}")


@pytest.mark.parametrize(
    "url",
    [
        "https://me:hunter2@host/a/w.pth",
        "https://hunter2@host/w.pth",
        "https://me:hun/ter2@host/w.pth",
        "https://me:hunter2@host:8080/w.pth#part",
        "https://me:hunter2@[::1]:8080/w.pth",
        "https://host/w.pth?sig=c2lnbmF0dXJl&se=2026",
        "https://me:hunter2@host/w.pth?X-Amz-Signature=c2lnbmF0dXJl&file=a#x",
        "ftp://me:hunter2@host/data",
        "sftp://me:hunter2@host/data",
        "s3://key:hunter2@bucket/x",
        "az://box/x?sv=1&sig=c2lnbmF0dXJl",
        "simplecache::https://me:hunter2@host/w.pth",
        "zip://in/w.pth::https://me:hunter2@host/w.zip?sig=c2lnbmF0dXJl",
        "HTTPS://me:hunter2@host/w.pth",
    ],
)
def test_credentials_are_taken_out_and_put_back(url: str) -> None:
    hidden = redacted(url)
    assert re.search(r"://redacted-[0-9a-f]{8}@", hidden)
    no_secret_in(hidden)
    assert "ter2" not in hidden
    assert redacted(hidden) == hidden
    assert revealed(hidden) == url
    assert storage.is_remote(hidden)
    copy = json.loads(os.environ.pop(secret_urls.VARIABLE))
    with pytest.raises(UserError, match="give the whole URL again"):
        revealed(hidden)
    os.environ[secret_urls.VARIABLE] = json.dumps(copy)
    carried = pickle.dumps(secret_urls.Carried())
    os.environ[secret_urls.VARIABLE] = "{}"
    no_secret_in(repr(pickle.loads(carried)))  # noqa: S301
    assert revealed(hidden) == url, "whoever unpickles it knows it"


@pytest.mark.parametrize(
    "text",
    [
        *("digits", "random", "/data/me:x@y?sig=1", "s3://bucket/a?b#c", "s3://bucket/a@b/c", "https://host/@me/w.pth"),
        *("abfs://box@account/x", "sftp://me@host/x", "memory://x", "https://host:8080/w.pth#x", "http://[::1]:80/a@b"),
        "own://0123",
    ],
)
def test_what_has_no_credentials_stays_as_it_is(text: str) -> None:
    assert redacted(text) == revealed(text) == text
    assert secret_urls.known() == {}


def test_another_url_is_noticed_and_a_renewed_signature_is_the_same_file() -> None:
    base = "https://me:hunter2@host/w.pth?file=1&X-Amz-Signature=a&X-Amz-Date=1"
    same = [base.replace("Signature=a", "Signature=b"), base.replace("Date=1", "Date=2"), base.replace("hunter2", "h3")]
    others = [base.replace("file=1", "file=2"), base.replace("w.pth", "v.pth"), base.replace("me:", "you:")]
    assert {redacted(url) for url in same} == {redacted(base)}
    assert revealed(redacted(same[0])) == same[0], "the last one given counts"
    assert len({redacted(url) for url in [base, *others]}) == 4


def test_messages_of_others_are_scrubbed() -> None:
    redacted("https://me:hunter2@host/w.pth?sig=c2lnbmF0dXJl")
    for text in (
        "404, message='Not Found', url='https://me:hunter2@host/x?sig=c2lnbmF0dXJl'",
        "got (https://a:hunter2@host:80/x, s3://b/x) and <http://host/y?sig=c2lnbmF0dXJl>",
        "header sig=c2lnbmF0dXJl is wrong for hunter2",
    ):
        no_secret_in(scrubbed(text))
    plain = "see https://redacted-01234567@host/w.pth, https://docs.example.org/x?y and s3://bucket/a?b"
    assert scrubbed(plain) == plain


def test_a_run_with_a_secret_url(server: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(
        teacher={"weights": url_of(server)},
        run={"root": str(tmp_path), "log_samples": True, "keep_best": True, "tensorboard": True, "checkpoint_steps": 1},
        train={"max_steps": 2},
        launch={"gpu": "off"},
    )
    result = run(config)
    place = Path(run_directory(config))
    assert json.loads((place / "teacher.json").read_text())["weights"] == redacted(url_of(server))
    no_secret_in(saved(tmp_path))

    (place / "result.json").unlink()  # the same command goes on, and a renewed signature does
    for url in (url_of(server), url_of(server, more="&Expires=9")):
        again = replace(config, teacher=replace(config.teacher, weights=url))
        assert run_directory(again) == str(place)
        assert run(again)["student"] == result["student"]
    other = replace(config, teacher=replace(config.teacher, weights=url_of(server, "other.safetensors")))
    assert digest(other) != digest(config)
    with pytest.raises(UserError, match=r"teacher\.weights: http://redacted-\w+@\S+/t\.safetensors -> ") as raised:
        run(replace(other, run=replace(other.run, name=place.name)))
    no_secret_in(str(raised.value))

    # A directory that an earlier release began, with the URL whole.
    old = json.loads((place / "config.json").read_text())
    old["teacher"]["weights"] = url_of(server)
    (place / "config.json").write_text(json.dumps(old))
    run(config)
    no_secret_in(saved(tmp_path))

    os.environ[secret_urls.VARIABLE] = "{}"
    lost = from_dict(Config, json.loads((place / "config.json").read_text()))
    with pytest.raises(UserError, match=r"give the whole URL again.*--teacher\.weights"):
        run(replace(lost, run=replace(lost.run, name="lost")))
    said = capfd.readouterr()
    no_secret_in(said.out + said.err)


def test_errors_and_printed_configs(server: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    gone, denied = url_of(server, "gone.safetensors"), url_of(server).replace("hunter2", "hunter2x")
    dead = "http://me:hunter2@127.0.0.1:9/a?sig=c2lnbmF0dXJl"
    untrained = ["--teacher.train", "false", "--teacher.weights"]
    printed = ["--print-config", *untrained, url_of(server), "--data.root", dead, "--run.root", dead]
    cases = [
        (printed, 0),
        ([*untrained, gone], 2),
        ([*untrained, denied], None),
        (["--teacher.weight", url_of(server)], 2),
        ([f"--teacher.weight={url_of(server)}"], 2),
        (["--config", gone], 2),
        (["--data.root", "http://me:hunter2@"], None),
    ]
    for flags, status in cases:
        where = [] if "--run.root" in flags else ["--run.root", str(tmp_path)]
        os.environ[secret_urls.VARIABLE] = "{}"
        try:
            found = command_line.main(IMAGENET_RECIPES, "demo", ["demo", "--launch.backend", "local", *flags, *where])
        except Exception:  # what Python would print
            traceback.print_exc()
            found = None
        said = "".join(capfd.readouterr())
        no_secret_in(said)
        assert said
        assert found == status or status is None, said

    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", secret_urls.VARIABLE: "{}"}
    line = [sys.executable, str(root / "jobs" / "imagenet.py"), "demo", *printed]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment, timeout=120)
    no_secret_in(done.stdout + done.stderr)
    assert done.returncode == 0, done.stderr


def test_every_field_that_takes_a_url_hides_it() -> None:
    url = "https://me:hunter2@host/x?sig=c2lnbmF0dXJl"
    sections: dict[str, dict[str, Any]] = {name: {"root": url} for name in ("data", "cache", "run")}
    sections |= {"teacher": {"weights": url}, "student": {"weights": url}}
    sections["data"] |= {"store": url, "views": 1}
    config = tiny_config(**sections)
    no_secret_in(repr(config) + json.dumps(to_dict(config)))
    no_secret_in(repr(PrepareConfig(source=url, target="https://me:hunter2@other/y")))
    no_secret_in(repr(ModelConfig(name="x", weights=url)))
    assert command_line.from_flags(ModelConfig, ["--name", "x", "--weights", url]) == ModelConfig(name="x", weights=url)
