"""Class folders, and from them archives in the form of the official ImageNet ones: for tests and for trying things out.

python tests/data/official_archives.py FOLDERS OUT      (FOLDERS/train/<wnid>/*, FOLDERS/val/<wnid>/*)
"""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import numpy as np

KIT = "ILSVRC2012_devkit_t12"


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_train(folders: Path, out: Path) -> None:
    """A tar of class tars. Neither level is in order of names."""
    with tarfile.open(out / "ILSVRC2012_img_train.tar", "w") as whole:
        for folder in sorted(folders.iterdir(), reverse=True):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for file in sorted(folder.iterdir(), reverse=True):
                    add(tar, file.name, file.read_bytes())
            add(whole, f"{folder.name}.tar", inner.getvalue())


def write_val(folders: Path, out: Path, wnids: list[str], seed: int = 0) -> dict[str, str]:
    """A flat tar and the development kit, in which ids of classes are not in the order of wnids, and some synsets are
    groups of classes. Returns {name in the archive: wnid}."""
    from scipy.io import savemat

    random = np.random.default_rng(seed)
    ids = {wnid: int(number) + 1 for wnid, number in zip(wnids, random.permutation(len(wnids)), strict=True)}
    rows = [file for folder in sorted(folders.iterdir()) for file in sorted(folder.iterdir())]
    rows = [rows[place] for place in random.permutation(len(rows))]
    names = {f"ILSVRC2012_val_{n + 1:08d}.JPEG": file for n, file in enumerate(rows)}
    with tarfile.open(out / "ILSVRC2012_img_val.tar", "w") as tar:
        for place in random.permutation(len(rows)):
            name = list(names)[place]
            add(tar, name, names[name].read_bytes())
    kind = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("gloss", object)]
    kind += [("num_children", object), ("children", object), ("wordnet_height", object), ("num_train_images", object)]
    synsets = [(number, wnid, f"name of {wnid}", "text", 0, [], 0, 1300) for wnid, number in ids.items()]
    synsets.sort()
    synsets.append((len(ids) + 1, "n00000000", "a group", "text", 2, [1, 2], 1, 0))
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(synsets, dtype=kind)})
    truth = "".join(f"{ids[file.parent.name]}\n" for file in rows)
    with tarfile.open(out / f"{KIT}.tar.gz", "w:gz") as tar:
        add(tar, f"{KIT}/readme.txt", b"ILSVRC 2012 development kit")
        add(tar, f"{KIT}/data/meta.mat", meta.getvalue())
        add(tar, f"{KIT}/data/ILSVRC2012_validation_ground_truth.txt", truth.encode())
    return {name: file.parent.name for name, file in names.items()}


if __name__ == "__main__":
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    target.mkdir(parents=True, exist_ok=True)
    write_train(source / "train", target)
    write_val(source / "val", target, sorted(folder.name for folder in (source / "train").iterdir()))
