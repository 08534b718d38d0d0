"""Calls to a store: which failures are tried again and for how long, and what the user is told of the others.

A place (a bucket, a server) that has answered this process is waited for: for `storage.patience_minutes`, with a line a
minute. One that never did is tried a few times only: a wrong name or endpoint should be known at once. Files of this
machine are tried as often.
"""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from mimkd_ray import console
from mimkd_ray.errors import UserError
from mimkd_ray.secret_urls import revealed, scrubbed

TRIES, FIRST_SECONDS = 5, 30.0
"""Where nothing is waited for, a call ends after so many tries, or with the try after which so long has passed."""
FIRST_WAIT_S = 0.2  # doubled after each failure, times a random factor of 0.5 to 1.5
WAIT_CAP_S = 10.0
TELL_AFTER_S, TELL_EVERY_S = 10.0, 60.0

PATIENCE = "MIMKD_RAY_STORAGE_PATIENCE_MINUTES"
"""Environment variable with the minutes, for this process and its children."""
PATIENCE_MINUTES = 10.0

T = TypeVar("T")


class StorageError(OSError):
    """A transient failure that outlasted all tries. The message names the object."""


class AccessError(UserError):
    """A store refuses what it is asked for: no credentials, others, or expired ones."""


class ShortError(OSError):
    """An object ends before the bytes that are asked for: another try finds no more of it."""


# Failures that a retry does not cure. Every other OSError is retried: stores report throttling, resets and server
# errors as plain OSError.
_PERMANENT_ERRNOS = frozenset({errno.EROFS, errno.ENAMETOOLONG, errno.EPERM, errno.EACCES, errno.ENOSYS})
_PERMANENT_TYPES = (FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError)
# Connection failures that do not derive from OSError, by name, so that no client library has to be imported.
_TRANSIENT_NAMES = {
    "botocore": {"HTTPClientError", "ConnectionError", "IncompleteReadError"},
    "aiohttp": {"ClientError"},
    "http": {"IncompleteRead"},
    "httpx": {"TransportError"},
}
_WRITING = ("write", "write to", "create", "upload to")
_NO_PLACE = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR),
    *(errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
)
"""Of a write: the place is below a file, a folder itself, or where the system makes no folders."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_CREDENTIAL_ERRORS = {
    *("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "CredentialRetrievalError"),
    *("SSOTokenLoadError", "UnauthorizedSSOTokenError", "TokenRetrievalError"),
}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "InvalidRegion"}
_REGION |= {"301", "InvalidLocationConstraint"}
"""Codes of S3's answers. An answer to a HEAD request has none, only its status."""

_NO_RANGE = {"InvalidRange", "416"}
"""Of an object that ends before the first byte that is asked for, as ShortError says it of the others."""

ANSWERED: set[tuple[str, bool]] = set()
"""Places that have answered this process, and whether to a write: some may be read and not written."""
_told: dict[str, float] = {}
_hurried: ContextVar[bool] = ContextVar("hurried", default=False)


def be_patient(minutes: float) -> None:
    """Set `storage.patience_minutes` for this process and its children."""
    os.environ[PATIENCE] = str(minutes)


@contextmanager
def hurried() -> Iterator[None]:
    """Wait for no place in this thread during the with-block: a call ends after a few tries."""
    before = _hurried.set(True)
    try:
        yield
    finally:
        _hurried.reset(before)


def attempt(url: str, verb: str, call: Callable[[], T]) -> T:
    """Run `call`, repeat it with growing waits while it fails transiently, and name `url` in the error."""
    where, writes = place_of(url), verb in _WRITING
    known = bool(where) and bool({(where, False), (where, True)} & ANSWERED)
    began, tried = time.monotonic(), 0
    while True:
        tried += 1
        try:
            with explained(url, verb):
                value = call()
            ANSWERED.add((where, writes))
            return value
        except Exception as error:
            refused = isinstance(error, AccessError)
            lasts = refused and not (known and (where, writes) in ANSWERED) and not (known and _code(error) in _EXPIRED)
            if lasts or not (refused or _is_transient(error)):
                if isinstance(error, _PERMANENT_TYPES):
                    ANSWERED.add((where, writes))
                raise
            patience = _patience_s() if known else 0.0
            spent = time.monotonic() - began
            short = isinstance(error, ShortError) or _code(error) in _NO_RANGE
            if short or (spent >= patience and (tried >= TRIES or spent >= FIRST_SECONDS)):
                if not short and not _hurried.get():
                    ANSWERED.difference_update({(where, False), (where, True)})  # others do not wait as long again
                raise _gave_up(url, verb, error, tried, spent) from _cause(url, error)
            _tell(where, f"{verb} {url}", error, spent, patience)
            time.sleep(min(WAIT_CAP_S, FIRST_WAIT_S * 2 ** min(tried - 1, 9)) * random.uniform(0.5, 1.5))


def place_of(url: str) -> str:
    """Protocol and bucket or host; "" for a file of this machine."""
    scheme, mark, rest = url.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}" if mark and scheme != "file" else ""


def _patience_s() -> float:
    return 0.0 if _hurried.get() else 60 * float(os.environ.get(PATIENCE, PATIENCE_MINUTES))


def _gave_up(url: str, verb: str, error: Exception, tried: int, spent: float) -> StorageError:
    if isinstance(error, AccessError):
        return StorageError(f"{error} (tried for {_span(spent)})")
    tries = f"{tried} {'tries' if tried > 1 else 'try'}"
    text = f"could not {verb} {url} in {tries}, {_span(spent)}; the last failure: {_detail(error)}"
    if url.startswith("s3") and not isinstance(error, ShortError):
        text += "; check the network and the address of the store (AWS_ENDPOINT_URL)"
    if _code(error) == "400":  # of a HEAD request, which says no more
        text += "; so a store answers to credentials that have expired, and to a wrong AWS_DEFAULT_REGION"
    return StorageError(text)


def _span(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} s"


def _detail(error: Exception) -> str:
    text = " ".join(scrubbed(str(error)).split())
    return text if isinstance(error, AccessError) else f"{type(error).__name__}: {text or 'no answer in time'}"


def _tell(where: str, what: str, error: Exception, spent: float, patience: float) -> None:
    """Say now and then that a place is waited for: once for all threads."""
    now = time.monotonic()
    if TELL_AFTER_S <= spent < patience and now - _told.get(where, -TELL_EVERY_S) >= TELL_EVERY_S:
        _told[where] = now
        left = _span(patience - spent)
        detail = _detail(error).removeprefix(f"cannot {what}: ")
        console.line(f"cannot {what}: trying for {left} more (storage.patience_minutes): {detail}")


def _cause(url: str, error: BaseException) -> BaseException | None:
    """The error that another one comes from, unless it may name a URL whole: tracebacks show it."""
    return error if revealed(url) == url else None


def _code(error: BaseException | None) -> str:
    """The code in a store's answer that an error comes from; "" if there is none."""
    while error is not None:
        answer: Any = getattr(error, "response", None)
        if isinstance(answer, dict):
            return str(answer.get("Error", {}).get("Code", ""))
        error = error.__cause__ or error.__context__
    return ""


def by_credentials(error: BaseException) -> bool:
    """Return whether a store may have refused a call for its credentials."""
    return isinstance(error, PermissionError) or _code(error) in {*_EXPIRED, "400"}


def no_bucket(error: BaseException) -> bool:
    """Return whether what was not found is the bucket."""
    return _code(error) == "NoSuchBucket"


@contextmanager
def explained(url: str, verb: str) -> Iterator[None]:
    """Name `url` in errors from the with-block that only the user can fix (no room, no access, no such file)."""
    try:
        yield
    except Exception as error:
        code = _code(error)
        said = " ".join(scrubbed(str(error)).split())
        if no_bucket(error):
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
            bucket = place_of(url)
            raise UserError(
                f"cannot {verb} {url}: there is no bucket {bucket}{f' at {endpoint}' if endpoint else ''}: make it "
                f"(aws s3 mb {bucket}), or correct its name, or the store's address (AWS_ENDPOINT_URL)"
            ) from _cause(url, error)
        # A redirection without a region, as to a HEAD request, is one that botocore follows for ever.
        if code in _REGION or (isinstance(error, RecursionError) and url.startswith("s3")):
            region = os.environ.get("AWS_DEFAULT_REGION") or os.environ.get("AWS_REGION") or "us-east-1, the default"
            raise UserError(
                f"cannot {verb} {url}: the bucket is in another region than {region}: set AWS_DEFAULT_REGION to its "
                f"own (the store says: {said})"
            ) from _cause(url, error)
        if code in _EXPIRED:
            raise AccessError(
                f"cannot {verb} {url}: the credentials have expired ({said}): renew them where this process takes them "
                "from (aws sso login, ~/.aws/credentials, a role), or set new AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN and give the same command again"
            ) from _cause(url, error)
        if isinstance(error, PermissionError) or type(error).__name__ in _CREDENTIAL_ERRORS:
            raise AccessError(
                f"cannot {verb} {url}: {said or 'access denied'}; check the permissions, and for an object store its "
                "credentials (they may have expired) and endpoint (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
                "AWS_ENDPOINT_URL)"
            ) from _cause(url, error)
        if verb in _WRITING and getattr(error, "status", 0) in (405, 501):
            raise UserError(
                f"cannot {verb} {url}: the server takes no files ({said}); give a folder or a bucket"
            ) from _cause(url, error)
        # Of botocore, which quotes the address whole; s3fs may wrap it.
        if "ParamValidationError" in (type(error).__name__, type(error.__cause__).__name__):
            raise UserError(
                f"cannot {verb} {url}: not an address of S3: a bucket's name has letters, digits, dots, hyphens and "
                "underscores only; credentials are no part of it, but variables (AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY)"
            ) from _cause(url, error)
        if verb in _WRITING and isinstance(error, OSError):
            number = error.errno or (errno.ENOENT if isinstance(error, FileNotFoundError) else 0)
            if number in _NO_PLACE and not code:
                raise UserError(
                    f"cannot {verb} {url}: {os.strerror(number)}; give a place in which folders and files can be made"
                ) from _cause(url, error)
        if isinstance(error, FileNotFoundError | NotADirectoryError):  # the latter: a file stands where a folder would
            raise FileNotFoundError(errno.ENOENT, "no such file or folder", url) from _cause(url, error)
        if isinstance(error, OSError) and error.errno in _FULL:
            raise UserError(
                f"cannot {verb} {url}: no space is left ({error.strerror}); make room and give the same command again"
            ) from error
        raise


def _is_transient(error: Exception) -> bool:
    if isinstance(error, OSError):
        return not isinstance(error, _PERMANENT_TYPES) and error.errno not in _PERMANENT_ERRNOS
    kinds = type(error).__mro__
    return any(kind.__name__ in _TRANSIENT_NAMES.get(kind.__module__.split(".")[0], ()) for kind in kinds)
