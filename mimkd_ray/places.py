"""Places that users type (a folder, a file, a URL), turned into what the code works with; names of folders."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote

from mimkd_ray.errors import UserError

NAME_BYTES = 200
"""Longest name of a folder that a run makes; file systems take 255 bytes, and files beside it have longer names."""

RAY_PACKAGES = "/runtime_resources/working_dir_files/"
"""Part of the path of the folder in which `ray job submit --working-dir` unpacks what it sends."""

_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hdfs", "http", "https", "memory")
_SERVERS = ("http", "https")
"""Protocols whose paths are the server's business: an empty part may mean something to it."""


def place(typed: str) -> str:
    """Return where `typed` is: an absolute local path, or a URL without a slash at its end.

    `~` is the home folder, `file:///data/my%20runs` is `/data/my runs`, and a relative path starts in the current
    folder. Everything else in a local path is taken as it stands: spaces, `#`, `%`, letters of any alphabet. Of
    `s3://bucket//runs/` the superfluous slashes go. Raises UserError for what can be no place.
    """
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in typed):
        raise UserError(f"{typed!r} has control characters (a line break, say), and is no place: give a path or a URL")
    if any("\ud800" <= letter <= "\udfff" for letter in typed):  # Python's form of bytes that are no letters
        raise UserError(
            f"{typed!r} has bytes that are not UTF-8, and files keep no such name: rename it, or link to it"
        )
    scheme, colon, rest = typed.partition(":")
    if not colon or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+", scheme) or rest.startswith(":"):
        return _local(typed)
    if scheme.lower() == "file":
        return _local(_of_file_url(typed, rest))
    if rest.startswith("//"):
        return _remote(typed, scheme.lower(), rest[2:])
    if scheme.lower() in _STORES:
        raise UserError(f"{typed} is no URL: write {scheme}://{rest.lstrip('/')}, or ./{typed} for a folder here")
    return _local(typed)


def is_function(typed: str) -> bool:
    """Say whether `typed` is `package.module:function` and no place."""
    module, _, _ = typed.partition(":")
    return bool(re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", typed)) and module not in (*_STORES, "file")


def _local(path: str) -> str:
    if "://" in path:  # protocols in a chain, such as simplecache::s3://bucket/file
        return path.rstrip("/")
    full = os.path.expanduser(path)
    if path.startswith("~") and full == path:
        user = path[1:].partition("/")[0]
        raise UserError(f"{path}: there is no user {user!r} here; write ./{path} for a folder of that name")
    return os.path.abspath(full)


def _of_file_url(typed: str, rest: str) -> str:
    if not rest.startswith("//"):
        return unquote(rest)
    host, slash, path = rest[2:].partition("/")
    if host.startswith("~"):
        return host + slash + unquote(path)
    if host not in ("", "localhost"):
        raise UserError(f"{typed} names another machine, {host!r}: a file URL has three slashes, as in file:///data")
    return unquote(slash + path)


def _remote(typed: str, scheme: str, rest: str) -> str:
    if scheme in _SERVERS:
        return f"{scheme}://{rest.rstrip('/')}"
    host, *parts = rest.split("/")
    if not host:
        raise UserError(f"{typed} names no bucket or host: write {scheme}://NAME/folder")
    if {".", ".."} & set(parts):
        raise UserError(f"{typed}: object stores know no '.' and '..'; give the place without them")
    return f"{scheme}://" + "/".join([host, *filter(None, parts)])


def check_lasting(flag: str, where: str) -> None:
    """Raise UserError for a place of results, given by ``flag``, that is lost with a job of `ray job submit`."""
    if RAY_PACKAGES in where:
        name = flag.removeprefix("--").replace("-", "_")
        kind = name.partition(".")[0]
        raise UserError(
            f"{name} {where} is a temporary folder of Ray's, which is removed with the job, and which other nodes do "
            f"not see: pass {flag} with a folder that all nodes share, or a URL such as s3://bucket/{kind}s"
        )


def check_name(field: str, name: str, limit: int = NAME_BYTES) -> None:
    """Raise UserError unless `name` can be the name of one folder, on disks and in object stores; `field` is whose."""
    shown = name if len(name) <= 60 else f"{name[:60]}..."
    problem = ""
    if not name.strip():
        problem = "is empty"
    elif "/" in name:
        problem = "has a slash"
    elif name in (".", ".."):
        problem = "names another folder"
    elif not name.isprintable():
        problem = "has letters that cannot be printed (a line break, NUL or the like)"
    elif len(name.encode()) > limit:
        problem = f"has {len(name.encode()):,} bytes, of at most {limit}"
    if problem:
        raise UserError(
            f"{field} {shown!r} {problem}: it becomes the name of one folder; give letters, digits, '-', '_', '.' and "
            "the like, and other places by --run.root"
        )
