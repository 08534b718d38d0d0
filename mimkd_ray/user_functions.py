"""Functions of the user's by import path, `package.module:function`: networks and augmentation pipelines."""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable
from typing import Any

from mimkd_ray.errors import UserError, nearest

LOOK_IN = "MIMKD_RAY_LOOK_IN"
"""Variable with the folder that a job was started in: workers of a Ray that it starts work in folders of Ray's."""


NOT_FOREIGN = (*(sysconfig.get_path(key) for key in ("stdlib", "purelib", "platlib")), os.path.dirname(__file__), "<")
"""How the paths of libraries, of this package and of modules without a file begin."""


def named_function(kind: str, name: str) -> Callable[..., Any]:
    """Import the function "package.module:function"; `kind` is what it makes, for errors. Raises UserError.

    The current folder is looked in after everything else, whatever started the process: `python jobs/imagenet.py` has
    the folder of the script on its path instead.
    """
    module_name, _, function_name = name.partition(":")
    here = os.getcwd()
    for folder in (here, os.environ.get(LOOK_IN, "")):
        if folder and folder not in sys.path and "" not in sys.path:
            sys.path.append(folder)
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError, TypeError) as error:  # TypeError: "../x" is a relative name
        raise UserError(
            f"{kind} {name!r}: cannot import {module_name!r}: {error}; start from its folder ({here} is looked in), "
            f"put that on PYTHONPATH, or ship it with the job's working directory"
        ) from error
    except Exception as error:  # the module is foreign code
        raise UserError(f"{kind} {name!r}: importing {module_name!r} failed: {told(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(
            f"{kind} {name!r}: {module_name} has no function {function_name!r}{nearest(function_name, there)}"
        )
    found: Callable[..., Any] = function
    return found


def call_named(kind: str, name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call an imported function; what it raises becomes a UserError of one line, with the place in its code."""
    try:
        return function(*args, **options)
    except UserError:
        raise
    except Exception as error:  # the function is foreign code
        given = ", ".join([*map(repr, args), *(f"{key}={value!r}" for key, value in options.items())])
        raise UserError(f"{kind} {name!r}: called with {given}, it raised {told(error)}") from error


def told(error: Exception) -> str:
    """Return an error of foreign code as one line: its kind, what it says, and the last line of that code, or else the
    line of a library that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(NOT_FOREIGN)]
    place = f" ({(own or frames)[-1].filename}, line {(own or frames)[-1].lineno})" if frames else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{f': {text}' if text else ''}{place}"
