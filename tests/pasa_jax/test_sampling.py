"""The samplers against diffusers' schedulers, live and stored, and against an equation solved."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax.sampling import SAMPLERS, init_state, make_schedule, update

FIXTURE = Path(__file__).parent.parent / "fixtures" / "schedulers.npz"
# Both sides are float32 with the same operations in another order; values stay below about 30.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def sample(schedule, latents, velocities):
    """Latents of every step under given velocities, and how often the step was traced."""
    traces = []

    @jax.jit
    def step(state, latents, velocity, i):
        traces.append(i)
        return update(schedule, state, latents, velocity, i)

    state, path = init_state(schedule, latents), [latents]
    for i, velocity in enumerate(velocities):
        latents, state = step(state, path[-1], velocity, jnp.int32(i))
        path.append(latents)
    return np.stack(path), len(traces)


def stored_names():
    with np.load(FIXTURE) as stored:
        return sorted({key.split("/")[0] for key in stored})


@pytest.mark.parametrize("name", stored_names())
def test_matches_stored_diffusers_steps(name):
    with np.load(FIXTURE) as stored:
        want = {k.split("/")[1]: stored[k] for k in stored if k.startswith(name + "/")}
    sampler, steps, shift = name.split("-")
    schedule = make_schedule(sampler, int(steps), float(shift))
    np.testing.assert_allclose(schedule.sigmas, want["sigmas"], rtol=1e-6)
    np.testing.assert_allclose(schedule.timesteps, want["timesteps"], rtol=1e-6)
    got, _ = sample(schedule, jnp.asarray(want["latents"][0]), jnp.asarray(want["velocities"]))
    np.testing.assert_allclose(got, want["latents"], **TOLERANCE)


def live_scheduler(diffusers, sampler, shift):
    if sampler == "euler":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=1000,
        flow_shift=shift,
    )


@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
@pytest.mark.parametrize("steps", [2, 3, 20, 50])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_matches_live_diffusers_step_by_step(diffusers, sampler, steps, shift):
    import torch

    theirs = live_scheduler(diffusers, sampler, shift)
    theirs.set_timesteps(steps)
    ours = make_schedule(sampler, steps, shift)
    np.testing.assert_allclose(ours.sigmas, theirs.sigmas, rtol=1e-6)
    np.testing.assert_allclose(ours.timesteps, theirs.timesteps, rtol=1e-6)
    rng = np.random.default_rng(steps)
    latents = rng.standard_normal((2, 5, 3), dtype=np.float32)
    velocities = rng.standard_normal((steps, 2, 5, 3), dtype=np.float32)
    got, _ = sample(ours, jnp.asarray(latents), jnp.asarray(velocities))
    want = torch.from_numpy(latents)
    for i, t in enumerate(theirs.timesteps):
        want = theirs.step(torch.from_numpy(velocities[i]), t, want, return_dict=False)[0]
        np.testing.assert_allclose(got[i + 1], want.numpy(), **TOLERANCE, err_msg=f"step {i}")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_share_one_trace(sampler):
    schedule = make_schedule(sampler, 5, 3.0)
    _, traces = sample(schedule, jnp.ones((2, 3)), jnp.ones((5, 2, 3)))
    assert traces == 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_straight_path_is_walked_exactly(sampler):
    """With a constant velocity noise − video both samplers end in the video, whatever the steps."""
    video, noise = jnp.asarray([0.5, -1.0]), jnp.asarray([2.0, 0.25])
    schedule = make_schedule(sampler, 7, 5.0)
    start = (1 - schedule.sigmas[0]) * video + schedule.sigmas[0] * noise
    path, _ = sample(schedule, start, jnp.broadcast_to(noise - video, (7, 2)))
    np.testing.assert_allclose(path[-1], video, atol=2e-6)  # a few roundings of values near 2


def test_unipc_beats_euler_on_a_curved_path():
    """Gaussian data of spread 0.5 has a known velocity and a known end point."""

    def end(sampler, steps):
        schedule = make_schedule(sampler, steps, 1.0)
        latents = jnp.asarray([1.0])
        state = init_state(schedule, latents)
        for i in range(steps):
            s = schedule.sigmas[i]
            velocity = (s - 0.25 * (1 - s)) / (s**2 + 0.25 * (1 - s) ** 2) * latents
            latents, state = update(schedule, state, latents, velocity, i)
        return abs(float(latents[0]) - 0.5)

    assert end("unipc", 20) < 0.1 * end("euler", 20)


def test_velocity_in_bfloat16_leaves_latents_in_float32():
    schedule = make_schedule("unipc", 3, 1.0)
    latents = jnp.ones((2,), jnp.float32)
    new, state = update(
        schedule, init_state(schedule, latents), latents, jnp.ones((2,), jnp.bfloat16), 0
    )
    assert {x.dtype for x in jax.tree.leaves((new, state))} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "sampler, steps, shift, words",
    [
        ("heun", 3, 1.0, "sampler='heun' must be one of euler, unipc"),
        ("euler", 0, 1.0, "steps=0 must be from 1 to 1000"),
        ("euler", 3, 0.0, "shift=0.0 must be from 0.01 to 100"),
        ("unipc", 3, float("nan"), "shift=nan must be from 0.01 to 100"),
    ],
)
def test_bad_schedules_are_refused(sampler, steps, shift, words):
    with pytest.raises(ValueError, match=words):
        make_schedule(sampler, steps, shift)
