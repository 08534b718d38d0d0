"""What a run saves on its own machine when its directory, in a store, cannot be written any more."""

from __future__ import annotations

import socket
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

from mimkd_ray import local_files, storage

FOLDER = "mimkd_ray_saved"
"""In the home folder, or among temporary files where nothing can be written there."""


def rescued(run_dir: str, write: Callable[[str], None], error: Exception) -> storage.StorageError:
    """Call ``write`` with a folder of this machine, in the place of the run's directory, and return the error that says
    what is there and how to go on."""
    name = f"{run_dir.rstrip('/').rpartition('/')[2]}-{zlib.crc32(run_dir.encode()):08x}"
    home = Path.home() / FOLDER / name
    try:
        home.mkdir(parents=True, exist_ok=True)
        folder = home
    except OSError:
        folder = Path(tempfile.gettempdir()) / FOLDER / name
    write(str(folder))
    kept = ", ".join(sorted({path.partition("/")[0] for path in local_files.tree(folder)}))
    how = f"aws s3 cp --recursive {folder} {run_dir}" if run_dir.startswith("s3://") else f"copy it into {run_dir}"
    return storage.StorageError(
        f"{error}; the state of the run is saved on {socket.gethostname()} in {folder} ({kept}): once the store "
        f"answers, {how}, and give the same command again, which goes on from there (without it, from the last "
        "checkpoint in the run's directory)"
    )
