"""What several commands share: how to sample, which policy, which texts."""

import dataclasses
import re
import typing
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

from pasa_jax.cli.parsing import of, read_file, refusing

Prompts = Annotated[
    tuple[str, ...],
    tyro.conf.Positional,
    tyro.conf.arg(metavar="PROMPT ...", help_behavior_hint=""),
]
CARD = "(default: the model's)"


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What all commands that sample share.

    Attributes:
        model: "tiny", which comes with the package, or a checkpoint's folder.
        steps: denoising steps.
        shift: timestep shift; larger spends more steps in the noise.
        guidance: weight of classifier-free guidance; 1 is none.
        sampler: unipc or euler.
        frames: video frames.
        size: width x height in pixels, as 832x480.
        negative_prompt: what guidance leads away from.
        negative_states: its text states from a file, as --prompt-states.
        progress: show a bar with seconds and density of each step.
    """

    model: str = "tiny"
    steps: Annotated[int | None, of("INT", CARD)] = None
    shift: Annotated[float | None, of("FLOAT", CARD)] = None
    guidance: Annotated[float | None, of("FLOAT", CARD)] = None
    sampler: Annotated[str | None, of("NAME", CARD)] = None
    frames: Annotated[int | None, of("INT", CARD)] = None
    size: Annotated[str | None, of("WxH", CARD)] = None
    negative_prompt: Annotated[str, of("TEXT")] = ""
    negative_states: Annotated[Path | None, of("FILE")] = None
    progress: bool = True

    def settings(self, card):
        """The checked `settings.Settings`."""
        width, height = parse_size(self.size)
        return card.settings(
            steps=self.steps,
            shift=self.shift,
            guidance=self.guidance,
            sampler=self.sampler,
            frames=self.frames,
            width=width,
            height=height,
        )


@dataclasses.dataclass(frozen=True)
class Caching:
    """What all commands that may skip steps share.

    Attributes:
        cache: skip steps: teacache, teacache-retention, or every-N, as every-2; works with any
            method.
        cache_threshold: of teacache, a larger one skips more.
    """

    cache: Annotated[str | None, of("NAME", "(default: none)")] = None
    cache_threshold: Annotated[
        float | None, of("FLOAT", "(default: Wan's lowest published, 0.1 for others)")
    ] = None

    def step_cache(self, card, prefix: float = 0.0):
        """The checked cache, or None."""
        from pasa_jax.caches import make_cache

        if self.cache is not None:
            cache = make_cache(self.cache, card.config, self.cache_threshold)
            return dataclasses.replace(cache, prefix=prefix)
        if self.cache_threshold is not None:
            raise ValueError(f"cache_threshold={self.cache_threshold} must come with --cache")
        return None


def load(command: str, card: Any) -> Any:
    """The card's pipeline; a damaged checkpoint is refused in one line."""
    from safetensors import SafetensorError

    from pasa_jax.pipeline import Pipeline

    with refusing(f"pasa-jax {command}"):
        try:
            return Pipeline.load(card)
        except (OSError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"model={str(card.folder)!r} is damaged: {error}") from error


def policy_options(policy: type, without: tuple[str, ...] = ()) -> type:
    """The policy's fields as options; searched masks come from a file."""
    types = {"masks": Annotated[Path | None, of("FILE")]}
    fields = [
        (field.name, types.get(field.name, field.type), dataclasses.field(default=field.default))
        for field in dataclasses.fields(policy)
        if field.name not in without
    ]
    doc = {"__doc__": policy.__doc__}
    return dataclasses.make_dataclass(policy.__name__, fields, namespace=doc, frozen=True)


def with_masks(policy: type, parameters: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    """The policy's parameters with masks read from their file, and the block they need, if any."""
    if parameters.get("masks") is None:
        return parameters, None
    types = {field.name: field.type for field in dataclasses.fields(policy)}
    masks = read_file("masks", typing.get_args(types["masks"])[0], parameters["masks"])
    return {**parameters, "masks": masks}, getattr(masks, "block", None)


def parse_size(size: str | None) -> tuple[int | None, int | None]:
    if size is None:
        return None, None
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", size)
    if not match:
        raise ValueError(f"{size=} must be WIDTHxHEIGHT in pixels, as 832x480")
    return int(match[1]), int(match[2])


def texts(options: Any, card: Any, settings: Any) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Checks the prompts; text states from files, [P, E, D] and the negative one [E, D]."""
    from pasa_jax.settings import check_prompts, read_states

    check_prompts(list(options.prompts))
    files, negative = options.prompt_states, options.negative_states
    missing = f"{card.name} has no text encoder here, so give"
    if card.scenes:
        from pasa_jax.models.tiny.text import word_ids

        word_ids(options.negative_prompt)
    if card.has_text and not files:
        for prompt in options.prompts if card.scenes else ():
            word_ids(prompt)
    elif len(files) != len(options.prompts):
        raise ValueError(
            f"prompt_states={[str(f) for f in files]} must be one file for each of the "
            f"{len(options.prompts)} prompts" + ("" if card.has_text else f": {missing} them")
        )
    if not card.has_text and settings.guidance != 1 and negative is None:
        raise ValueError(
            f"guidance={settings.guidance} needs the negative prompt's states: {missing} "
            "--negative-states FILE, or --guidance 1"
        )
    states = [read_states(file, card.config) for file in files]
    longest = max((len(s) for s in states), default=0)
    states = [np.pad(s, ((0, longest - len(s)), (0, 0))) for s in states]
    negative = None if negative is None else read_states(negative, card.config)
    return (np.stack(states) if states else None), negative


def read_curve(path: Path) -> Any:
    from pasa_jax.calibration import VelocityCurve

    return read_file("curve", VelocityCurve, path)


@dataclasses.dataclass(frozen=True)
class Recording(Sampling):
    """What all commands that record dense runs share; each says what its prompts are for.

    Attributes:
        prompt_states: text states of the prompts, as in `pasa-jax generate`.
    """

    prompts: Prompts = ()
    prompt_states: Annotated[tuple[Path, ...], of("FILE ...")] = ()
    out: Path = Path("masks.json")


class Recorded(NamedTuple):
    """A checked order of such a command: whose runs, of which prompts, and their options."""

    card: Any
    settings: Any
    prompts: list[str]
    how: dict[str, Any]


def recording_order(options: Recording, number: int) -> Recorded:
    """The order; where tiny is given no prompts, `number` of its own."""
    from pasa_jax.settings import read_card
    from pasa_jax.video import check_target

    card = read_card(options.model)
    settings = options.settings(card)
    if card.scenes and not options.prompts:
        from pasa_jax.models.tiny.check import prompts

        # Others than those of seed 0, which `compare` and `check` make.
        options = dataclasses.replace(options, prompts=tuple(prompts(number, seed=1)))
    check_target(options.out, (".json",))
    states, negative = texts(options, card, settings)
    how = dict(
        negative_prompt=options.negative_prompt,
        states=None if states is None else list(states),
        negative_states=negative,
        progress=options.progress,
        **dataclasses.asdict(settings),
    )
    return Recorded(card, settings, list(options.prompts), how)
