"""pasa-jax check."""

import dataclasses
import itertools
from typing import Annotated, Any

import numpy as np
import tyro

from pasa_jax.cli.options import Sampling, load
from pasa_jax.cli.parsing import parse, refusing


@dataclasses.dataclass(frozen=True)
class Check(Sampling):
    """Options of `pasa-jax check`.

    Attributes:
        prompts: how many; made from tiny's words, the same ones for every method.
        policies: methods to compare.
        density: exact share of the key blocks, for PISA and PASA.
        dense_prefix: share of the steps that run dense first, for PISA and PASA.
        batch: videos sampled together.
        seed: of the prompts, and of the first video; the others count on.
    """

    prompts: int = 160
    policies: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = (
        "dense",
        "pisa",
        "pasa",
    )
    density: float = 0.15
    dense_prefix: float = 0.2
    batch: int = 8
    seed: int = 0


def check(argv: list[str]) -> None:
    """pasa-jax check: tables of what tiny's videos get right."""
    about = "Samples videos of random prompts and counts what they get right, by method."
    options = parse(Check, "check", argv, about)
    with refusing("pasa-jax check"):
        card, settings, policies = _check_job(options)
    from pasa_jax.models.tiny import check as tiny_check

    pipeline, asked = load("check", card), tiny_check.prompts(options.prompts, options.seed)
    for policy in policies:
        seeds = itertools.count(options.seed)
        results = []

        def videos(prompts, policy=policy, seeds=seeds, results=results):
            result = pipeline.generate(
                prompts,
                policy=policy,
                seeds=list(itertools.islice(seeds, len(prompts))),
                negative_prompt=options.negative_prompt,
                progress=options.progress,
                **dataclasses.asdict(settings),
            )
            results.append(result)
            return result.frames / np.float32(255)

        title = f"{type(policy).__name__}: {len(asked)} prompts, {settings.steps} steps"
        print(tiny_check.check(videos, asked, batch=options.batch, title=title))
        seconds = np.median(np.concatenate([r.seconds / len(r.prompts) for r in results]))
        density = results[0].densities.mean()
        print(f"\nmean density {density:.3f}, {seconds:.3f} s a step and video\n")


def _check_job(options: Check) -> tuple[Any, Any, list[Any]]:
    """Card, settings and policies of a check."""
    from pasa_jax.models.tiny.text import word_ids
    from pasa_jax.policies import make_policy
    from pasa_jax.settings import check_seeds, read_card

    for name in ("prompts", "batch"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name}={getattr(options, name)} must be at least 1")
    check_seeds([options.seed])
    if not options.policies:
        raise ValueError(f"policies={options.policies} must name at least one")
    if options.negative_states is not None:
        raise ValueError("negative_states must be left out: the check writes prompts in words")
    card = read_card(options.model)
    settings = options.settings(card)
    if not card.scenes:
        raise ValueError(f"model={options.model!r} must be tiny: the check reads tiny's scenes")
    word_ids(options.negative_prompt)
    if settings.frames < 8:
        raise ValueError(f"frames={settings.frames} must be at least 8 to tell motion")
    block = card.block(settings)
    sparse = {"density": options.density, "dense_prefix": options.dense_prefix}
    policies = [
        make_policy(name, block_q=block, block_kv=block, **({} if name == "dense" else sparse))
        for name in options.policies
    ]
    return card, settings, policies
