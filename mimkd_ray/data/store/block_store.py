"""A bounded folder of blocks on this node's disk, shared by all of its processes.

A block is one file (`stored_block.py`) named by a digest of its content, or of the place that its content is read from.
A process that needs a missing block takes the block's lock, reads and verifies it, writes a temporary file and renames
it; others wait for the lock and find it. For a block that is read in place, from a data set on a local disk, the store
keeps only the places of its rows, and the fact that they were verified. The least recently used files are removed when
the folder is full.

Writes do not wait for the disk: after a power cut, which may lose the content of a renamed file, the store starts
empty. Notes, which say what was found in a data set by reading all of it, are small, wait for the disk, and stay as
long as they are used.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import math
import multiprocessing
import os
import stat
import tempfile
import time
import zlib
from collections.abc import Callable
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any

from mimkd_ray import local_files
from mimkd_ray.config import DataConfig
from mimkd_ray.data.store import locks
from mimkd_ray.data.store.locks import HeldError, locked
from mimkd_ray.data.store.stored_block import StoredBlock, read_stored
from mimkd_ray.errors import UserError

logger = logging.getLogger(__name__)

LOCKS = 256  # lock files; blocks that share one wait for each other, which costs only a little time
SUFFIX = ".block"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # Linux: another value after each start of the machine
_FULL = (errno.ENOSPC, errno.EDQUOT)
SLOW_BYTES = 4_000_000
"""Per second, of slow storage: a block that takes it more than LOCK_SECONDS is waited for as long as that."""
NOTE_SECONDS = 600.0
"""Of a wait for a note that another process makes, at least: it reads whole files."""
NOTE, NOTE_LOCK = ".note", ".note-lock"
OLD_SECONDS = {NOTE: 30 * 86400.0, NOTE_LOCK: 86400.0, ".tmp": 86400.0}
"""Of files without use, until they are removed: notes, and what killed processes left of them."""

_said: dict[tuple[Path, str], object] = {}

Load = Callable[[], StoredBlock]


class BlockStore:
    """Blocks in `folder`, at most `max_bytes` of them (a little more while several processes write).

    Picklable; the folder is created on first use, for this user alone. Raises UserError (on first use) for a folder
    that cannot be created or belongs to someone else.
    """

    def __init__(self, folder: str | Path = "", max_bytes: int = 8 * 10**9) -> None:
        self.folder = Path(folder or default_folder()).expanduser()
        self.max_bytes = max_bytes
        self._ready = False
        self._counted = False
        self._warned = False
        self._uses: Any = multiprocessing.Array("q", 2, lock=False)  # blocks that a fetch found here, and all others

    def __getstate__(self) -> dict[str, Any]:
        # Memory is shared with processes that this one starts. Elsewhere it may be another machine's folder.
        uses = self._uses if get_spawning_popen() is not None else None
        return {**self.__dict__, "_ready": False, "_counted": False, "_uses": uses}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._uses is None:
            self._uses = multiprocessing.Array("q", 2, lock=False)

    def hit_rate(self) -> float | None:
        """Return the share of the blocks fetched so far that were here, by this process and those it started; None: no
        fetches."""
        found, others = self._uses
        return found / (found + others) if found + others else None

    def _count(self, which: int) -> None:
        self._uses[which] += 1  # without a lock, which other kinds of process could not share: a count may get lost

    def get(self, key: str, load: Load, size: int = 0) -> StoredBlock:
        """Return block `key`; if it is not here, `load()` makes it once, from `size` bytes of storage if that is known.

        Any error of `load` is passed on, and the next caller tries again. If the disk is full even after the store has
        removed half of its blocks, or another process, which may be stopped, holds the lock for LOCK_SECONDS (of large
        blocks `size` / SLOW_BYTES), the block is returned from memory, with one warning.
        """
        block = self._open(key)
        if block is not None:
            return block
        try:
            lock = self.folder / f"lock-{int(_name(key)[:4], 16) % LOCKS}"
            with locked(lock, max(locks.LOCK_SECONDS, size / SLOW_BYTES)):
                block = self._open(key)
                if block is not None:
                    return block
                block = load()
                return block.at(self._path(key)) if self._keep(key, block) else block
        except HeldError as error:
            self._warn(str(error))
            return block or load()

    def fetch(self, key: str, load: Load, size: int = 0) -> bool:
        """Fetch block `key` into the store, as `get` does; return whether it is here (False: there is no room)."""
        self.prepare()
        if self.touch(key):
            self._count(0)
            return True
        self._count(1)
        self.get(key, load, size)
        return self._path(key).exists()

    def note(self, key: str, make: Callable[[], bytes], what: str, size: int = 0) -> bytes:
        """Return note `key` on `what`; if it is not here, `make()` makes it once, from `size` bytes of storage. Any
        error of `make` is passed on."""
        self.prepare()
        path = self.folder / f"{_name(key)}{NOTE}"
        lock = path.with_suffix(NOTE_LOCK)  # of its own: two notes that share one would wait for each other's files
        found = _read_note(path)
        if found is not None:
            return found
        patience = max(NOTE_SECONDS, size / SLOW_BYTES)
        alone = f"until then each process reads by itself what is kept there, such as {what}, which is slower"

        def waits() -> None:
            self._say_once(
                "another process reads %s: waiting for what it finds, for at most %g s a file", what, patience
            )

        try:
            with locked(lock, patience, waits):
                found = _read_note(path)
                if found is None:
                    found = make()
                    packed = zlib.compress(found)
                    try:
                        local_files.publish(path, lambda out: out.write(packed))
                    except OSError as error:
                        remedy = "free some space, or choose another folder with --data.store"
                        self._say_once("%s cannot be written: %s; %s; %s", path, error, remedy, alone)
                if path.exists():
                    lock.unlink(missing_ok=True)  # whoever waits for it has it open, and then finds the note
        except HeldError as error:
            self._say_once("%s; %s", error, alone)
        return make() if found is None else found

    def _say_once(self, line: str, *values: object) -> None:
        """Log a warning, once in this process: all threads that read notes come to it at the same moment."""
        mark = object()
        if _said.setdefault((self.folder, line), mark) is mark:
            logger.warning(line, *values)

    def touch(self, key: str) -> bool:
        """Mark block `key` as used just now; return whether it is here."""
        try:
            os.utime(self._path(key))
        except FileNotFoundError:
            return False
        return True

    def discard(self, key: str) -> None:
        """Remove block `key`, whose data differs from what was verified."""
        self._path(key).unlink(missing_ok=True)

    def prepare(self) -> None:
        """Create the folder, once; empty it after a restart of the machine. Raises UserError for an unusable folder."""
        if self._ready and self.folder.is_dir():  # cleaners of temporary folders run at any time
            return
        remedy = "choose another folder with --data.store, or none with --data.store-gb 0"
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.folder.lstat()
        except OSError as error:
            raise UserError(f"the block store {self.folder} cannot be made: {error}; {remedy}") from error
        if not stat.S_ISDIR(status.st_mode):
            raise UserError(f"the block store {self.folder} is a link or a file, not a folder; {remedy}")
        if status.st_uid != os.getuid():
            raise UserError(
                f"the block store {self.folder} belongs to user {status.st_uid}, and this is user {os.getuid()}: "
                f"what others can write is not trained on; {remedy}"
            )
        if status.st_mode & 0o022:
            raise UserError(
                f"the block store {self.folder} can be written by others (mode {status.st_mode & 0o777:o}): what "
                f"others can write is not trained on; chmod 700 it, or {remedy}"
            )
        try:
            self._begin_anew_after_a_restart()
        except OSError as error:  # a full disk, or a file system without locks
            raise UserError(f"the block store {self.folder} cannot be used: {error}; {remedy}") from error
        self._ready = True

    def _path(self, key: str) -> Path:
        return self.folder / f"{_name(key)}{SUFFIX}"

    def _open(self, key: str) -> StoredBlock | None:
        """Return the block, or None if it is not here. A damaged file is removed."""
        self.prepare()
        path = self._path(key)
        try:
            block = read_stored(path)
            os.utime(path)
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:
            logger.warning("%s is damaged (%s): it is fetched anew", path, error)
            path.unlink(missing_ok=True)
            return None
        return block

    def _keep(self, key: str, block: StoredBlock) -> bool:
        """Write the block; return whether that was possible. The caller holds the block's lock."""
        path, part = self._path(key), self.folder / f"{_name(key)}.part"
        needed = block.file_bytes()
        for last_try in (False, True):
            try:
                if needed > self.max_bytes:
                    raise OSError(errno.ENOSPC, f"a block of {needed:,} bytes is larger than the store")
                self._reserve(needed, give_up_half=last_try)
                block.write(part, durable=not _boot_id())
                part.replace(path)
                return True
            except OSError as error:
                part.unlink(missing_ok=True)
                if last_try or error.errno not in _FULL or needed > self.max_bytes:
                    free = os.statvfs(self.folder)
                    self._warn(
                        f"{self.folder}: a block of {needed / 1e6:.1f} MB cannot be kept ({error}; the disk has "
                        f"{free.f_bavail * free.f_frsize / 1e6:.1f} MB free, the store may hold "
                        f"{self.max_bytes / 1e6:.1f} MB): free some space, or choose another folder with --data.store "
                        "or a size with --data.store-gb"
                    )
                    return False
        raise AssertionError("unreachable")

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("%s; until then each process reads blocks by itself, which is slower", why)

    def _reserve(self, needed: int, give_up_half: bool) -> None:
        """Make room for `needed` bytes and count them as used."""
        with locked(self.folder / "usage") as usage:
            # The count drifts when processes are killed; each process's first block and each eviction correct it.
            count = os.pread(usage, 32, 0)  # a power cut may leave zero bytes
            used = int(count) if count.isdigit() else 0
            if not self._counted or give_up_half or used + needed > self.max_bytes:
                used = self._evict(self.max_bytes - needed, give_up_half)
                self._counted = True
            os.pwrite(usage, b"%032d" % (used + needed), 0)

    def _evict(self, limit: int, give_up_half: bool) -> int:
        """Remove the least recently used files until `limit` bytes are left; return the bytes left."""
        found, now = [], time.time()
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):
                ending = os.path.splitext(entry.name)[1]
                status = entry.stat()
                if ending in (SUFFIX, ".part"):
                    found.append((status.st_mtime_ns, status.st_size, entry.path))
                elif now - status.st_mtime > OLD_SECONDS.get(ending, math.inf):
                    os.unlink(entry.path)
        used = sum(size for _, size, _ in found)
        if give_up_half:
            limit = min(limit, used // 2)
        elif used > limit:
            limit -= limit // 16  # a little more than needed, so that this listing is rare
        for _, size, path in sorted(found):
            if used <= limit:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            used -= size
        return used

    def _begin_anew_after_a_restart(self) -> None:
        """Empty a store that was filled before the machine was last started."""
        boot = _boot_id()
        if not boot:
            return  # blocks are written durably in this case
        mark = self.folder / "boot"
        if mark.is_file() and mark.read_text() == boot:
            return
        with locked(self.folder / "usage"):
            if mark.is_file() and mark.read_text() == boot:
                return
            self._evict(0, give_up_half=False)
            mark.write_text(boot)


def default_folder() -> Path:
    """Return this user's store below the machine's folder for temporary files."""
    return Path(tempfile.gettempdir()) / f"mimkd-ray-blocks-{os.getuid()}"


def _boot_id() -> str:
    """Return the identity of this start of the machine; "" if the system has none."""
    return BOOT_ID.read_text().strip() if BOOT_ID.is_file() else ""


def _read_note(path: Path) -> bytes | None:
    try:
        note = zlib.decompress(path.read_bytes())
        os.utime(path)  # it is in use: see OLD_SECONDS
        return note
    except FileNotFoundError:
        return None
    except (OSError, zlib.error) as error:
        logger.warning("%s is damaged (%s): it is made anew", path, error)
        return None


def _name(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:40]


def open_store(config: DataConfig) -> BlockStore | None:
    """Return the block store of a run, None for `data.store_gb` 0. Does not create the folder yet."""
    return BlockStore(config.store, int(config.store_gb * 1e9)) if config.store_gb else None
