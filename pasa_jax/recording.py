"""Queries, keys and values for looking at methods: recorded from a real run, or planted."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import io_callback
from jaxtyping import Array, Float

from pasa_jax import sampling
from pasa_jax.attention import Attention
from pasa_jax.grid import TokenGrid
from pasa_jax.models.wan import Wan, WanConfig
from pasa_jax.pallas_kernels import api
from pasa_jax.pipeline import Carry, Pipeline, denoise, seed_keys, start_noise
from pasa_jax.policies import Context, Policy
from pasa_jax.settings import Card, Settings


class Recording(NamedTuple):
    """Self-attention's operands in one layer of one step, in raster order.

    Attributes:
        q, k, v: f32 [B, T, N, H], rotated and normalised as attention takes them.
        grid: their tokens.
        name: where they come from.
        layers: of the model's whole stack, for policies that hold something for each.
    """

    q: Float[np.ndarray, "B T N H"]
    k: Float[np.ndarray, "B T N H"]
    v: Float[np.ndarray, "B T N H"]
    grid: TokenGrid
    name: str
    layers: int = 1


# What the running recorder has handed over. Not its own, so that alike recorders share a program.
_KEPT: list[list[np.ndarray]] = []


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Recorder(Policy):
    """Dense attention that hands one layer's operands of one step to the host."""

    step: int
    layer: int
    dense_layers: tuple[int, ...] = ()

    def modes(self, num_steps: int) -> tuple[str, ...]:
        """ "search" at the step, "dense" at all others."""
        return tuple("search" if i == self.step else "dense" for i in range(num_steps))

    def search(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        v: Float[Array, "B S N H"],
        context: Context,
        state: Any,
    ) -> tuple[Float[Array, "B T N H"], Any]:
        """Dense output; keeps q, k and v of the layer."""

        def keep(q, k, v):
            _KEPT.append([np.asarray(x, np.float32) for x in (q, k, v)])

        jax.lax.cond(
            context.layer == self.layer,
            lambda: io_callback(keep, None, q, k, v),
            lambda: None,
        )
        return api.dense_attention(q, k, v), state


class _Enough(Exception):
    """Ends a run whose rest nobody needs."""


def record(
    pipeline: Pipeline, prompt: str, *, layer: int, step: int, seed: int = 0, **options: Any
) -> Recording:
    """Operands of one layer's self-attention at one step of a dense run.

    Args:
        pipeline: its model is sampled, up to that step.
        prompt, seed: of the run.
        layer: index in the whole stack.
        step: denoising step, 0 the noisiest.
        options: further ones of `Pipeline.generate`.

    Raises:
        ValueError: no such layer or step, or an option that `generate` refuses.
    """
    card = pipeline.card
    names = {field.name for field in dataclasses.fields(card.defaults)}
    chosen = card.settings(**{key: value for key, value in options.items() if key in names})
    for name, value, end in (
        ("layer", layer, card.config.num_layers),
        ("step", step, chosen.steps),
    ):
        if not 0 <= value < end:
            raise ValueError(f"{name}={value} must be from 0 to {end - 1}")
    recorder = _Recorder(step=step, layer=layer)

    def stop(i, latents):
        if i == step:
            raise _Enough

    try:
        pipeline.generate([prompt], policy=recorder, seeds=[seed], observe=stop, **options)
    except _Enough:
        jax.effects_barrier()
    return _recording(recorder, card, chosen)


def record_step(
    pipeline: Pipeline,
    latents: Float[np.ndarray, "P F Y X C"],
    text: Float[Array, "P E D"],
    settings: Settings,
    *,
    layer: int,
    step: int,
) -> Recording:
    """Operands of one layer's self-attention at one step, from the latents the run has come to.

    One forward pass, of the conditional branch alone.

    Args:
        pipeline: its model runs.
        latents: before the step.
        text: states of the prompts.
        settings: of the run.
        layer: index in the whole stack.
        step: denoising step, 0 the noisiest.
    """
    recorder = _Recorder(step=step, layer=layer)
    schedule = sampling.make_schedule(settings.sampler, settings.steps, settings.shift)
    latents = jnp.asarray(latents)
    carry = Carry(latents, sampling.init_state(schedule, latents), jnp.zeros_like(latents))
    keys = jax.random.split(jax.random.key(0), len(latents))
    attention = Attention(recorder, "search", jnp.int32(step), jnp.int32(1), keys, 1)
    denoise(*nnx.split(pipeline.model), schedule, carry, text, jnp.float32(1), attention)
    jax.effects_barrier()
    return _recording(recorder, pipeline.card, settings)


def _recording(recorder: _Recorder, card: Card, settings: Settings) -> Recording:
    """What the recorder has handed over."""
    q, k, v = _KEPT.pop()
    name = f"{card.name}, layer {recorder.layer}, step {recorder.step}"
    return Recording(q, k, v, card.grid(settings), name, card.config.num_layers)


def planted(grid: TokenGrid, *, head_dim: int = 64, seed: int = 0) -> Recording:
    """Three heads of known shape in a Wan of random weights, batch 1: local, cross-shaped, global.

    q, k and v are what the second and last layer of a small Wan attends with at the first step,
    from noise, its weights drawn as the original draws them before training. Such heads are near
    even, so the shapes are planted on its q and k, halved to stand out: q and k of the first head
    make logits that fall with the squared distance (e-fold at two tokens), of the second ones that
    reward an equal row or column (twice for both), whatever the frame; in the third head every
    fiftieth key draws all queries, the rest is left as it is.

    Args:
        grid: video tokens; rows + columns at most half of `head_dim`.
        head_dim: H, even and at least 16.
        seed: of the weights and of the noise.

    Raises:
        ValueError: rows and columns that do not fit the head.
    """
    places = grid.rows + grid.columns
    if head_dim < 16 or 2 * places > head_dim:
        raise ValueError(
            f"{head_dim=} must be at least 16 and twice the {places} rows and columns of {grid}"
        )
    recording = _random_wan(grid, head_dim, seed)
    q, k = (0.5 * x.astype(np.float64) for x in (recording.q, recording.k))
    root = head_dim**0.5  # attention divides by it
    axes = [x.reshape(-1).astype(np.float64) for x in np.indices(grid.sizes)]
    at = np.stack([x - x.mean() for x in axes], 1)
    # −|a − b|²/4 = a·b/2 − |b|²/4, but for a term that all keys of a query share.
    q[0, :, 0, :4] = np.concatenate([at, np.ones((len(at), 1))], 1) * root
    k[0, :, 0, :4] = np.concatenate([at / 2, -(at**2).sum(1, keepdims=True) / 4], 1)
    cross = np.concatenate([np.eye(grid.rows)[axes[1].astype(int)], _one_hot(grid, axes)], 1)
    q[0, :, 1, :places] += 4 * root * cross
    k[0, :, 1, :places] += cross
    q[0, :, 2, 0] = root
    k[0, :, 2, 0] = np.where(np.arange(grid.num_tokens) % 50 == 0, 4.0, 0.0)
    q, k = (x.astype(np.float32) for x in (q, k))
    return Recording(q, k, recording.v, grid, "random Wan, planted heads")


def _random_wan(grid: TokenGrid, head_dim: int, seed: int) -> Recording:
    """The second layer of a Wan of three heads and random weights, on noise."""
    config = WanConfig(
        in_channels=4,
        out_channels=4,
        patch=(1, 1, 1),
        dim=3 * head_dim,
        num_heads=3,
        num_layers=2,
        ffn_dim=6 * head_dim,
        freq_dim=32,
        text_dim=16,
        text_len=8,
        eps=1e-6,
    )
    settings = Settings(2, 3.0, 1.0, "euler", grid.frames, grid.columns, grid.rows)
    lacks = dict(causal=False, scenes=False, has_text=False, has_video=False)
    about = dict(name="random Wan", folder=Path(), fps=8.0, defaults=settings)
    card = Card(config=config, weights="random", cell=(1, 1, 1), **lacks, **about)
    model = _random_model(config, jax.random.key(seed))
    latents = start_noise(seed_keys([seed])[0], card.latent_shape(settings))
    text = jnp.zeros((1, config.text_len, config.text_dim), jnp.float32)  # no words
    pipeline = Pipeline(card, model, None, None)
    return record_step(pipeline, np.asarray(latents), text, settings, layer=1, step=0)


@functools.partial(nnx.jit, static_argnums=0)  # eager, every draw compiles for itself
def _random_model(config: WanConfig, key: jax.Array) -> Wan:
    return Wan(config, dtype=jnp.float32, rngs=nnx.Rngs(key))


def _one_hot(grid: TokenGrid, axes: list[np.ndarray]) -> np.ndarray:
    return np.eye(grid.columns)[axes[2].astype(int)]
