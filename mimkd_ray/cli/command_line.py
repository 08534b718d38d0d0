"""The command line of jobs/: pick a recipe, override any field by its dotted name, run, and exit with a status.

Exit status: 0 done, 1 the run failed, 2 bad input, 3 stopped by SIGTERM or one Ctrl-C (training has saved then, and the
same command resumes it), 130 interrupted (Ctrl-C).

Errors are one line on standard error; for an unknown flag, or a value of the
wrong type, tyro prints its own message there.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from mimkd_ray import console, storage
from mimkd_ray.cli.short_help import short_help
from mimkd_ray.config import Config
from mimkd_ray.config.form.json_form import from_dict, to_dict
from mimkd_ray.errors import LOST_LOADER, DamagedDataError, Interrupted, NonFiniteLossError, UserError, nearest
from mimkd_ray.secret_urls import redacted, scrubbed
from mimkd_ray.signals import handled

Recipe = Callable[[], Config]
C = TypeVar("C", bound=Config)
T = TypeVar("T")

SPINS = "10000"
"""Turns of libgomp's waiting loop before a thread sleeps. libgomp's default is 300,000."""


def main(
    recipes: Mapping[str, Recipe], default: str, argv: Sequence[str] | None = None, program: str | None = None
) -> int:
    """Run a job: ``JOB [RECIPE] [--config FILE] [--print-config] [--field.path value ...]``. Returns the status.

    `argv` and `program` are by default those of this process."""
    program = program or sys.argv[0]

    def work() -> int:
        wait_asleep()
        arguments = sys.argv[1:] if argv is None else argv
        config = parse(recipes, default, arguments, program)
        if config is None:
            return 0
        if not config.compare.seeds and (idle := [word for word in arguments if word.startswith("--compare.arms")]):
            raise UserError(f"{idle[0]} compares nothing with compare.seeds 0: pass --compare.seeds 3 too")
        if os.environ.get("RANK", "0") != "0":
            console.use(console.Nobody())  # torchrun's other processes
        with console.phase(f"{config.recipe}: {config.teacher.name} teaches {config.student.name}; loading PyTorch"):
            from mimkd_ray.cli.training import run  # imported only once the command line is known to be good
        with console.phase(config.recipe, said=False):
            run(config)
        return 0

    return guarded(program, work, "the same command goes on from the last checkpoint")


def wait_asleep() -> None:
    """Let threads of torch sleep while they wait long for each other, unless the user has said otherwise. Call before
    torch is imported. By default they keep their cores busy for milliseconds, and where another program runs on one of
    these, a network is many times as slow as with a single thread; those that sleep at once are half as fast on a
    quiet machine (benchmarks/threads.py). Processes of a Ray started here inherit it."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def guarded(program: str, work: Callable[[], int], interrupted: str) -> int:
    """Return the status of ``work()``, or that of its error, which is printed as one line. `interrupted` is the message
    for Ctrl-C, and for a SIGTERM that is not handled as a request to save."""
    came: list[int] = []

    def on_sigterm(number: int, _: object) -> None:
        came.append(number)
        sys.exit(number)  # as `ray.init` has it; `ray.get` makes a status of 1 of it

    try:
        with handled({signal.SIGTERM: on_sigterm}):
            status = work()
            sys.stdout.flush()
            return status
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return 128 + signal.SIGPIPE
    except UserError as error:
        return fail(f"{program}: {error}", 2)
    except (DamagedDataError, NonFiniteLossError, storage.StorageError) as error:
        return fail(f"{program}: {error}", 1)
    except RuntimeError as error:
        if LOST_LOADER not in str(error):
            raise
        return fail(
            f"{program}: {str(error).strip(' .')}: a process that reads images ended, mostly because the system killed "
            "it for its memory (dmesg says so): free some, or pass --data.loader-workers with fewer; the same command "
            "goes on from what is finished",
            1,
        )
    except Interrupted as error:
        return fail(f"{program}: {error}; the same command goes on from there", 3)
    except KeyboardInterrupt:
        return fail(f"{program}: interrupted; {interrupted}", 130)
    except SystemExit as left:
        if came or left.code == signal.SIGTERM:
            return fail(f"{program}: asked to stop; {interrupted}", 3)
        if left.code == 0:  # Ray's handler of Ctrl-C
            return fail(f"{program}: interrupted; {interrupted}", 130)
        if left.code == 2:  # tyro has printed the fault of the command line
            return 2
        raise


def _nobody_reads() -> bool:
    """Return whether what read standard output has gone, such as `| head`. What is printed from then on is lost."""
    output, reader = sys.stdout.fileno(), select.poll()
    reader.register(output, 0)
    if not any(event & select.POLLERR for _, event in reader.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)  # Python flushes once more at its end
    return True


def fail(text: str, status: int) -> int:
    """Print an error as one line on standard error; return the exit status."""
    print(" ".join(scrubbed(text).split()), file=sys.stderr, flush=True)
    return status


def parse(recipes: Mapping[str, Callable[[], C]], default: str, argv: Sequence[str], program: str) -> C | None:
    """Return the config of a command line; None if it only requested a printout."""
    arguments = list(argv)
    name = default
    if arguments and not arguments[0].startswith("-"):
        name = arguments.pop(0)
        if name not in recipes:
            raise UserError(f"unknown recipe {name!r}{nearest(name, recipes)} (recipes: {', '.join(recipes)})")
    only_print = "--print-config" in arguments
    arguments = [argument for argument in arguments if argument != "--print-config"]
    base = recipes[name]()
    if "--config" in arguments:
        at = arguments.index("--config")
        if at + 1 == len(arguments):
            raise UserError("--config needs a JSON, YAML or TOML file, such as a run's config.json")
        base = read_config(arguments[at + 1], type(base))
        del arguments[at : at + 2]
    # Without flags tyro, whose import and reading of all fields take longer than all else here, is left out.
    config = override(base, arguments, program, recipes) if arguments else base
    if config is not None and only_print:
        print(json.dumps(to_dict(config), indent=2))
        return None
    return config


def read_config(path: str, kind: type[C]) -> C:
    """Return a config from a JSON file (path or URL), or by its ending a YAML or TOML file."""
    path = storage.absolute(path)
    if not storage.exists(path):
        raise UserError(f"--config {path}: there is no such file")
    try:
        text = storage.read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path} is no text: {error}") from None
    except IsADirectoryError:
        raise UserError(f"--config {path} is a folder: give the file, such as {path}/config.json") from None
    kind_of_file, value = _parsed(path, text)
    if not isinstance(value, dict):
        raise UserError(f"--config {path} is {kind_of_file} of a {type(value).__name__}, not of sections and fields")
    return from_dict(kind, value)


def _parsed(path: str, text: str) -> tuple[str, Any]:
    ending = path.rpartition(".")[2].lower()
    kind = {"yml": "YAML", "yaml": "YAML", "toml": "TOML"}.get(ending, "JSON")
    try:
        if kind == "YAML":
            import yaml

            try:
                return kind, yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(error) from None
        return kind, tomllib.loads(text) if kind == "TOML" else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--config {path} is not {kind}: {' '.join(str(error).split())}") from None


def override(base: C, arguments: list[str], program: str, recipes: Mapping[str, Callable[[], Any]]) -> C | None:
    """Apply ``--field.path value`` pairs to a config; return None after tyro's --help."""
    head = _describe(program, recipes)
    page = short_help(base, head)
    return from_flags(type(base), arguments, page, prog=program, description=head, default=base)


def from_flags(kind: type[T], arguments: Sequence[str], page: str = "", **options: Any) -> T | None:
    """Return a dataclass made from a command line, with tyro's ``options``; None after --help, which prints all fields,
    or the ``page``, if there is one: --help-all then prints all.

    Raises SystemExit(2) for an unknown flag or a value of the wrong type, after tyro has printed its message.
    """
    arguments = list(arguments)
    if page and {"--help", "-h"} & {*arguments}:
        print(page)
        return None
    import tyro

    if page:
        arguments = ["--help" if argument == "--help-all" else argument for argument in arguments]
    if "--verbose" in arguments:
        at = arguments.index("--verbose")
        value = [word for word in arguments[at + 1 : at + 2] if word in ("true", "false")]
        name = "--verbose" if hasattr(kind, "verbose") else "--launch.verbose"
        arguments[at : at + 1 + len(value)] = [name, *(value or ["true"])]
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def either_way(info: Any) -> Any:
        """tyro spells truth values True and False; users type true and false."""
        if info.type is not bool:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="{true,false}",
            instance_from_str=lambda words: words[0].lower() == "true",
            choices=("true", "false", "True", "False"),
            is_instance=lambda value: isinstance(value, bool),
            str_from_instance=lambda value: [str(value).lower()],
        )

    # Without credentials: tyro shows the arguments that it does not understand.
    arguments = list(map(_hidden, arguments))
    try:
        return tyro.cli(kind, args=arguments, config=(tyro.conf.FlagConversionOff,), registry=registry, **options)
    except SystemExit as stop:
        if stop.code:
            raise
        return None


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace | None:
    """Return the options of a command line; None after --help, which argparse ends by SystemExit(0)."""
    try:
        return parser.parse_args(argv)
    except SystemExit as stop:
        if stop.code:
            raise
        return None


def _hidden(argument: str) -> str:
    """An argument without the credentials of a URL in it: `URL`, or `--flag=URL`."""
    flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return flag + equals + redacted(value)


def _describe(program: str, recipes: Mapping[str, Callable[[], Any]]) -> str:
    """Return the head of the help: the arguments before the flags, and the recipes."""
    lines = (f"  {name}: {(recipe.__doc__ or '').strip().splitlines()[0]}" for name, recipe in recipes.items())
    return f"{program} [RECIPE] [--config FILE] [--print-config] [flags]\n\nRecipes:\n" + "\n".join(lines)
