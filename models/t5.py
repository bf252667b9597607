"""Encoders of T5 v1.1 (arXiv 1910.10683) and UMT5 (arXiv 2304.09151): token ids to text states."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pasa_jax.models.wan import RMSNorm, stack


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Architecture of one encoder.

    Attributes:
        vocab_size: rows of the table of tokens.
        dim: width D of the states.
        num_heads, head_dim: of the attention; their product need not be `dim`.
        ffn_dim: hidden width of the gated feed-forward layers.
        num_layers: blocks.
        buckets: classes of distances between tokens, half for each direction.
        max_distance: tokens; all distances from here on share the last bucket.
        bias_per_layer: every layer has a position bias of its own (UMT5), else one serves all (T5).
        eps: of every normalisation.
    """

    vocab_size: int
    dim: int
    num_heads: int
    head_dim: int
    ffn_dim: int
    num_layers: int
    buckets: int
    max_distance: int
    bias_per_layer: bool
    eps: float

    def __post_init__(self):
        if self.buckets % 4:
            raise ValueError(f"{self.buckets=} must be a multiple of 4: two directions, two halves")
        if self.max_distance <= self.buckets // 4:
            raise ValueError(f"{self.max_distance=} must be above a quarter of {self.buckets=}")

    @classmethod
    def t5_v1_1_xxl(cls) -> "T5Config":
        """t5-v1_1-xxl, the text encoder of CogVideoX."""
        return cls(
            vocab_size=32128,
            dim=4096,
            num_heads=64,
            head_dim=64,
            ffn_dim=10240,
            num_layers=24,
            buckets=32,
            max_distance=128,
            bias_per_layer=False,
            eps=1e-6,
        )

    @classmethod
    def umt5_xxl(cls) -> "T5Config":
        """umt5-xxl, the text encoder of Wan."""
        return dataclasses.replace(cls.t5_v1_1_xxl(), vocab_size=256384, bias_per_layer=True)


class SelfAttention(nnx.Module):
    """Attention among the tokens of a text: logits unscaled, plus a bias by distance, in f32."""

    def __init__(self, config: T5Config, dtypes: dict, rngs: nnx.Rngs):
        dim, inner = config.dim, config.num_heads * config.head_dim

        def linear(fan_in, fan_out, std):
            init = nnx.initializers.normal(std)
            return nnx.Linear(
                fan_in, fan_out, use_bias=False, kernel_init=init, rngs=rngs, **dtypes
            )

        # The scale that other models divide the logits by is in q's first values instead.
        self.q = linear(dim, inner, (dim * config.head_dim) ** -0.5)
        self.k = linear(dim, inner, dim**-0.5)
        self.v = linear(dim, inner, dim**-0.5)
        self.o = linear(inner, dim, inner**-0.5)
        self.num_heads = config.num_heads

    def __call__(self, x, bias):
        """Tokens [B, T, D] and what is added to the logits [B or 1, N, T, S]."""
        q, k, v = (self.split(layer(x)) for layer in (self.q, self.k, self.v))
        logits = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits + bias, axis=-1).astype(v.dtype)
        return self.o(rearrange(jnp.einsum("bnts,bsnh->btnh", weights, v), "b t n h -> b t (n h)"))

    def split(self, x):
        return rearrange(x, "b t (n h) -> b t n h", n=self.num_heads)


class Block(nnx.Module):
    """One layer: self-attention, then a feed-forward layer with a gated GELU.

    The residual stream, which grows large in these encoders, stays f32; the originals round it
    to the weights' dtype.
    """

    def __init__(self, config: T5Config, dtypes: dict, rngs: nnx.Rngs):
        dim, ffn_dim = config.dim, config.ffn_dim
        wide = dict(kernel_init=nnx.initializers.normal(dim**-0.5), use_bias=False, rngs=rngs)
        narrow = {**wide, "kernel_init": nnx.initializers.normal(ffn_dim**-0.5)}
        self.norm_attn = RMSNorm(dim, config.eps)
        self.attn = SelfAttention(config, dtypes, rngs)
        if config.bias_per_layer:
            self.position_bias = first_bias(config, rngs)
        self.norm_ffn = RMSNorm(dim, config.eps)
        self.ffn_gate = nnx.Linear(dim, ffn_dim, **wide, **dtypes)
        self.ffn_up = nnx.Linear(dim, ffn_dim, **wide, **dtypes)
        self.ffn_down = nnx.Linear(ffn_dim, dim, **narrow, **dtypes)

    def __call__(self, x, bias):
        x = x + self.attn(self.norm_attn(x), bias).astype(jnp.float32)
        y = self.norm_ffn(x)
        y = jax.nn.gelu(self.ffn_gate(y), approximate=True) * self.ffn_up(y)
        return x + self.ffn_down(y).astype(jnp.float32)


class T5Encoder(nnx.Module):
    """A T5 or UMT5 encoder: token ids in, text states out.

    Parameters of the blocks are stacked, leaves [num_layers, ...], and the layers scanned. Norms
    and position biases are f32 whatever `param_dtype` is, as are norms, logits, softmax and the
    residual stream; products, attention weights and the gated GELU round to `dtype`.

    At the size of T5-XXL the largest arrays of a pass are the logits, f32 [B, N, T, T]: 67 MB a
    prompt of 512 tokens, and as much for a layer's position bias.

    Args:
        config: the architecture.
        dtype: of the matrix products, f32 or bf16; f16 would overflow in the feed-forward layers.
        param_dtype: of the stored parameters that may be rounded; None takes `dtype`.
        rngs: for initial values as the original draws them.

    Raises:
        ValueError: another dtype.
    """

    def __init__(
        self,
        config: T5Config,
        *,
        dtype: DTypeLike = jnp.bfloat16,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        dtype = jnp.dtype(dtype)
        if dtype not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f"{dtype=} must be float32 or bfloat16: others overflow or are slow")
        dtypes = dict(dtype=dtype, param_dtype=param_dtype or dtype)
        self.config = config
        self.token_embedding = nnx.Embed(
            config.vocab_size,
            config.dim,
            embedding_init=nnx.initializers.normal(1.0),
            rngs=rngs,
            **dtypes,
        )
        if not config.bias_per_layer:
            self.position_bias = first_bias(config, rngs)
        self.blocks = stack(config.num_layers, lambda rngs: Block(config, dtypes, rngs), rngs)
        self.norm = RMSNorm(config.dim, config.eps)

    def __call__(
        self, ids: Int[Array, "B T"], length: Int[Array, " B"] | None = None
    ) -> Float[Array, "B T D"]:
        """Encodes texts.

        Args:
            ids: token ids, padded behind each text's own tokens.
            length: tokens of each text that may be attended to, at least 1; None lets all be,
                padding included, as CogVideoX does.

        Returns:
            States in f32. Rows from `length` on mean nothing.
        """
        config, tokens = self.config, ids.shape[1]
        x = self.token_embedding(ids).astype(jnp.float32)
        mask = padding_bias(length, tokens)
        if not config.bias_per_layer:
            mask = mask + expand_bias(self.position_bias.get_value(), tokens, config)
        graph, params = nnx.split(self.blocks)

        def body(x, params):
            block = nnx.merge(graph, params)
            bias = mask
            if config.bias_per_layer:
                bias = bias + expand_bias(block.position_bias.get_value(), tokens, config)
            return block(x, bias), None

        x, _ = jax.lax.scan(body, x, params)
        return self.norm(x)


def first_bias(config: T5Config, rngs: nnx.Rngs) -> nnx.Param:
    """A table of position biases [buckets, N] as the original draws it."""
    shape = (config.buckets, config.num_heads)
    return nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) * config.dim**-0.5)


def padding_bias(length: Int[Array, " B"] | None, tokens: int) -> Float[Array, "B 1 1 S"]:
    """0 for the keys of a text's own tokens, the lowest f32 for padding; [1, 1, 1, S] without."""
    if length is None:
        return jnp.zeros((1, 1, 1, tokens), jnp.float32)
    own = jnp.arange(tokens)[None, :] < length[:, None]
    # Half of the lowest, so that a bias by distance added to it cannot reach minus infinity.
    return jnp.where(own, 0.0, jnp.finfo(jnp.float32).min / 2)[:, None, None, :]


def expand_bias(table: Float[Array, "K N"], tokens: int, config: T5Config):
    """What a table of buckets adds to the logits of all pairs of tokens, f32 [1, N, T, T]."""
    distances = np.arange(1 - tokens, tokens)  # of the key from the query, in tokens
    values = table.T[:, bucket(distances, config.buckets, config.max_distance)]  # [N, 2T - 1]
    places = jnp.arange(tokens)
    pairs = places[None, :] - places[:, None] + (tokens - 1)  # [T, T]
    return values[:, pairs][None]


def bucket(distance: np.ndarray, buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of each distance: exact ones up to an eighth of them, then logarithmic.

    Args:
        distance: tokens from the query to the key, negative for keys before it.
        buckets: the first half is for keys before the query and the query itself.
        max_distance: see `T5Config`.

    Returns:
        int32, in f32 arithmetic as the originals: it decides where a bucket ends.

    Source: T5 (arXiv:1910.10683), section 2.1; the formula is that of its published code.
    """
    half, exact = buckets // 2, buckets // 4
    size = np.abs(distance)
    ratio = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(exact))
    steps = ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + steps.astype(np.int32), half - 1)
    return np.where(size < exact, size, far).astype(np.int32) + half * (distance > 0)
