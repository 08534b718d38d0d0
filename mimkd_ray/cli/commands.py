"""The commands of `mimkd-ray`."""

from __future__ import annotations

COMMANDS = {
    "train": ("mimkd_ray.cli.jobs:train", "distil a student: a recipe, and the fields to override"),
    "cache": ("mimkd_ray.cli.jobs:cache", "store a teacher's features once, for many runs"),
    "search": ("mimkd_ray.cli.jobs:search", "search for the best critic, layers and weights"),
    "prepare": ("mimkd_ray.cli.jobs:prepare", "make a prepared data set of class folders, Parquet or archives"),
    "evaluate": ("mimkd_ray.cli.jobs:evaluate", "measure a student, a teacher or any network on a data set"),
    "export": ("mimkd_ray.cli.jobs:export", "write a student as ONNX, .pt2, int8 and a model of the Hugging Face hub"),
    "report": ("mimkd_ray.cli.report:main", "write report.html of a run, or of several side by side"),
    "runs": (
        "mimkd_ray.cli.runs:main",
        "list, show and compare runs: ls ROOT, show RUN, compare RUN RUN",
    ),
    "layers": ("mimkd_ray.cli.layers:main", "list the layers of a network that can be tapped, and the default taps"),
    "doctor": ("mimkd_ray.cli.doctor:main", "check a machine or a cluster before money is spent"),
    "completion": ("mimkd_ray.cli.completion:main", "print a script that completes commands and flags in bash and zsh"),
}
"""Command to ("module:function", help text). The module is imported on use; the function takes (argv, program) and
returns the status."""
