"""pasa-jax compare."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from pasa_jax.cli.methods import Methods, named_policies
from pasa_jax.cli.options import Caching, Prompts, Sampling, load, read_curve, texts
from pasa_jax.cli.parsing import of, parse, refusing


@dataclasses.dataclass(frozen=True)
class Compare(Methods, Caching, Sampling):
    """Options of `pasa-jax compare`.

    Attributes:
        prompts: what to show, each in quotes; tiny makes `count` of its own where none is given.
        prompt_states: text states of the prompts, as in `pasa-jax generate`.
        count: prompts made from tiny's words.
        seed: every prompt is sampled with each of these.
        curve: velocity curve of `pasa-jax calibrate`, for PASA.
        batch: clips sampled together.
        shown: clips on the page.
        out: folder, made where it is missing: index.html, comparison.json, comparison.csv.
    """

    prompts: Prompts = ()
    prompt_states: Annotated[tuple[Path, ...], of("FILE ...")] = ()
    count: int = 4
    seed: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT ...")] = (0,)
    curve: Annotated[Path | None, of("FILE")] = None
    batch: int = 4
    shown: int = 3
    out: Path = Path("comparison")


def compare(argv: list[str]) -> None:
    """pasa-jax compare: methods side by side over the same clips."""
    about = "Samples the same clips under dense attention and other methods, and measures them."
    options = parse(Compare, "compare", argv, about)
    with refusing("pasa-jax compare", OSError):
        job = _comparison_job(options)
        _make_folder(options.out)
    from pasa_jax.compare import compare as measure
    from pasa_jax.report import write_page

    pipeline = load("compare", job.pop("card"))
    with refusing("pasa-jax compare", OSError):
        found = measure(pipeline, folder=options.out, **job)
        page = write_page(options.out / "index.html", *found, fps=pipeline.card.fps)
    for name, method in found.comparison["methods"].items():
        print(f"{name}: {_summary(method)}")
    print(f"wrote {page}")


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out={str(out)!r} must be a folder: {error.strerror}") from error


def _summary(method: dict[str, Any]) -> str:
    """A method's main figures in a line."""
    if "failure" in method:
        return f"failed: {method['failure']}"
    from pasa_jax.report import density_told

    told, speedup = [f"density {density_told(method)}"], method["speedup"]
    told += [] if speedup is None else [f"{speedup:.2f}x as fast"]
    if method["cache"] is not None:
        told.append(f"{method['cache']['computed']} steps computed")
    for name, unit in (("psnr", "PSNR {:.2f} dB"), ("ssim", "SSIM {:.3f}")):
        value = method["metrics"][name]
        told += [] if value is None else [unit.format(value["mean"])]
    return ", ".join(told)


def _comparison_job(options: Compare) -> dict[str, Any]:
    """The checked arguments of `compare.compare`, and the card."""
    from pasa_jax.settings import check_policy, check_seeds, read_card

    card = read_card(options.model)
    settings = options.settings(card)
    check_seeds(list(options.seed))
    for name in ("prompts", "seed"):
        if len(set(values := getattr(options, name))) < len(values):
            raise ValueError(f"{name}={values} must differ, to hold clips apart")
    for name in ("batch", "count"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name}={getattr(options, name)} must be at least 1")
    if card.scenes and not options.prompts:
        from pasa_jax.models.tiny import check as tiny_check

        options = dataclasses.replace(options, prompts=tuple(tiny_check.prompts(options.count)))
    states, negative = texts(options, card, settings)
    curve = None if options.curve is None else read_curve(options.curve)
    policies = named_policies(options, card.block(settings), "compare")
    for policy in policies.values():
        check_policy(policy, card, settings, curve if policy.reads_curve else None)
    return dict(
        card=card,
        prompts=list(options.prompts),
        seeds=list(options.seed),
        policies=policies,
        # With one prefix, methods and dense skip the same steps.
        cache=options.step_cache(card, options.dense_prefix),
        batch=options.batch,
        shown=options.shown,
        states=states,
        negative_states=negative,
        negative_prompt=options.negative_prompt,
        curve=curve,
        progress=options.progress,
        **dataclasses.asdict(settings),
    )
