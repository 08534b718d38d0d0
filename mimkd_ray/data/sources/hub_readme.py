"""Which files are which split, as the README.md of a Hugging Face data set says in its metadata (`configs`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mimkd_ray import storage
from mimkd_ray.errors import UserError

README = "README.md"
DEEPEST = 4  # folders in each other


def declared_files(root: str) -> dict[str, dict[str, storage.Entry]]:
    """Return {split: {URL: Entry}} of the Parquet files that the README.md in `root` names for its default config, or
    for the only one; {} where it names none. Of several without a default, splits are called CONFIG/SPLIT. Links to
    nothing are among them. Raises UserError for metadata that cannot be read."""
    patterns = _patterns(storage.read_bytes(storage.join(root, README)).decode(errors="replace"), root)
    if not patterns:
        return {}
    listing = storage.list_entries_below(root, DEEPEST, lambda name: not name.startswith("."), broken=True)
    files = {path: entry for path, entry in sorted(listing.items()) if path.endswith(".parquet")}
    found = {}
    for split, of_split in patterns.items():
        fits = [_regex(pattern, root) for pattern in of_split]
        named = {path: entry for path, entry in files.items() if any(fit.fullmatch(path) for fit in fits)}
        found[split] = {storage.join(root, path): entry for path, entry in named.items()}
    return {split: of_split for split, of_split in found.items() if of_split}


def _patterns(text: str, root: str) -> dict[str, list[str]]:
    lines = text.splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in [line.strip() for line in lines[1:]]:
        return {}
    end = [line.strip() for line in lines[1:]].index("---")
    try:
        import yaml
    except ImportError:  # it comes with Ray, timm and the Hugging Face packages
        return {}
    try:
        metadata = yaml.safe_load("\n".join(lines[1 : end + 1]))
        if not isinstance(metadata, Mapping):  # a rule above a text, say
            return {}
        configs = [each for each in metadata.get("configs") or () if each.get("data_files")]
        chosen = [each for each in configs if each.get("default") or each.get("config_name") == "default"] or configs
        if len(chosen) == 1:
            return _by_split(chosen[0]["data_files"])
        return {
            f"{each['config_name']}/{split}": paths
            for each in chosen
            for split, paths in _by_split(each["data_files"]).items()
        }
    except (yaml.YAMLError, AttributeError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{storage.join(root, README)}: its metadata cannot be read ({type(error).__name__}: {reason}): mend the "
            "lines between ---, or remove the file"
        ) from error


def _regex(pattern: str, root: str) -> re.Pattern[str]:
    """As on the hub: `*` stays in a folder, and `**` does not."""
    from fsspec.utils import glob_translate

    try:
        return re.compile(glob_translate(pattern.removeprefix("./")))
    except ValueError as error:
        raise UserError(
            f"{storage.join(root, README)}: its pattern '{pattern}' of files cannot be read: {error}; mend it, or "
            "remove the file"
        ) from error


def _by_split(data_files: Any) -> dict[str, list[str]]:
    """{split: patterns}; files without a split are those of `train`, as on the hub."""
    if isinstance(data_files, str):
        return {"train": [data_files]}
    if isinstance(data_files, Mapping):
        return {str(split): [path] if isinstance(path, str) else list(path) for split, path in data_files.items()}
    found: dict[str, list[str]] = {}
    for each in data_files:
        split, path = ("train", each) if isinstance(each, str) else (str(each["split"]), each["path"])
        found.setdefault(split, []).extend([path] if isinstance(path, str) else path)
    return found
