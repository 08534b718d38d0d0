"""The wheel: what is in it, that it works where it is unpacked, and the licences of what it needs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from configparser import ConfigParser
from importlib import import_module
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

import pytest
from jobs_here import ROOT

import mimkd_ray


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the backend that pip calls, in a copy: it leaves folders beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "mimkd_ray", folder / "mimkd_ray", ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=folder, capture_output=True, check=True)
    (path,) = folder.glob("dist/*.whl")
    return path


def test_every_file_of_the_package_is_in_it(wheel: Path) -> None:
    paths = [path for path in (ROOT / "mimkd_ray").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    notes = f"mimkd_ray-{mimkd_ray.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as files:
        names = {name for name in files.namelist() if not name.startswith(notes)}
        assert names == {path.relative_to(ROOT).as_posix() for path in paths}
        assert {"mimkd_ray/py.typed", "mimkd_ray/pages/page.css", "mimkd_ray/pages/page.js"} <= names
        assert files.read(f"{notes}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        said = files.read(f"{notes}/METADATA").decode()
        scripts = ConfigParser()
        scripts.read_string(files.read(f"{notes}/entry_points.txt").decode())
    assert dict(scripts["console_scripts"]) == {"mimkd-ray": "mimkd_ray.__main__:main"}
    assert "\nLicense-Expression: Apache-2.0\n" in said
    assert "\nProvides-Extra: export\n" in said


def test_its_command_runs_where_it_is_unpacked(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as files:
        files.extractall(tmp_path)
    command = "import mimkd_ray; print(mimkd_ray.__file__); from mimkd_ray.__main__ import main; main(['--version'])"
    done = subprocess.run([sys.executable, "-c", command], cwd=tmp_path, env={}, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{tmp_path}/mimkd_ray/__init__.py", f"mimkd-ray {mimkd_ray.__version__}"]


def test_the_licence_of_every_dependency_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    build_pages = import_module("build_pages")

    def without_extras(name: str) -> Any:
        if name in build_pages.LICENCES:
            raise PackageNotFoundError(name)
        return metadata(name)

    monkeypatch.setattr(build_pages, "metadata", without_extras)
    rows = dict(re.findall(r"^\| (\S+) \| (.+?) \|", build_pages.licences(), re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = sum(project["optional-dependencies"].values(), project["dependencies"])
    named = {re.split(r"[^\w-]", each)[0].replace("_", "-") for each in requirements} - {"mimkd-ray"}
    assert {name for name in named if not re.search("MIT|BSD|Apache|MPL|GPL|ISC", rows[name])} == set()
    assert rows["aiobotocore"] == "Apache-2.0", "s3fs brings it along"
