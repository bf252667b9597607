"""Blocks of tokens: the records the operations exchange, and the arithmetic of ragged ends."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class BlockIndex(NamedTuple):
    """For every query block, the key blocks computed exactly.

    Attributes:
        ids: int32 [B, N, I, L], key block numbers; a row's entries beyond `count` are never read.
        count: int32 [B, N, I], how many entries of the row are valid. Data, not shape: one
            compilation serves every budget up to L.
    """

    ids: Int[Array, "B N I L"]
    count: Int[Array, "B N I"]


class BlockMass(NamedTuple):
    """For every query block, the key blocks that hold most of its attention.

    Attributes:
        ids: int32 [B, N, I, top], key block numbers, the heaviest first; of equals the first.
        mass: f32 [B, N, I, top], their softmax weights summed over the block's queries and keys.
        total: f32 [B, N, I], the mass of all key blocks: the valid queries of the block, where the
            log-sum-exp is the queries' own.
    """

    ids: Int[Array, "B N I top"]
    mass: Float[Array, "B N I top"]
    total: Float[Array, "B N I"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockStatistics:
    """What the Taylor expansion of the blocks not computed exactly needs.

    Attributes:
        key_mean: f32 [B, N, J, H], mean of the block's valid keys; 0 where it has none.
        value_sum: f32 [B, N, J, H], sum of the block's valid values.
        length: int32 [B, J], valid tokens in the block.
        covariance: f32 [B, N, G, H, H], per group Σ_j Σ_n (k_n − kbar_j)ᵀ v_n, un-normalised:
            rows are key channels, columns value channels. G = ceil(J / group).
        group: blocks in a group; J or more means one group (PISA), 32 is PASA's.
    """

    key_mean: Float[Array, "B N J H"]
    value_sum: Float[Array, "B N J H"]
    length: Int[Array, "B J"]
    covariance: Float[Array, "B N G H H"]
    group: int = dataclasses.field(metadata={"static": True})


def num_blocks(tokens: int, block: int) -> int:
    """Blocks that cover `tokens`; the last one may be ragged."""
    return -(-tokens // block)


def block_lengths(
    tokens: int, block: int, kv_length: Int[Array, " B"] | None, batch: int
) -> Int[Array, "B J"]:
    """Valid tokens of each key block: `block`, except at the end of the array or of `kv_length`."""
    end = jnp.full((batch,), tokens, jnp.int32) if kv_length is None else kv_length
    end = jnp.minimum(end, tokens).astype(jnp.int32)
    start = jnp.arange(num_blocks(tokens, block), dtype=jnp.int32) * block
    return jnp.clip(end[:, None] - start[None, :], 0, block)


def group_count(blocks: int, group: int) -> int:
    """Groups that cover `blocks` key blocks; the last one may hold fewer."""
    return -(-blocks // group)


def pad_axis(x: Array, axis: int, size: int, value: int = 0) -> Array:
    """`value` at the end of `axis`, up to `size`; no copy when it already has that size."""
    if x.shape[axis] == size:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)


def group_tokens(length: Int[Array, "B J"], group: int) -> Int[Array, "B G"]:
    """Valid tokens of each group of blocks, T_g; at least 1, as it divides."""
    batch, blocks = length.shape
    size, groups = min(group, blocks), group_count(blocks, group)
    padded = pad_axis(length, 1, groups * size)
    return jnp.maximum(padded.reshape(batch, groups, size).sum(axis=2), 1)


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The type sums and softmax run in: float32, or float64 for float64 input."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
