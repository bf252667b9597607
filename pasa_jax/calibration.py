"""The velocity curve: how far the velocity moves from step to step, recorded once a setting."""

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pasa_jax.budget import step_lengths
from pasa_jax.grid import TokenGrid
from pasa_jax.video import atomic

_MAX_BYTES = 1 << 20  # a curve of 10,000 steps is below it
_MAX_STEPS = 10_000
_FORMAT = 1


def velocity_distance(
    velocity: Float[Array, "..."], previous: Float[Array, "..."]
) -> Float[Array, ""]:
    """ℓ_t: mean |v_t − v_{t−1}| over all elements, in float32.

    Args:
        velocity, previous: what the sampler used at this step and the one before, after guidance.
    """
    return jnp.abs(velocity.astype(jnp.float32) - previous.astype(jnp.float32)).mean()


@dataclasses.dataclass(frozen=True)
class CurveKey:
    """What a velocity curve, or any other record of dense sampling, depends on.

    Attributes:
        model: kind of model, and a digest of its weights' files behind an "@".
        grid: video tokens.
        steps: denoising steps.
        sampler: its name.
        shift: of the noise schedule.
        guidance: classifier-free guidance scale.
    """

    model: str
    grid: TokenGrid
    steps: int
    sampler: str
    shift: float
    guidance: float


@dataclasses.dataclass(frozen=True)
class VelocityCurve:
    """Velocity distances ℓ_t over some prompts, from dense sampling.

    Attributes:
        key: the setting they were recorded in.
        prompts: number of prompts.
        mean: ℓ_t [steps], mean over prompts. ℓ_0, which no velocity precedes, repeats ℓ_1.
        std: standard deviation over prompts [steps].
        speed: ℓ_t / |σ_t − σ_{t−1}| [steps], the distance per unit of noise level.

    Raises:
        ValueError: entries that are not `key.steps` finite numbers ≥ 0, or no prompt.
    """

    key: CurveKey
    prompts: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    speed: tuple[float, ...]

    def __post_init__(self):
        if not 1 <= self.key.steps <= _MAX_STEPS:
            raise ValueError(f"steps={self.key.steps} must be from 1 to {_MAX_STEPS}")
        if self.prompts < 1:
            raise ValueError(f"prompts={self.prompts} must be at least 1")
        for name in ("mean", "std", "speed"):
            values = getattr(self, name)
            if len(values) != self.key.steps:
                raise ValueError(f"{name} has {len(values)} entries, must have {self.key.steps}")
            if not all(0 <= value < math.inf for value in values):
                raise ValueError(f"{name}={values} must be finite and not negative")

    @classmethod
    def from_distances(
        cls,
        key: CurveKey,
        distances: Float[np.ndarray, "P steps"],
        sigmas: Float[np.ndarray, " levels"],
    ) -> "VelocityCurve":
        """The curve of recorded distances.

        Args:
            key: the setting.
            distances: ℓ_t of each prompt; column 0 is not read.
            sigmas: noise levels of the schedule [steps + 1], step t starting at sigmas[t].

        Raises:
            ValueError: shapes that disagree with key.steps, fewer than 2 steps, or values that
                are not finite and non-negative.
        """
        steps = key.steps
        if distances.ndim != 2 or distances.shape[1] != steps or steps < 2:
            raise ValueError(f"{distances.shape=} must be (prompts, {steps}), with 2 steps or more")
        if len(sigmas) != steps + 1:
            raise ValueError(f"{len(sigmas)=} must be {steps + 1}, one more than the steps")
        distances = np.concatenate([distances[:, 1:2], distances[:, 1:]], 1).astype(np.float64)
        mean = distances.mean(0)
        curves = mean, distances.std(0), mean / step_lengths(sigmas)
        return cls(key, len(distances), *(tuple(curve.tolist()) for curve in curves))

    def check(self, key: CurveKey) -> None:
        """Raises ValueError, naming both settings, unless the curve was recorded in this one."""
        if self.key != key:
            raise ValueError(
                f"the velocity curve was recorded for {self.key}, not for {key}: record one for it "
                "with `pasa-jax calibrate`, or sample without a curve"
            )

    def save(self, path: str | os.PathLike) -> None:
        """Writes JSON, beside the target first, so that no reader sees half a file."""
        text = json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, indent=1)
        with atomic(Path(path)) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "VelocityCurve":
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is not a velocity curve; the message says what is wrong.
            OSError: the file cannot be read.
        """
        return read_json(path, _MAX_BYTES, _from_json, "is not a velocity curve")

    def plot(self, path: str | os.PathLike) -> None:
        """Draws ℓ_t with its spread over prompts, and the speed; the suffix chooses the format."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 5), layout="constrained")
        FigureCanvasAgg(figure)
        upper, lower = figure.subplots(2, sharex=True)
        step = np.arange(1, self.key.steps)
        mean, std, speed = (np.asarray(x)[1:] for x in (self.mean, self.std, self.speed))
        upper.plot(step, mean)
        upper.fill_between(step, np.maximum(mean - std, 0), mean + std, alpha=0.3, linewidth=0)
        upper.set(ylabel="mean |v_t − v_(t−1)|", title=f"{self.key.model}, {self.prompts} prompts")
        lower.plot(step, speed)
        lower.set(xlabel="step", ylabel="per unit of σ")
        figure.savefig(path)


def _from_json(record: Any) -> VelocityCurve:
    """A curve from parsed JSON, every field of its type; ValueError says which is not."""
    fields = json_fields(record, "the file", {"format", "key", "prompts", "mean", "std", "speed"})
    if fields["format"] != _FORMAT:
        raise ValueError(f"format={fields['format']!r} must be {_FORMAT}")
    return VelocityCurve(
        json_key(fields["key"]),
        json_typed("prompts", fields["prompts"], int),
        *(_numbers(name, fields[name]) for name in ("mean", "std", "speed")),
    )


def read_json(path: str | os.PathLike, most: int, parse: Callable[[Any], Any], wrong: str) -> Any:
    """What `parse` makes of a JSON file of at most `most` bytes.

    Raises:
        ValueError: a larger file, no JSON, or what `parse` refuses; `wrong` says what it is not.
        OSError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise ValueError(f"it has more than {most} bytes")
        return parse(json.loads(data))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)!r} {wrong}: {error}") from error


def write_json(path: str | os.PathLike, record: dict[str, Any]) -> None:
    """Writes JSON without spaces, beside the target first, so that no reader sees half a file."""
    with atomic(path) as temporary:
        text = json.dumps(record, separators=(",", ":"))
        temporary.write_text(text + "\n", encoding="utf-8")


def json_key(record: Any) -> CurveKey:
    """A key from parsed JSON; ValueError says which field is not of its type."""
    key = json_fields(record, "key", {field.name for field in dataclasses.fields(CurveKey)})
    grid = json_fields(key["grid"], "grid", {"frames", "rows", "columns", "text"})
    return CurveKey(
        model=json_typed("model", key["model"], str),
        grid=TokenGrid(**{name: json_typed(name, value, int) for name, value in grid.items()}),
        steps=json_typed("steps", key["steps"], int),
        sampler=json_typed("sampler", key["sampler"], str),
        shift=json_number("shift", key["shift"]),
        guidance=json_number("guidance", key["guidance"]),
    )


def json_fields(record: Any, name: str, expected: set[str]) -> dict[str, Any]:
    """The record, a JSON object with exactly these fields; ValueError if it is not."""
    if not isinstance(record, dict) or set(record) != expected:
        raise ValueError(f"{name} must be an object with exactly {sorted(expected)}")
    return record


def json_typed(name: str, value: Any, kind: type) -> Any:
    """The value, if it is of that type, a bool being no int; ValueError otherwise."""
    if type(value) is not kind:
        raise ValueError(f"{name}={value!r:.40} must be a JSON value of type {kind.__name__}")
    return value


def json_number(name: str, value: Any) -> float:
    """The value, if it is a finite number; ValueError otherwise."""
    if type(value) not in (int, float) or not abs(value) < 1e30:
        raise ValueError(f"{name}={value!r:.40} must be a finite number")
    return float(value)


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    return tuple(json_number(name, value) for value in json_typed(name, values, list))
