"""The lines of `python -m mimkd_ray doctor`."""

from __future__ import annotations

import pytest

from mimkd_ray.doctor.outcome import Outcome, lines


def test_nodes_that_pass_share_a_line_and_others_have_their_own() -> None:
    found = [
        Outcome(check="gpus", status="pass", text="none"),
        Outcome(check="decode", status="pass", node="a", text="900 images/s", speed=900.0),
        Outcome(check="decode", status="warn", node="b", text="100 images/s", remedy="more cores", speed=100.0),
        Outcome(check="decode", status="pass", node="c", text="800 images/s", speed=800.0),
    ]
    assert lines(found) == [
        "pass  gpus: none",
        "pass  decode: 2 times; the slowest, c: 800 images/s",
        "warn  decode [b]: 100 images/s; more cores",
    ]


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef")
    monkeypatch.setenv("SOME_TOKEN", "the")
    text = (
        "cannot read the http://user:pw@host/x?X-Amz-Signature=abc&X-Amz-Credential=KEY/20260101 of wJalrXUtnFEMI "
        "and\n0123456789abcdef"
    )
    line = Outcome(check="storage", status="fail", text=text).line()
    assert line == (
        "fail  storage: cannot read the http://***@host/x?X-Amz-Signature=***&X-Amz-Credential=*** of *** and ***"
    )
