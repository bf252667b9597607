"""T5 and UMT5 encoders: transformers' names, and those of Wan's own file."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from pasa_jax.convert.reader import Entry
from pasa_jax.convert.rules import Rule
from pasa_jax.convert.wan import check_eps, check_size
from pasa_jax.models.t5 import T5Config, T5Encoder

VECTOR = "d -> d"
LINEAR = "o i -> i o"
TABLE = "row column -> row column"

ENCODER, ENCODER_ORIGINAL = r"encoder\.block\.(\d+)\.layer", r"blocks\.(\d+)"
ATTENTION = rf"{ENCODER}\.0\.SelfAttention"
FFN = rf"{ENCODER}\.1\.DenseReluDense"
BIAS = r"SelfAttention\.relative_attention_bias\.weight"

# transformers' name, the original's name, the parameter, the transform.
ROWS = (
    (r"shared\.weight", r"token_embedding\.weight", "token_embedding/embedding", TABLE),
    *(
        (
            rf"{ATTENTION}\.{name}\.weight",
            rf"{ENCODER_ORIGINAL}\.attn\.{name}\.weight",
            f"blocks/attn/{name}/kernel",
            LINEAR,
        )
        for name in "qkvo"
    ),
    *(
        (
            rf"{FFN}\.{name}\.weight",
            rf"{ENCODER_ORIGINAL}\.ffn\.{original}\.weight",
            f"blocks/ffn_{ours}/kernel",
            LINEAR,
        )
        for name, original, ours in (
            ("wi_0", r"gate\.0", "gate"),
            ("wi_1", "fc1", "up"),
            ("wo", "fc2", "down"),
        )
    ),
    *(
        (
            rf"{ENCODER}\.{i}\.layer_norm\.weight",
            rf"{ENCODER_ORIGINAL}\.norm{i + 1}\.weight",
            f"blocks/norm_{name}/scale",
            VECTOR,
        )
        for i, name in enumerate(("attn", "ffn"))
    ),
    (r"encoder\.final_layer_norm\.weight", r"norm\.weight", "norm/scale", VECTOR),
)
# By `bias_per_layer`. Wan's code names a shared table too, though no checkpoint of it has one.
BIAS_ROWS = {
    True: (
        rf"{ENCODER}\.0\.{BIAS}",
        rf"{ENCODER_ORIGINAL}\.pos_embedding\.embedding\.weight",
        "blocks/position_bias",
        TABLE,
    ),
    False: (
        rf"encoder\.block\.0\.layer\.0\.{BIAS}",
        r"pos_embedding\.embedding\.weight",
        "position_bias",
        TABLE,
    ),
}
IGNORED = (
    r"encoder\.embed_tokens\.weight",  # the same table as shared.weight, stored twice by some tools
    r"decoder\..+",  # a whole T5's other half
    r"lm_head\.weight",
)

SIZES = {
    "vocab_size": "vocab_size",
    "dim": "d_model",
    "num_heads": "num_heads",
    "head_dim": "d_kv",
    "ffn_dim": "d_ff",
    "num_layers": "num_layers",
    "buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
}
# Left out of older config.json files, whose encoders all have these values.
DEFAULTS = {"relative_attention_max_distance": 128, "feed_forward_proj": "relu"}
BIAS_PER_LAYER = {"t5": False, "umt5": True}  # by model_type
PRESET = T5Config.umt5_xxl()


def describes(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a T5 or UMT5."""
    return config.get("model_type") in BIAS_PER_LAYER


def tables(config: T5Config) -> dict[str, tuple[Rule, ...]]:
    """The rules of both layouts."""
    rows = (*ROWS, BIAS_ROWS[config.bias_per_layer])
    return {
        "transformers": tuple(Rule(name, path, transform) for name, _, path, transform in rows),
        "original": tuple(Rule(name, path, transform) for _, name, path, transform in rows),
    }


def transform_sizes(config: T5Config) -> dict[str, int]:
    """Lengths of the axes that the transforms name: none, they only turn matrices round."""
    return {}


def abstract_model(config: T5Config, dtype: Any) -> T5Encoder:
    """The model without values.

    Args:
        config: the architecture.
        dtype: of its rounded parameters, and of its products but for float16, whose range they
            leave: with float16 parameters they run in float32.
    """
    stored = jnp.dtype(dtype)
    products = jnp.dtype(jnp.float32) if stored == jnp.float16 else stored
    return nnx.eval_shape(
        lambda: T5Encoder(config, dtype=products, param_dtype=stored, rngs=nnx.Rngs(0))
    )


def read_config(config: Mapping[str, Any]) -> T5Config:
    """The architecture from transformers' config.json of a T5 or UMT5.

    Raises:
        ValueError: another architecture, a missing key or an impossible value.
    """
    kind = config.get("model_type")
    if kind not in BIAS_PER_LAYER:
        raise ValueError(f"config.json describes {kind!r}, must be one of t5, umt5")
    config = {**DEFAULTS, **config}
    if missing := [key for key in (*SIZES.values(), "layer_norm_epsilon") if key not in config]:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    if (ffn := config["feed_forward_proj"]) != "gated-gelu":
        raise ValueError(
            f"config.json has feed_forward_proj={ffn!r}, must be 'gated-gelu': only T5 v1.1 and "
            "UMT5 are implemented"
        )
    sizes = {ours: check_size(theirs, config[theirs]) for ours, theirs in SIZES.items()}
    eps = check_eps(config["layer_norm_epsilon"])
    return T5Config(bias_per_layer=BIAS_PER_LAYER[kind], eps=eps, **sizes)


def preset_of(entries: Mapping[str, Entry]) -> T5Config | None:
    """The preset whose table of tokens a checkpoint without config.json has, if there is one."""
    found = [entries.get(name) for name in ("shared.weight", "token_embedding.weight")]
    for preset in (T5Config.t5_v1_1_xxl(), T5Config.umt5_xxl()):
        if any(entry and entry.shape == (preset.vocab_size, preset.dim) for entry in found):
            return preset
    return None
