"""report.html of a run, of a comparison, or of several runs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from mimkd_ray import storage
from mimkd_ray.errors import UserError
from mimkd_ray.json_files import read_json
from mimkd_ray.pages.compare_page import compare_page
from mimkd_ray.pages.run_page import run_page
from mimkd_ray.pages.run_records import REPORT, RunRecord, read_run, runs_of
from mimkd_ray.secret_urls import redacted_values, scrubbed
from mimkd_ray.train.records.outcomes import CONFIG, RESULT

logger = logging.getLogger(__name__)


def write_report(run_dir: str) -> str:
    """Write the page of a run or a comparison into its directory; return its place. Raises UserError."""
    arms = runs_of(run_dir)
    if arms:
        config, result = (redacted_values(read_json(storage.join(run_dir, name)) or {}) for name in (CONFIG, RESULT))
        text = compare_page(arms, run_dir, config, result)
    else:
        text = run_page(read_run(run_dir))
    return _write(storage.join(run_dir, REPORT), text)


def try_to_write_report(run_dir: str) -> str | None:
    """Write the page at the end of a run, and return its place. A page is worth less than a run: what goes wrong is one
    line of warning, and None is returned."""
    try:
        return write_report(run_dir)
    except Exception as error:
        logger.warning(
            "%s was not made: %s: %s; 'mimkd-ray report %s' tries again",
            REPORT,
            type(error).__name__,
            " ".join(scrubbed(str(error)).split()),
            run_dir,
        )
        return None


def write_comparison(run_dirs: Sequence[str], place: str) -> str:
    """Write one page that compares several runs, or the arms of comparisons, to `place`, and return it. Raises
    UserError."""
    if len(set(run_dirs)) < len(run_dirs):
        raise UserError(f"a run is given twice: {', '.join(run_dirs)}")
    arms: dict[str, Sequence[RunRecord]] = {}
    for run_dir in run_dirs:
        name = run_dir.rstrip("/").rpartition("/")[2]
        own: Mapping[str, Sequence[RunRecord]] = runs_of(run_dir) or {name: [read_run(run_dir)]}
        for arm, runs in own.items():
            arms[arm if arm not in arms else f"{arm} of {run_dir}"] = runs
    return _write(place, compare_page(arms, place.rpartition("/")[0], {}, {}))


def _write(place: str, text: str) -> str:
    storage.write_bytes(place, text.encode())
    return place
