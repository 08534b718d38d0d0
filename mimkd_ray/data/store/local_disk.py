"""Detection of local disks, on which any row can be read at any time, as opposed to network file systems."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

_MOUNTS = Path("/proc/self/mountinfo")  # of Linux
_NETWORK = {"9p", "afs", "beegfs", "ceph", "cifs", "davfs", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4"}
_NETWORK |= {"orangefs", "pvfs2", "smb3", "smbfs", "virtiofs", "wekafs"}


def is_on_local_disk(path: Path) -> bool:
    """Return whether the file or folder at `path` is on no known network file system.

    FUSE (`fuse.s3fs`, `fuse.gcsfuse`, ...) counts as network. If the system lists no mounts, every path is local.
    """
    place = Path(os.path.realpath(path))
    types = _mounted()
    kind = next((types[str(parent)] for parent in (place, *place.parents) if str(parent) in types), "")
    return kind not in _NETWORK and kind != "fuse" and not kind.startswith("fuse.")


@cache
def _mounted() -> dict[str, str]:
    """Return {mount point: type of its file system}; of several at one point the last, which hides the others."""
    if not _MOUNTS.is_file():
        return {}
    found = {}
    for line in _MOUNTS.read_bytes().splitlines():
        # "36 35 98:0 / /mnt/x rw,noatime master:1 - ext4 /dev/sda1 rw"; a space in a path is written \040
        mount, _, source = line.partition(b" - ")
        point = mount.split(b" ")[4].decode("unicode_escape").encode("latin-1")
        found[os.fsdecode(point)] = source.split(b" ")[0].decode()
    return found
