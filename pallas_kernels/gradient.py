"""The gradient of block-sparse attention, for every kernel: jnp, one query block at a time.

The backward pass recomputes each query block's softmax from the listed blocks, so that what is kept
between the passes is linear in tokens: q, k, v, the lists and the statistics.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pasa_jax.pallas_kernels.blocks import (
    BlockIndex,
    BlockStatistics,
    accumulation_dtype,
    block_lengths,
    group_count,
    num_blocks,
)


class _Tail(NamedTuple):
    """One head's statistics."""

    mean: Array  # [J, H]
    value: Array  # [J, H]
    matrix: Array  # [G, H, H]
    tokens: Array  # [J], the blocks' lengths
    of_group: Array  # [J, G], 1 where the block is in the group


def _rows(
    q: Array,
    k: Array,
    v: Array,
    tail: _Tail | None,
    inside: Array,
    free: Array,
    order: int,
    scale: float,
) -> tuple[Array, Array]:
    """Output [P, H] and log-sum-exp [P] of one query block.

    q [P, H]; k, v [K, H] are the tokens of its listed blocks, of which those `inside` [K] count;
    `free` [J] are the blocks that the tail stands for.
    """
    scores = jnp.where(inside[None], scale * q @ k.T, -jnp.inf)
    if tail is None:
        log_mass = scores
    else:
        # A block's mean stands for each of its tokens.
        logits = scale * q @ tail.mean.T + jnp.log(jnp.maximum(tail.tokens, 1))[None]
        log_mass = jnp.concatenate([scores, jnp.where(free[None], logits, -jnp.inf)], axis=1)
    top = lax.stop_gradient(jnp.max(log_mass, axis=1, keepdims=True))
    top = jnp.where(jnp.isneginf(top), 0, top)
    weights = jnp.exp(log_mass - top)
    mass = weights.sum(axis=1)
    exact = k.shape[0]
    out = weights[:, :exact] @ v
    if tail is not None:
        out = out + _tail_values(q, weights[:, exact:], tail, order, scale)
    seen = mass > 0
    safe = jnp.where(seen, mass, 1)
    return out / safe[:, None], jnp.where(seen, top[:, 0] + jnp.log(safe), -jnp.inf)


def _tail_values(q: Array, weights: Array, tail: _Tail, order: int, scale: float) -> Array:
    """The tail's share of the numerator [P, H]; `weights` [P, J] hold the blocks' lengths."""
    out = (weights / jnp.maximum(tail.tokens, 1)[None]) @ tail.value
    if order == 0:
        return out
    total = jnp.maximum(tail.tokens @ tail.of_group, 1)
    share = (weights @ tail.of_group) / total[None]  # ω_g / T_g [P, G]
    return out + scale * jnp.einsum("pg,ph,ghd->pd", share, q, tail.matrix)


def _groups(tail: BlockStatistics, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Lengths [B, J], and which group holds which block [B, J, G]."""
    batch, blocks = tail.length.shape
    number = jnp.arange(blocks, dtype=jnp.int32) // min(tail.group, blocks)
    of_group = jax.nn.one_hot(number, group_count(blocks, tail.group), dtype=dtype)
    return tail.length.astype(dtype), jnp.broadcast_to(of_group, (batch, *of_group.shape))


def _add(total: Array, ids: Array, piece: Array) -> Array:
    """Adds [L, block, H] to the blocks `ids` of [J, block, H]; ids of J and more go nowhere."""
    return total.at[ids].add(piece, mode="drop")


def _head_gradient(
    q: Array,
    k: Array,
    v: Array,
    blocks: BlockIndex,
    tail: _Tail | None,
    length: Array,
    cotangent: tuple[Array, Array],
    order: int,
    scale: float,
) -> tuple[Array, Array, Array, _Tail | None]:
    """One head: q, the outputs' cotangents [I, P, ...]; k, v [J, block, H]; lists [I, L], [I]."""
    total, block, h = k.shape
    slots = jnp.arange(blocks.ids.shape[1], dtype=jnp.int32)

    def one(carry, row):
        dk, dv, dtail = carry
        q, ids, count, cotangent = row
        live = (slots < count) & (ids >= 0) & (ids < total)
        safe = jnp.clip(ids, 0, total - 1)
        inside = jnp.arange(block, dtype=jnp.int32)[None, :] < length[safe][:, None]
        inside = inside & live[:, None]
        # What does not count is zeroed: a weight of zero does not silence a NaN.
        keys, values = (jnp.where(inside[..., None], x[safe], 0).reshape(-1, h) for x in (k, v))
        target = jnp.where(live, ids, total)
        free = jnp.ones(total, jnp.bool_).at[target].set(False, mode="drop") & (length > 0)

        def attend(q, keys, values, tail):
            return _rows(q, keys, values, tail, inside.reshape(-1), free, order, scale)

        _, pull = jax.vjp(attend, q, keys, values, tail)
        dq, dkeys, dvalues, more = pull(cotangent)
        dk = _add(dk, target, dkeys.reshape(-1, block, h))
        dv = _add(dv, target, dvalues.reshape(-1, block, h))
        return (dk, dv, jax.tree.map(jnp.add, dtail, more)), dq

    start = jnp.zeros_like(k), jnp.zeros_like(v), jax.tree.map(jnp.zeros_like, tail)
    (dk, dv, dtail), dq = lax.scan(one, start, (q, blocks.ids, blocks.count, cotangent))
    return dq, dk, dv, dtail


def _cut(x: Array, block: int) -> Array:
    """Tokens [B, T, N, ...] in blocks per head [B · N, I, block, ...], the last zero-padded."""
    b, t, n = x.shape[:3]
    i = num_blocks(t, block)
    x = jnp.pad(x, ((0, 0), (0, i * block - t), *((0, 0),) * (x.ndim - 2)))
    x = jnp.moveaxis(x.reshape(b, i, block, n, *x.shape[3:]), 3, 1)
    return x.reshape(b * n, i, block, *x.shape[4:])


def _join(x: Array, b: int, t: int) -> Array:
    """The way back from `_cut`."""
    x = x.reshape(b, -1, *x.shape[1:])  # [B, N, I, block, H]
    x = jnp.moveaxis(x, 1, 3)
    return x.reshape(b, -1, *x.shape[3:])[:, :t]


def block_sparse_gradient(
    q: Array,
    k: Array,
    v: Array,
    blocks: BlockIndex,
    tail: BlockStatistics | None,
    kv_length: Array | None,
    cotangent: tuple[Array, Array],
    *,
    block_q: int,
    block_kv: int,
    order: int,
    scale: float | None,
) -> tuple[Array, Array, Array, tuple[Array, Array, Array] | None]:
    """Cotangents of q, k, v and the statistics.

    Args:
        q, k, v, blocks, tail, kv_length, block_q, block_kv, order, scale: of the call.
        cotangent: of its output [B, T, N, H] and its log-sum-exp [B, T, N].

    Returns:
        As q, k and v, and as the tail's key_mean, value_sum and covariance; None without one. Sums
        run in float32 (float64 for float64 input). Tokens of a listed block get theirs through the
        exact part here, and through the statistics where these were computed from them.
    """
    b, t, n, h = q.shape
    s, dtype = k.shape[1], accumulation_dtype(q.dtype)
    scale = h**-0.5 if scale is None else scale
    lengths = block_lengths(s, block_kv, kv_length, b)
    heads = [_cut(x.astype(dtype), block_q) for x in (q, *cotangent)]
    keys = [_cut(x.astype(dtype), block_kv) for x in (k, v)]
    rows = heads[0].shape[1]
    lists = jax.tree.map(lambda x: x.reshape(b * n, rows, *x.shape[3:]), blocks)
    per_head = jnp.repeat(lengths, n, axis=0)
    flat = None
    if tail is not None:
        parts = (tail.key_mean, tail.value_sum, tail.covariance)
        parts = [x.astype(dtype).reshape(b * n, *x.shape[2:]) for x in parts]
        flat = _Tail(*parts, *(jnp.repeat(x, n, axis=0) for x in _groups(tail, dtype)))

    def head(x):
        q, dout, dlse, k, v, lists, length, tail = x
        return _head_gradient(q, k, v, lists, tail, length, (dout, dlse), order, scale)

    dq, dk, dv, dtail = lax.map(head, (*heads, *keys, lists, per_head, flat))
    result = (_join(dq, b, t), _join(dk, b, s), _join(dv, b, s))
    result = tuple(x.astype(y.dtype) for x, y in zip(result, (q, k, v), strict=True))
    if tail is None:
        return *result, None
    parts = (dtail.mean, dtail.value, dtail.matrix)
    like = (tail.key_mean, tail.value_sum, tail.covariance)
    parts = tuple(x.reshape(y.shape).astype(y.dtype) for x, y in zip(parts, like, strict=True))
    return *result, parts
