"""Which key blocks are exact: block scores, noise, forced blocks, top-k → BlockIndex."""

import dataclasses
import functools
from typing import Literal

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pasa_jax.pallas_kernels.blocks import BlockIndex, block_lengths, num_blocks

NOISES = ("none", "gumbel", "gaussian", "uniform")
SINKS = (None, "first", "last")
# Scores above this many entries are made one head at a time (64 MiB of float32).
_MAX_SCORES = 1 << 24


@dataclasses.dataclass(frozen=True)
class Noise:
    """The random bias on block scores (pasa.md 2.2, 7.1).

    Attributes:
        kind: law of the draw, each of unit variance: "gumbel" makes top-k a draw of blocks without
            replacement with probabilities ∝ exp(score / τ), τ = scale·σ·√6/π.
        scale: standard deviation of the noise over σ, the spread of the row's scores; 0 is none.
    """

    kind: Literal["none", "gumbel", "gaussian", "uniform"] = "none"
    scale: float = 0.0

    def __post_init__(self):
        if self.kind not in NOISES:
            raise ValueError(f"noise={self.kind!r} must be one of {NOISES}")
        if not 0 <= self.scale < float("inf"):
            raise ValueError(f"noise_scale={self.scale!r} must be 0 or more and finite")


def block_mean(x: Float[Array, "B T N H"], block: int) -> Float[Array, "B N I H"]:
    """Mean of every block of tokens, in float32; the ragged last block by its true length."""
    batch, tokens, _, _ = x.shape
    blocks = num_blocks(tokens, block)
    x = jnp.pad(x, ((0, 0), (0, blocks * block - tokens), (0, 0), (0, 0)))
    x = einops.rearrange(x, "b (i t) n h -> b i t n h", t=block)
    length = block_lengths(tokens, block, None, 1).astype(jnp.float32).reshape(1, 1, blocks, 1)
    return einops.rearrange(x.sum(2, dtype=jnp.float32), "b i n h -> b n i h") / length


def call_keys(keys: jax.Array, step: Int[Array, ""], layer: Int[Array, ""]) -> jax.Array:
    """The prompts' keys [P] for one layer call: each prompt key folded with step, then layer."""

    def fold(key):
        return jax.random.fold_in(jax.random.fold_in(key, step), layer)

    return jax.vmap(fold)(keys)


def forced_blocks(
    length: Int[Array, "B J"], sink: str | None, text: Bool[np.ndarray, " J"] | None = None
) -> Bool[Array, "B J"]:
    """True for key blocks that are always exact.

    Args:
        length: valid tokens of each key block.
        sink: the first or the last block with valid tokens; None adds none.
        text: blocks forced as well, `TokenGrid.text_blocks`.
    """
    column = jnp.arange(length.shape[1], dtype=jnp.int32)[None, :]
    last = (length > 0).sum(1, dtype=jnp.int32)[:, None] - 1
    target = {None: -1, "first": 0, "last": last}[sink]
    forced = column == target
    if text is not None:
        forced = forced | jnp.asarray(text)[None, :]
    return forced & (length > 0)


def listed_blocks(mask: Bool[Array, "B N I J"], slots: int) -> BlockIndex:
    """Lists of the blocks that a mask holds, in rising order.

    Args:
        mask: True where a key block is exact.
        slots: static length L of the lists; of a row with more blocks the first L are kept.
    """
    columns = mask.shape[-1]
    column = jnp.arange(columns, dtype=jnp.int32)[None, None, None, :]
    # Sorting one operand takes a twentieth of top-k's time on a CPU, which sorts pairs.
    ids = jnp.sort(jnp.where(mask, column, columns), axis=-1)[..., :slots]
    ids = jnp.minimum(ids, columns - 1)
    count = mask.sum(-1, dtype=jnp.int32)
    return BlockIndex(ids, jnp.minimum(count, ids.shape[-1]))


def select_blocks(
    query_mean: Float[Array, "B N I H"],
    key_mean: Float[Array, "B N J H"],
    length: Int[Array, "B J"],
    *,
    budget: Int[Array, ""],
    max_budget: int,
    bias: Float[Array, "B N J"] | None = None,
    forced: Bool[Array, "B J"] | None = None,
    noise: Noise = Noise(),
    keys: jax.Array | None = None,
    scale: float | None = None,
) -> BlockIndex:
    """The `budget` key blocks of highest score for every query block of every head.

    score_ij = scale · query_mean_i · key_mean_j + bias_j + noise.scale · σ_i · z_ij, in float32;
    σ_i is the standard deviation of the row's scores over live blocks that are not forced, z_ij a
    draw of zero location and unit variance, independent per prompt, head, query and key block.
    Forced blocks come first and use up budget; ties go to the lower block number.

    Blocks without valid tokens are never selected. A bias that is not finite counts as 0. A score
    that is not finite ranks last among the live blocks and takes no part in σ: a NaN in one query
    block's mean leaves that block with the lowest block numbers, a NaN in one key block's mean
    leaves all other blocks' order as it is.

    Args:
        query_mean: mean of each query block's rows, after normalisation and rotation.
        key_mean, length: see `BlockStatistics`.
        budget: exact key blocks per query block, at least 1; may be traced.
        max_budget: static length L of the lists, an upper bound of `budget`.
        bias: added to the scores of a key block, as log(‖H_j − Hbar‖ + ε).
        forced: blocks always selected, as far as the budget goes.
        noise: law and size of the random bias.
        keys: typed keys [P] of this layer call (`call_keys`), needed with noise. B is a multiple of
            P and branch-major: entries b, b + P, ... are guidance branches of prompt b and share
            one draw.
        scale: of the logits; None is H^-½.

    Returns:
        Ids by falling score; count = min(budget, L, live blocks) in all rows of a batch entry.

    Raises:
        ValueError: max_budget below 1, noise without keys, or B not a multiple of P.
    """
    batch, heads, rows, width = query_mean.shape
    columns = key_mean.shape[2]
    noisy = noise.kind != "none" and noise.scale > 0
    if max_budget < 1:
        raise ValueError(f"{max_budget=} must be at least 1")
    if noisy and keys is None:
        raise ValueError(f"noise={noise.kind!r} needs keys")
    if noisy and batch % keys.shape[0]:
        raise ValueError(f"{batch=} must be a multiple of the prompts, {keys.shape[0]}")
    live = length > 0
    forced = jnp.zeros_like(live) if forced is None else forced & live
    kept = min(max_budget, columns)
    rank = functools.partial(
        _rank_head,
        live=live,
        forced=forced,
        noise=noise,
        keys=keys if noisy else None,
        scale=width**-0.5 if scale is None else scale,
        kept=kept,
    )
    if bias is None:
        bias = jnp.zeros((batch, heads, columns), jnp.float32)
    head = jnp.arange(heads, dtype=jnp.int32)
    per_head = [einops.rearrange(x, "b n ... -> n b ...") for x in (query_mean, key_mean, bias)]
    operands = jax.lax.stop_gradient((head, *per_head))
    if batch * heads * rows * columns > _MAX_SCORES:
        ids = jax.lax.map(lambda operand: rank(*operand), operands)
    else:
        ids = jax.vmap(rank)(*operands)
    count = jnp.minimum(jnp.minimum(budget, kept), live.sum(1, dtype=jnp.int32))
    count = jnp.broadcast_to(count[:, None, None], (batch, heads, rows))
    return BlockIndex(einops.rearrange(ids, "n b i l -> b n i l"), count)


def _rank_head(
    head: Int[Array, ""],
    query_mean: Float[Array, "B I H"],
    key_mean: Float[Array, "B J H"],
    bias: Float[Array, "B J"],
    *,
    live: Bool[Array, "B J"],
    forced: Bool[Array, "B J"],
    noise: Noise,
    keys: jax.Array | None,
    scale: float,
    kept: int,
) -> Int[Array, "B I L"]:
    """One head's `kept` best key blocks per query block, best first."""
    # Rounding to bf16 or tf32, the default of matrix units, would reorder close scores.
    score = jnp.einsum(
        "bih,bjh->bij",
        query_mean.astype(jnp.float32),
        key_mean.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    score = scale * score + jnp.where(jnp.isfinite(bias), bias, 0.0)[:, None, :]
    if keys is not None:
        spread = _row_spread(score, (live & ~forced)[:, None, :])
        draw = _draw(noise.kind, keys, head, score.shape[1:])
        draw = jnp.tile(draw, (score.shape[0] // keys.shape[0], 1, 1))
        score = score + noise.scale * spread * draw
    worst = jnp.finfo(jnp.float32).min
    score = jnp.where(jnp.isfinite(score), score, worst)
    score = jnp.where(forced[:, None, :], jnp.inf, score)
    score = jnp.where(live[:, None, :], score, -jnp.inf)
    return jax.lax.top_k(score, kept)[1]


def _row_spread(score: Float[Array, "B I J"], mask: Bool[Array, "B 1 J"]) -> Float[Array, "B I 1"]:
    """Standard deviation of each row over the masked finite entries; 0 where there is none."""
    mask = mask & jnp.isfinite(score)
    number = jnp.maximum(mask.sum(2, keepdims=True), 1).astype(jnp.float32)
    mean = jnp.where(mask, score, 0.0).sum(2, keepdims=True) / number
    square = jnp.where(mask, (score - mean) ** 2, 0.0)
    return jnp.sqrt(square.sum(2, keepdims=True) / number)


def _draw(
    kind: str, keys: jax.Array, head: Int[Array, ""], shape: tuple[int, int]
) -> Float[Array, "P I J"]:
    """Draws of unit variance and zero location for one head of every prompt."""

    def one(key):
        key = jax.random.fold_in(key, head)
        if kind == "gaussian":
            return jax.random.normal(key, shape, jnp.float32)
        if kind == "uniform":
            return jax.random.uniform(key, shape, jnp.float32, minval=-(3**0.5), maxval=3**0.5)
        return jax.random.gumbel(key, shape, jnp.float32) * (6**0.5 / jnp.pi)

    return jax.vmap(one)(keys)
