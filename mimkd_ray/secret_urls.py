"""URLs with credentials in them: user:password@, and queries with signatures or tokens.

They are taken out where a config is made, so that nothing that is printed, logged or saved has them:
`https://me:pw@host/w.pth?sig=..` becomes `https://redacted-0f3a92c1@host/w.pth`. The eight digits are a digest of the
rest of the URL, so that another one is another configuration; neither passwords nor signatures are in it, because a
short digest would let them be guessed, and a signature that was renewed names the same file.

What was taken out is kept in an environment variable of this process, where its children find it, and is put back only
where a file is opened. To processes of a cluster it goes by `Carried`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

from mimkd_ray.errors import UserError

VARIABLE = "MIMKD_RAY_URL_SECRETS"

_WEB = ("http", "https", "ftp", "ftps", "webdav", "webdavs")
"""Protocols where whatever stands before an @ or after a ? may be a token."""
_TOKENS = re.compile(
    r"(?i)sig|signature|.*token|x-(amz|goog|ms)-.*|api_?key|key|secret|.*password|passwd|credential|auth"
)
_RENEWED = re.compile(
    r"(?i)sig|signature|expires|expiry|policy|key-pair-id|awsaccesskeyid|googleaccessid|s[etpv]|sk[etv]|sktid|skoid|sks|"
    r"x-(amz|goog)-.*|x-amz-security-token"
)
"""Parameters of signatures, which are other ones each time."""

_CHAIN = re.compile(r"::(?=[A-Za-z][\w+.-]*://)")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^?#]*)(\?[^#]*)?(#.*)?", re.DOTALL)
_KNOWN = re.compile(r"://redacted-([0-9a-f]{8})@")
_IN_TEXT = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)([^\s'\"<>]+)")


def redacted(url: str) -> str:
    """Return the URL without credentials, which this process keeps; any other text as it is."""
    if "://" not in url:
        return url
    parts = [_redacted(part) for part in _CHAIN.split(url)]
    return "::".join(parts)


def _redacted(url: str) -> str:
    match = _URL.fullmatch(url)
    if match is None or _KNOWN.search(url):
        return url
    scheme, rest, query, fragment = match[1], match[2], match[3] or "", match[4] or ""
    user, at, rest = _split_user(scheme, rest)
    pairs = parse_qsl(query[1:], keep_blank_values=True)
    web = scheme.lower() in _WEB
    if not query or not (web or any(_TOKENS.fullmatch(name) for name, _ in pairs)):
        rest, query = rest + query, ""
    if not (at or query):
        return url
    lasting = [(name, value) for name, value in pairs if not _RENEWED.fullmatch(name)] if query else []
    name = user.partition(":")[0] if ":" in user else ""
    digest = hashlib.sha256(json.dumps([scheme.lower(), rest, name, lasting]).encode()).hexdigest()[:8]
    os.environ[VARIABLE] = json.dumps(known() | {digest: [user + at, query]})
    return f"{scheme}://redacted-{digest}@{rest}{fragment}"


def _split_user(scheme: str, rest: str) -> tuple[str, str, str]:
    """Split "user:password@host/path" at its @; a name alone is no secret, but where it may be a token."""
    host, slash, path = rest.partition("/")
    if "@" not in host and "@" in path and re.search(r":(?!\d*$)", re.sub(r"\[.*\]", "", host)):
        user, at, found = rest.rpartition("@")  # a password with a slash in it
        return user, at, found
    user, at, host = host.rpartition("@")
    if at and (":" in user or scheme.lower() in _WEB):
        return user, at, host + slash + path
    return "", "", rest


def revealed(url: str) -> str:
    """Return the URL as it was given, to open it. Raises UserError where its credentials are not known here."""
    return "::".join(_revealed(part) for part in _CHAIN.split(url)) if _KNOWN.search(url) else url


def _revealed(url: str) -> str:
    match = _KNOWN.search(url)
    if match is None:
        return url
    if match[1] not in known():
        raise UserError(
            f"{url}: its password or signature was kept out of what is saved: give the whole URL again, where this one "
            "comes from, such as --teacher.weights or --data.root"
        )
    user, query = known()[match[1]]
    place, hash_, fragment = url.partition("#")
    return _KNOWN.sub(lambda _: f"://{user}", place, count=1) + query + hash_ + fragment


def known() -> dict[str, list[str]]:
    """Return {digest: [what stood before the host, the query]} of the URLs that this process was given."""
    found: dict[str, list[str]] = json.loads(os.environ.get(VARIABLE, "{}"))
    return found


def hide(config: object, *fields: str) -> None:
    """Redact fields of a frozen dataclass that is just being made: strings, or tuples of them."""
    for field in fields:
        value = getattr(config, field)
        hidden = tuple(map(redacted, value)) if isinstance(value, tuple) else redacted(value)
        object.__setattr__(config, field, hidden)


def redacted_values(value: Any) -> Any:
    """Return JSON with all URLs in it redacted: files of earlier releases have them whole."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Mapping):
        return {key: redacted_values(item) for key, item in value.items()}
    return [redacted_values(item) for item in value] if isinstance(value, list) else value


def scrubbed(text: str) -> str:
    """Return a message of somebody else's without the credentials of URLs in it."""
    for user, query in known().values():
        for secret in (user, user.rpartition("@")[0].partition(":")[2], query, query[1:]):
            text = text.replace(secret, "***") if len(secret) > 3 else text
    return _IN_TEXT.sub(_scrubbed, text)


def _scrubbed(match: re.Match[str]) -> str:
    scheme, rest = match[1][:-3], match[2]
    if rest.startswith("redacted-"):
        return match[0]
    place, mark, query = rest.partition("?")
    _, at, place = _split_user(scheme, place)
    shown = f"{'***@' if at else ''}{place}"
    return f"{scheme}://{shown}" + ("?***" if mark and scheme.lower() in _WEB and "=" in query else mark + query)


class Carried:
    """What this process knows, for another one: whoever unpickles it knows it too. Shown, it says nothing."""

    def __repr__(self) -> str:
        return "Carried()"

    def __reduce__(self) -> tuple[Any, ...]:
        return _carried, (known(),)


def _carried(others: dict[str, list[str]]) -> Carried:
    if others:
        os.environ[VARIABLE] = json.dumps(known() | others)
    return Carried()
