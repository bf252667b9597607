"""Arguments → options, and refusals in one line."""

import contextlib
import dataclasses
import difflib
import functools
import io
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tyro


@contextlib.contextmanager
def refusing(who: str, *more: type[Exception]) -> Iterator[None]:
    """Turns a refused input into one line on stderr and exit code 2."""
    try:
        yield
    except (ValueError, *more) as error:
        print(f"{who}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def parse(options: Any, name: str, argv: list[str], about: str, default: Any = None) -> Any:
    """The options filled from arguments; what tyro refuses is said in one line."""
    told, more = io.StringIO(), {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(options, prog=f"pasa-jax {name}", description=about, args=argv, **more)
    except SystemExit as end:
        if end.code:
            print(f"pasa-jax {name}: {_one_line(told.getvalue())}", file=sys.stderr)
        raise


def _one_line(box: str) -> str:
    """The first paragraph of tyro's boxed message, and its proposal where it has one."""
    # Frames and rules are drawn with what the terminal has; the first line is a title.
    lines = [line.strip(" │|╭╮╰╯+") for line in box.splitlines()][1:]
    paragraphs = itertools.groupby(lines, key=lambda line: bool(line.strip("─- ")))
    first = " ".join(next(words for some, words in paragraphs if some))
    kind = re.match(
        r"Error parsing (\S+): no type matching \{None\}\|(\w+) .* from \['(.*)'\]", first
    )
    if kind:
        return f"{kind[1]}={kind[3]!r} must be of type {kind[2]}"
    meant = re.search(r"Perhaps you meant:\n\s*(--[\w-]+)", "\n".join(lines))
    return first + (f"; nearest is {meant[1]}" if meant else "")


def choices(value: str, valid: list[str]) -> str:
    """The valid words, and the one that was probably meant."""
    near = difflib.get_close_matches(value, valid, 1)
    return ", ".join(valid) + (f"; nearest is {near[0]!r}" if near else "")


def usage(name: str, word: str, about: str, kinds: dict[str, tuple[Any, str]]) -> str:
    """The --help of a name that a word of several kinds stands behind."""
    lines = [f"  {kind:<12} {text}" for kind, (_, text) in kinds.items()]
    tail = f"\nOptions of a {word.lower()}: {name} {word} --help"
    return "\n".join([f"usage: {name} {word} [OPTIONS]\n\n{about}\n", *lines, tail])


def run_kind(
    name: str,
    about: str,
    kinds: dict[str, tuple[Callable[[list[str]], None], str]],
    argv: list[str],
) -> None:
    """Runs what the first word of a command's arguments names."""
    what = argv[0] if argv else ""
    if what in ("-h", "--help"):
        print(usage(f"pasa-jax {name}", "KIND", about, kinds))
        return
    with refusing(f"pasa-jax {name}"):
        if what not in kinds:
            raise ValueError(f"{what!r} must be one of {choices(what, list(kinds))}")
    kinds[what][0](argv[1:])


def of(metavar: str, hint: str = "") -> Any:
    """How an option whose default is None shows in --help."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)


def nested(base: type, name: str, own: type) -> type:
    """Options with those of another dataclass, which stand in the field `name`."""
    field = (name, tyro.conf.OmitArgPrefixes[own], dataclasses.field(default_factory=own))
    doc = {"__doc__": base.__doc__}
    return dataclasses.make_dataclass("Options", [field], bases=(base,), namespace=doc, frozen=True)


def call(function: Callable[..., Any], name: str, argv: list[str], about: str) -> None:
    """Runs a function whose parameters are the command's options."""

    @functools.wraps(function)
    def order(*args, **options):
        return functools.partial(function, *args, **options)

    run = parse(order, name, argv, about)
    with refusing(f"pasa-jax {name}"):
        run()


def read_file(name: str, kind: Any, path: Path) -> Any:
    """What `kind.save` wrote; a file that cannot be read is told in one line."""
    try:
        return kind.load(path)
    except OSError as error:
        raise ValueError(f"{name}={str(path)!r} could not be read: {error.strerror}") from error
