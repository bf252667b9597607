"""Wan's autoencoders: names of both published layouts, diffusers' config, one model."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from pasa_jax.convert.reader import Entry
from pasa_jax.convert.rules import Rule
from pasa_jax.convert.wan import VECTOR, check_size
from pasa_jax.models.wan_vae import WanVAE, WanVAEConfig

VIDEO_CONV = "o i t y x -> t y x i o"
FRAME_CONV = "o i y x -> y x i o"
VIDEO_LINEAR = "o i 1 1 1 -> i o"
FRAME_LINEAR = "o i 1 1 -> i o"
VIDEO_SCALE = "d 1 1 1 -> d"
FRAME_SCALE = "d 1 1 -> d"
IGNORED = ()

# diffusers' name, the original's name, the parameter, the transform.
Row = tuple[str, str, str, str]

# A residual block's parts in diffusers and in the original.
BLOCK_PARTS = {
    "norm1": ("norm1", "residual.0"),
    "conv1": ("conv1", "residual.2"),
    "norm2": ("norm2", "residual.3"),
    "conv2": ("conv2", "residual.6"),
}


def layer(diffusers: str, original: str, path: str, weight: str) -> Iterator[Row]:
    """The rows of a convolution or linear layer."""
    yield f"{diffusers}.weight", f"{original}.weight", f"{path}/kernel", weight
    yield f"{diffusers}.bias", f"{original}.bias", f"{path}/bias", VECTOR


def scale(diffusers: str, original: str, path: str, transform: str = VIDEO_SCALE) -> Row:
    """The row of a norm."""
    return f"{diffusers}.gamma", f"{original}.gamma", f"{path}/scale", transform


def block(diffusers: str, original: str, path: str, shortcut: bool) -> Iterator[Row]:
    """The rows of a residual block."""
    for part, names in BLOCK_PARTS.items():
        theirs = (f"{diffusers}.{names[0]}", f"{original}.{names[1]}", f"{path}/{part}")
        if part.startswith("norm"):
            yield scale(*theirs)
        else:
            yield from layer(*theirs, VIDEO_CONV)
    if shortcut:
        names = (f"{diffusers}.conv_shortcut", f"{original}.shortcut", f"{path}/shortcut")
        yield from layer(*names, VIDEO_LINEAR)


def resample(diffusers: str, original: str, path: str, temporal: bool) -> Iterator[Row]:
    """The rows of a halving or doubling."""
    names = (f"{diffusers}.resample.1", f"{original}.resample.1", f"{path}/space")
    yield from layer(*names, FRAME_CONV)
    if temporal:
        names = (f"{diffusers}.time_conv", f"{original}.time_conv", f"{path}/time")
        yield from layer(*names, VIDEO_CONV)


def middle(coder: str, start: int) -> Iterator[Row]:
    """The rows of the layers at the lowest resolution, the model's from `start`."""
    for i in range(2):
        names = (f"{coder}.mid_block.resnets.{i}", f"{coder}.middle.{2 * i}")
        yield from block(*names, f"{coder}/layers/{start + 2 * i}", False)
    path = f"{coder}/layers/{start + 1}"
    diffusers, original = f"{coder}.mid_block.attentions.0", f"{coder}.middle.1"
    yield scale(f"{diffusers}.norm", f"{original}.norm", f"{path}/norm", FRAME_SCALE)
    yield from layer(f"{diffusers}.to_qkv", f"{original}.to_qkv", f"{path}/qkv", FRAME_LINEAR)
    yield from layer(f"{diffusers}.proj", f"{original}.proj", f"{path}/proj", FRAME_LINEAR)


def ends(coder: str) -> Iterator[Row]:
    """The rows of a coder's first and last layers."""
    yield from layer(f"{coder}.conv_in", f"{coder}.conv1", f"{coder}/conv_in", VIDEO_CONV)
    yield scale(f"{coder}.norm_out", f"{coder}.head.0", f"{coder}/norm_out")
    yield from layer(f"{coder}.conv_out", f"{coder}.head.2", f"{coder}/conv_out", VIDEO_CONV)


def encoder(config: WanVAEConfig) -> Iterator[Row]:
    """The rows of the encoder's levels; without shortcuts both layouts number them through."""
    flat = 0
    for i, (dim, out) in enumerate(config.encoder_levels):
        for j in range(config.blocks + (i < len(config.temporal))):
            down, path = j == config.blocks, f"encoder/layers/{i}"
            if config.residual:
                part = "downsampler" if down else f"resnets.{j}"
                diffusers = f"encoder.down_blocks.{i}.{part}"
                original = f"encoder.downsamples.{i}.downsamples.{j}"
            else:
                diffusers, original = f"encoder.down_blocks.{flat}", f"encoder.downsamples.{flat}"
            if down:
                yield from resample(diffusers, original, f"{path}/down", config.temporal[i])
            else:
                shortcut = j == 0 and dim != out
                yield from block(diffusers, original, f"{path}/blocks/{j}", shortcut)
            flat += 1


def decoder(config: WanVAEConfig) -> Iterator[Row]:
    """The rows of the decoder's levels; without shortcuts the original numbers them through."""
    flat = 0
    for i, (dim, out) in enumerate(config.decoder_levels):
        for j in range(config.blocks + 1 + (i < len(config.temporal))):
            up, path = j == config.blocks + 1, f"decoder/layers/{i + 3}"
            upsampler = "upsampler" if config.residual else "upsamplers.0"
            diffusers = f"decoder.up_blocks.{i}." + (upsampler if up else f"resnets.{j}")
            original = f"decoder.upsamples.{i}.upsamples.{j}"
            if not config.residual:
                original = f"decoder.upsamples.{flat}"
            if up:
                temporal = config.temporal[::-1][i]
                yield from resample(diffusers, original, f"{path}/up", temporal)
            else:
                shortcut = j == 0 and dim != out
                yield from block(diffusers, original, f"{path}/blocks/{j}", shortcut)
            flat += 1


def rows(config: WanVAEConfig) -> Iterator[Row]:
    """All rows, plain names."""
    yield from ends("encoder")
    yield from encoder(config)
    yield from middle("encoder", len(config.multipliers))
    yield from layer("quant_conv", "conv1", "quant", VIDEO_LINEAR)
    yield from layer("post_quant_conv", "conv2", "post_quant", VIDEO_LINEAR)
    yield from ends("decoder")
    yield from middle("decoder", 0)
    yield from decoder(config)


def tables(config: WanVAEConfig) -> dict[str, tuple[Rule, ...]]:
    """The rules of both layouts, one for each parameter."""
    found = [tuple(name.replace(".", r"\.") for name in row[:2]) + row[2:] for row in rows(config)]
    return {
        "diffusers": tuple(Rule(name, path, how) for name, _, path, how in found),
        "original": tuple(Rule(name, path, how) for _, name, path, how in found),
    }


# What diffusers takes for keys that a config.json lacks: Wan 2.1.
PRESET = WanVAEConfig.wan_2_1()
DEFAULTS = {
    "base_dim": PRESET.encoder_dim,
    "z_dim": PRESET.latent_channels,
    "dim_mult": list(PRESET.multipliers),
    "num_res_blocks": PRESET.blocks,
    "temperal_downsample": list(PRESET.temporal),
    "latents_mean": list(PRESET.latents_mean),
    "latents_std": list(PRESET.latents_std),
    "is_residual": False,
    "in_channels": PRESET.channels,
    "out_channels": PRESET.channels,
}


def describes(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this model."""
    return config.get("_class_name") == "AutoencoderKLWan"


def transform_sizes(config: WanVAEConfig) -> dict[str, int]:
    """Lengths of the axes that the transforms name: none need one."""
    return {}


def abstract_model(config: WanVAEConfig, dtype: Any) -> WanVAE:
    """The model without values; `dtype` is that of its products and its rounded parameters."""
    return nnx.eval_shape(lambda: WanVAE(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))


def read_config(config: Mapping[str, Any]) -> WanVAEConfig:
    """The architecture from diffusers' config.json; keys it lacks are Wan 2.1's.

    Raises:
        ValueError: another architecture or an impossible value.
    """
    name = config.get("_class_name")
    if name != "AutoencoderKLWan":
        raise ValueError(f"config.json describes {name!r}, must be 'AutoencoderKLWan'")
    if config.get("attn_scales"):
        raise ValueError(f"config.json has attn_scales={config['attn_scales']!r}, must be empty")
    config = {**DEFAULTS, **config}
    patch = check_size("patch_size", config.get("patch_size") or 1)
    base = check_size("base_dim", config["base_dim"])
    multipliers = check_list("dim_mult", config["dim_mult"], int)
    result = WanVAEConfig(
        channels=read_channels(config, patch),
        patch=patch,
        latent_channels=check_size("z_dim", config["z_dim"]),
        encoder_dim=base,
        decoder_dim=check_size("decoder_base_dim", config.get("decoder_base_dim") or base),
        multipliers=tuple(check_size("dim_mult", m) for m in multipliers),
        temporal=check_list("temperal_downsample", config["temperal_downsample"], bool),
        blocks=check_size("num_res_blocks", config["num_res_blocks"]),
        residual=check_list("is_residual", [config["is_residual"]], bool)[0],
        latents_mean=check_list("latents_mean", config["latents_mean"], float),
        latents_std=check_list("latents_std", config["latents_std"], float),
    )
    check_stride(config, "scale_factor_spatial", result.spatial_stride)
    check_stride(config, "scale_factor_temporal", result.temporal_stride)
    return result


def check_stride(config: Mapping[str, Any], key: str, stride: int) -> None:
    """Refuses a stride that the levels do not make."""
    if (config.get(key) or stride) != stride:
        raise ValueError(f"config.json has {key}={config[key]!r}, must be {stride}")


def read_channels(config: Mapping[str, Any], patch: int) -> int:
    """A frame's channels; config.json counts a patch's pixels as channels."""
    pixels = patch**2
    inside, outside = (check_size(key, config[key]) for key in ("in_channels", "out_channels"))
    if inside != outside or inside % pixels:
        raise ValueError(
            f"config.json has in_channels={inside}, out_channels={outside}, must be equal and a "
            f"multiple of {pixels}, the pixels of a patch"
        )
    return inside // pixels


def check_list(name: str, values: Any, kind: type) -> tuple:
    """A list of finite values of one type from a config.json."""
    listed = values if isinstance(values, list) else [None]
    if not all(type(value) is kind and abs(value) < math.inf for value in listed):
        raise ValueError(f"config.json has {name}={values!r}, must be a list of {kind.__name__}")
    return tuple(values)


def preset_of(entries: Mapping[str, Entry]) -> WanVAEConfig | None:
    """The preset whose latent channels a checkpoint without config.json has, if there is one."""
    bias = entries.get("conv2.bias") or entries.get("post_quant_conv.bias")
    for preset in (WanVAEConfig.wan_2_1(), WanVAEConfig.wan_2_2()):
        if bias is not None and bias.shape == (preset.latent_channels,):
            return preset
    return None
