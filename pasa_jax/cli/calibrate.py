"""pasa-jax calibrate."""

import dataclasses
from pathlib import Path
from typing import Annotated

from pasa_jax.cli.options import Prompts, Sampling, load, recording_order
from pasa_jax.cli.parsing import of, parse, refusing


@dataclasses.dataclass(frozen=True)
class Calibrate(Sampling):
    """Options of `pasa-jax calibrate`.

    Attributes:
        prompts: to average over; tiny has ten of its own.
        prompt_states: text states of the prompts, as in `pasa-jax generate`.
        out: JSON file; a plot is written beside it as .png.
    """

    prompts: Prompts = ()
    prompt_states: Annotated[tuple[Path, ...], of("FILE ...")] = ()
    out: Path = Path("curve.json")


def calibrate(argv: list[str]) -> None:
    """pasa-jax calibrate: a velocity curve from dense sampling."""
    options = parse(Calibrate, "calibrate", argv, "Records a velocity curve by dense sampling.")
    with refusing("pasa-jax calibrate"):
        card, settings, options, states, negative = recording_order(options, 10)
        if settings.steps < 2:
            raise ValueError(f"steps={settings.steps} must be at least 2: one has no distance")
        plot = options.out.with_suffix(".png")
    from pasa_jax import pipeline
    from pasa_jax.video import atomic

    curve = pipeline.calibrate(
        load("calibrate", card),
        list(options.prompts),
        negative_prompt=options.negative_prompt,
        states=None if states is None else list(states),
        negative_states=negative,
        progress=options.progress,
        **dataclasses.asdict(settings),
    )
    curve.save(options.out)
    with atomic(plot) as temporary:
        curve.plot(temporary)
    print(f"wrote {options.out} and {plot}: {settings.steps} steps, {curve.prompts} prompts")
