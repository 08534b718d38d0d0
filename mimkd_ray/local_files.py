"""Local files that appear at once and whole, even if a process or the machine dies: a temporary name, fsync, then a
rename or a hard link."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

NOTHING = -1
"""The bytes of a link that leads to nothing, or in a circle."""
_NO_HARD_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def _written_beside(path: Path, fill: Callable[[BinaryIO], object]) -> Iterator[Path]:
    """Hold the filled file under a temporary name during a with-block, which renames or links it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Hidden, and in the same folder because a rename is atomic only within one file system.
    temporary = path.parent / f".{path.name[:100]}.{os.getpid()}-{os.urandom(6).hex()}.tmp"
    try:
        with open(temporary, "xb") as out:
            fill(out)
            out.flush()
            os.fsync(out.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)  # the directory entry, too, must survive a power cut
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def scratch_folder(kind: str) -> str:
    """Make a folder among the temporary files, and remove those that killed processes left there. A folder has the
    number of its process in its name, and a digest of the machine and the set of processes that has this number.
    """
    namespace = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    here = f"{zlib.crc32(f'{socket.gethostname()} {namespace}'.encode()):08x}"
    for old in Path(tempfile.gettempdir()).glob(f"mimkd-*-{here}-*"):
        number = re.fullmatch(rf"mimkd-[a-z]+-{here}-(\d+)-\w+", old.name)
        try:
            if number is None or old.is_symlink() or old.lstat().st_uid != os.getuid():
                continue
            os.kill(int(number[1]), 0)
        except ProcessLookupError:
            shutil.rmtree(old, ignore_errors=True)
        except OSError:
            continue  # another start has removed it, or the process is somebody else's
    return tempfile.mkdtemp(prefix=f"mimkd-{kind}-{here}-{os.getpid()}-")


@contextmanager
def scratch(kind: str) -> Iterator[str]:
    """A with-block with such a folder, which goes with it; a killed process leaves it to the next call."""
    folder = scratch_folder(kind)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Write the output of `fill` to `path`, replacing any file there."""
    with _written_beside(path, fill) as temporary:
        os.replace(temporary, path)


def create_once(path: Path, data: bytes) -> bool:
    """Write `data` to `path` if nothing is there, and return whether this call wrote it.

    Exactly one of several callers wins. Without hard links, two callers at the same moment may both win.
    """
    if path.exists():
        return False
    with _written_beside(path, lambda out: out.write(data)) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            # Over NFS the reply to a successful link can be lost and the client repeats the call: then the link is
            # ours.
            return temporary.stat().st_nlink == 2
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            if path.exists():
                return False
            os.replace(temporary, path)
    return True


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with what is in it; nothing there is fine."""
    if not path.is_dir() or path.is_symlink():
        return path.unlink(missing_ok=True)
    try:
        shutil.rmtree(path)
    except FileNotFoundError as error:
        if path.exists():
            raise OSError(errno.EBUSY, "another process removes a part of it", str(path)) from error


def entries(folder: Path) -> list[tuple[str, bool, int, str]]:
    """Return (name, is a folder, bytes, version) of each entry of the folder, sorted; [] if there is no folder. Of a
    link to nothing the bytes are `NOTHING`."""
    try:
        with os.scandir(folder) as listed:
            return sorted(filter(None, map(_entry, listed)))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _entry(listed: os.DirEntry[str]) -> tuple[str, bool, int, str] | None:
    """None for a pipe or a device, and for what has been renamed or removed since it was listed."""
    try:
        is_dir = listed.is_dir()
        if not is_dir and not listed.is_file():
            return (listed.name, False, NOTHING, "") if listed.is_symlink() and not os.path.exists(listed) else None
        status = listed.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return listed.name, False, NOTHING, ""
        if error.errno == errno.ENOENT:
            return None
        raise
    return listed.name, is_dir, 0 if is_dir else status.st_size, str(status.st_mtime_ns)


def tree(folder: Path) -> list[str]:
    """Return the paths in the folder of all files and links below it, sorted; links are not followed."""
    found: list[str] = []
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        found += [os.path.relpath(os.path.join(place, name), folder) for name in (*files, *links)]
    return sorted(found)
