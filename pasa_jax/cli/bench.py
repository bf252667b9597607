"""pasa-jax bench attention, bench methods, bench recall."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from pasa_jax.cli.methods import Methods, worded_policies
from pasa_jax.cli.options import load
from pasa_jax.cli.parsing import call, of, parse, refusing, run_kind


def bench(argv: list[str]) -> None:
    """pasa-jax bench attention, methods: seconds; bench recall: what methods' blocks hold."""
    kinds = {
        "attention": (_bench_attention, "time sparse against dense attention"),
        "methods": (_bench_methods, "time one layer under any methods, and their planning"),
        "recall": (_bench_recall, "recall and error of methods over densities"),
    }
    run_kind("bench", "Measures attention and methods on this machine.", kinds, argv)


def _bench_attention(argv: list[str]) -> None:
    from pasa_jax.bench import bench_attention

    call(bench_attention, "bench attention", argv, "Times sparse against dense attention.")


@dataclasses.dataclass(frozen=True)
class BenchMethods:
    """Options of `pasa-jax bench methods`.

    Attributes:
        policies: methods, each in quotes with options of its own, as "pasa --noise none".
        shape: a model's, as wan14b-720p, in place of grid, heads and head-dim.
        grid: frames, rows and columns of the video's tokens.
        heads: attention heads.
        head_dim: channels of a head.
        density: exact share of the key blocks, where a method's own options do not say.
        block: tokens of a block.
        dtype: of q, k and v: float32, bfloat16 or float16.
        repeats: timed rounds, each of which runs everything once.
        output: write the result to this JSON file.
    """

    policies: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ("pasa", "pisa")
    shape: Annotated[str | None, of("NAME")] = None
    grid: tuple[int, int, int] = (16, 32, 32)
    heads: int = 4
    head_dim: int = 64
    density: float = 0.15
    block: int = 64
    dtype: str = "float32"
    repeats: int = 7
    output: Annotated[Path | None, of("FILE")] = None


def _bench_methods(argv: list[str]) -> None:
    """One layer's call of any method beside dense attention."""
    about = "Times one layer's attention under any methods, with what planning takes of it."
    options = parse(BenchMethods, "bench methods", argv, about)
    with refusing("pasa-jax bench methods", OSError):
        from pasa_jax.bench_methods import bench_methods, table, write_rows

        policies, asked = _methods_asked(options)
        rows = bench_methods(policies, repeats=options.repeats, **asked)
        print(table(rows))
        if options.output is not None:
            shown = {**asked, "grid": dataclasses.asdict(asked["grid"]), "repeats": options.repeats}
            write_rows(options.output, rows, shown)


def _methods_asked(options: BenchMethods) -> tuple[dict[str, Any], dict[str, Any]]:
    """The policies, and grid, heads, head_dim and dtype."""
    from pasa_jax.bench import SHAPES
    from pasa_jax.grid import TokenGrid
    from pasa_jax.video import check_target

    if options.output is not None:
        check_target(options.output, (".json",))
    if options.shape is not None and options.shape not in SHAPES:
        raise ValueError(f"shape={options.shape!r} must be one of {', '.join(SHAPES)}")
    grid, heads, head_dim = TokenGrid(*options.grid), options.heads, options.head_dim
    if options.shape is not None:
        grid, heads, head_dim = SHAPES[options.shape]
    for name, value in (("heads", heads), ("head_dim", head_dim), ("repeats", options.repeats)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if options.dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={options.dtype!r} must be float32, bfloat16 or float16")
    shared = Methods(policies=options.policies, density=options.density, block=options.block)
    policies = worded_policies(shared, options.block, "bench methods")
    return policies, dict(grid=grid, heads=heads, head_dim=head_dim, dtype=options.dtype)


@dataclasses.dataclass(frozen=True)
class Recall:
    """Options of `pasa-jax bench recall`.

    Attributes:
        policies: methods, each in quotes with options of its own.
        density: exact shares of the key blocks.
        block: tokens of a block.
        out: JSON file; a plot is written beside it as .png.
    """

    policies: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ("pasa", "pisa")
    density: Annotated[tuple[float, ...], tyro.conf.arg(metavar="FLOAT ...")] = (0.1, 0.2, 0.4)
    block: int = 16
    out: Path = Path("recall.json")


def _bench_recall(argv: list[str]) -> None:
    """Recall and error against density, on attention of tiny and on planted heads."""
    about = (
        "Measures recall and error of methods on attention of tiny and of a Wan of random weights "
        "with planted heads. AdaSpa searches on the very q and k that it is judged on."
    )
    options = parse(Recall, "bench recall", argv, about)
    with refusing("pasa-jax bench recall"):
        target = _recall_target(options)
        shared = Methods(policies=options.policies, block=options.block)
        at = [dataclasses.replace(shared, density=density) for density in options.density]
        each = [worded_policies(one, options.block, "bench recall") for one in at]
        families = {words: [one[words] for one in each] for words in options.policies}
    from pasa_jax.grid import TokenGrid
    from pasa_jax.info import machine
    from pasa_jax.recall import ORACLE, plot_recall, recall_curves
    from pasa_jax.recording import planted, record
    from pasa_jax.settings import read_card
    from pasa_jax.video import atomic

    pipeline = load("bench recall", read_card("tiny"))
    prompt = "a red circle moving right on a green background"
    places = [(1, 5), (2, 10), (3, 15)]
    recordings = [record(pipeline, prompt, layer=n, step=i, progress=False) for n, i in places]
    recordings.append(planted(TokenGrid(4, 16, 16)))
    rows = recall_curves(recordings, families)
    with atomic(target) as temporary:
        content = {**machine(), "prompt": prompt, "rows": rows}
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    plot_recall(target.with_suffix(".png"), rows)
    for row in rows:
        told = row.get("failure") or (
            f"density {row['density']:.3f}, recall {np.mean(row['recall']):.3f}, "
            f"error {np.mean(row['error']):.3f}" + (f" ({ORACLE})" if row["oracle"] else "")
        )
        print(f"{row['recording']}, {row['method']}: {told}")
    print(f"wrote {target}")


def _recall_target(options: Recall) -> Path:
    from pasa_jax.video import check_target

    if not options.density:
        raise ValueError(f"density={options.density} must hold at least one")
    return check_target(options.out, (".json",))
