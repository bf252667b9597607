"""Wan 2.1: names of both published layouts, both config dialects, one model."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from pasa_jax.convert.reader import Entry
from pasa_jax.convert.rules import Rule
from pasa_jax.models.wan import Wan, WanConfig

VECTOR = "d -> d"
LINEAR = "o i -> i o"
# The model turns rotary pairs (h, h + H/2), the checkpoints (2h, 2h + 1): the columns of q and k,
# and the norms that follow them, change order within each head.
ROTARY_VECTOR = "(n h pair) -> (n pair h)"
ROTARY_LINEAR = "(n h pair) i -> i (n pair h)"
PATCH = "o c pf py px -> (pf py px c) o"
MODULATION = "1 s d -> s d"


def linear(diffusers: str, original: str, path: str, weight: str = LINEAR, bias: str = VECTOR):
    """The two rows of a linear layer."""
    return (
        (rf"{diffusers}\.weight", rf"{original}\.weight", f"{path}/kernel", weight),
        (rf"{diffusers}\.bias", rf"{original}\.bias", f"{path}/bias", bias),
    )


def rotary_linear(diffusers: str, original: str, path: str):
    """The two rows of a linear layer whose columns are rotated."""
    return linear(diffusers, original, path, ROTARY_LINEAR, ROTARY_VECTOR)


def norm(diffusers: str, original: str, path: str, scale: str = VECTOR):
    """The row of a norm's scale."""
    return (rf"{diffusers}\.weight", rf"{original}\.weight", f"{path}/scale", scale)


CONDITION = r"condition_embedder"
BLOCK = r"blocks\.(\d+)"
SELF, SELF_ORIGINAL = rf"{BLOCK}\.attn1", rf"{BLOCK}\.self_attn"
CROSS, CROSS_ORIGINAL = rf"{BLOCK}\.attn2", rf"{BLOCK}\.cross_attn"

# diffusers' name, the original's name, the parameter, the transform.
ROWS = (
    *linear(r"patch_embedding", r"patch_embedding", "patch_embedding", PATCH),
    *linear(rf"{CONDITION}\.text_embedder\.linear_1", r"text_embedding\.0", "text_in"),
    *linear(rf"{CONDITION}\.text_embedder\.linear_2", r"text_embedding\.2", "text_out"),
    *linear(rf"{CONDITION}\.time_embedder\.linear_1", r"time_embedding\.0", "time_in"),
    *linear(rf"{CONDITION}\.time_embedder\.linear_2", r"time_embedding\.2", "time_out"),
    *linear(rf"{CONDITION}\.time_proj", r"time_projection\.1", "time_projection"),
    (rf"{BLOCK}\.scale_shift_table", rf"{BLOCK}\.modulation", "blocks/modulation", MODULATION),
    *rotary_linear(rf"{SELF}\.to_q", rf"{SELF_ORIGINAL}\.q", "blocks/self_attn/q"),
    *rotary_linear(rf"{SELF}\.to_k", rf"{SELF_ORIGINAL}\.k", "blocks/self_attn/k"),
    *linear(rf"{SELF}\.to_v", rf"{SELF_ORIGINAL}\.v", "blocks/self_attn/v"),
    *linear(rf"{SELF}\.to_out\.0", rf"{SELF_ORIGINAL}\.o", "blocks/self_attn/o"),
    norm(rf"{SELF}\.norm_q", rf"{SELF_ORIGINAL}\.norm_q", "blocks/self_attn/norm_q", ROTARY_VECTOR),
    norm(rf"{SELF}\.norm_k", rf"{SELF_ORIGINAL}\.norm_k", "blocks/self_attn/norm_k", ROTARY_VECTOR),
    norm(rf"{BLOCK}\.norm2", rf"{BLOCK}\.norm3", "blocks/norm_cross"),
    (rf"{BLOCK}\.norm2\.bias", rf"{BLOCK}\.norm3\.bias", "blocks/norm_cross/bias", VECTOR),
    *linear(rf"{CROSS}\.to_q", rf"{CROSS_ORIGINAL}\.q", "blocks/cross_attn/q"),
    *linear(rf"{CROSS}\.to_k", rf"{CROSS_ORIGINAL}\.k", "blocks/cross_attn/k"),
    *linear(rf"{CROSS}\.to_v", rf"{CROSS_ORIGINAL}\.v", "blocks/cross_attn/v"),
    *linear(rf"{CROSS}\.to_out\.0", rf"{CROSS_ORIGINAL}\.o", "blocks/cross_attn/o"),
    norm(rf"{CROSS}\.norm_q", rf"{CROSS_ORIGINAL}\.norm_q", "blocks/cross_attn/norm_q"),
    norm(rf"{CROSS}\.norm_k", rf"{CROSS_ORIGINAL}\.norm_k", "blocks/cross_attn/norm_k"),
    *linear(rf"{BLOCK}\.ffn\.net\.0\.proj", rf"{BLOCK}\.ffn\.0", "blocks/ffn_up"),
    *linear(rf"{BLOCK}\.ffn\.net\.2", rf"{BLOCK}\.ffn\.2", "blocks/ffn_down"),
    (r"scale_shift_table", r"head\.modulation", "head_modulation", MODULATION),
    *linear(r"proj_out", r"head\.head", "head"),
)
TABLES = {
    "diffusers": tuple(Rule(name, path, transform) for name, _, path, transform in ROWS),
    "original": tuple(Rule(name, path, transform) for _, name, path, transform in ROWS),
}
IGNORED = (
    r"rope\.freqs(_cos|_sin)?",  # rotary tables some tools save; the model computes its own
    r"freqs",
)

PRESET = WanConfig.t2v_1_3b()
CLASSES = ("WanTransformer3DModel", "WanModel")
MODEL_TYPES = ("t2v", "i2v", "flf2v", "vace", "ti2v", "s2v")  # of the original's config.json

# The sizes of a config.json by our names, for each dialect.
DIFFUSERS_SIZES = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "num_heads": "num_attention_heads",
    "num_layers": "num_layers",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "text_dim": "text_dim",
    "text_len": "text_len",
}
ORIGINAL_SIZES = {
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    "dim": "dim",
    "num_heads": "num_heads",
    "num_layers": "num_layers",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "text_dim": "text_dim",
    "text_len": "text_len",
}
# Left out of the released config.json: diffusers keeps the text length in its pipeline, the
# original takes these from its code.
DEFAULTS = {"text_len": 512, "text_dim": 4096, "patch_size": [1, 2, 2]}
# What makes another architecture (image-to-video, other norms) and the value that means ours.
DIFFUSERS_FIXED = {
    "qk_norm": "rms_norm_across_heads",
    "cross_attn_norm": True,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}
ORIGINAL_FIXED = {
    "model_type": "t2v",
    "qk_norm": True,
    "cross_attn_norm": True,
    "window_size": [-1, -1],
}


def tables(config: WanConfig) -> dict[str, tuple[Rule, ...]]:
    """The rules of both layouts, the same for every architecture."""
    return TABLES


def transform_sizes(config: WanConfig) -> dict[str, int]:
    """Lengths of the axes that the transforms name."""
    pf, py, px = config.patch
    return {"n": config.num_heads, "pair": 2, "pf": pf, "py": py, "px": px}


def abstract_model(config: WanConfig, dtype: Any) -> Wan:
    """The model without values; `dtype` is that of its products and its rounded parameters."""
    return nnx.eval_shape(lambda: Wan(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))


def describes(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this model or of a near relative, in either dialect."""
    return config.get("_class_name") in CLASSES or config.get("model_type") in MODEL_TYPES


def read_config(config: Mapping[str, Any]) -> WanConfig:
    """The architecture from a config.json of either dialect.

    Raises:
        ValueError: another architecture, a missing key or an impossible value.
    """
    if config.get("_class_name") == "WanTransformer3DModel":
        names, fixed = DIFFUSERS_SIZES, DIFFUSERS_FIXED
        head_dim, heads = (
            check_size(key, config.get(key))
            for key in ("attention_head_dim", "num_attention_heads")
        )
        extra = {"dim": head_dim * heads}
    elif "model_type" in config:
        names, fixed, extra = ORIGINAL_SIZES, ORIGINAL_FIXED, {}
    else:
        name = config.get("_class_name")
        raise ValueError(f"config.json describes {name!r}, must be a Wan transformer's")
    check_fixed(config, fixed)
    config = {**DEFAULTS, **config}
    if missing := [key for key in (*names.values(), "eps") if key not in config]:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    sizes = {ours: check_size(theirs, config[theirs]) for ours, theirs in names.items()}
    patch, eps = config["patch_size"], config["eps"]
    if not isinstance(patch, list) or len(patch) != 3:
        raise ValueError(f"config.json has patch_size={patch!r}, must be three integers")
    check_eps(eps)
    patch = tuple(check_size("patch_size", p) for p in patch)
    return WanConfig(patch=patch, eps=eps, **sizes, **extra)


def check_size(name: str, value: Any) -> int:
    """A size from a config.json."""
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(f"config.json has {name}={value!r}, must be a positive integer")
    return value


def check_eps(eps: Any) -> float:
    """The epsilon of the norms from a config.json."""
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise ValueError(f"config.json has {eps=}, must be in (0, 1)")
    return eps


def check_fixed(config: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Refuses the relatives of Wan text-to-video that the model does not implement."""
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise ValueError(
                f"config.json has {key}={config[key]!r}, must be {value!r}: only Wan 2.1 "
                "text-to-video is implemented"
            )


def preset_of(entries: Mapping[str, Entry]) -> WanConfig | None:
    """The preset whose width and depth a checkpoint without config.json has, if there is one."""
    bias = entries.get("patch_embedding.bias")
    depth = len({name.split(".")[1] for name in entries if name.startswith("blocks.")})
    for preset in (WanConfig.t2v_1_3b(), WanConfig.t2v_14b()):
        if bias is not None and bias.shape == (preset.dim,) and depth == preset.num_layers:
            return preset
    return None


def diffusers_config(config: WanConfig) -> dict[str, Any]:
    """A config.json that diffusers and `read_config` take."""
    sizes = {theirs: getattr(config, ours) for ours, theirs in DIFFUSERS_SIZES.items()}
    return {
        "_class_name": "WanTransformer3DModel",
        **sizes,
        **DIFFUSERS_FIXED,
        "attention_head_dim": config.head_dim,
        "patch_size": list(config.patch),
        "eps": config.eps,
    }
