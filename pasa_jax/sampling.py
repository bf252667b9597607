"""Flow-matching schedules and samplers, Euler and UniPC as Wan uses them; knows no model."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

SAMPLERS = ("euler", "unipc")
TRAIN_TIMESTEPS = 1000  # Wan's num_train_timesteps: a timestep is 1000 times its sigma
MAX_STEPS = TRAIN_TIMESTEPS
MAX_SHIFT = 100.0  # Wan uses 3 to 12; far beyond, neighbouring levels are equal in float32
_EPSILON = 1e-6  # UniPC starts at sigma 1 - 1e-6, where log(1 - sigma) is finite


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """Noise levels of a sampling run, and the weights its sampler gives to what it remembers.

    Attributes:
        sigmas: f32 [steps + 1], falling, the last one 0; latents at step i are
            (1 − σ_i)·video + σ_i·noise.
        timesteps: f32 [steps], what the model is told at each step, in [0, 1000].
        corrector: f32 [steps, 4], UniPC's weights of (latents before the last prediction, clean
            estimates of two steps ago, of the last step, of this step); unused by Euler.
        predictor: f32 [steps, 3], UniPC's weights of (corrected latents, clean estimate of the
            last step, of this step); unused by Euler.
        sampler: one of `SAMPLERS` (static).
    """

    sigmas: Float[Array, " levels"]
    timesteps: Float[Array, " steps"]
    corrector: Float[Array, "steps 4"]
    predictor: Float[Array, "steps 3"]
    sampler: str = dataclasses.field(metadata={"static": True})


class State(NamedTuple):
    """What UniPC remembers, f32 of the latents' shape; for Euler all entries are None.

    Attributes:
        latents: corrected latents before the last prediction.
        clean: clean estimates x0 of two steps ago and of the last step.
    """

    latents: Float[Array, "..."] | None
    clean: tuple[Float[Array, "..."] | None, Float[Array, "..."] | None]


def make_schedule(sampler: str, steps: int, shift: float) -> Schedule:
    """Noise levels and timesteps of a run, the same as diffusers' schedulers make for Wan.

    The two samplers space their levels differently, as their originals do: Euler evenly from 1 to
    the shifted 1/1000, UniPC evenly from 1 to 1/1000 without its end; then σ ← s·σ / (1 + (s−1)·σ).
    UniPC's timesteps are whole numbers. Wan's own code spaces UniPC from 0.999 to 0 instead, in
    the same order and with the same final 0, which differs by at most 0.001 before the shift.

    Args:
        sampler: "euler" or "unipc".
        steps: denoising steps, at least 1.
        shift: Wan's timestep shift s, above 0; 1 is none. Larger spends more steps in the noise.

    Returns:
        The schedule, all arrays f32.

    Raises:
        ValueError: an unknown sampler, steps not from 1 to MAX_STEPS, or a shift
            not from 1 / MAX_SHIFT to MAX_SHIFT.

    Source: diffusers' FlowMatchEulerDiscreteScheduler(shift) and UniPCMultistepScheduler(
    flow_prediction, use_flow_sigmas, flow_shift), order 2, B(h) = expm1 (UniPC, arXiv:2302.04867).
    """
    check_schedule(sampler, steps, shift)
    if sampler == "euler":
        floor = _shifted(np.float64(1 / TRAIN_TIMESTEPS), shift)
        levels = _shifted(np.linspace(1.0, floor, steps), shift)
        timesteps = levels * TRAIN_TIMESTEPS
    else:
        levels = _shifted(np.linspace(1.0, 1 / TRAIN_TIMESTEPS, steps + 1)[:-1], shift)
        levels[0] -= _EPSILON
        timesteps = np.trunc(levels * TRAIN_TIMESTEPS)
    sigmas = np.append(levels, 0.0).astype(np.float32)
    corrector, predictor = _unipc_weights(sigmas)
    tables = (np.asarray(x, np.float32) for x in (sigmas, timesteps, corrector, predictor))
    return Schedule(*(jnp.asarray(x) for x in tables), sampler=sampler)


def check_schedule(sampler: str, steps: int, shift: float) -> None:
    """Raises ValueError where `make_schedule` would, without building anything."""
    if sampler not in SAMPLERS:
        raise ValueError(f"{sampler=} must be one of {', '.join(SAMPLERS)}")
    if not 1 <= steps <= MAX_STEPS:
        nearest = min(max(steps, 1), MAX_STEPS)
        raise ValueError(f"{steps=} must be from 1 to {MAX_STEPS}; the nearest is {nearest}")
    if not 1 / MAX_SHIFT <= shift <= MAX_SHIFT:
        raise ValueError(
            f"{shift=} must be from {1 / MAX_SHIFT} to {MAX_SHIFT:g}; 1 means no shift"
        )


def init_state(schedule: Schedule, latents: Float[Array, "..."]) -> State:
    """The sampler's memory before the first step: zeros for UniPC, nothing for Euler."""
    if schedule.sampler == "euler":
        return State(None, (None, None))
    zeros = jnp.zeros(latents.shape, jnp.float32)
    return State(zeros, (zeros, zeros))


def update(
    schedule: Schedule,
    state: State,
    latents: Float[Array, "*shape"],
    velocity: Float[Array, "*shape"],
    i: Int[Array, ""] | int,
) -> tuple[Float[Array, "*shape"], State]:
    """One denoising step, from level σ_i to σ_{i+1}.

    Args:
        schedule: from `make_schedule`.
        state: from `init_state` or the step before.
        latents: f32, at level σ_i.
        velocity: the model's prediction noise − video at σ_i, any float; used in f32.
        i: step, 0 the noisiest; may be traced, so that one compilation serves all steps.

    Returns:
        Latents at σ_{i+1}, f32, and the new memory.
    """
    velocity = velocity.astype(jnp.float32)
    if schedule.sampler == "euler":
        return latents + (schedule.sigmas[i + 1] - schedule.sigmas[i]) * velocity, state
    older, old = state.clean
    clean = latents - schedule.sigmas[i] * velocity
    c, p = schedule.corrector[i], schedule.predictor[i]
    corrected = c[0] * state.latents + c[1] * older + c[2] * old + c[3] * clean
    corrected = jnp.where(jnp.asarray(i) == 0, latents, corrected)
    following = p[0] * corrected + p[1] * old + p[2] * clean
    return following, State(corrected, (old, clean))


def _shifted(sigmas, shift):
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _unipc_weights(sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """UniPC's updates are linear in what it remembers: their weights for every step, in float64."""
    steps = len(sigmas) - 1
    # The rounded levels, not the exact ones: 1 − σ_0 is 1e-6 and f32 moves it by 5 %.
    sigmas = sigmas.astype(np.float64)
    with np.errstate(divide="ignore"):
        log_snr = np.log(1 - sigmas) - np.log(sigmas)
    corrector, predictor = np.zeros((steps, 4)), np.zeros((steps, 3))
    for i in range(steps):
        if i > 0:
            corrector[i] = _corrector(sigmas, log_snr, i, _order(i - 1, steps))
        predictor[i] = _predictor(sigmas, log_snr, i, _order(i, steps))
    return corrector, predictor


def _order(i: int, steps: int) -> int:
    """Order of step i: 2, but 1 where nothing is remembered yet and at the last step."""
    return min(2, i + 1, steps - i)


def _predictor(sigmas, log_snr, i, order):
    """Weights of (latents_i, clean_{i−1}, clean_i) in latents_{i+1}."""
    step = log_snr[i + 1] - log_snr[i]
    gain = -(1 - sigmas[i + 1]) * np.expm1(-step)
    slope = 0.0
    if order == 2:
        slope = 0.5 * gain * step / (log_snr[i - 1] - log_snr[i])
    return sigmas[i + 1] / sigmas[i], slope, gain - slope


def _corrector(sigmas, log_snr, i, order):
    """Weights of (corrected_{i−1}, clean_{i−2}, clean_{i−1}, clean_i) in corrected_i."""
    step = log_snr[i] - log_snr[i - 1]
    gain = -(1 - sigmas[i]) * np.expm1(-step)
    back, here = 0.0, 0.5
    if order == 2:
        ratio = (log_snr[i - 2] - log_snr[i - 1]) / step
        first, second = _moments(-step)
        back, here = np.linalg.solve([[1.0, 1.0], [ratio, 1.0]], [first, second])
        back = back / ratio
    return sigmas[i] / sigmas[i - 1], gain * back, gain * (1 - back - here), gain * here


def _moments(h: float) -> tuple[float, float]:
    """UniPC's b_1 and b_2 over B(h) = expm1(h): φ_2 and 2·φ_3 of the exponential integrator."""
    phi = np.expm1(h)
    second = phi / h - 1
    return second / phi, 2 * (second / h - 0.5) / phi
