"""A bounded folder of blocks on this node's disk, shared by all of its processes.

A block lies there as an Arrow file (columns `image`: encoded files, `label`: int64) named by a digest of its
content, or of what its content is read from. Whoever needs a block that is missing takes the block's lock, reads
and verifies it, writes a temporary file and renames it; the others wait for the lock and find it. Reading maps the
file: processes share the pages, and nothing is copied. The least recently opened files go when the folder is full;
a file that is still mapped stays readable without its name.

Each process keeps the tables it used last (`CACHE_BYTES`), mapped or, without a store, decoded.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import stat
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mimkd_ray.errors import UserError

logger = logging.getLogger(__name__)

CACHE_BYTES = 256 * 2**20  # tables that a process keeps
LOCKS = 256  # lock files; blocks that share one wait for each other, which costs a little time and nothing else
HEADER_BYTES = 4096  # what an Arrow file holds beyond its columns, at most
_FULL = (errno.ENOSPC, errno.EDQUOT)


class BlockStore:
    """Blocks in `folder`, at most `max_bytes` of them (a little more while several processes write).

    Picklable; the folder is made on first use, for this user alone. Raises UserError (on first use) for a folder
    that cannot be made or belongs to someone else.
    """

    def __init__(self, folder: str | Path = "", max_bytes: int = 8 * 10**9) -> None:
        self.folder = Path(folder or default_folder()).expanduser()
        self.max_bytes = max_bytes
        self._ready = False
        self._counted = False
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": False, "_counted": False}  # it may be another machine's folder now

    def get(self, key: str, load: Callable[[], Any]) -> Any:
        """Return block `key` as a memory-mapped pyarrow.Table; if it is not here, `load()` makes it once.

        Any error of `load` is passed on, and the next caller tries again. When the disk is full even after the
        store has given up half of its blocks, the table is handed over from memory, with one warning.
        """
        table = self._open(key)
        if table is not None:
            return table
        with _locked(self.folder / f"lock-{int(_name(key)[:4], 16) % LOCKS}"):
            table = self._open(key)
            if table is not None:
                return table
            table = load()
            if not self._keep(key, table):
                return table
        mapped = self._open(key)
        return table if mapped is None else mapped

    def fetch(self, key: str, load: Callable[[], Any]) -> bool:
        """See to it that block `key` is here; say whether it is (False: there is no room for it)."""
        self._prepare()
        path = self._path(key)
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
            return True
        self.get(key, load)
        return path.exists()

    def _path(self, key: str) -> Path:
        return self.folder / f"{_name(key)}.arrow"

    def _open(self, key: str) -> Any:
        """Return the mapped table, or None if the block is not here. A damaged file is removed."""
        import pyarrow as pa

        self._prepare()
        path = self._path(key)
        try:
            with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as file:
                table = file.read_all()
            table.validate(full=True)  # offsets that point nowhere would end the process
            os.utime(path)
        except FileNotFoundError:
            return None
        except (pa.ArrowInvalid, OSError) as error:
            logger.warning("%s is damaged (%s): it is fetched anew", path, error)
            path.unlink(missing_ok=True)
            return None
        return table

    def _keep(self, key: str, table: Any) -> bool:
        """Write the table; say whether that was possible. Holds the block's lock."""
        path, part = self._path(key), self.folder / f"{_name(key)}.part"
        needed = table.nbytes + HEADER_BYTES
        for last_try in (False, True):
            try:
                if needed > self.max_bytes:
                    raise OSError(errno.ENOSPC, f"a block of {needed:,} bytes is larger than the store")
                self._reserve(needed, give_up_half=last_try)
                _write(part, table)
                part.replace(path)
                return True
            except OSError as error:
                part.unlink(missing_ok=True)
                if last_try or error.errno not in _FULL or needed > self.max_bytes:
                    self._warn(needed, error)
                    return False
        raise AssertionError("unreachable")

    def _warn(self, needed: int, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            free = os.statvfs(self.folder)
            logger.warning(
                "%s: a block of %.1f MB cannot be kept (%s; the disk has %.1f MB free, the store may hold %.1f MB): "
                "blocks are handed over from memory, and each process reads them by itself, which is slower; free "
                "some space, or choose another folder with --data.store or a size with --data.store-gb",
                self.folder,
                needed / 1e6,
                error,
                free.f_bavail * free.f_frsize / 1e6,
                self.max_bytes / 1e6,
            )

    def _reserve(self, needed: int, give_up_half: bool) -> None:
        """Make room for `needed` bytes and count them as used."""
        with _locked(self.folder / "usage") as usage:
            # The count drifts when processes are killed; each process's first block and each eviction set it right.
            used = int(os.pread(usage, 32, 0) or 0)
            if not self._counted or give_up_half or used + needed > self.max_bytes:
                used = self._evict(self.max_bytes - needed, give_up_half)
                self._counted = True
            os.pwrite(usage, b"%032d" % (used + needed), 0)

    def _evict(self, limit: int, give_up_half: bool) -> int:
        """Remove the files opened longest ago until `limit` bytes are left; return what is left."""
        found = []
        for entry in os.scandir(self.folder):
            if entry.name.endswith((".arrow", ".part")):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    found.append((status.st_mtime_ns, status.st_size, entry.path))
        used = sum(size for _, size, _ in found)
        if give_up_half:
            limit = min(limit, used // 2)
        elif used > limit:
            limit -= limit // 16  # a little more than needed: this listing should be rare
        for _, size, path in sorted(found):
            if used <= limit:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            used -= size
        return used

    def _prepare(self) -> None:
        if self._ready and self.folder.is_dir():  # cleaners of temporary folders come at any time
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
        self._ready = True


def default_folder() -> Path:
    """Return this user's store below the machine's folder for temporary files."""
    return Path(tempfile.gettempdir()) / f"mimkd-ray-blocks-{os.getuid()}"


def read_block(store: BlockStore | None, key: str, load: Callable[[], Any]) -> Any:
    """Return block `key` as a pyarrow.Table: from this process's memory, from the store, or from `load()`."""
    global _tables
    if _tables.pid != os.getpid():
        _tables = _Tables()  # a forked child must not wait for a lock that its parent held
    tables = _tables
    table = tables.find(key)
    if table is None:
        table = load() if store is None else store.get(key, load)
        tables.keep(key, table)
    return table


class _Tables:
    """The tables that this process used last."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.bytes = 0
        self._lock = threading.Lock()
        self._tables: OrderedDict[str, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tables)

    def find(self, key: str) -> Any:
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
            return self._tables.get(key)

    def keep(self, key: str, table: Any) -> None:
        with self._lock:
            if key in self._tables:
                return
            self._tables[key] = table
            self.bytes += table.nbytes
            while self.bytes > CACHE_BYTES and len(self._tables) > 1:
                self.bytes -= self._tables.popitem(last=False)[1].nbytes


_tables = _Tables()


def _name(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:40]


def _write(path: Path, table: Any) -> None:
    import pyarrow as pa

    with open(path, "wb") as out:
        with pa.ipc.new_file(out, table.schema) as file:
            file.write_table(table)
        out.flush()
        os.fsync(out.fileno())  # the rename must not outlive a power cut that the content does not


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Hold the lock of the file, made if missing, against all processes and threads of this machine."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
    finally:
        # Unlocked by name: a process that was forked meanwhile holds the file open, and the lock with it.
        fcntl.flock(file, fcntl.LOCK_UN)
        os.close(file)
