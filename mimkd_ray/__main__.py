"""`mimkd-ray COMMAND`, also as `python -m mimkd_ray COMMAND`: the jobs, and tools around them.

Exit status: 0 done, 1 a job or a check failed, 2 bad input, 3 stopped (SIGTERM, one Ctrl-C), 130 interrupted. Errors
are one line on standard error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import mimkd_ray
from mimkd_ray.cli.command_line import guarded
from mimkd_ray.cli.commands import COMMANDS


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    program = f"{parser.prog} {options.command}"
    module, _, function = COMMANDS[options.command][0].partition(":")
    command = getattr(import_module(module), function)
    return guarded(program, lambda: command(options.arguments, program), "nothing was changed")


def _parser() -> argparse.ArgumentParser:
    lines = "\n".join(f"  {name:10} {what}" for name, (_, what) in COMMANDS.items())
    called = Path(sys.argv[0]).name
    parser = argparse.ArgumentParser(
        prog="python -m mimkd_ray" if called == "__main__.py" else "mimkd-ray",
        description=f"Distil image classifiers by mutual information.\n\n{lines}",
        epilog="COMMAND --help says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mimkd-ray {mimkd_ray.__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=" or ".join(COMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command")
    return parser


if __name__ == "__main__":
    sys.exit(main())
