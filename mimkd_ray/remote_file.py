"""Files that are read in ranges, as Python's file objects are: those of an object store."""

from __future__ import annotations

import io
from typing import Any, cast

from mimkd_ray.remote_filesystem import call
from mimkd_ray.retries import ShortError


class RangeFile(io.RawIOBase):
    """A read-only file of `length` bytes, of which each read fetches a range. Threads must not share one."""

    def __init__(self, length: int) -> None:
        self.length = length
        self._place = 0

    def fetch(self, start: int, stop: int) -> bytes:
        """Return the bytes start..stop-1, which are within the file and at least one."""
        raise NotImplementedError

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.length}[whence]
        self._place = max(0, base + offset)
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        start = self._place
        stop = self.length if size is None or size < 0 else min(self.length, start + size)
        if stop <= start:
            return b""
        data = self.fetch(start, stop)
        self._place = stop
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)


class RemoteFile(RangeFile):
    """A file of an object store."""

    def __init__(self, url: str, length: int) -> None:
        super().__init__(length)
        self.url = url

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteFile, (self.url, self.length)

    def fetch(self, start: int, stop: int) -> bytes:
        def ask(fs: Any, path: str) -> bytes:
            data = cast(bytes, fs.cat_file(path, start=start, end=stop))
            if len(data) < stop - start:
                there = fs.info(path).get("size")  # None, of a server that does not say
                if there is not None and there < stop:
                    raise ShortError(f"it has {there:,} bytes, and {stop:,} are needed")
            if len(data) != stop - start:
                raise OSError(f"got {len(data)} bytes of the {stop - start} at offset {start}")
            return data

        return call(self.url, "read", ask)
