from __future__ import annotations

from pathlib import Path

import pytest

from mimkd_ray.data.store import local_disk
from mimkd_ray.data.store.local_disk import is_on_local_disk

MOUNTS = r"""
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:44 / /mnt/efs rw - nfs4 fs-1.efs:/ rw,vers=4.1
31 30 0:45 / /mnt/efs/scratch rw - xfs /dev/nvme1n1 rw
32 22 0:46 / /mnt/my\040bucket rw - fuse.s3fs s3fs rw
33 22 0:47 / /fast rw - lustre fsx@tcp:/x rw
34 22 0:48 / /usb rw - fuseblk /dev/sdb rw
35 22 0:49 / /over rw - nfs old rw
37 22 0:51 / /mnt/données rw - nfs4 fs-2.efs:/ rw
36 35 0:50 / /over rw master:7 propagate_from:2 - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("/data/imagenet", True),
        ("/mnt/efs", False),
        ("/mnt/efs/imagenet/train.parquet", False),
        ("/mnt/efsx/imagenet", True),
        ("/mnt/efs/scratch/x", True),
        ("/mnt/my bucket/x", False),
        ("/mnt/données/x", False),
        ("/fast/x", False),
        ("/usb/x", True),
        ("/over/x", True),
    ],
)
def test_the_innermost_mount_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, local: bool) -> None:
    (tmp_path / "mountinfo").write_text(MOUNTS.lstrip())
    monkeypatch.setattr(local_disk, "_MOUNTS", tmp_path / "mountinfo")
    local_disk._mounted.cache_clear()
    assert is_on_local_disk(Path(path)) == local
    local_disk._mounted.cache_clear()


def test_without_a_list_of_mounts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_disk, "_MOUNTS", Path("/no/such/file"))
    local_disk._mounted.cache_clear()
    assert is_on_local_disk(Path("/anything"))
    local_disk._mounted.cache_clear()


def test_a_link_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_disk, "_mounted", lambda: {"/": "ext4", str(tmp_path.resolve() / "far"): "nfs"})
    (tmp_path / "far").mkdir()
    (tmp_path / "near").symlink_to(tmp_path / "far")
    assert not is_on_local_disk(tmp_path / "near" / "x")
