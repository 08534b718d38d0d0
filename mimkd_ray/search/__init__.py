"""Hyperparameter search: spaces, configs, trials and their table; its report is in report/.

The package can be called: `mimkd_ray.search(config, space, tune_config=..., run_config=...)` is the function of
cli/search_from_python.py, whose help is

    from mimkd_ray.cli import search_from_python; help(search_from_python.search)

A function of this name in `mimkd_ray` would be replaced by this package as soon as anything in it is imported.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        return import_module("mimkd_ray.cli.search_from_python").search(*args, **options)


sys.modules[__name__].__class__ = _Package
