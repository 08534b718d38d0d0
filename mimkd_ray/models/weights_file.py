"""What is in a weights file: the state dicts of .safetensors and PyTorch files, by the key that they stand under.

PyTorch files are read with weights_only=True. Beside tensors that allows what other people's checkpoints hold as notes
on the run: argparse.Namespace, paths, numpy's scalars and arrays, defaultdicts, Lightning's AttributeDict. No other
class is ever unpickled.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import pathlib
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

from mimkd_ray.errors import UserError
from mimkd_ray.places import place
from mimkd_ray.secret_urls import redacted, revealed, scrubbed

SUFFIXES = (".safetensors", ".pt", ".pth", ".pth.tar", ".ckpt", ".bin")
"""Endings of weights files. What is in a file is seen from its first bytes."""
HUB, FOLDER = "hf-hub:", "local-dir:"
"""In front of a model of the Hugging Face hub, ORG/NAME, and of a folder that holds one."""
WEB = ("http://", "https://")
IN_FOLDER = ("model.safetensors", "pytorch_model.bin")
"""Names of the weights file of such a model."""
CONFIG = "config.json"
"""Beside it: the network."""
WRAPPERS = (
    "state_dict",
    "model",
    "model_state_dict",
    "model_state",
    "net",
    "network",
    "student",
    "teacher",
    "module",
    "state_dict_ema",
    "model_ema",
)
"""Keys that a checkpoint's state dicts stand under; of several that fit equally well the first here counts. Where none
of these is there, any key will do."""


def shown(path: str) -> str:
    """Return `path` without a URL's query, which may be a signature."""
    return path.partition("?")[0] if "://" in path else path


def is_weights_file(path: str) -> bool:
    """Say whether `path` can be a weights file: by its ending, as a URL or a model of a hub, or if it is there."""
    if path.startswith((HUB, FOLDER, *WEB)):
        return True
    return urlsplit(path).path.endswith(SUFFIXES) or path.endswith(SUFFIXES) or os.path.isfile(path)


def read_states(path: str) -> dict[str, dict[str, Tensor]]:
    """The state dicts of a weights file, on the CPU, by their keys; "" for a bare one. Raises UserError."""
    path = redacted(path)
    if not is_weights_file(path):
        raise UserError(
            f"weights {path!r}: expected 'random', 'published' or a file ending in {', '.join(SUFFIXES)}; or "
            f"{HUB}ORG/NAME, {FOLDER}FOLDER"
        )
    data, name = _read(path), shown(path)
    if data.startswith(b"version https://git-lfs"):
        raise UserError(f"weights {name}: is a Git LFS pointer of {len(data)} bytes: git lfs pull fetches the file")
    if _is_safetensors(data) or urlsplit(name).path.endswith(".safetensors"):
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            content: Any = load(data)
        except SafetensorError as error:
            raise UserError(
                f"weights {name}: not a readable safetensors file of {len(data)} bytes: {error}; "
                "copy the file again, or give another"
            ) from error
    else:
        try:
            with torch.serialization.safe_globals(_notes()), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of unusual files, to torch's own developers
                content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError) as error:
            # Of torch's text only the class: its advice is to load the file with pickle, which runs code in it.
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            reason = f"it holds a {found[1]}" if found else "it is damaged, or something else"
            raise UserError(
                f"weights {name}: not a PyTorch file of plain tensors ({len(data):,} bytes): {reason}; save "
                "model.state_dict() with torch.save, or use safetensors, and copy the file again"
            ) from error
    return _states(content, name)


def file_digest(path: str) -> str:
    """sha256 of a weights file. Raises UserError."""
    return hashlib.sha256(_read(redacted(path))).hexdigest()


def _is_safetensors(data: bytes) -> bool:
    """A safetensors file begins with the length of its JSON header, in eight bytes."""
    return data[8:9] == b"{" and 0 < int.from_bytes(data[:8], "little") <= len(data)


LIGHTNINGS = (
    *("pytorch_lightning.utilities.parsing", "lightning.pytorch.utilities.parsing"),
    *("lightning_fabric.utilities.data", "lightning.fabric.utilities.data"),
)
"""Modules of Lightning's AttributeDict. None is imported: its place is taken by an OrderedDict."""


def _notes() -> list[Any]:
    """Classes and functions that torch.load may call beside its own: those of Namespace, paths, numpy's scalars and
    arrays, defaultdicts and Lightning's hyperparameters."""
    made = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.zeros(0).__reduce__()[0]}
    kinds = {type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"}
    # numpy's module of these functions has had two names.
    numbers = [(made[name], f"numpy.{core}.multiarray.{name}") for core in ("core", "_core") for name in made]
    path = type(pathlib.Path())
    named = [(OrderedDict, f"{module}.AttributeDict") for module in LIGHTNINGS]
    of_defaults = [(_without_default, "collections.defaultdict"), list, dict, int, float]
    return [argparse.Namespace, path, *numbers, *named, np.ndarray, np.dtype, *kinds, *of_defaults]


def _without_default(*_: type) -> OrderedDict[str, Any]:
    """Stands for a defaultdict, into which torch puts nothing."""
    return OrderedDict()


def _read(path: str) -> bytes:
    import fsspec

    if path.startswith(HUB):
        path = _from_hub(path.removeprefix(HUB))
    elif path.startswith(FOLDER):
        path = _in_folder(path.removeprefix(FOLDER))
    elif not path.startswith(WEB):
        path = place(path)
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe or a device might be read for ever
        raise UserError(f"weights {path}: is a folder, a pipe or a device, and no file: give the file itself")
    # A signature is of the address as it was given: yarl would write another one for the same.
    url = revealed(path)
    options = {"encoded": True} if path.startswith(WEB) and "%" in url else {}
    try:
        files, key = fsspec.url_to_fs(url, **options)
        return bytes(files.cat_file(key))
    except FileNotFoundError as error:
        raise UserError(
            f"weights {shown(path)}: no such file; pass an existing file, 'published' or 'random'"
        ) from error
    except Exception as error:  # each file system has its own: no storage, no driver, no permission
        reason = " ".join(scrubbed(str(error)).split()) or type(error).__name__
        if status := getattr(error, "status", None):  # of a web server
            reason = f"the server answers {status}, as it does to an address that has expired"
        raise UserError(
            f"weights {shown(path)}: cannot be read: {reason}; copy the file here and pass its path"
        ) from error


def from_hub(model: str, *names: str) -> str:
    """Return the path of the first of a model's files of these names that there is, in the hub's cache on this machine;
    it is downloaded if it is not there. The hub's client has its own errors."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, _, revision = model.partition("@")
    for name in names[:-1]:
        try:
            return str(hf_hub_download(repository, name, revision=revision or None))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            continue
    return str(hf_hub_download(repository, names[-1], revision=revision or None))


def _from_hub(model: str) -> str:
    try:
        return from_hub(model, *IN_FOLDER)
    except ImportError as error:
        raise UserError(
            f"weights {HUB}{model} need timm, which is not installed: pip install mimkd-ray[timm], or download "
            f"{hub_file(model)} and pass its path"
        ) from error
    except Exception as error:  # the hub's client has many; the cause is in the message
        raise UserError(
            f"weights {HUB}{model} could not be downloaded: {cause(error)}; {bring(hub_file(model))}"
        ) from error


def _in_folder(folder: str) -> str:
    found = [name for name in IN_FOLDER if os.path.isfile(os.path.join(folder, name))]
    if not found:
        raise UserError(
            f"weights {FOLDER}{folder}: there is no {' and no '.join(IN_FOLDER)} in it: pass the file itself"
        )
    return os.path.join(folder, found[0])


def hub_file(model: str, name: str = IN_FOLDER[0]) -> str:
    """Return the address of the weights file of ORG/NAME or ORG/NAME@REVISION on the Hugging Face hub."""
    repository, _, revision = model.partition("@")
    return f"https://huggingface.co/{repository}/resolve/{revision or 'main'}/{name}"


def bring(address: str, where: str = "") -> str:
    """Return what to do on a machine without network: which file to bring, and where it is looked for."""
    put = f"put it at {where}, where it is looked for first, or " if where else ""
    return f"on a machine with network download {address}, copy the file here and {put}pass its path as weights"


def cause(error: BaseException) -> str:
    """Return the first line of the innermost error: a hub's client wraps "Name or service not known" often."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _states(content: Any, path: str) -> dict[str, dict[str, Tensor]]:
    found = _within(content, "")
    if not found:
        keys = ", ".join(list(map(str, content))[:3]) if isinstance(content, Mapping) else type(content).__name__
        raise UserError(
            f"weights {path}: no state dict in it (found {keys}); expected names with tensors, bare or under a key "
            f"such as {', '.join(map(repr, WRAPPERS))}"
        )
    return found


def _within(content: Any, key: str, depth: int = 3) -> dict[str, dict[str, Tensor]]:
    """The state dicts in a file's content or, `depth` levels deep, under its keys: the usual ones, or else any."""
    if _is_state_dict(content):
        return {key: dict(content)}
    if not isinstance(content, Mapping) or not depth:
        return {}
    usual = [wrapper for wrapper in WRAPPERS if wrapper in content]
    for keys in (usual, [name for name in content if isinstance(name, str)]):
        found: dict[str, dict[str, Tensor]] = {}
        for name in keys:
            found |= _within(content[name], f"{key}.{name}".lstrip("."), depth - 1)
        if found:
            return found
    return {}


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(key, str) and isinstance(item, Tensor) for key, item in value.items())
    )
