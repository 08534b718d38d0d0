"""The file system behind a URL, and retried calls: the base of storage.py.

A file system object owns an event loop, which does not survive a fork, so each process has its own.
"""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from mimkd_ray.errors import UserError
from mimkd_ray.secret_urls import redacted, revealed, scrubbed

TRIES = 5
FIRST_WAIT_S = 0.2  # doubled after each failure, times a random factor of 0.5 to 1.5
WAIT_CAP_S = 10.0

T = TypeVar("T")


class StorageError(OSError):
    """A transient failure that outlasted all tries. The message names the object."""


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
_FLAT = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss"}
"""Object stores: a folder is no more than the beginning of names, and goes with them."""
_WRITING = ("write", "write to", "create", "upload to")
_NO_PLACE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
"""Of a write: the place is below a file, a folder itself, or where the system makes no folders."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_CREDENTIAL_ERRORS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}

# After a fork the parent's entries stay here unused: finalising them in the child would wait for a dead event loop.
_FILESYSTEMS: dict[tuple[Any, ...], Any] = {}


def filesystem(url: str) -> Any:
    """Return this process's file system for `url`, as the environment configures it; it caches no listings."""
    import fsspec

    protocol = url.split("://", 1)[0]
    try:
        kind = fsspec.get_filesystem_class(protocol)
    except (ValueError, ImportError) as error:
        raise UserError(f"{redacted(url)}: cannot open '{protocol}://' places: {error}") from error
    options: dict[str, Any] = {}
    if protocol in ("s3", "s3a"):
        # Stores that lack the newer checksums refuse uploads that carry them (HTTP 411).
        options["config_kwargs"] = {
            name: "when_required"
            for name in ("request_checksum_calculation", "response_checksum_validation")
            if f"AWS_{name.upper()}" not in os.environ
        }
    else:
        options |= kind._get_kwargs_from_urls(url)  # host and port of servers named in the URL
    # The environment is part of the key because a program (a test) may switch to another endpoint or account.
    settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    key = (os.getpid(), protocol, settings, repr(options))
    if key not in _FILESYSTEMS:
        _FILESYSTEMS[key] = kind(**options, skip_instance_cache=True, use_listings_cache=False)
    return _FILESYSTEMS[key]


def tree(fs: Any, path: str) -> tuple[list[str], list[str]]:
    """Return the files of a tree, and its folders where the store has real ones, each sorted; a file is a tree too.

    By their literal names: `fs.rm` takes `[`, `*` and `?` in a name for a pattern, so that `lr[0]` removed `lr0`.
    """
    fs.invalidate_cache()
    path = path.rstrip("/")
    try:
        found = fs.find(path, withdirs=True, detail=True)
    except FileNotFoundError:
        return [], []
    inside = {name: entry["type"] for name, entry in found.items() if name == path or name.startswith(f"{path}/")}
    # An object that marks a folder is listed as a folder, under a name with a slash at its end.
    files = sorted(name for name, kind in inside.items() if kind != "directory" or name.endswith("/"))
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    real = [] if protocols & _FLAT else sorted(set(inside) - set(files))
    return files, real


def remove_key(fs: Any, path: str) -> None:
    """Remove one file by its literal name; nothing there is fine."""
    with suppress(FileNotFoundError):
        fs.rm_file(path)


def remove_folders(fs: Any, folders: list[str]) -> None:
    """Remove empty folders, those within others first; what is gone is fine."""
    for folder in sorted(folders, reverse=True):
        if fs.isdir(folder):
            fs.rmdir(folder)


def attempt(url: str, verb: str, call: Callable[[], T]) -> T:
    """Run `call`, repeat it with growing waits while it fails transiently, and name `url` in the error."""
    for tried in range(1, TRIES + 1):
        try:
            with explained(url, verb):
                return call()
        except Exception as error:
            if not _is_transient(error):
                raise
            if tried == TRIES:
                detail = scrubbed(f"{type(error).__name__}: {error}")
                raise StorageError(f"could not {verb} {url} in {TRIES} tries; the last failure: {detail}") from (
                    _cause(url, error)
                )
            time.sleep(min(WAIT_CAP_S, FIRST_WAIT_S * 2 ** (tried - 1)) * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


def _cause(url: str, error: Exception) -> Exception | None:
    """The error that another one comes from, unless it may name a URL whole: tracebacks show it."""
    return error if revealed(url) == url else None


@contextmanager
def explained(url: str, verb: str) -> Iterator[None]:
    """Name `url` in errors from the with-block that only the user can fix (no room, no access, no such file)."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and verb in _WRITING and error.errno in _NO_PLACE:
            raise UserError(
                f"cannot {verb} {url}: {os.strerror(error.errno)}; give a place in which folders and files can be made"
            ) from _cause(url, error)
        if isinstance(error, FileNotFoundError | NotADirectoryError):  # the latter: a file stands where a folder would
            raise FileNotFoundError(errno.ENOENT, "no such file or folder", url) from _cause(url, error)
        if isinstance(error, PermissionError) or type(error).__name__ in _CREDENTIAL_ERRORS:
            raise UserError(
                f"cannot {verb} {url}: {scrubbed(str(error)) or 'access denied'}; check the permissions, and for an "
                "object store its credentials and endpoint (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
                "AWS_ENDPOINT_URL)"
            ) from _cause(url, error)
        if isinstance(error, OSError) and error.errno in _FULL:
            raise UserError(
                f"cannot {verb} {url}: no space is left ({error.strerror}); make room and give the same command "
                "again: it goes on from what is finished"
            ) from error
        raise


def _is_transient(error: Exception) -> bool:
    if isinstance(error, OSError):
        return not isinstance(error, _PERMANENT_TYPES) and error.errno not in _PERMANENT_ERRNOS
    kinds = type(error).__mro__
    return any(kind.__name__ in _TRANSIENT_NAMES.get(kind.__module__.split(".")[0], ()) for kind in kinds)
