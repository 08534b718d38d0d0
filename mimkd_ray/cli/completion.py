"""`mimkd-ray completion`: print what bash needs to complete commands, recipes and flags; zsh reads it too."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mimkd_ray.cli import command_line
from mimkd_ray.cli.commands import COMMANDS
from mimkd_ray.cli.prepare_data import PrepareJob
from mimkd_ray.config import Config, DoctorConfig, ExportConfig, SearchJob
from mimkd_ray.config.jobs.evaluate import EvaluateJob
from mimkd_ray.recipes import CIFAR_RECIPES, IMAGENET_RECIPES

_RECIPES = (*IMAGENET_RECIPES, *CIFAR_RECIPES)
_OF_JOBS = ("--help", "--help-all", "--verbose", "--config", "--print-config")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Nothing:
    """Print a script for bash, which zsh reads too: source <(mimkd-ray completion)."""


WORDS: dict[str, tuple[type, tuple[str, ...]]] = {
    "train": (Config, (*_RECIPES, *_OF_JOBS)),
    "cache": (Config, ("build", "plan", "ls", "verify", "gc", *_RECIPES, *_OF_JOBS)),
    "search": (SearchJob, (*_RECIPES, *_OF_JOBS)),
    "prepare": (PrepareJob, ("--help",)),
    "evaluate": (EvaluateJob, ("--help", "--help-all", "--verbose")),
    "export": (ExportConfig, ("--help",)),
    "report": (_Nothing, ("--help", "--out")),
    "runs": (_Nothing, ("ls", "show", "compare", "--help")),
    "layers": (_Nothing, ("--help", "--image-size", "--num-classes", "--all")),
    "doctor": (DoctorConfig, ("--help",)),
    "completion": (_Nothing, ("--help",)),
}
"""Command to (the config that its flags come from, other words that it takes)."""

_SCRIPT = """\
# Completion of mimkd-ray. In bash: source <(mimkd-ray completion); in zsh, put before it:
# autoload -U +X bashcompinit && bashcompinit
_mimkd_ray() {{
  local words
  case "$COMP_CWORD,${{COMP_WORDS[1]}}" in
    1,*) words="{commands}" ;;
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _mimkd_ray mimkd-ray
"""


def main(argv: Sequence[str], program: str) -> int:
    """Print the script; return the exit status."""
    if command_line.from_flags(_Nothing, argv, prog=program) is not None:
        print(script(COMMANDS), end="")
    return 0


def script(commands: Mapping[str, Any]) -> str:
    """Return the script for these commands."""
    cases = "\n".join(
        f'    *,{name}) words="{" ".join((*words, *(f"--{flag}" for flag in flags(config))))}" ;;'
        for name, (config, words) in WORDS.items()
    )
    return _SCRIPT.format(commands=" ".join(commands), cases=cases)


def flags(config: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of a config's fields, with hyphens, as the command line spells them."""
    kinds = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(kinds[field.name]):
            yield from flags(kinds[field.name], f"{name}.")
        else:
            yield name
