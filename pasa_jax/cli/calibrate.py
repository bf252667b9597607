"""pasa-jax calibrate."""

import dataclasses
from pathlib import Path

from pasa_jax.cli.options import Recording, load, recording_order
from pasa_jax.cli.parsing import parse, refusing


@dataclasses.dataclass(frozen=True)
class Calibrate(Recording):
    """Options of `pasa-jax calibrate`.

    Attributes:
        prompts: to average over; tiny has ten of its own.
        out: JSON file; a plot is written beside it as .png.
    """

    out: Path = Path("curve.json")


def calibrate(argv: list[str]) -> None:
    """pasa-jax calibrate: a velocity curve from dense sampling."""
    options = parse(Calibrate, "calibrate", argv, "Records a velocity curve by dense sampling.")
    with refusing("pasa-jax calibrate"):
        order = recording_order(options, 10)
        if order.settings.steps < 2:
            raise ValueError(
                f"steps={order.settings.steps} must be at least 2: one has no distance"
            )
        plot = options.out.with_suffix(".png")
    from pasa_jax import pipeline
    from pasa_jax.video import atomic

    curve = pipeline.calibrate(load("calibrate", order.card), order.prompts, **order.how)
    curve.save(options.out)
    with atomic(plot) as temporary:
        curve.plot(temporary)
    print(f"wrote {options.out} and {plot}: {order.settings.steps} steps, {curve.prompts} prompts")
