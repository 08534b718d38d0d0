"""`python -m mimkd_ray COMMAND`: tools around the jobs.

Exit status: 0 done, 1 a check failed, 2 bad input, 130 interrupted. Errors are one line on standard error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from mimkd_ray.cli.common import guarded

COMMANDS = {
    "doctor": ("mimkd_ray.cli.doctor", "check a machine or a cluster before money is spent"),
    "layers": ("mimkd_ray.cli.layers", "list the layers of a network that can be tapped, and the default taps"),
}
"""Command to (module, help text). The module is imported on use and has ``main(argv, program)``, which returns the
status."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    lines = "\n".join(f"  {name:8} {what}" for name, (_, what) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m mimkd_ray",
        description=f"Tools around the jobs:\n{lines}",
        epilog="COMMAND --help says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=" or ".join(COMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command")
    options = parser.parse_args(argv)
    program = f"{parser.prog} {options.command}"
    command = import_module(COMMANDS[options.command][0])
    return guarded(program, lambda: command.main(options.arguments, program), "nothing was changed")


if __name__ == "__main__":
    sys.exit(main())
