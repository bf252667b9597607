"""Wan 2.1 text-to-video transformer (arXiv 2503.20314)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pasa_jax.attention import Attention, LayerRecord, attend, sequence_order
from pasa_jax.grid import TokenGrid
from pasa_jax.pallas_kernels import api

ROPE_THETA = 10_000.0  # fixed in the published code
ROPE_POSITIONS = 1024  # rows of the published rotary table, hence the longest side of a grid


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """Architecture of one Wan transformer.

    Attributes:
        in_channels, out_channels: latent channels C of the input and of the velocity.
        patch: latent frames, rows and columns that make one token.
        dim: model width D, num_heads · head_dim.
        ffn_dim: hidden width of the feed-forward layers.
        freq_dim: sinusoids of the timestep, half cosines, half sines.
        text_dim: width of the text encoder's states.
        text_len: text tokens; shorter prompts are padded with zeros, which are attended to.
        eps: of every normalisation.
    """

    in_channels: int
    out_channels: int
    patch: tuple[int, int, int]
    dim: int
    num_heads: int
    num_layers: int
    ffn_dim: int
    freq_dim: int
    text_dim: int
    text_len: int
    eps: float

    def __post_init__(self):
        if self.dim % self.num_heads:
            raise ValueError(f"{self.dim=} must be a multiple of {self.num_heads=}")
        if self.head_dim % 2:
            raise ValueError(f"{self.head_dim=} must be even: rotary embedding turns pairs")
        if self.freq_dim % 2:
            raise ValueError(f"{self.freq_dim=} must be even: half cosines, half sines")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @classmethod
    def t2v_1_3b(cls) -> "WanConfig":
        """Wan2.1-T2V-1.3B."""
        return cls(
            in_channels=16,
            out_channels=16,
            patch=(1, 2, 2),
            dim=1536,
            num_heads=12,
            num_layers=30,
            ffn_dim=8960,
            freq_dim=256,
            text_dim=4096,
            text_len=512,
            eps=1e-6,
        )

    @classmethod
    def t2v_14b(cls) -> "WanConfig":
        """Wan2.1-T2V-14B."""
        small = cls.t2v_1_3b()
        return dataclasses.replace(small, dim=5120, num_heads=40, num_layers=40, ffn_dim=13824)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the whole width (all heads together), in f32."""

    def __init__(self, dim: int, eps: float):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        return y * self.scale.get_value()[None, None, :]


def layer_norm(x: Float[Array, "B T D"], eps: float) -> Float[Array, "B T D"]:
    """Layer norm without parameters; f32 in and out."""
    centred = x - jnp.mean(x, -1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + eps)


class SelfAttention(nnx.Module):
    """Attention among video tokens; q and k columns are in half-split rotary order."""

    def __init__(self, config: WanConfig, dtypes: dict, rngs: nnx.Rngs):
        dim = config.dim
        self.q = nnx.Linear(dim, dim, rngs=rngs, **dtypes)
        self.k = nnx.Linear(dim, dim, rngs=rngs, **dtypes)
        self.v = nnx.Linear(dim, dim, rngs=rngs, **dtypes)
        self.o = nnx.Linear(dim, dim, rngs=rngs, **dtypes)
        self.norm_q = RMSNorm(dim, config.eps)
        self.norm_k = RMSNorm(dim, config.eps)
        self.num_heads = config.num_heads

    def __call__(self, x, rope, attention: Attention | None, layer, state, grid: TokenGrid):
        v = self.split(self.v(x))
        q = rotate(self.split(self.norm_q(self.q(x))), rope).astype(v.dtype)
        k = rotate(self.split(self.norm_k(self.k(x))), rope).astype(v.dtype)
        out, record = attend(q, k, v, attention, layer=layer, state=state, grid=grid)
        return self.o(rearrange(out, "b t n h -> b t (n h)")), record

    def split(self, x):
        return rearrange(x, "b t (n h) -> b t n h", n=self.num_heads)


class CrossAttention(nnx.Module):
    """Attention from video tokens to text tokens, always dense."""

    def __init__(self, config: WanConfig, dtypes: dict, rngs: nnx.Rngs):
        dim = config.dim
        self.q = nnx.Linear(dim, dim, rngs=rngs, **dtypes)
        self.k = nnx.Linear(dim, dim, rngs=rngs, **dtypes)
        self.v = nnx.Linear(dim, dim, rngs=rngs, **dtypes)
        self.o = nnx.Linear(dim, dim, rngs=rngs, **dtypes)
        self.norm_q = RMSNorm(dim, config.eps)
        self.norm_k = RMSNorm(dim, config.eps)
        self.num_heads = config.num_heads

    def __call__(self, x, text):
        v = self.split(self.v(text))
        q = self.split(self.norm_q(self.q(x))).astype(v.dtype)
        k = self.split(self.norm_k(self.k(text))).astype(v.dtype)
        return self.o(rearrange(api.dense_attention(q, k, v), "b t n h -> b t (n h)"))

    def split(self, x):
        return rearrange(x, "b t (n h) -> b t n h", n=self.num_heads)


class Block(nnx.Module):
    """One layer: modulated self-attention, cross-attention, modulated feed-forward.

    The residual stream stays f32, as the original's autocast leaves it; matrix products run in
    the model's dtype.
    """

    def __init__(self, config: WanConfig, dtypes: dict, rngs: nnx.Rngs):
        dim = config.dim
        table = jax.random.normal(rngs.params(), (6, dim), jnp.float32) / dim**0.5
        self.modulation = nnx.Param(table)
        self.self_attn = SelfAttention(config, dtypes, rngs)
        self.norm_cross = nnx.LayerNorm(dim, epsilon=config.eps, rngs=rngs)
        self.cross_attn = CrossAttention(config, dtypes, rngs)
        self.ffn_up = nnx.Linear(dim, config.ffn_dim, rngs=rngs, **dtypes)
        self.ffn_down = nnx.Linear(config.ffn_dim, dim, rngs=rngs, **dtypes)
        self.eps = config.eps

    def __call__(
        self, x, time, text, rope, attention: Attention | None, layer, state, grid: TokenGrid
    ):
        modulation = self.modulation.get_value()[None] + time  # [B, 6, D]
        shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = jnp.split(modulation, 6, axis=1)
        y = layer_norm(x, self.eps) * (1 + scale_sa) + shift_sa
        y, record = self.self_attn(y, rope, attention, layer, state, grid)
        x = x + y.astype(jnp.float32) * gate_sa
        x = x + self.cross_attn(self.norm_cross(x), text).astype(jnp.float32)
        y = layer_norm(x, self.eps) * (1 + scale_ff) + shift_ff
        y = self.ffn_down(jax.nn.gelu(self.ffn_up(y), approximate=True))
        return x + y.astype(jnp.float32) * gate_ff, record


class Wan(nnx.Module):
    """Wan 2.1 text-to-video: latents and text in, velocity out.

    Parameters of the blocks are stacked, leaves [num_layers, ...], and the layers scanned, so
    compile time does not grow with depth. Time embedding, modulation, norms and the head are f32
    whatever `param_dtype` is, as in the original.

    Args:
        config: the architecture.
        dtype: of the matrix products.
        param_dtype: of the stored parameters that may be rounded; None takes `dtype`.
        rngs: for initial values as the original draws them.
    """

    def __init__(
        self,
        config: WanConfig,
        *,
        dtype: DTypeLike = jnp.bfloat16,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        dtypes = dict(
            dtype=dtype,
            param_dtype=param_dtype or dtype,
            kernel_init=nnx.initializers.xavier_uniform(),
        )
        f32 = dict(dtype=jnp.float32, param_dtype=jnp.float32)
        narrow = dict(kernel_init=nnx.initializers.normal(0.02))
        dim, patch = config.dim, int(np.prod(config.patch))
        self.config = config
        self.patch_embedding = nnx.Linear(patch * config.in_channels, dim, rngs=rngs, **dtypes)
        self.text_in = nnx.Linear(config.text_dim, dim, rngs=rngs, **{**dtypes, **narrow})
        self.text_out = nnx.Linear(dim, dim, rngs=rngs, **{**dtypes, **narrow})
        self.time_in = nnx.Linear(config.freq_dim, dim, rngs=rngs, **f32, **narrow)
        self.time_out = nnx.Linear(dim, dim, rngs=rngs, **f32, **narrow)
        self.time_projection = nnx.Linear(dim, 6 * dim, rngs=rngs, **f32)
        self.blocks = stack(config.num_layers, lambda rngs: Block(config, dtypes, rngs), rngs)
        self.head_modulation = nnx.Param(
            jax.random.normal(rngs.params(), (2, dim), jnp.float32) / dim**0.5
        )
        self.head = nnx.Linear(
            dim,
            patch * config.out_channels,
            rngs=rngs,
            kernel_init=nnx.initializers.zeros_init(),
            **f32,
        )

    def __call__(
        self,
        latents: Float[Array, "B F Y X C"],
        timestep: Float[Array, " B"],
        text_states: Float[Array, "B E D"],
        attention: Attention | None = None,
    ) -> tuple[Float[Array, "B F Y X C"], LayerRecord]:
        """Predicts the flow-matching velocity.

        Args:
            latents: noisy latents, F, Y, X multiples of the patch.
            timestep: noise level times 1000, in [0, 1000].
            text_states: the text encoder's output, at most `text_len` tokens; rows beyond a
                prompt's own tokens must be zero.
            attention: policy and step of the self-attention; None runs it dense.

        Returns:
            Velocity in f32, and the layers' records: the policy's state after this pass, and the
            density [num_layers] of its attention.

        Raises:
            ValueError: sizes the patch does not divide, grids beyond the rotary table, too many
                text tokens, channels or widths of another model.
        """
        velocity, records, _ = self.with_residual(latents, timestep, text_states, attention)
        return velocity, records

    def with_residual(
        self,
        latents: Float[Array, "B F Y X C"],
        timestep: Float[Array, " B"],
        text_states: Float[Array, "B E D"],
        attention: Attention | None = None,
    ) -> tuple[Float[Array, "B F Y X C"], LayerRecord, Float[Array, "B T width"]]:
        """The same pass, which also returns what `skip` needs.

        Args:
            latents, timestep, text_states, attention: as for the call.

        Returns:
            Velocity and records as the call's, and the residual: the blocks' output minus their
            input, f32, tokens in raster order whatever the policy's order.

        Raises:
            ValueError: as the call.
        """
        config = self.config
        check_inputs(config, latents, text_states)
        sizes = self._sizes(latents)
        start = x = self._tokens(latents)
        time, modulation = self.embed_time(timestep)
        padding = ((0, 0), (0, config.text_len - text_states.shape[1]), (0, 0))
        text = self.text_in(jnp.pad(text_states, padding))
        text = self.text_out(jax.nn.gelu(text, approximate=True))
        rope = rope_table(sizes, config.head_dim)
        grid = TokenGrid(*sizes)
        order = sequence_order(attention, grid)
        if order is not None:
            x, rope = x[:, order], tuple(table[order] for table in rope)

        graph, params = nnx.split(self.blocks)

        def body(x, scanned):
            params, layer, state = scanned
            block = nnx.merge(graph, params)
            return block(x, modulation, text, rope, attention, layer, state, grid)

        layers = jnp.arange(config.num_layers, dtype=jnp.int32)
        state = () if attention is None else attention.state
        x, records = jax.lax.scan(body, x, (params, layers, state))
        if order is not None:
            x = x[:, np.argsort(order)]
        return self._velocity(x, time, sizes), records, x - start

    def skip(
        self,
        latents: Float[Array, "B F Y X C"],
        timestep: Float[Array, " B"],
        residual: Float[Array, "B T D"],
    ) -> Float[Array, "B F Y X C"]:
        """Velocity of a pass without the blocks: an earlier pass's residual stands for them.

        Args:
            latents, timestep: as for the call.
            residual: from `with_residual`, of latents of this shape; the text is in it.

        Returns:
            Velocity in f32.
        """
        time, _ = self.embed_time(timestep)
        return self._velocity(self._tokens(latents) + residual, time, self._sizes(latents))

    def embed_time(
        self, timestep: Float[Array, " B"]
    ) -> tuple[Float[Array, "B D"], Float[Array, "B 6 D"]]:
        """The time embedding, which the head takes, and the blocks' modulation from it; f32."""
        time = self.time_in(sinusoids(timestep, self.config.freq_dim))
        time = self.time_out(jax.nn.silu(time))
        modulation = self.time_projection(jax.nn.silu(time))
        return time, rearrange(modulation, "b (s d) -> b s d", s=6)

    def _sizes(self, latents) -> list[int]:
        """Tokens along F, Y and X."""
        return [size // p for size, p in zip(latents.shape[1:4], self.config.patch, strict=True)]

    def _tokens(self, latents):
        """The stream before the blocks [B, T, D], f32, raster order."""
        tokens = rearrange(
            latents,
            "b (f pf) (y py) (x px) c -> b (f y x) (pf py px c)",
            **dict(zip(("pf", "py", "px"), self.config.patch, strict=True)),
        )
        return self.patch_embedding(tokens).astype(jnp.float32)

    def _velocity(self, x, time, sizes):
        """The head: from the stream behind the blocks to latents' shape."""
        shift, scale = jnp.split(self.head_modulation.get_value()[None] + time[:, None], 2, axis=1)
        return rearrange(
            self.head(layer_norm(x, self.config.eps) * (1 + scale) + shift),
            "b (f y x) (pf py px c) -> b (f pf) (y py) (x px) c",
            **dict(zip(("f", "y", "x"), sizes, strict=True)),
            **dict(zip(("pf", "py", "px"), self.config.patch, strict=True)),
        )


def stack(num_layers: int, create, rngs: nnx.Rngs) -> nnx.Module:
    """`num_layers` modules as one, parameters stacked along a new first axis."""

    @nnx.split_rngs(splits=num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stacked(rngs):
        return create(rngs)

    return stacked(rngs)


def check_inputs(config: WanConfig, latents, text_states) -> None:
    """Raises the ValueErrors of `Wan.__call__`."""
    *_, channels = latents.shape
    if channels != config.in_channels:
        raise ValueError(f"latents have {channels=}, the model takes {config.in_channels=}")
    for size, p, axis in zip(latents.shape[1:4], config.patch, "FYX", strict=True):
        if size % p:
            raise ValueError(f"latents' axis {axis} has {size=}, it must be a multiple of {p}")
        if size // p > ROPE_POSITIONS:
            raise ValueError(f"latents' axis {axis} has {size=}, at most {p * ROPE_POSITIONS}")
    tokens, width = text_states.shape[1:]
    if tokens > config.text_len:
        raise ValueError(f"text_states have {tokens=}, at most {config.text_len=}")
    if width != config.text_dim:
        raise ValueError(f"text_states have {width=}, the model takes {config.text_dim=}")


def sinusoids(timestep: Float[Array, " B"], freq_dim: int) -> Float[Array, "B K"]:
    """Cosines, then sines, of the timestep at freq_dim / 2 frequencies from 1 down to 1/10000."""
    half = freq_dim // 2
    frequencies = jnp.asarray(10_000.0 ** (-np.arange(half) / half), jnp.float32)
    angles = timestep.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rope_table(sizes: list[int], head_dim: int) -> tuple[Float[Array, "T P"], Float[Array, "T P"]]:
    """Cosines and sines of the rotary embedding over a grid, raster order; P = head_dim / 2 pairs.

    Rows and columns get a third of the pairs each, rounded down, frames the rest. Angles are
    computed in f64 per axis and only then broadcast, so the program holds no T×P constant.
    """
    pairs = head_dim // 2
    shares = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    cosines, sines = [], []
    for axis, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        frequencies = ROPE_THETA ** (-np.arange(share) / max(share, 1))
        angles = np.outer(np.arange(size), frequencies)
        shape = [1, 1, 1, share]
        shape[axis] = size
        for tables, values in ((cosines, np.cos(angles)), (sines, np.sin(angles))):
            table = jnp.asarray(values.reshape(shape), jnp.float32)
            tables.append(jnp.broadcast_to(table, (*sizes, share)))
    flat = "f y x p -> (f y x) p"
    return (
        rearrange(jnp.concatenate(cosines, -1), flat),
        rearrange(jnp.concatenate(sines, -1), flat),
    )


def rotate(x: Float[Array, "B T N H"], rope) -> Float[Array, "B T N H"]:
    """Turns pairs (h, h + H/2) by the table's angles, in f32.

    The published order is interleaved pairs (2h, 2h + 1); conversion permutes the columns of q
    and k once, because half-split order moves 1.6-2.4 GB less per large layer on a TPU.
    """
    cos, sin = (table[None, :, None, :] for table in rope)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
