"""A torchrun whose workers stay in this session. For `ray_overhead.py`, with torchrun's own arguments.

torchrun puts every worker into a separate session, and Linux's autogroups share a busy machine's processors among
sessions, not processes: two workers in two sessions then get more than two workers in one, as Ray's are. That
difference is not a cost of Ray's, and without other load it does not occur.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
from torch.distributed.run import main


class Popen(subprocess.Popen):
    """A child in this session."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "start_new_session": False})


if __name__ == "__main__":
    vars(subprocess_handler)["Popen"] = Popen
    sys.exit(main())
