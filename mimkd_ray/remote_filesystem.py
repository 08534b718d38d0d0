"""The file system behind a URL, for storage.py.

A file system object owns an event loop, which does not survive a fork, so each process has its own. None of its calls
waits for ever: a silent server is a failure, which retries.py tries again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from mimkd_ray.errors import UserError
from mimkd_ray.retries import attempt, by_credentials
from mimkd_ray.secret_urls import redacted, revealed

T = TypeVar("T")

_FLAT = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss"}
"""Object stores: a folder is no more than the beginning of names, and goes with them."""
CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 15.0
"""For a server to accept a connection, and to send the next bytes of an answer."""
UPLOAD_SECONDS, SLOWEST_UPLOAD = 30.0, 250_000
"""An upload may take so long, and its bytes at so many a second: no other limit counts while a server reads nothing."""

_BY_AIOHTTP = {"http": "client_kwargs", "https": "client_kwargs", "gs": "session_kwargs", "gcs": "session_kwargs"}
"""File systems on aiohttp, and what they call the settings of its sessions."""

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
        options["config_kwargs"] |= {"connect_timeout": CONNECT_SECONDS, "read_timeout": ANSWER_SECONDS}
        if "AWS_MAX_ATTEMPTS" not in os.environ:  # one budget of retries, that of retries.py; once here, for a part
            options["config_kwargs"]["retries"] = {"total_max_attempts": 2}
    else:
        options |= kind._get_kwargs_from_urls(url)  # host and port of servers named in the URL
        if protocol in _BY_AIOHTTP:
            from aiohttp import ClientTimeout

            limits = ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=ANSWER_SECONDS)
            options[_BY_AIOHTTP[protocol]] = {"timeout": limits}
    # The environment is part of the key because a program (a test) may switch to another endpoint or account.
    settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    key = (os.getpid(), protocol, settings, repr(options))
    if key not in _FILESYSTEMS:
        made = kind(**options, skip_instance_cache=True, use_listings_cache=False)
        if protocol in ("s3", "s3a"):
            made.retries = 1
        _FILESYSTEMS[key] = made
    return _FILESYSTEMS[key]


def forget(fs: Any) -> None:
    """Make the next call with a new file system, which reads its credentials anew."""
    for key in [key for key, known in list(_FILESYSTEMS.items()) if known is fs]:
        _FILESYSTEMS.pop(key, None)


def call(url: str, verb: str, use: Callable[[Any, str], T]) -> T:
    """Return ``use(file system, path)`` for a URL, tried again after transient failures. Errors name the URL."""

    def once() -> T:
        fs = filesystem(whole := revealed(url))
        try:
            return use(fs, fs._strip_protocol(whole))
        except Exception as error:
            if by_credentials(error):
                forget(fs)  # they may have been renewed since it was made
            raise

    return attempt(url, verb, once)


def time_for(fs: Any, size: int) -> dict[str, float]:
    """Return the option of an upload of `size` bytes that ends it when it takes too long, where it runs in a loop."""
    return {"timeout": UPLOAD_SECONDS + size / SLOWEST_UPLOAD} if fs.async_impl else {}


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
