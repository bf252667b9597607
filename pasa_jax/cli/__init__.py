"""The command `pasa-jax`: arguments → the functions of the package, a file a command.

jax and the models are imported inside the commands: --help answers at once.
"""

import sys
from collections.abc import Callable

from pasa_jax.cli import (
    bench,
    calibrate,
    check,
    compare,
    convert,
    generate,
    inspect,
    machine,
    search,
)
from pasa_jax.cli.parsing import choices, refusing, usage

COMMANDS = {
    "generate": (generate.generate, "make videos from prompts"),
    "calibrate": (
        calibrate.calibrate,
        "record the velocity curve that shares PASA's budget over the steps",
    ),
    "search": (
        search.search,
        "search compact, paro or sparse_vdit: find what a model's heads need, for --masks",
    ),
    "convert": (convert.convert, "turn a PyTorch checkpoint of Wan into one of Flax"),
    "compare": (
        compare.compare,
        "set methods side by side: videos, figures and curves on one page",
    ),
    "inspect": (
        inspect.inspect,
        "draw where one layer's attention lies, and which blocks methods take",
    ),
    "check": (
        check.check,
        "count what tiny's videos get right, under dense attention, PISA and PASA",
    ),
    "bench": (
        bench.bench,
        "time attention or methods against dense, or measure what methods' blocks hold",
    ),
    "tune": (
        machine.tune,
        "measure which options of a kernel are best on this machine, and keep them",
    ),
    "info": (machine.info, "say which kernels run on this machine, and why others do not"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program's name; None takes the process's own.

    Returns:
        Exit code: 0; after one line on stderr 2 when the input was refused, and 130 when Ctrl-C
        ended the work.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        about = "Videos from prompts by sparse attention, in JAX."
        print(usage("pasa-jax", "COMMAND", about, COMMANDS))
        return 0
    try:
        with refusing(" ".join(["pasa-jax", *argv[:1]])):
            run = _command(argv[0])
        run(argv[1:])
    except SystemExit as end:
        return int(end.code or 0)
    except KeyboardInterrupt:
        print(f"pasa-jax {argv[0]}: interrupted", file=sys.stderr)
        return 130
    return 0


def _command(name: str) -> Callable[[list[str]], None]:
    if name not in COMMANDS:
        raise ValueError(f"command={name!r} must be one of {choices(name, list(COMMANDS))}")
    return COMMANDS[name][0]
