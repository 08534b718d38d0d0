"""`mimkd-ray report RUN [RUN...]`: report.html of a run or a comparison; of several, one page that compares them.

Exit status: 0 done, 1 a damaged file, 2 bad input.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mimkd_ray import storage
from mimkd_ray.cli.command_line import parsed
from mimkd_ray.cli.result_table import SHAPE
from mimkd_ray.errors import DamagedDataError, UserError
from mimkd_ray.places import check_lasting
from mimkd_ray.secret_urls import redacted


def main(argv: Sequence[str], program: str) -> int:
    """Write the page of a command line and print its place; return the exit status. Raises UserError and
    DamagedDataError."""
    parser = argparse.ArgumentParser(prog=program, description="Write report.html: one file that needs no network.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory or URL of a run; several are compared")
    parser.add_argument("--out", help="the page of several runs (default: comparison.html here)")
    options = parsed(parser, argv)
    if options is None:
        return 0
    from mimkd_ray.pages.write_pages import write_comparison, write_report  # brings torch, which --help needs not

    runs = [storage.absolute(redacted(run)) for run in options.runs]
    if len(runs) == 1 and options.out:
        raise UserError("--out is for several runs: the page of one is report.html in its directory")
    page = storage.absolute(redacted(options.out or "comparison.html"))
    if len(runs) > 1:
        check_lasting("--out", page)
    try:
        print(write_report(runs[0]) if len(runs) == 1 else write_comparison(runs, page))
    except SHAPE as error:
        raise DamagedDataError(
            f"a JSON file in {', '.join(runs)} is damaged, or of another release ({type(error).__name__}: {error}): "
            "put it back from a copy; without result.json or metrics.jsonl the page is made of what else is there"
        ) from error
    return 0
