"""Common parts of all commands: dataclass -> command line and TOML -> dataclass, and one-line errors with exit code
2."""

import contextlib
import io
import math
import os
import re
import sys
import tomllib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from mde_dist.utils.console import alone, lasting, own_rank, say
from mde_dist.utils.errors import OtherRankError, RankError, UserError
from mde_dist.utils.io import decode_text
from mde_dist.utils.paths import expanded, local_path
from mde_dist.utils.renamed import check_names
from mde_dist.utils.urls import without_keys

T = TypeVar("T")

_LARGEST = 1e30  # of what becomes float32
_MOST = 10**15  # of what is counted: products of it with a few others have room in 64 bits


def _size_from(text: list[str]) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text[0])
    if not match or not (1 <= int(match[1]) <= 8192 and 1 <= int(match[2]) <= 8192):
        raise ValueError(f"{text[0]!r} is not a size; write HEIGHTxWIDTH in pixels, for example 240x320")
    return int(match[1]), int(match[2])


def _part_from(text: list[str]) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text[0])
    if not match or not int(match[1]) < int(match[2]):
        raise ValueError(f"{text[0]!r} is not a part; write K/N with K from 0 to N-1, for example 0/8")
    return int(match[1]), int(match[2])


def _pair(metavar: str, read: Callable[[list[str]], tuple[int, int]], sign: str) -> Any:
    """Two numbers that are one word on the command line."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, tuple) and len(value) == 2,
        str_from_instance=lambda pair: [f"{pair[0]}{sign}{pair[1]}"],
    )


Size = Annotated[tuple[int, int], _pair("HxW", _size_from, "x")]
"""Height and width in pixels; written `240x320` on the command line and in TOML."""
Part = Annotated[tuple[int, int], _pair("K/N", _part_from, "/")]
"""Part K of N, from 0; written `0/8`."""
RUN_DIR = tyro.conf.arg(aliases=("--run-dir",))
"""A second name of `--run`: torchrun's own parser looks through all that follows its module, takes `--run` for an
abbreviation of its `--run-path`, and refuses it."""


def option(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    resumable: bool = False,
    local: bool = False,
) -> Any:
    """A field of a config, with what is known of it beside its default.

    `low`, `high`: bounds of its numbers, both allowed; `resumable`: it may change when a run is resumed; `local`: a
    path, which may differ over the ranks.
    """
    bounds = {name: bound for name, bound in (("low", low), ("high", high)) if bound is not None}
    return field(default=default, metadata={**bounds, "resumable": resumable, "local": local})


def _path(metavar: str, kind: type, read: Callable[[str], Any]) -> Any:
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda text: read(text[0]),
        is_instance=lambda value: isinstance(value, kind),
        str_from_instance=lambda value: [str(value)],
    )


Place = Annotated[str, _path("DIR|URL", str, expanded)]
"""A directory; or a URL, which is not expanded."""
Weights = Annotated[str, _path("none|imagenet|FILE", str, expanded)]
LatePath = Annotated[Path, _path("PATH", Path, lambda text: Path(expanded(text, home=False)))]
"""A path whose `~` is left for where it is opened: whoever goes on with a run has another home, or none."""

_registry = tyro.constructors.ConstructorRegistry()
_registry.primitive_rule(lambda info: _path("PATH", Path, local_path) if info.type is Path else None)


def run_command(main: Callable[[list[str]], None], logged: bool = False) -> None:
    """Run a command's `main(argv)` and turn a UserError into one line on stderr and exit code 2.

    Every rank of a node meets the same mistakes in config and data, so only the first one of it speaks; once all have
    joined, so does rank 0 alone (see `processes`). A RankError names its rank, and where one rank stops the others,
    they keep silent. With `--debug` the traceback is shown as well. What nobody expects has its traceback, and on
    several ranks a line that names the rank.

    A command goes on to its end when its output is lost: the pipe's reader or the terminal is gone, the disk is full.
    After a full disk the exit code is 2, unless all that matters is `logged` elsewhere.
    """
    (sys.stdout, output), (sys.stderr, _) = lasting(sys.stdout), lasting(sys.stderr)
    code = _run(main)
    sys.stdout.flush()
    if not code and output is not None and output.lost is not None and not logged:
        say(f"error: what was printed is not whole: {output.lost.strerror}", file=sys.stderr)
        code = 2
    if code:
        sys.exit(code)


def read_alone(read: Callable[[], T], otherwise: T) -> tuple[T, Exception | None]:
    """Read what a rank needs before it can join -> that, or `otherwise` and the error, which `init_distributed` tells.

    A lone process raises at once.
    """
    try:
        return read(), None
    except Exception as error:
        if alone():
            raise
        return otherwise, error


def _run(main: Callable[[list[str]], None]) -> str | int | None:
    """-> the exit code."""
    argv, rank = sys.argv[1:], os.environ.get("RANK")
    sys.argv[1:] = map(without_keys, argv)  # trackers note down what stands there
    try:
        main(argv)
    except UserError as error:
        if "--debug" in argv:
            raise
        if isinstance(error, OtherRankError):
            return 2
        if own_rank("LOCAL_RANK") == 0 or isinstance(error, RankError):
            if error.__cause__ is not None:
                traceback.print_exception(error.__cause__)
            where = f" (rank {rank})" if rank is not None and isinstance(error, RankError) else ""
            say(f"error{where}: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if alone():
            raise
        traceback.print_exc()
        say(f"error (rank {rank}): {type(error).__name__}: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("interrupted", file=sys.stderr)
        return 130
    except SystemExit as stop:
        return stop.code
    return 0


def _one_line(error: Exception) -> str:
    return re.sub(r"\s*\n\s*", " ", str(error).strip())  # other blanks may be part of a path


def parse(kind: type[T], argv: Sequence[str], prog: str) -> T:
    """Dataclass defaults <- the TOML file of `--config FILE` <- `--section.field value`. Raises UserError.

    The dataclass's docstrings are the help text. A file's keys go the way of the command line, so that both accept the
    same names and values. Paths are expanded, see `paths.py`; numbers have an end, see `check_bounds`.
    """
    rest, file = _take_config(list(argv))
    if not any(item.name == "debug" for item in fields(kind)):  # type: ignore[arg-type]
        rest = [argument for argument in rest if argument != "--debug"]  # `run_command` answers to it
    default: Any = tyro.MISSING_NONPROP
    if file is not None:
        default = _call(kind, toml_arguments(file), prog, f"{file}: ", default)
    return check_bounds(_call(kind, rest, prog, "", default))


def toml_arguments(path: Path) -> list[str]:
    """A TOML file as command-line arguments. Raises UserError."""
    try:
        return list(arguments_of(tomllib.loads(decode_text(path.read_bytes()))))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not TOML: {error}") from None


def arguments_of(table: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Convert the values of a TOML file to command-line arguments."""
    for key, value in table.items():
        name = key.replace("_", "-")
        if isinstance(value, dict):
            yield from arguments_of(value, f"{prefix}{name}.")
        elif isinstance(value, bool):
            yield f"--{prefix}{'' if value else 'no-'}{name}"
        else:
            yield from (f"--{prefix}{name}", *map(str, value if isinstance(value, list) else [value]))


def options_of(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """(`section.field`, value, metadata as `option` gives it) of every field."""
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from options_of(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value, item.metadata


def flatten(config: Any) -> Iterator[tuple[str, Any]]:
    """(`section.field`, value) of every field."""
    return ((name, value) for name, value, _ in options_of(config))


def words_of(config: Any) -> Iterator[str | Path]:
    """The options that a config without sections differs from its defaults by, as words; a Path stays one."""
    for item in fields(config):
        value, name = getattr(config, item.name), item.name.replace("_", "-")
        if value == item.default:
            continue
        if isinstance(value, bool):
            yield f"--{'' if value else 'no-'}{name}"
        elif isinstance(value, tuple):
            yield from (f"--{name}", *(("x".join(map(str, value)),) if isinstance(value[0], int) else value))
        else:
            yield from (f"--{name}", value if isinstance(value, Path) else str(value))


def check_bounds(config: T) -> T:
    """The config, in which each number lies in the bounds of its field, and has room in float32 or 64 bits.

    Raises UserError.
    """
    for name, value, about in options_of(config):
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float):
                most = _LARGEST if isinstance(number, float) else _MOST
                _check(name, number, about.get("low", -most), about.get("high", most))
    return config


def _check(name: str, number: float, low: float, high: float) -> None:
    if not low <= number <= high:  # false for nan, too
        limits = f"{low:g} to {high:g}"
        if high >= 1000 and not math.isnan(number):  # an end that hardly anybody comes near
            limits = f"at least {low:g}" if number < low else f"at most {high:g}"
        said = f"{name} = {number}" if "." in name else f"--{name.replace('_', '-')} {number}"
        raise UserError(f"{said}: must be {limits}")


def _take_config(argv: list[str]) -> tuple[list[str], Path | None]:
    for index, argument in enumerate(argv):
        if argument == "--config" and index + 1 < len(argv):
            return argv[:index] + argv[index + 2 :], local_path(argv[index + 1])
        if argument.startswith("--config="):
            return argv[:index] + argv[index + 1 :], local_path(argument.removeprefix("--config="))
    return argv, None


def _call(kind: type[T], arguments: list[str], prog: str, where: str, default: Any) -> T:
    """tyro, with its boxed message folded into one line."""
    complaint = io.StringIO()
    try:
        check_names(arguments)
        with contextlib.redirect_stderr(complaint), _registry:
            return tyro.cli(kind, args=arguments, prog=prog, default=default)
    except UserError as error:  # of a name or a path
        raise UserError(f"{where}{error}") from None
    except SystemExit as stop:
        if stop.code in (0, None):  # --help was printed
            raise
    lines = [line.strip("│╭╮╰╯ ") for line in complaint.getvalue().splitlines()]
    words = [line for line in lines if line.strip("─ ") and not re.search(r"─{3}|full helptext|helptext:", line)]
    said = without_keys(re.sub(r"\s+", " ", " ".join(words)))  # it quotes what was given
    raise UserError(f"{where}{said} (all options: {prog} --help)")
