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
    about = (
        "Draws one head's attention by blocks beside the blocks that each method takes. AdaSpa "
        "searches on the very q and k that it is judged on."
    )
    options = parse(Inspect, "inspect", argv, about)
    with refusing("pasa-jax inspect"):
        card, policies, step, curve, options_of_run = _inspection_job(options)
    from pasa_jax.recall import Shown, head_told, judge_each, write_inspection
    from pasa_jax.recording import record

    pipeline = load("inspect", card)
    steps, mean = options_of_run["steps"], None if curve is None else curve.mean
    where = dict(layer=options.layer, step=step, seed=options.seed)
    with refusing("pasa-jax inspect", OSError):
        recording = record(pipeline, options.prompts[0], **where, **options_of_run)
        judged, failures = judge_each(policies, recording, steps=steps, **where, curve=mean)
        if not judged:
            raise ValueError(f"no method could be judged: {failures}")
        shown = {name: Shown.of(policies[name], one, steps, mean) for name, one in judged.items()}
        where = dict(head=options.head, step=step, failures=failures)
        write_inspection(options.out, recording, shown, **where)
    for name in policies:
        known = name in shown
        told = head_told(shown[name], options.head) if known else f"failed: {failures[name]}"
        print(f"{name}: {told}")
    print(f"wrote {options.out}")


def _inspection_job(options: Inspect) -> tuple[Any, dict[str, Any], int, Any, dict[str, Any]]:
    """Card, policies, step, curve, and the options of the run that is recorded."""
    from pasa_jax.settings import check_policy, check_seeds, read_card
    from pasa_jax.video import STILL_SUFFIXES, check_target

    if len(options.prompts) != 1:
        raise ValueError(f"prompts={options.prompts} must be one")
    card = read_card(options.model)
    settings = options.settings(card)
    check_seeds([options.seed])
    check_target(options.out, STILL_SUFFIXES)
    for name, end in (("layer", card.config.num_layers), ("head", card.config.num_heads)):
        if not 0 <= (value := getattr(options, name)) < end:
            raise ValueError(f"{name}={value} must be from 0 to {end - 1}")
    states, negative = texts(options, card, settings)
    curve = None if options.curve is None else read_curve(options.curve)
    policies = named_policies(options, card.block(settings), "inspect")
    for policy in policies.values():
        check_policy(policy, card, settings, curve if policy.reads_curve else None)
    step = _step(options.step, policies, settings.steps)
    run = dict(states=states, negative_states=negative, progress=options.progress)
    run |= dict(negative_prompt=options.negative_prompt, **dataclasses.asdict(settings))
    return card, policies, step, curve, run


def _step(step: int | None, policies: dict[str, Any], steps: int) -> int:
    """The step that is asked for, or the middle one, if any method runs its plan there."""
    from pasa_jax.recall import planned_steps

    step = steps // 2 if step is None else step
    planned = {i for policy in policies.values() for i in planned_steps(policy, steps)}
    if step not in planned:
        runs = f"{min(planned)} to {max(planned)}" if planned else f"none of {steps}"
        raise ValueError(f"{step=} must be one that a method runs sparse: {runs}")
    return step
