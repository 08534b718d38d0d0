"""Flat functions over local paths and object stores.

A place is a string: a local path (`/data/x`, `~/x`, `file:///data/x`) or an fsspec URL (`s3://bucket/x`). Object stores
are configured by their usual environment variables (`AWS_ENDPOINT_URL`, ...).

Local files never go through fsspec. Calls are retried after transient failures, and errors name the object (see
retries.py). Nothing is cached: every listing is a new request.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from mimkd_ray import local_files
from mimkd_ray.errors import UserError
from mimkd_ray.places import place
from mimkd_ray.remote_file import RemoteFile
from mimkd_ray.remote_filesystem import call, remove_folders, remove_key, time_for, tree
from mimkd_ray.retries import AccessError as AccessError
from mimkd_ray.retries import StorageError as StorageError
from mimkd_ray.retries import attempt, no_bucket
from mimkd_ray.retries import be_patient as be_patient
from mimkd_ray.retries import explained as explained
from mimkd_ray.retries import hurried as hurried
from mimkd_ray.secret_urls import redacted

_S3 = ("s3://", "s3a://")

THREADS = 16
"""Objects that are removed at a time."""


class Entry(NamedTuple):
    """A listed file: its size in bytes, and its version (modification time or ETag), which changes when it is
    rewritten."""

    size: int
    version: str


class ChangedError(Exception):
    """A file was written again since it was listed."""


def is_remote(url: str) -> bool:
    """Return whether `url` names an object store or server rather than a file of this machine."""
    return "://" in url and not url.startswith("file://")


def local_path(url: str) -> Path:
    """Return the path of a place on this machine (`~` and `file://` resolved)."""
    return Path(url.removeprefix("file://")).expanduser()


def absolute(url: str) -> str:
    """Return the place that a user typed, as it is for every process, wherever it starts: see places.py."""
    return place(redacted(url))


def join(url: str, *parts: str) -> str:
    """Append path parts with single slashes, keeping the style of `url` (path or URL)."""
    for part in parts:
        if part.strip("/"):
            url = f"{url.rstrip('/')}/{part.strip('/')}"
    return url


def exists(url: str) -> bool:
    """Return whether a file or a folder (for object stores: any object under the prefix) is at `url`."""
    if not is_remote(url):
        return local_path(url).exists()

    def look(fs: Any, path: str) -> bool:
        fs.invalidate_cache()
        try:
            # `info` and not `exists`: some file systems turn every failure inside `exists` into "no".
            fs.info(path)
        except FileNotFoundError as error:
            if no_bucket(error):
                raise
            return False
        return True

    return call(url, "look up", look)


def list_files(url: str, suffix: str = "") -> list[str]:
    """Return the files in folder `url`, sorted; [] if there is no folder. With a `suffix` those whose names end in it,
    without hidden ones (`._x.parquet`, which a Mac leaves on other disks)."""
    return list(list_sizes(url, suffix))


def list_sizes(url: str, suffix: str = "") -> dict[str, int]:
    """Return {file: bytes} of the files that `list_files` returns, in the same order. Makes no call per file."""
    return {file: entry.size for file, entry in list_entries(url, suffix).items()}


def list_entries(url: str, suffix: str = "", broken: bool = False) -> dict[str, Entry]:
    """Return {file: Entry} of the files that `list_files` returns, in the same order. Makes no call per file. `broken`:
    with links to nothing, whose size is `local_files.NOTHING`."""
    return {
        join(url, name): Entry(size, version)
        for name, is_dir, size, version in _entries(url, broken)
        if not is_dir and name.endswith(suffix) and not (suffix and name.startswith("."))
    }


def list_dirs(url: str) -> list[str]:
    """Return the folders directly in folder `url`, sorted; [] if there is no folder."""
    return [join(url, name) for name, is_dir, _, _ in _entries(url) if is_dir]


def list_entries_below(url: str, deepest: int, wanted: Callable[[str], bool], broken: bool = False) -> dict[str, Entry]:
    """Return {path below `url`: Entry} for files in the folder and its folders, `deepest` of them in each other.

    `wanted` says of a name whether it counts. One listing a folder; no folder twice, wherever links lead. `broken` as
    in `list_entries`.
    """
    found: dict[str, Entry] = {}
    seen: set[str] = set()
    left = [("", 0)]
    while left:
        below, depth = left.pop()
        folder = join(url, below)
        real = folder if is_remote(folder) else os.path.realpath(local_path(folder))
        entries = [] if real in seen else _entries(folder, broken)
        seen.add(real)
        for name, is_dir, length, version in filter(lambda entry: wanted(entry[0]), entries):
            path = f"{below}/{name}" if below else name
            if not is_dir:
                found[path] = Entry(length, version)
            elif depth < deepest:
                left.append((path, depth + 1))
    return found


def size(url: str) -> int:
    """Return the size of the file at `url` in bytes. Raises FileNotFoundError."""
    if not is_remote(url):
        return attempt(url, "look up", lambda: local_path(url).stat().st_size)
    return call(url, "look up", lambda fs, path: int(fs.info(path)["size"]))


def modified(url: str) -> float:
    """Return the time at which the file at `url` was written, in seconds since 1970. Raises FileNotFoundError."""
    if not is_remote(url):
        return attempt(url, "look up", lambda: local_path(url).stat().st_mtime)
    return call(url, "look up", lambda fs, path: float(fs.modified(path).timestamp()))


def read_bytes(url: str, small: bool = False) -> bytes:
    """Return the whole file. Raises FileNotFoundError.

    With `small` the file is read in one request; by default S3 is asked for the size first, and large files are read in
    parallel parts.
    """
    if not is_remote(url):
        return attempt(url, "read", lambda: local_path(url).read_bytes())
    options = {"max_concurrency": 1} if small and url.startswith(_S3) else {}
    return call(url, "read", lambda fs, path: cast(bytes, fs.cat_file(path, **options)))


def refuse_pipe(url: str, field: str) -> None:
    """Raise UserError for a pipe or a device given as `field` of a config, which might be read for ever."""
    path = local_path(url)
    if not is_remote(url) and path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{field} {url} is a pipe or a device, and no file: give the file itself")


def read_range(url: str, offset: int, length: int, entry: Entry | None = None) -> bytes:
    """Return `length` bytes starting at `offset`, in one request. Raises FileNotFoundError.

    A local file that ends earlier gives fewer bytes; a remote one raises StorageError. A local file that is not the
    listed `entry` any more raises ChangedError.
    """
    if is_remote(url):
        file = RemoteFile(url, offset + length)
        file.seek(offset)
        return file.read(length)

    def read() -> bytes:
        with open(local_path(url), "rb") as file:
            status = os.fstat(file.fileno())
            if entry is not None and Entry(status.st_size, str(status.st_mtime_ns)) != entry:
                raise ChangedError(url)
            file.seek(offset)
            return file.read(length)

    return attempt(url, "read", read)


def write_bytes(url: str, data: bytes) -> None:
    """Write `data` to `url` atomically: readers see the old file or the whole new one, even if the writer dies.

    Local: a temporary file beside it, fsync, rename. Remote: one upload, visible on completion.
    """
    if is_remote(url):
        call(url, "write", lambda fs, path: fs.pipe_file(path, data, **time_for(fs, len(data))))
    else:
        attempt(url, "write", lambda: local_files.publish(local_path(url), lambda out: out.write(data)))


def create_once(url: str, data: bytes) -> bool:
    """Write `data` to `url` atomically if nothing is there, and return whether this caller's data is there.

    One of any number of callers wins: locally by a hard link, on S3 by a conditional PUT (If-None-Match; at most 5 GB).
    Other stores, and file systems without hard links, have neither: there the function checks for the file and then
    writes, so that two callers at the same moment may both win, and the later one's data stays.
    """
    if not is_remote(url):
        return attempt(url, "create", lambda: local_files.create_once(local_path(url), data))
    if not url.startswith(_S3):
        if exists(url):
            return False
        write_bytes(url, data)
        return True
    # If an answer is lost, the request is repeated and the second answer is "exists": the mark tells whose object it
    # is.
    mark = uuid.uuid4().hex

    def create(fs: Any, path: str) -> bool:
        try:
            # In one part, however large: stores ignore the condition when an upload in parts is completed.
            whole = {"mode": "create", "chunksize": len(data) + 1, "Metadata": {"writer": mark}}
            fs.pipe_file(path, data, **whole, **time_for(fs, len(data)))
        except OSError as error:
            # s3fs recognises the answer of AWS; other stores do not say which condition failed.
            answer = getattr(error.__cause__, "response", {}).get("ResponseMetadata", {})
            if not isinstance(error, FileExistsError) and answer.get("HTTPStatusCode") != 412:
                raise
            return bool(fs.metadata(path).get("writer") == mark)
        return True

    return call(url, "create", create)


def upload(path: str | Path, url: str) -> None:
    """Write the local file to `url` (remote or local) atomically, as `write_bytes` does; constant memory."""
    if not Path(path).is_file():
        raise FileNotFoundError(errno.ENOENT, "no such file to upload", str(path))

    def copy(out: BinaryIO) -> None:
        with open(path, "rb") as source:
            shutil.copyfileobj(source, out, 1 << 20)

    if is_remote(url):
        length = Path(path).stat().st_size
        call(url, "upload to", lambda fs, place: fs.put_file(str(path), place, **time_for(fs, length)))
    else:
        attempt(url, "upload to", lambda: local_files.publish(local_path(url), copy))


def list_tree(url: str) -> list[str]:
    """Return the files below folder `url` by their paths in it, sorted; [] if there is no folder.

    Of a local folder, links are listed and not followed.
    """
    if not is_remote(url):
        return attempt(url, "list", lambda: local_files.tree(local_path(url)))
    start = len(call(url, "list", lambda fs, path: path.rstrip("/"))) + 1
    return [path[start:] for path in call(url, "list", tree)[0] if path[start:]]


def remove_file(url: str) -> None:
    """Remove the file (or link) at `url`, whatever its name; nothing there is fine."""
    if not is_remote(url):
        return attempt(url, "remove", lambda: local_path(url).unlink(missing_ok=True))
    return call(url, "remove", remove_key)


def remove_tree(url: str) -> None:
    """Remove the folder (or file) at `url` and everything below it; do nothing if it does not exist.

    Names are taken literally, never for patterns. Raises UserError for the root of a disk or a bucket, and for a folder
    that holds the home folder or the current one.
    """
    if not is_remote(url):
        path = Path(os.path.abspath(local_path(url)))
        if path == Path(path.anchor) or any(each.is_relative_to(path) for each in (Path.home(), Path.cwd())):
            raise UserError(f"refusing to remove {url}: {path} holds much else; name a folder below it")
        attempt(url, "remove", lambda: local_files.remove(path))
        return
    parts = url.split("://", 1)[1].strip("/").split("/")
    if not any(parts[1:]) or {".", ".."} & set(parts):
        raise UserError(f"refusing to remove {url}: it is a whole bucket, or may be; name a folder in it")
    files, folders = call(url, "list", tree)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda path: call(url, "remove", lambda fs, _: remove_key(fs, path)), files))
    call(url, "remove", lambda fs, _: remove_folders(fs, folders))


def open_file(url: str, length: int | None = None) -> BinaryIO:
    """Open a seekable binary reader. `length` (bytes), if known, saves one request for a remote file.

    A remote reader requests exactly the ranges that are read, without read-ahead; each range is retried. It holds no
    connection, so it can be pickled and survives a fork.
    """
    if not is_remote(url):
        return attempt(url, "open", lambda: open(local_path(url), "rb"))
    return cast(BinaryIO, RemoteFile(url, size(url) if length is None else length))


def _entries(url: str, broken: bool = False) -> list[tuple[str, bool, int, str]]:
    """Return (name, is a folder, bytes, version) of a folder's entries, sorted; [] if it is missing or a file."""
    if not is_remote(url):
        listed = attempt(url, "list", lambda: local_files.entries(local_path(url)))
        return [entry for entry in listed if broken or entry[2] != local_files.NOTHING]

    def ls(fs: Any, path: str) -> list[tuple[str, bool, int, str]]:
        fs.invalidate_cache()
        try:
            listing = fs.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError) as error:
            if no_bucket(error):
                raise
            return []
        # A listing also has the folder's own marker object, or the file itself if `url` is a file, under the same name.
        return sorted(
            (
                e["name"].rstrip("/").rpartition("/")[2],
                e["type"] == "directory",
                int(e.get("size") or 0),
                str(
                    e.get("ETag") or e.get("etag") or e.get("LastModified") or e.get("mtime") or e.get("created") or ""
                ),
            )
            for e in listing
            if e["name"].strip("/") != path.strip("/")
        )

    return call(url, "list", ls)
