"""Cost of a checkpoint to training, cost of a resume, and the parts of both: ResNet-18 with critics and momentum.

A save stalls the step while statistics are collected and the state is copied; serialising, hashing and writing happen
in the background. The same state saved in the foreground is the baseline. A resume finds the newest checkpoint, reads
and checks it, and loads it into the networks and the optimiser. The folder is local unless --root names a URL.
"""

from __future__ import annotations

import hashlib
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from made_students import make_student
from report import finish, parser, table

from mimkd_ray import storage
from mimkd_ray.train.engine import restart
from mimkd_ray.train.records import checkpoint


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=7, help="saves and resumes")
    options.add_argument("--root", default="", help="folder or URL; unset: a temporary folder")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student = make_student("resnet34", "resnet18", 2, 4, 64, device)
    parts: dict[str, list[float]] = {}

    def note(part: str, call: Callable[..., Any], *values: Any) -> Any:
        """Call it, and record its duration."""
        began = time.perf_counter()
        answer = call(*values)
        parts.setdefault(part, []).append(time.perf_counter() - began)
        return answer

    with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
        root = args.root or folder
        writer = checkpoint.Writer(root, 2, lambda _: None)
        for step in range(args.rounds):
            student.step(step)  # momentum is there from the first step on
            note("stall", restart.save, student, step + 1, writer)
            note("in the background", writer.wait)
            state = restart.state_of(student, step + 1, [student.norms.flat().cpu()])
            buffer = io.BytesIO()
            note("of it: serialise", torch.save, state, buffer)
            data = buffer.getvalue()
            note("of it: hash", lambda data: hashlib.sha256(data).hexdigest(), data)
            note("of it: write", storage.write_bytes, storage.join(root, "probe"), data)
            note("in the foreground", checkpoint.save, root, step + 1, state, 2)
            note("resume", restart.resume, student, root)
            _, found = note("of it: find, read, check", checkpoint.newest, root)
            parsed = note("of it: parse", checkpoint.parse, found, device)
            note("of it: load the networks", student.distiller.load_state_dict, parsed["distiller"])
    middle = {part: statistics.median(seconds) for part, seconds in parts.items()}
    megabytes = len(data) / 1e6
    print(f"state of {megabytes:.0f} MB, {'local folder' if not args.root else args.root.split(':')[0]}")
    print(table(["ms", "median"], [[part, 1e3 * seconds] for part, seconds in middle.items()]))
    figures = {
        "megabytes": megabytes,
        "stall_ms": 1e3 * middle["stall"],
        "foreground_ms": 1e3 * middle["in the foreground"],
        "stall_over_foreground": middle["stall"] / middle["in the foreground"],
        "resume_ms": 1e3 * middle["resume"],
    }
    return finish("checkpoint", figures, {"stall_over_foreground": ("<=", 0.5)}, args.json)


if __name__ == "__main__":
    sys.exit(main())
