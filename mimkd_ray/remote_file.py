"""A file of an object store as Python's file objects are, read in ranges."""

from __future__ import annotations

import io
from typing import Any, cast

from mimkd_ray.attempts import ShortError
from mimkd_ray.remote import call


class RemoteFile(io.RawIOBase):
    """A read-only remote file, read in ranges. Threads must not share one."""

    def __init__(self, url: str, length: int) -> None:
        self.url = url
        self.length = length
        self._place = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteFile, (self.url, self.length)

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

        def fetch(fs: Any, path: str) -> bytes:
            data = cast(bytes, fs.cat_file(path, start=start, end=stop))
            if len(data) < stop - start and (there := int(fs.info(path)["size"])) < stop:
                raise ShortError(f"it has {there:,} bytes, and {stop:,} are needed")
            if len(data) != stop - start:
                raise OSError(f"got {len(data)} bytes of the {stop - start} at offset {start}")
            return data

        data = call(self.url, "read", fetch)
        self._place = stop
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)
