"""pasa-jax bench attention, bench recall."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from pasa_jax.cli.methods import Methods, worded_policy
from pasa_jax.cli.options import load
from pasa_jax.cli.parsing import call, parse, refusing


def bench(argv: list[str]) -> None:
    """pasa-jax bench attention: seconds; pasa-jax bench recall: what methods' blocks hold."""
    benches = {"attention": _bench_attention, "recall": _bench_recall}
    with refusing("pasa-jax bench"):
        what = argv[0] if argv else ""
        if what not in benches:
            raise ValueError(f"{what!r} must be {' or '.join(benches)}: pasa-jax bench attention")
    benches[what](argv[1:])


def _bench_attention(argv: list[str]) -> None:
    from pasa_jax.bench import bench_attention

    call(bench_attention, "bench attention", argv, "Times sparse against dense attention.")


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
    about = "Measures recall and error of methods on recorded and planted attention."
    options = parse(Recall, "bench recall", argv, about)
    with refusing("pasa-jax bench recall"):
        target = _recall_target(options)
        families = {}
        for words in options.policies:
            each = [Methods(density=density, block=options.block) for density in options.density]
            families[words] = [worded_policy(words, one, options.block) for one in each]
    from pasa_jax.grid import TokenGrid
    from pasa_jax.info import machine
    from pasa_jax.recall import plot_recall, recall_curves
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
            f"error {np.mean(row['error']):.3f}"
        )
        print(f"{row['recording']}, {row['method']}: {told}")
    print(f"wrote {target}")


def _recall_target(options: Recall) -> Path:
    from pasa_jax.video import check_target

    if not options.policies or not options.density:
        raise ValueError(f"policies={options.policies} and density={options.density} must not lack")
    return check_target(options.out, (".json",))
