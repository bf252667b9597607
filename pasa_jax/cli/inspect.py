"""pasa-jax inspect."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from pasa_jax.cli.methods import Methods, named_policies
from pasa_jax.cli.options import Prompts, Sampling, load, read_curve, texts
from pasa_jax.cli.parsing import of, parse, refusing


@dataclasses.dataclass(frozen=True)
class Inspect(Methods, Sampling):
    """Options of `pasa-jax inspect`.

    Attributes:
        prompts: one, what to show.
        prompt_states: its text states, as in `pasa-jax generate`.
        seed: of the run.
        layer: whose attention is drawn.
        head: which of its heads.
        step: denoising step whose attention is drawn; the middle one by default.
        curve: velocity curve of `pasa-jax calibrate`, for PASA.
        out: .png; figures are written beside it as .json.
    """

    prompts: Prompts = ("blue and white waves moving left",)
    prompt_states: Annotated[tuple[Path, ...], of("FILE ...")] = ()
    seed: int = 0
    layer: int = 1
    head: int = 0
    step: Annotated[int | None, of("INT", "(default: the middle one)")] = None
    curve: Annotated[Path | None, of("FILE")] = None
    out: Path = Path("inspection.png")


def inspect(argv: list[str]) -> None:
    """pasa-jax inspect: attention mass and exact blocks of one layer, head and step."""
    about = "Draws one head's attention by blocks beside the blocks that each method takes."
    options = parse(Inspect, "inspect", argv, about)
    with refusing("pasa-jax inspect"):
        card, policies, curve, options_of_run = _inspection_job(options)
    from pasa_jax.recall import judge, write_inspection
    from pasa_jax.recording import record

    pipeline = load("inspect", card)
    steps, mean = options_of_run["steps"], None if curve is None else curve.mean
    step = steps // 2 if options.step is None else options.step
    where = dict(layer=options.layer, step=step, seed=options.seed)
    with refusing("pasa-jax inspect", OSError):
        recording = record(pipeline, options.prompts[0], **where, **options_of_run)
        judged = {
            name: judge(policy, recording, steps=steps, **where, curve=mean)
            for name, policy in policies.items()
        }
        budgets = {name: _densities(p, recording, steps, mean) for name, p in policies.items()}
        write_inspection(options.out, recording, judged, head=options.head, budgets=budgets)
    for name, one in judged.items():
        told = f"recall {one.recall[options.head]:.3f}, error {one.error[options.head]:.3f}"
        print(f"{name}: density {one.density:.3f}, {told}")
    print(f"wrote {options.out}")


def _inspection_job(options: Inspect) -> tuple[Any, dict[str, Any], Any, dict[str, Any]]:
    """Card, policies, curve, and the options of the run that is recorded."""
    from pasa_jax.settings import check_policy, check_seeds, read_card
    from pasa_jax.video import STILL_SUFFIXES, check_target

    if len(options.prompts) != 1:
        raise ValueError(f"prompts={options.prompts} must be one")
    card = read_card(options.model)
    settings = options.settings(card)
    check_seeds([options.seed])
    check_target(options.out, STILL_SUFFIXES)
    if not 0 <= options.head < card.config.num_heads:
        raise ValueError(f"head={options.head} must be from 0 to {card.config.num_heads - 1}")
    states, negative = texts(options, card, settings)
    curve = None if options.curve is None else read_curve(options.curve)
    policies = named_policies(options, card.block(settings))
    for policy in policies.values():
        check_policy(policy, card, settings, curve if policy.reads_curve else None)
    run = dict(states=states, negative_states=negative, progress=options.progress)
    run |= dict(negative_prompt=options.negative_prompt, **dataclasses.asdict(settings))
    return card, policies, curve, run


def _densities(policy: Any, recording: Any, steps: int, curve: Any) -> list[float]:
    """The budget of every step as a density."""
    blocks = recording.grid.num_blocks(policy.block_kv)
    budgets = policy.budgets(steps, blocks, curve if policy.reads_curve else None)
    return [float(budget) / blocks for budget in budgets]
