"""Wan's video autoencoders: 2.1 (16 channels, 4x8x8) and 2.2 (48 channels, 4x16x16).

Memory of 81 frames of 1280x720 (2.2: 1280x704) as compiled for a CPU, GiB, everything counted:
parameters, the video (0.8) and the work. More frames add at most twice their own size.

            tiled in f32, bf16    whole in f32, bf16
2.1 decode       3.0    2.7           16.5   10.3
2.1 encode       2.0    1.8           13.2    8.8
2.2 decode       4.6    5.4           16.6   13.0
2.2 encode       3.4    3.1            6.9    5.4

Tiles are of 256x256 pixels, 512x512 where 2.2 encodes. A CPU computes bfloat16 convolutions in f32,
weights copied, which a GPU does not.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pasa_jax.pallas_kernels import api

NORM_EPS = 1e-12  # least length of a normalised vector, fixed in the published code
LOG_VARIANCES = (-30.0, 20.0)  # the published code cuts the posterior's log variance to these
OVERLAP = 4  # tiles overlap by a quarter, diffusers' default

# Mean and deviation of each latent channel, as the released models have them.
MEAN_2_1 = "-.7571 -.7089 -.9113 .1075 -.1745 .9653 -.1517 1.5508 .4134 -.0715 .5517 -.3632 -.1922"
MEAN_2_1 += " -.9497 .2503 -.2921"
STD_2_1 = "2.8184 1.4541 2.3275 2.6558 1.2196 1.7708 2.6052 2.0743 3.2687 2.1526 2.8652 1.5579"
STD_2_1 += " 1.6382 1.1253 2.8251 1.9160"
MEAN_2_2 = """
    -.2289 -.0052 -.1323 -.2339 -.2799 .0174 .1838 .1557 -.1382 .0542 .2813 .0891 .1570 -.0098 .0375
    -.1825 -.2246 -.1207 -.0698 .5109 .2665 -.2108 -.2158 .2502 -.2055 -.0322 .1109 .1567 -.0729
    .0899 -.2799 -.1230 -.0313 -.1649 .0117 .0723 -.2839 -.2083 -.0520 .3748 .0152 .1957 .1433
    -.2944 .3573 -.0548 -.1681 -.0667"""
STD_2_2 = """
    .4765 1.0364 .4514 1.1677 .5313 .4990 .4818 .5013 .8158 1.0344 .5894 1.0901 .6885 .6165 .8454
    .4978 .5759 .3523 .7135 .6804 .5833 1.4146 .8986 .5659 .7069 .5338 .4889 .4917 .4069 .4999 .6866
    .4093 .5709 .6065 .6415 .4944 .5726 1.2042 .5458 1.6887 .3971 1.0600 .3943 .5537 .5444 .4089
    .7468 .7744"""


@dataclasses.dataclass(frozen=True)
class WanVAEConfig:
    """Architecture of one autoencoder.

    Attributes:
        channels: of a frame, 3 for RGB.
        patch: pixels along each side that become channels before the first convolution.
        latent_channels: C of the latents.
        encoder_dim, decoder_dim: width at full resolution.
        multipliers: width of each level over that; every level but the last halves rows and
            columns.
        temporal: for each of those levels, whether it halves the frames too.
        blocks: residual blocks of an encoder's level; a decoder's has one more.
        residual: levels have shortcuts around them (Wan 2.2).
        latents_mean, latents_std: of each latent channel over the training videos.
    """

    channels: int
    patch: int
    latent_channels: int
    encoder_dim: int
    decoder_dim: int
    multipliers: tuple[int, ...]
    temporal: tuple[bool, ...]
    blocks: int
    residual: bool
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]

    def __post_init__(self):
        if len(self.temporal) != len(self.multipliers) - 1:
            raise ValueError(f"{self.temporal=} must be one shorter than {self.multipliers=}")
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.latent_channels:
                count = len(getattr(self, name))
                raise ValueError(f"{name} has {count} values, must be {self.latent_channels=}")
        if not all(std > 0 for std in self.latents_std):
            raise ValueError(f"{self.latents_std=} must be positive")
        if not self.residual and any(size % 2 for size in self.decoder_dims[1:-1]):
            raise ValueError(f"{self.decoder_dims=} must be even: upsampling halves the width")
        for i, (size, out) in enumerate(self.encoder_levels if self.residual else ()):
            if size * self.factor(i) % out:
                raise ValueError(f"{self.encoder_dims=}: a level's shortcut cannot split evenly")
        for i, (size, out) in enumerate(self.decoder_levels[:-1] if self.residual else ()):
            if out * self.factor(len(self.temporal) - 1 - i) % size:
                raise ValueError(f"{self.decoder_dims=}: a level's shortcut cannot split evenly")

    def factor(self, level: int) -> int:
        """Pixels that an encoder's level makes one of."""
        return (8 if self.temporal[level] else 4) if level < len(self.temporal) else 1

    @property
    def num_layers(self) -> int:
        """Residual blocks of all levels."""
        return len(self.multipliers) * (2 * self.blocks + 1)

    @property
    def spatial_stride(self) -> int:
        """Pixels along each side of a latent cell."""
        return self.patch * 2 ** len(self.temporal)

    @property
    def temporal_stride(self) -> int:
        """Frames of a latent frame; the first latent frame holds one."""
        return 2 ** sum(self.temporal)

    @property
    def encoder_dims(self) -> list[int]:
        """Widths before, between and behind the encoder's levels."""
        return [self.encoder_dim * m for m in (1, *self.multipliers)]

    @property
    def decoder_dims(self) -> list[int]:
        """Widths before, between and behind the decoder's levels."""
        return [self.decoder_dim * m for m in (self.multipliers[-1], *self.multipliers[::-1])]

    @property
    def encoder_levels(self) -> list[tuple[int, int]]:
        """Width into and out of each level."""
        return list(zip(self.encoder_dims[:-1], self.encoder_dims[1:], strict=True))

    @property
    def decoder_levels(self) -> list[tuple[int, int]]:
        """Width into and out of each level; without shortcuts upsampling halves the width."""
        first, *rest = zip(self.decoder_dims[:-1], self.decoder_dims[1:], strict=True)
        return [first, *((size if self.residual else size // 2, out) for size, out in rest)]

    @classmethod
    def wan_2_1(cls) -> "WanVAEConfig":
        """Wan2.1_VAE, which Wan 2.2's A14B models share."""
        return cls(
            channels=3,
            patch=1,
            latent_channels=16,
            encoder_dim=96,
            decoder_dim=96,
            multipliers=(1, 2, 4, 4),
            temporal=(False, True, True),
            blocks=2,
            residual=False,
            latents_mean=tuple(map(float, MEAN_2_1.split())),
            latents_std=tuple(map(float, STD_2_1.split())),
        )

    @classmethod
    def wan_2_2(cls) -> "WanVAEConfig":
        """Wan2.2_VAE, of Wan2.2-TI2V-5B."""
        return dataclasses.replace(
            cls.wan_2_1(),
            patch=2,
            latent_channels=48,
            encoder_dim=160,
            decoder_dim=256,
            residual=True,
            latents_mean=tuple(map(float, MEAN_2_2.split())),
            latents_std=tuple(map(float, STD_2_2.split())),
        )


class RMSNorm(nnx.Module):
    """Root-mean-square norm of each pixel's channels, f32 inside and out."""

    def __init__(self, dim: int):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))

    def __call__(self, x: Float[Array, "B F Y X C"]) -> Float[Array, "B F Y X C"]:
        y = x.astype(jnp.float32)
        square = jnp.mean(y * y, -1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.maximum(square, NORM_EPS**2 / x.shape[-1]))
        return y * self.scale.get_value()[None, None, None, None, :]


class CausalConv(nnx.Conv):
    """Convolution over three frames: this one and the two before it.

    `past` is those two frames of its input, None at the start of a video; they come back for the
    next call. All layers below keep their past in this way, so that a video can pass in chunks.
    """

    def __init__(self, dim: int, out: int, dtypes: dict, rngs: nnx.Rngs, side: int = 3):
        around = (side // 2, side // 2)
        kernel, padding = (3, side, side), ((0, 0), around, around)
        super().__init__(dim, out, kernel, padding=padding, rngs=rngs, **dtypes)

    def __call__(self, x, past):
        x = x.astype(self.dtype)
        if past is None:
            past = empty_past(x)
        x = jnp.concatenate([past, x], axis=1)
        return super().__call__(x), x[:, -2:]


def empty_past(x: Float[Array, "B F Y X C"]) -> Float[Array, "B 2 Y X C"]:
    """What a causal convolution sees before a video."""
    return jnp.zeros((x.shape[0], 2, *x.shape[2:]), x.dtype)


class ResBlock(nnx.Module):
    """Two causal convolutions, each behind a norm and SiLU, around them a shortcut."""

    def __init__(self, dim: int, out: int, dtypes: dict, rngs: nnx.Rngs):
        self.norm1, self.norm2 = RMSNorm(dim), RMSNorm(out)
        self.conv1 = CausalConv(dim, out, dtypes, rngs)
        self.conv2 = CausalConv(out, out, dtypes, rngs)
        self.shortcut = nnx.Linear(dim, out, rngs=rngs, **dtypes) if dim != out else None

    def __call__(self, x, past):
        first, second = past or (None, None)
        y, first = self.conv1(jax.nn.silu(self.norm1(x)), first)
        y, second = self.conv2(jax.nn.silu(self.norm2(y)), second)
        return y + (self.shortcut(x) if self.shortcut else x), (first, second)


class FrameAttention(nnx.Module):
    """Attention of one head among the pixels of each frame; keeps no past."""

    def __init__(self, dim: int, dtypes: dict, rngs: nnx.Rngs):
        self.norm = RMSNorm(dim)
        self.qkv = nnx.Linear(dim, 3 * dim, rngs=rngs, **dtypes)
        self.proj = nnx.Linear(dim, dim, rngs=rngs, **dtypes)

    def __call__(self, x, past):
        tokens = rearrange(self.qkv(self.norm(x)), "b f y x c -> (b f) (y x) 1 c")
        out = api.dense_attention(*jnp.split(tokens, 3, axis=-1))
        out = rearrange(out, "(b f) (y x) 1 c -> b f y x c", f=x.shape[1], y=x.shape[2])
        return x + self.proj(out), None


class Down(nnx.Module):
    """Halves rows and columns and, if temporal, frames; the first frame of a video stays one."""

    def __init__(self, dim: int, temporal: bool, dtypes: dict, rngs: nnx.Rngs):
        more = dict(rngs=rngs, **dtypes)
        self.space = nnx.Conv(dim, dim, (3, 3), strides=2, padding=((0, 1), (0, 1)), **more)
        time = dict(strides=(2, 1, 1), padding="VALID")
        self.time = nnx.Conv(dim, dim, (3, 1, 1), **time, **more) if temporal else None

    def __call__(self, x, past):
        x = self.space(x)
        if self.time is None:
            return x, None
        y = x if past is None else self.time(jnp.concatenate([past, x], axis=1))
        return y, x[:, -1:]


class Up(nnx.Module):
    """Doubles rows and columns and, if temporal, frames; the first frame of a video stays one."""

    def __init__(self, dim: int, out: int, temporal: bool, dtypes: dict, rngs: nnx.Rngs):
        self.time = CausalConv(dim, 2 * dim, dtypes, rngs, side=1) if temporal else None
        self.space = nnx.Conv(dim, out, (3, 3), padding=1, rngs=rngs, **dtypes)

    def __call__(self, x, past):
        if self.time is not None and past is None:
            past = empty_past(x)  # as published: the first frame is left out of the past
        elif self.time is not None:
            x, past = self.time(x, past)
            x = rearrange(x, "b f y x (two c) -> b (f two) y x c", two=2)
        return self.space(jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)), past


def run(layers: Sequence[nnx.Module], x, past):
    """The layers in turn, each with its own past."""
    kept = []
    for layer, own in zip(layers, past or [None] * len(layers), strict=True):
        x, own = layer(x, own)
        kept.append(own)
    return x, kept


def pool(x: Float[Array, "B F Y X C"], out: int, temporal: bool, spatial: bool):
    """The encoder's shortcut: pixels to channels, then means of `out` groups of channels."""
    ft, fs = 1 + temporal, 1 + spatial
    x = jnp.pad(x, ((0, 0), (-x.shape[1] % ft, 0), (0, 0), (0, 0), (0, 0)))
    pattern = "b (f ft) (y fy) (x fx) c -> b f y x (c ft fy fx)"
    x = rearrange(x, pattern, ft=ft, fy=fs, fx=fs)
    return jnp.mean(rearrange(x, "b f y x (c group) -> b f y x c group", c=out), axis=-1)


def spread(x: Float[Array, "B F Y X C"], out: int, temporal: bool, first: bool):
    """The decoder's shortcut: channels repeated, then to pixels; the first frame stays one."""
    ft = 1 + temporal
    x = jnp.repeat(x, out * ft * 4 // x.shape[-1], axis=-1)
    pattern = "b f y x (c ft fy fx) -> b (f ft) (y fy) (x fx) c"
    x = rearrange(x, pattern, ft=ft, fy=2, fx=2)
    return x[:, ft - 1 :] if first else x


class EncoderLevel(nnx.Module):
    """Residual blocks, then, but for the last level, halving."""

    def __init__(self, config: WanVAEConfig, level: int, dtypes: dict, rngs: nnx.Rngs):
        dim, self.out = config.encoder_levels[level]
        self.blocks = nnx.List(
            ResBlock(dim if i == 0 else self.out, self.out, dtypes, rngs)
            for i in range(config.blocks)
        )
        self.last = level == len(config.temporal)
        self.temporal = not self.last and config.temporal[level]
        self.down = None if self.last else Down(self.out, self.temporal, dtypes, rngs)
        self.residual = config.residual

    def __call__(self, x, past):
        layers = [*self.blocks, *([self.down] if self.down else [])]
        y, past = run(layers, x, past)
        if self.residual:
            y = y + pool(x, self.out, self.temporal, not self.last)
        return y, past


class DecoderLevel(nnx.Module):
    """Residual blocks, then, but for the last level, doubling."""

    def __init__(self, config: WanVAEConfig, level: int, dtypes: dict, rngs: nnx.Rngs):
        dim, out = config.decoder_levels[level]
        self.blocks = nnx.List(
            ResBlock(dim if i == 0 else out, out, dtypes, rngs) for i in range(config.blocks + 1)
        )
        last = level == len(config.temporal)
        self.temporal = not last and config.temporal[::-1][level]
        self.out = out if config.residual else out // 2
        self.up = None if last else Up(out, self.out, self.temporal, dtypes, rngs)
        self.residual = config.residual and not last

    def __call__(self, x, past):
        layers = [*self.blocks, *([self.up] if self.up else [])]
        y, kept = run(layers, x, past)
        if self.residual:
            y = y + spread(x, self.out, self.temporal, first=past is None)
        return y, kept


class Coder(nnx.Module):
    """What encoder and decoder share: layers between a first and a last convolution."""

    def __init__(self, dims: tuple[int, int, int, int], layers, dtypes: dict, rngs: nnx.Rngs):
        start, first, last, end = dims
        self.conv_in = CausalConv(start, first, dtypes, rngs)
        self.layers = nnx.List(layers)
        self.norm_out = RMSNorm(last)
        self.conv_out = CausalConv(last, end, dtypes, rngs)

    def __call__(self, x, past):
        first, inner, last = past or (None, None, None)
        x, first = self.conv_in(x, first)
        x, inner = run(self.layers, x, inner)
        x, last = self.conv_out(jax.nn.silu(self.norm_out(x)), last)
        return x, (first, inner, last)


def middle(dim: int, dtypes: dict, rngs: nnx.Rngs) -> list[nnx.Module]:
    """The layers at the lowest resolution."""
    return [
        ResBlock(dim, dim, dtypes, rngs),
        FrameAttention(dim, dtypes, rngs),
        ResBlock(dim, dim, dtypes, rngs),
    ]


class WanVAE(nnx.Module):
    """Wan's autoencoder: video [B, 1 + 4n, ...] in [-1, 1] to latents [B, 1 + n, ...] and back.

    Every layer is causal in time. A video passes a latent frame at a time, each layer keeping the
    two frames that the next call sees: one program for the first frame, one for all others,
    memory independent of the length but for the video itself.

    Activations are in `dtype`, rounded behind every layer as in diffusers; norms, SiLU, softmax,
    the posterior and the returned arrays are f32.

    Args:
        config: the architecture.
        dtype: of the convolutions and of what is kept between chunks; the originals run in f32.
        param_dtype: of the stored parameters that may be rounded, all but norms; None takes
            `dtype`.
        rngs: for initial values.

    Source: Wan (arXiv 2503.20314).
    """

    def __init__(
        self,
        config: WanVAEConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        dtypes = dict(dtype=dtype, param_dtype=param_dtype or dtype)
        z, pixel = config.latent_channels, config.channels * config.patch**2
        levels = range(len(config.multipliers))
        self.config = config
        first, *_, last = config.encoder_dims
        layers = [EncoderLevel(config, level, dtypes, rngs) for level in levels]
        layers += middle(last, dtypes, rngs)
        self.encoder = Coder((pixel, first, last, 2 * z), layers, dtypes, rngs)
        self.quant = nnx.Linear(2 * z, 2 * z, rngs=rngs, **dtypes)
        self.post_quant = nnx.Linear(z, z, rngs=rngs, **dtypes)
        first, *_, last = config.decoder_dims
        layers = middle(first, dtypes, rngs)
        layers += [DecoderLevel(config, level, dtypes, rngs) for level in levels]
        self.decoder = Coder((z, first, last, pixel), layers, dtypes, rngs)

    def encode(
        self, video: Float[Array, "B frames rows columns channels"], tile: int | None = None
    ) -> tuple[Float[Array, "B F Y X C"], Float[Array, "B F Y X C"]]:
        """The posterior of a video's latents.

        Args:
            video: values in [-1, 1]; 1 + 4n frames; rows and columns multiples of a latent cell.
                For image-to-video, an image and zeros behind it.
            tile: rows and columns of a spatial tile, in latent cells, as for `decode`.

        Returns:
            Mean and log variance, f32, not normalised. The mean is what the pipelines take.

        Raises:
            ValueError: sizes or channels the model cannot take, or a tile below four cells.
        """
        config = self.config
        check_video(config, video)
        stride = config.spatial_stride

        def step(chunk, past):
            pattern = "b f (y py) (x px) c -> b f y x (c px py)"
            chunk = rearrange(chunk, pattern, py=config.patch, px=config.patch)
            moments, past = self.encoder(chunk, past)
            return self.quant(moments).astype(jnp.float32), past

        def whole(video):
            return in_chunks(step, video, config.temporal_stride, 1)

        moments = in_tiles(whole, video, tile, Scale(stride, 1, 1))
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, *LOG_VARIANCES)

    def decode(
        self, latents: Float[Array, "B F Y X C"], tile: int | None = None
    ) -> Float[Array, "B frames rows columns channels"]:
        """The video of latents that are not normalised.

        Args:
            latents: of any floating dtype.
            tile: rows and columns of a spatial tile, in latent cells; tiles overlap by a quarter
                and are blended linearly as by diffusers' `tiled_decode`. Each shape of tile
                (four at most sizes) is a program of its own. None decodes frames whole.

        Returns:
            Values in [-1, 1], f32, 1 + 4 (F - 1) frames.

        Raises:
            ValueError: latents of another model, or a tile below four cells.
        """
        config = self.config
        *_, channels = latents.shape
        if channels != config.latent_channels:
            raise ValueError(f"latents have {channels=}, must be {config.latent_channels=}")

        def step(chunk, past):
            pixels, past = self.decoder(self.post_quant(chunk), past)
            pattern = "b f y x (c px py) -> b f (y py) (x px) c"
            video = rearrange(pixels, pattern, py=config.patch, px=config.patch)
            return video.astype(jnp.float32), past

        def whole(latents):
            return in_chunks(step, latents, 1, config.temporal_stride)

        scale = Scale(1, config.spatial_stride, config.patch)
        return jnp.clip(in_tiles(whole, latents, tile, scale), -1, 1)

    def normalise(self, latents: Float[Array, "B F Y X C"]) -> Float[Array, "B F Y X C"]:
        """Latents of mean 0 and variance 1 over the training videos, as the transformers see."""
        mean, std = self._moments()
        return (latents.astype(jnp.float32) - mean) / std

    def denormalise(self, latents: Float[Array, "B F Y X C"]) -> Float[Array, "B F Y X C"]:
        """The inverse of `normalise`, which `decode` takes; f32."""
        mean, std = self._moments()
        return latents.astype(jnp.float32) * std + mean

    def _moments(self):
        """Mean and deviation of the latent channels, [1, 1, 1, 1, C]."""
        moments = (self.config.latents_mean, self.config.latents_std)
        return (jnp.asarray(m, jnp.float32)[None, None, None, None] for m in moments)


def check_video(config: WanVAEConfig, video) -> None:
    """Raises the ValueErrors of `encode` about the video."""
    _, frames, rows, columns, channels = video.shape
    if channels != config.channels:
        raise ValueError(f"video has {channels=}, must be {config.channels=}")
    if (frames - 1) % config.temporal_stride:
        raise ValueError(f"video has {frames=}, must be 1 + a multiple of {config.temporal_stride}")
    if rows % config.spatial_stride or columns % config.spatial_stride:
        stride = config.spatial_stride
        raise ValueError(f"video has {rows=}, {columns=}, must be multiples of {stride}")


def in_chunks(step: Callable, x: Array, size: int, out_size: int) -> Array:
    """Passes a video by its first frame, then `size` frames at a time.

    Args:
        step: (chunk, past) to (output, past); past is None for the first frame.
        x: video [B, 1 + size·n, ...].
        size, out_size: frames of a later chunk, and of its output; the first has one.

    Returns:
        The outputs along one axis of time, written in place: no second copy of the video.
    """
    y, past = step(x[:, :1], None)
    count = (x.shape[1] - 1) // size
    if count == 0:
        return y
    out = jnp.zeros((y.shape[0], 1 + count * out_size, *y.shape[2:]), y.dtype)
    out = out.at[:, :1].set(y)

    def body(i: Array, carry: tuple[Any, Array]) -> tuple[Any, Array]:
        past, out = carry
        chunk = jax.lax.dynamic_slice_in_dim(x, 1 + i * size, size, axis=1)
        y, past = step(chunk, past)
        return past, jax.lax.dynamic_update_slice_in_dim(out, y, 1 + i * out_size, axis=1)

    return jax.lax.fori_loop(0, count, body, (past, out))[1]


@dataclasses.dataclass(frozen=True)
class Scale:
    """Input and output pixels along each side of a latent cell, and of one step of blending."""

    input: int
    output: int
    grain: int


@dataclasses.dataclass(frozen=True)
class Span:
    """A tile's place along one axis and its share of the output there.

    The share is a ramp up from the tile before, 1, and a ramp down into the tile after. diffusers
    blends above first, then left, with tiles blended before; worked out, a tile's weight is
    `body`(y) · `linear`(x) + `tail`(y) · `squared`(x).

    Attributes:
        start, size: in latent cells.
        body, tail: the ramp up and 1; the ramp down; each 0 where the other stands.
        linear: body + tail; squared: the same of a squared ramp up.
    """

    start: int
    size: int
    body: np.ndarray
    tail: np.ndarray
    linear: np.ndarray
    squared: np.ndarray


def spans(size: int, tile: int, scale: Scale) -> list[Span]:
    """The tiles along an axis of `size` cells."""
    overlap = tile // OVERLAP
    stride = tile - overlap

    def ramp(start: int) -> np.ndarray:
        steps = min(overlap, size - start) * scale.output // scale.grain
        return np.repeat(np.arange(steps) / steps, scale.grain)

    found = []
    for start in range(0, size, stride):
        length = min(tile, size - start)
        up = np.ones(min(stride, length) * scale.output)
        if start:
            up[: len(ramp(start))] = ramp(start)
        down = ramp(start + stride) if length > stride else np.zeros(0)
        body, tail = np.append(up, 0 * down), np.append(0 * up, 1 - down)
        squared = np.append(up**2, 1 - down**2)
        found.append(Span(start, length, body, tail, body + tail, squared))
    return found


def in_tiles(whole: Callable, x: Array, tile: int | None, scale: Scale) -> Array:
    """Passes a video in spatial tiles, one after the other, and blends them.

    Args:
        whole: of a tile [B, F, rows, columns, C] the output, in `scale`.
        x: video whose rows and columns are multiples of `scale.input`.
        tile: in latent cells; None, or one that holds the whole frame, passes it whole.

    Returns:
        The output, f32; beside it one tile's work is in memory.

    Raises:
        ValueError: a tile below four cells, which leaves no overlap.
    """
    if tile is not None and tile < OVERLAP:
        raise ValueError(f"{tile=} must be at least {OVERLAP} latent cells")
    cells = [side // scale.input for side in x.shape[2:4]]
    if tile is None or max(cells) <= tile:
        return whole(x)
    shapes: dict[tuple[int, int], list[tuple[Span, Span]]] = {}
    rows, columns = (spans(side, tile, scale) for side in cells)
    for row in rows:
        for column in columns:
            shapes.setdefault((row.size, column.size), []).append((row, column))
    full = jax.eval_shape(whole, x)
    out = jnp.zeros(full.shape, jnp.float32)
    for (height, width), tiles in shapes.items():
        out = add_tiles(whole, x, out, (height, width), tiles, scale)
    return out


def add_tiles(whole: Callable, x, out, size: tuple[int, int], tiles, scale: Scale):
    """Adds the weighted outputs of tiles of one shape to `out`."""
    height, width = (side * scale.input for side in size)
    f32 = jnp.float32
    scanned = {
        "start": jnp.asarray([(row.start, column.start) for row, column in tiles], jnp.int32),
        "body": jnp.asarray(np.stack([row.body for row, _ in tiles]), f32),
        "tail": jnp.asarray(np.stack([row.tail for row, _ in tiles]), f32),
        "linear": jnp.asarray(np.stack([column.linear for _, column in tiles]), f32),
        "squared": jnp.asarray(np.stack([column.squared for _, column in tiles]), f32),
    }

    def body(out, one):
        y0, x0 = one["start"]
        part = jax.lax.dynamic_slice_in_dim(x, y0 * scale.input, height, axis=2)
        part = whole(jax.lax.dynamic_slice_in_dim(part, x0 * scale.input, width, axis=3))
        weight = jnp.outer(one["body"], one["linear"]) + jnp.outer(one["tail"], one["squared"])
        place = (0, 0, y0 * scale.output, x0 * scale.output, 0)
        old = jax.lax.dynamic_slice(out, place, part.shape)
        new = old + part * weight[None, None, :, :, None]
        return jax.lax.dynamic_update_slice(out, new, place), None

    return jax.lax.scan(body, out, scanned)[0]
