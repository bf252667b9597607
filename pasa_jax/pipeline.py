"""Prompt → text states → latents → frames → file."""

import dataclasses
import functools
import time
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8
from tqdm import tqdm

from pasa_jax import sampling
from pasa_jax.attention import Attention, LayerRecord
from pasa_jax.budget import OnlineBudget
from pasa_jax.caches import SKIP, StepCache
from pasa_jax.calibration import VelocityCurve, velocity_distance
from pasa_jax.policies import AttentionShape, Dense, Pasa, Policy
from pasa_jax.settings import (
    Card,
    Settings,
    check_policy,
    check_prompts,
    check_seeds,
    read_card,
)


@runtime_checkable
class TextEncoder(Protocol):
    """Prompts to text states; "" is the prompt of guidance that asks for nothing."""

    def encode(self, prompts: list[str]) -> Float[np.ndarray, "P E D"]: ...


@runtime_checkable
class Droppable(Protocol):
    """What can free its weights' memory and load them again when they are needed."""

    def drop(self) -> None: ...


@runtime_checkable
class Codec(Protocol):
    """Latents to video, RGB in 0..1."""

    def decode(self, latents: Float[Array, "P F Y X C"]) -> Float[Array, "P frames H W 3"]: ...


class Result(NamedTuple):
    """A finished run of P prompts.

    Attributes:
        frames: RGB [P, frames, height, width, 3]; None for a model whose codec is not there.
        latents: f32 [P, F, Y, X, C], denoised.
        prompts, seeds, settings, policy, cache: what was asked for.
        budgets: int32 [steps], exact key blocks per query block that each step was given; 0 where
            the cache skipped it.
        densities: f32 [steps, layers], share of the key blocks that were exact; 1 where dense, 0
            where skipped.
        seconds: [steps], wall time; the first step of each mode includes compilation.
        distances: f32 [steps, P], mean |v_t − v_{t−1}| of each prompt's velocity after guidance;
            NaN at step 0.
    """

    frames: UInt8[np.ndarray, "P frames H W 3"] | None
    latents: Float[np.ndarray, "P F Y X C"]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: Settings
    policy: Policy
    cache: StepCache | None
    budgets: Int[np.ndarray, " steps"]
    densities: Float[np.ndarray, "steps layers"]
    seconds: Float[np.ndarray, " steps"]
    distances: Float[np.ndarray, "steps P"]


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A model with what surrounds it.

    Attributes:
        card: the checkpoint's facts and default settings.
        model: latents, timestep and text states to velocity, as `models.wan.Wan`.
        text: None where prompts must come as states. A large one's weights are dropped before
            sampling starts.
        codec: None where a run ends in latents.
    """

    card: Card
    model: nnx.Module
    text: TextEncoder | None
    codec: Codec | None

    @classmethod
    def load(cls, model: str | Path | Card, dtype: Any = None) -> "Pipeline":
        """Reads "tiny", or a folder that `pasa-jax convert` wrote.

        Args:
            model: its name, folder or card.
            dtype: of the transformer's matrix products; None keeps the checkpoint's, for tiny
                float32.

        Raises:
            ValueError: neither of the two.
        """
        card = model if isinstance(model, Card) else read_card(model)
        from pasa_jax.convert import load_model
        from pasa_jax.models.tiny import codec, text

        if not card.scenes:
            return cls._load_wan(card, dtype)
        model, words = card.folder / "transformer", card.folder / "text_encoder"
        return cls(
            card, load_model(model, dtype), text.load(words), codec.load(card.folder / "vae")
        )

    @classmethod
    def _load_wan(cls, card: Card, dtype: Any) -> "Pipeline":
        """A checkpoint of Wan with the parts that are there."""
        from pasa_jax.convert import find_parts, load_model
        from pasa_jax.parts import load_decoder, load_text_encoder

        parts = find_parts(card.folder) if card.folder.is_dir() else None
        if parts is None:
            return cls(card, load_model(card.folder, dtype), None, None)
        paths, text, codec = parts.paths, None, None
        if card.has_text:
            folders = paths["text_encoder"], paths["tokenizer"]
            text = load_text_encoder(*folders, card.config.text_len)
        if card.has_video:
            codec = load_decoder(paths["vae"])
        return cls(card, load_model(paths["transformer"], dtype), text, codec)

    def generate(
        self,
        prompts: list[str],
        *,
        policy: Policy | None = None,
        cache: StepCache | None = None,
        seeds: list[int] | None = None,
        negative_prompt: str = "",
        states: Float[np.ndarray, "P E D"] | None = None,
        negative_states: Float[np.ndarray, "U D"] | None = None,
        curve: VelocityCurve | None = None,
        progress: bool = True,
        observe: Callable[[int, Float[Array, "P F Y X C"]], None] | None = None,
        **settings,
    ) -> Result:
        """Samples one video a prompt.

        Args:
            prompts: at least one, none empty.
            policy: attention method; None is PASA with its defaults and the card's block size.
            cache: steps that reuse the last computed residual (`pasa_jax.caches`) and skip all
                attention; None computes all. Budgets of the others stay as they are, so what a
                skipped step would have had is not spent. It keeps f32 [B, T, D] on the device.
            seeds: one a prompt, unsigned 32-bit; None gives all 0. A video depends on its prompt,
                seed and settings, not on its place in the batch; only an online budget is one for
                all, and follows the mean of the batch.
            negative_prompt: what guidance leads away from.
            states, negative_states: text states in place of encoded prompts.
            curve: recorded by `calibrate` in these very settings, shares the budget over the
                steps; None shares it equally.
            progress: show a bar with seconds and density of each step.
            observe: called with each step's number and the latents that it ended in.
            settings: fields of `Settings`; those not given are the card's.

        Returns:
            Frames or latents, and what each step cost.

        Raises:
            ValueError: an input out of range; nothing has been computed by then.
        """
        check_prompts(prompts)
        seeds = [0] * len(prompts) if seeds is None else seeds
        check_seeds(seeds)
        if len(seeds) != len(prompts):
            raise ValueError(f"{seeds=} must be one for each of the {len(prompts)} prompts")
        chosen = self.card.settings(**settings)
        policy = default_policy(self.card, chosen) if policy is None else policy
        check_policy(policy, self.card, chosen, curve)
        text = self.encode(prompts, negative_prompt, chosen.guidance, states, negative_states)
        if isinstance(self.text, Droppable):
            self.text.drop()
        mean = None if curve is None else curve.mean
        latents, record = self.sample(text, seeds, policy, chosen, mean, progress, observe, cache)
        frames = None if self.codec is None else to_frames(self.codec.decode(latents))
        asked = (tuple(prompts), tuple(seeds), chosen, policy, cache)
        return Result(frames, np.asarray(latents), *asked, **record)

    def encode(
        self,
        prompts: list[str],
        negative_prompt: str,
        guidance: float,
        states: Float[np.ndarray, "P E D"] | None = None,
        negative_states: Float[np.ndarray, "U D"] | None = None,
    ) -> Float[Array, "B E D"]:
        """Text states, branch-major: all prompts, then as many negative ones unless guidance is 1.

        Raises:
            ValueError: states are needed and missing, or not one a prompt.
        """
        if states is None:
            states = self._encoder("states").encode(prompts)
        if len(states) != len(prompts):
            raise ValueError(f"{states.shape=} must be one for each of the {len(prompts)} prompts")
        if guidance == 1:
            return jnp.asarray(states)
        if negative_states is None:
            negative_states = self._encoder("negative_states").encode([negative_prompt])[0]
        negative = np.broadcast_to(negative_states, (len(prompts), *negative_states.shape))
        return jnp.asarray(np.concatenate(pad_alike(states, negative)))

    def sample(
        self,
        text: Float[Array, "B E D"],
        seeds: list[int],
        policy: Policy,
        settings: Settings,
        curve: Sequence[float] | None = None,
        progress: bool = False,
        observe: Callable[[int, Float[Array, "P F Y X C"]], None] | None = None,
        cache: StepCache | None = None,
    ) -> tuple[Float[Array, "P F Y X C"], dict[str, np.ndarray]]:
        """Denoises from noise; returns latents and the record of the steps (see `Result`)."""
        steps = settings.steps
        schedule = sampling.make_schedule(settings.sampler, steps, settings.shift)
        blocks = self.card.grid(settings).num_blocks(policy.block_kv)
        budget = Budget.start(policy, steps, blocks, curve, np.asarray(schedule.sigmas))
        noise_keys, policy_keys = seed_keys(seeds)
        latents = start_noise(noise_keys, self.card.latent_shape(settings))
        carry = Carry(latents, sampling.init_state(schedule, latents), jnp.zeros_like(latents))
        state = policy.init_state(self.shape(settings, len(text)))
        graph, params = nnx.split(self.model)
        guidance = jnp.float32(settings.guidance)
        log, modes = Log(blocks), self.modes(policy, settings, cache)
        keep = SKIP in modes
        with tqdm(total=steps, disable=not progress, bar_format=BAR) as bar:
            for i, mode in enumerate(modes):
                began, exact = time.perf_counter(), budget.at(i)
                # Dense steps are alike under every policy, and so share one compilation.
                alike = mode in ("dense", SKIP)
                method, bound = (Dense(), 1) if alike else (policy, budget.bound)
                attention = Attention(method, mode, jnp.int32(i), exact, policy_keys, bound, state)
                if mode != SKIP:
                    carry = carry._replace(residual=None)  # freed before the next one is made
                carry, distance, record = denoise(
                    graph, params, schedule, carry, text, guidance, attention, keep
                )
                budget, state = budget.after(distance, mode), record.state
                bar.set_postfix_str(log.add(mode, exact, distance, record.density, began))
                bar.update()
                if observe is not None:
                    observe(i, carry.latents)
        return carry.latents, log.arrays()

    def modes(
        self, policy: Policy, settings: Settings, cache: StepCache | None = None
    ) -> tuple[str, ...]:
        """Every step's mode, the policy's own or `caches.SKIP`; known before the run."""
        modes = policy.modes(settings.steps)
        if cache is None:
            return modes
        schedule = sampling.make_schedule(settings.sampler, settings.steps, settings.shift)

        def embed():
            return jax.device_get(_embed_times(*nnx.split(self.model), schedule.timesteps))

        computed = cache.steps(modes, embed)
        return tuple(mode if run else SKIP for mode, run in zip(modes, computed, strict=True))

    def shape(self, settings: Settings, batch: int) -> AttentionShape:
        """What a policy's state may depend on; the batch counts guidance's branches."""
        config = self.card.config
        heads, width = config.num_heads, config.head_dim
        return AttentionShape(config.num_layers, batch, heads, width, self.card.grid(settings))

    def _encoder(self, instead: str) -> TextEncoder:
        if self.text is None:
            raise ValueError(
                f"{instead}=None must be given: {self.card.name} has no text encoder here"
            )
        return self.text


def calibrate(
    pipeline: Pipeline,
    prompts: list[str],
    *,
    seeds: list[int] | None = None,
    negative_prompt: str = "",
    states: list[np.ndarray] | None = None,
    negative_states: Float[np.ndarray, "U D"] | None = None,
    progress: bool = True,
    **settings,
) -> VelocityCurve:
    """Records how far the velocity moves from step to step, by dense sampling, prompt by prompt.

    Args:
        pipeline: its model is sampled.
        prompts: PASA's authors use 10.
        seeds: one a prompt; None counts from 0.
        negative_prompt, negative_states, progress, settings: as in `Pipeline.generate`.
        states: one array [E, D] a prompt, in place of encoded prompts.

    Returns:
        The mean curve with its spread, keyed by these settings.

    Raises:
        ValueError: as `Pipeline.generate`, or fewer than 2 steps.
    """
    check_prompts(prompts)
    chosen = pipeline.card.settings(**settings)
    if chosen.steps < 2:
        raise ValueError(f"steps={chosen.steps} must be at least 2: the curve has steps - 1 points")
    distances = []
    for i, prompt in enumerate(prompts):
        result = pipeline.generate(
            [prompt],
            policy=Dense(),
            seeds=[i if seeds is None else seeds[i]],
            negative_prompt=negative_prompt,
            states=None if states is None else states[i][None],
            negative_states=negative_states,
            progress=progress,
            **dataclasses.asdict(chosen),
        )
        distances.append(result.distances[:, 0])
    schedule = sampling.make_schedule(chosen.sampler, chosen.steps, chosen.shift)
    key = pipeline.card.curve_key(chosen)
    return VelocityCurve.from_distances(key, np.stack(distances), np.asarray(schedule.sigmas))


BAR = "{percentage:3.0f}% |{bar}| step {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Carry(NamedTuple):
    """What goes from step to step, all f32.

    Latents, the sampler's memory, the last velocity, and the last computed step's residual
    (`Wan.with_residual`) where the run skips steps.
    """

    latents: Float[Array, "P F Y X C"]
    memory: sampling.State
    velocity: Float[Array, "P F Y X C"]
    residual: Float[Array, "B T D"] | None = None


def denoise(
    graph: nnx.GraphDef,
    params: Any,
    schedule: sampling.Schedule,
    carry: Carry,
    text: Float[Array, "B E D"],
    guidance: Float[Array, ""],
    attention: Attention,
    keep: bool = False,
) -> tuple[Carry, Float[Array, " P"], LayerRecord]:
    """One step; compiled once per mode, as step, budget, seeds and guidance are data.

    Args:
        graph, params: the model, split.
        schedule: of the run.
        carry: from the step before.
        text: branch-major states; B = P runs without guidance, B = 2P with it.
        guidance: weight of the conditional velocity's lead over the unconditional one.
        attention: policy, mode, step, budget and the policy's state, whose memory the next state
            takes: it cannot be read afterwards. Mode `caches.SKIP` adds the carry's residual in the
            blocks' place, and leaves state and residual as they are.
        keep: put the residual into the carry, for later steps that skip.

    Returns:
        The next carry, mean |v_t − v_{t−1}| of each prompt, and the layers' records.
    """
    state, attention = attention.state, dataclasses.replace(attention, state=())
    return _denoise(graph, params, schedule, carry, text, guidance, attention, state, keep)


# Unused ones kept: a search reads none of the state whose memory it takes.
@functools.partial(jax.jit, static_argnums=(0, 8), donate_argnums=7, keep_unused=True)
def _denoise(graph, params, schedule, carry, text, guidance, attention, state, keep):
    """`denoise` with the state apart, which alone is given away."""
    i, attention = attention.step, dataclasses.replace(attention, state=state)
    branches = text.shape[0] // carry.latents.shape[0]
    latents = jnp.tile(carry.latents, (branches, 1, 1, 1, 1))
    timesteps = jnp.full(latents.shape[:1], schedule.timesteps[i])
    model, residual = nnx.merge(graph, params), carry.residual
    if attention.mode == SKIP:
        velocity = model.skip(latents, timesteps, residual)
        record = LayerRecord(attention.state, jnp.zeros(model.config.num_layers, jnp.float32))
    elif keep:
        velocity, record, residual = model.with_residual(latents, timesteps, text, attention)
    else:
        velocity, record = model(latents, timesteps, text, attention)
    velocity = velocity.astype(jnp.float32)
    if branches == 2:
        conditional, unconditional = jnp.split(velocity, 2)
        velocity = unconditional + guidance * (conditional - unconditional)
    distance = jax.vmap(velocity_distance)(velocity, carry.velocity)
    latents, memory = sampling.update(schedule, carry.memory, carry.latents, velocity, i)
    carry = Carry(latents, memory, velocity, residual)
    return carry, jnp.where(i == 0, jnp.nan, distance), record


def recorded_steps(
    pipeline: Pipeline,
    settings: Settings,
    text: Float[Array, "B E D"],
    seed: int,
    recorder: Policy,
    steps: Container[int],
    last: int,
) -> Iterator[Any]:
    """A dense run, step by step, whose chosen steps a recorder's `search` runs.

    Args:
        pipeline: its model is sampled.
        settings: of the run.
        text: one prompt's states and the negative ones'.
        seed: of the noise.
        recorder: begins each of its steps with a new state.
        steps: those it runs; the others are plain dense.
        last: the last step of interest, where the run ends.

    Yields:
        After each step the recorder's state, or None.
    """
    schedule = sampling.make_schedule(settings.sampler, settings.steps, settings.shift)
    noise_key, policy_key = seed_keys([seed])
    latents = start_noise(noise_key, pipeline.card.latent_shape(settings))
    carry = Carry(latents, sampling.init_state(schedule, latents), jnp.zeros_like(latents))
    graph, params = nnx.split(pipeline.model)
    guidance, shape = jnp.float32(settings.guidance), pipeline.shape(settings, len(text))
    for i in range(last + 1):
        found = i in steps
        policy, mode = (recorder, "search") if found else (Dense(), "dense")
        state = recorder.init_state(shape) if found else ()
        attention = Attention(policy, mode, jnp.int32(i), jnp.int32(1), policy_key, 1, state)
        carry, _, record = denoise(graph, params, schedule, carry, text, guidance, attention)
        jax.block_until_ready(carry)
        yield record.state if found else None


@functools.partial(jax.jit, static_argnums=0)
def _embed_times(graph: nnx.GraphDef, params: Any, timesteps: Float[Array, " steps"]):
    return nnx.merge(graph, params).embed_time(timesteps)


@dataclasses.dataclass(frozen=True)
class Budget:
    """Exact blocks of each step: a table known beforehand, or one that follows the velocities.

    Attributes:
        bound: the most a sparse step can get.
        table: int32 [steps]; None with `online`.
        online: the running budget; None with `table`.
    """

    bound: int
    table: np.ndarray | None
    online: OnlineBudget | None

    @classmethod
    def start(cls, policy: Policy, steps: int, blocks: int, curve, sigmas) -> "Budget":
        """The budget before the first step."""
        bound = policy.max_budget(steps, blocks, curve)
        online = policy.online_budget(blocks, sigmas)
        table = policy.budgets(steps, blocks, curve) if online is None else None
        return cls(bound, table, online)

    def at(self, i: int) -> Int[Array, ""]:
        """Blocks of step i, which must be the next one."""
        return jnp.int32(self.table[i]) if self.online is None else _online_blocks(self.online)

    def after(self, distance: Float[Array, " P"], mode: str) -> "Budget":
        """The budget once a step has run; a skipped one loses its blocks and tells no speed."""
        if self.online is None:
            return self
        distance = jnp.full_like(distance, jnp.nan) if mode == SKIP else distance
        return dataclasses.replace(self, online=_online_after(self.online, distance))


_online_blocks = jax.jit(OnlineBudget.blocks)


@jax.jit
def _online_after(online: OnlineBudget, distance: Float[Array, " P"]) -> OnlineBudget:
    return online.after_step(jnp.mean(distance))


class Log:
    """What the steps of a run cost, as they end."""

    def __init__(self, blocks: int):
        self.blocks = blocks
        self.rows = []

    def add(
        self, mode: str, budget: jax.Array, distance: jax.Array, density: jax.Array, began: float
    ) -> str:
        """Waits for the step, notes it, and says it in words."""
        distance, density = np.asarray(distance), np.asarray(density)
        exact = {"dense": self.blocks, SKIP: 0}.get(mode, budget)
        seconds = time.perf_counter() - began
        self.rows.append((int(exact), density, seconds, distance))
        return f"{seconds:.2f} s/step, density {density.mean():.3f}"

    def arrays(self) -> dict[str, np.ndarray]:
        """The steps as arrays of a `Result`."""
        budgets, densities, seconds, distances = zip(*self.rows, strict=True)
        return {
            "budgets": np.asarray(budgets, np.int32),
            "densities": np.stack(densities),
            "seconds": np.asarray(seconds),
            "distances": np.stack(distances),
        }


def default_policy(card: Card, settings: Settings) -> Policy:
    """PASA with its defaults and the card's block size."""
    block = card.block(settings)
    return Pasa(block_q=block, block_kv=block)


def seed_keys(seeds: list[int]) -> tuple[jax.Array, jax.Array]:
    """Random keys [P] for the noise the run starts from, and [P] for the policy."""
    keys = jax.vmap(jax.random.key)(jnp.asarray(np.asarray(seeds, np.uint32)))
    noise, policy = (jax.vmap(jax.random.fold_in, (0, None))(keys, n) for n in range(2))
    return noise, policy


def start_noise(keys: jax.Array, shape: tuple[int, ...]) -> Float[Array, "P F Y X C"]:
    """Normal noise, each video's from its own key alone."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def pad_alike(*states: np.ndarray) -> list[np.ndarray]:
    """Text states [P, E, D] with zeros behind the shorter, as the model pads them anyway."""
    longest = max(s.shape[1] for s in states)
    return [np.pad(s, ((0, 0), (0, longest - s.shape[1]), (0, 0))) for s in states]


def to_frames(video: Float[Array, "P frames H W 3"]) -> UInt8[np.ndarray, "P frames H W 3"]:
    """RGB in 0..1 to bytes."""
    return np.asarray(jnp.round(255 * jnp.clip(video, 0, 1)).astype(jnp.uint8))
