"""pasa-jax search compact, paro, sparse_vdit."""

import dataclasses
from pathlib import Path
from typing import Annotated

from pasa_jax.cli.options import Recording, load, recording_order
from pasa_jax.cli.parsing import nested, of, parse, refusing, run_kind


@dataclasses.dataclass(frozen=True)
class Search(Recording):
    """Options of `pasa-jax search compact`.

    Attributes:
        prompts: to cover, others than those to be made, four or more; tiny has four of its own.
        out: JSON file. What is found stays in a folder beside it, ending in .parts, until the
            search is complete: the same command goes on after an interruption.
    """


@dataclasses.dataclass(frozen=True)
class SearchParo(Recording):
    """Options of `pasa-jax search paro`.

    Attributes:
        prompts: others than those to be made, one or two; tiny has two of its own.
        out: JSON file, written at the end: after an interruption the search starts anew.
    """


@dataclasses.dataclass(frozen=True)
class SearchPatterns(SearchParo):
    """Options of `pasa-jax search sparse_vdit`.

    Attributes:
        block: tokens of a block.
    """

    out: Path = Path("patterns.json")
    block: Annotated[int | None, of("INT", "(default: 16 below 4,096 tokens, else 64)")] = None


def search(argv: list[str]) -> None:
    """pasa-jax search: masks from dense sampling, for the policies that need them."""
    anew = "; starts anew after an interruption"
    kinds = {
        "compact": (_search_compact, "windows of each head; goes on after an interruption"),
        "paro": (_search_paro, "order of tokens and masks of each head" + anew),
        "sparse_vdit": (_search_patterns, "pattern of each head" + anew),
    }
    run_kind("search", "Finds what a model's heads need, for --masks.", kinds, argv)


def _search_patterns(argv: list[str]) -> None:
    """Sparse-vDiT's pattern of each head."""
    from pasa_jax import vdit_search

    about = "Chooses each head's pattern, by dense sampling."
    options_class = nested(SearchPatterns, "criterion", vdit_search.Criterion)
    options = parse(options_class, "search sparse_vdit", argv, about)
    with refusing("pasa-jax search sparse_vdit", OSError):
        order = recording_order(options, 2)
        patterns, _ = vdit_search.search_patterns(
            load("search sparse_vdit", order.card),
            order.prompts,
            criterion=options.criterion,
            block=options.block,
            **order.how,
        )
        patterns.save(options.out)
    print(f"wrote {options.out}: {patterns.prompts} prompts, density {patterns.density:.3f}")


def _search_paro(argv: list[str]) -> None:
    """PAROAttention's orders and masks."""
    from pasa_jax import paro_search

    about = "Chooses each head's order of tokens and its blocks, by dense sampling."
    options_class = nested(SearchParo, "criterion", paro_search.Criterion)
    options = parse(options_class, "search paro", argv, about)
    with refusing("pasa-jax search paro", OSError):
        order = recording_order(options, 2)
        paro_search.Search.start(order.card, order.settings, options.criterion)
        masks = paro_search.calibrate_paro(
            load("search paro", order.card),
            order.prompts,
            criterion=options.criterion,
            **order.how,
        )
        masks.save(options.out)
    heads, buckets = sum(map(len, masks.orders)), len(masks.starts)
    print(
        f"wrote {options.out}: {masks.prompts} prompts, density "
        f"{masks.counts.mean() / masks.shape[-1]:.3f}, {buckets} masks for each of {heads} heads"
    )


def _search_compact(argv: list[str]) -> None:
    """Compact Attention's masks."""
    from pasa_jax import compact_search

    about = "Searches the windows that each head needs, by dense sampling."
    options_class = nested(Search, "criterion", compact_search.Criterion)
    options = parse(options_class, "search compact", argv, about)
    with refusing("pasa-jax search compact", OSError):
        order = recording_order(options, 4)
        compact_search.Search.start(order.card, order.settings, options.criterion)
        parts = compact_search.Parts(options.out.with_suffix(".parts"))
        masks, recall = compact_search.search_masks(
            load("search compact", order.card),
            order.prompts,
            criterion=options.criterion,
            parts=parts,
            **order.how,
        )
        masks.save(options.out)
        parts.clear()
    print(
        f"wrote {options.out}: {masks.prompts} prompts, density {masks.density:.3f} in sparse "
        f"steps, recall of a prompt's own windows {recall.mean():.3f}, at least {recall.min():.3f}"
    )
