"""The truth in plain jnp: closed forms with token masks, for small sizes and finite input only."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pasa_jax.pallas_kernels.blocks import (
    BlockIndex,
    BlockMass,
    BlockStatistics,
    block_lengths,
    num_blocks,
)


def _wide(*arrays: Array) -> tuple[Array, ...]:
    """float32, or float64 where x64 is on."""
    dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    return tuple(a.astype(dtype) for a in arrays)


def _valid_tokens(
    tokens: int, block: int, kv_length: Int[Array, " B"] | None, batch: int
) -> Bool[Array, "B S"]:
    lengths = block_lengths(tokens, block, kv_length, batch)
    valid = (
        jnp.arange(block, dtype=jnp.int32)[None, None, :] < lengths[:, :, None]
    )  # [B, J, block_kv]
    return valid.reshape(batch, -1)[:, :tokens]


def _selected(blocks: BlockIndex, num_key_blocks: int) -> Bool[Array, "B N I J"]:
    slot = jnp.arange(blocks.ids.shape[-1], dtype=jnp.int32)
    live = slot[None, None, None, :] < blocks.count[..., None]
    hot = jax.nn.one_hot(blocks.ids, num_key_blocks, dtype=jnp.bool_)
    return jnp.any(hot & live[..., None], axis=-2)


def _per_block(x: Float[Array, "B S N H"], block: int) -> Float[Array, "B N J K H"]:
    """Cuts tokens into blocks of `block`, the last one filled with zeros."""
    b, s, n, h = x.shape
    j = num_blocks(s, block)
    x = jnp.pad(x, ((0, 0), (0, j * block - s), (0, 0), (0, 0)))
    return jnp.moveaxis(x.reshape(b, j, block, n, h), 3, 1)


def _block_covariance(k, v, block_kv, kv_length):
    """Per-block statistics: means, sums, lengths and the matrices H_j [B, N, J, H, H]."""
    b, s, _, _ = k.shape
    length = block_lengths(s, block_kv, kv_length, b)  # [B, J]
    valid = _valid_tokens(s, block_kv, kv_length, b)[:, :, None, None]
    k, v = (_per_block(jnp.where(valid, x, 0), block_kv) for x in _wide(k, v))
    size = jnp.maximum(length, 1)[:, None, :, None].astype(k.dtype)
    key_mean = k.sum(axis=3) / size
    inside = _per_block(valid.astype(k.dtype), block_kv)  # [B, 1, J, block_kv, 1]
    centred = (k - key_mean[:, :, :, None, :]) * inside
    covariance = jnp.einsum("bnjkh,bnjkd->bnjhd", centred, v)
    return key_mean, v.sum(axis=3), length, covariance


def _group_sum(x: Array, group: int, axis: int) -> Array:
    """Sums runs of `group` entries along `axis`."""
    return jnp.add.reduceat(x, jnp.arange(0, x.shape[axis], group), axis=axis)


def block_statistics(
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    *,
    block_kv: int,
    group: int,
    kv_length: Int[Array, " B"] | None = None,
) -> BlockStatistics:
    """See `api.block_statistics`."""
    key_mean, value_sum, length, covariance = _block_covariance(k, v, block_kv, kv_length)
    return BlockStatistics(key_mean, value_sum, length, _group_sum(covariance, group, 2), group)


def block_covariance_norm(
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    *,
    block_kv: int,
    group: int,
    kv_length: Int[Array, " B"] | None = None,
    statistics: BlockStatistics | None = None,
) -> Float[Array, "B N J"]:
    """See `api.block_covariance_norm`; computes the statistics anew."""
    _, _, length, covariance = _block_covariance(k, v, block_kv, kv_length)
    total = _group_sum(covariance, group, 2)
    tokens = jnp.maximum(_group_sum(length, group, 1), 1)
    of = jnp.arange(length.shape[1]) // group
    length, tokens = _wide(length, tokens)
    share = length / tokens[:, of]
    return jnp.linalg.norm(
        covariance - share[:, None, :, None, None] * total[:, :, of], axis=(3, 4)
    )


def _tail(q, tail, selected, block_q, scale):
    """Scores of the block means [B, N, T, J] (-inf where not in the tail)."""
    key_mean, q = _wide(tail.key_mean, q)
    scores = jnp.einsum("btnh,bnjh->bntj", q, key_mean) * scale
    live = ~selected & (tail.length > 0)[:, None, None, :]
    live = jnp.repeat(live, block_q, axis=2)[:, :, : q.shape[1]]
    return jnp.where(live, scores, -jnp.inf)


def _tail_values(q, tail, weights, order, scale):
    """Numerator of the tail [B, N, T, H], given Ψ = `weights` [B, N, T, J]."""
    value_sum, covariance, length, q = _wide(tail.value_sum, tail.covariance, tail.length, q)
    out = jnp.einsum("bntj,bnjh->bnth", weights, value_sum)
    if order == 0:
        return out
    mass = _group_sum(weights * length[:, None, None], tail.group, 3)  # [B, N, T, G]
    tokens = jnp.maximum(_group_sum(length, tail.group, 1), 1)[:, None, None, :]
    return out + scale * jnp.einsum("bntg,btnh,bnghd->bntd", mass / tokens, q, covariance)


def block_sparse_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    blocks: BlockIndex,
    *,
    block_q: int,
    block_kv: int,
    tail: BlockStatistics | None = None,
    order: int = 1,
    kv_length: Int[Array, " B"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """See `api.block_sparse_attention`."""
    b, t, _, h = q.shape
    s = k.shape[1]
    scale = h**-0.5 if scale is None else scale
    selected = _selected(blocks, num_blocks(s, block_kv))  # [B, N, I, J]
    valid = _valid_tokens(s, block_kv, kv_length, b)
    keep = jnp.repeat(jnp.repeat(selected, block_q, axis=2), block_kv, axis=3)[:, :, :t, :s]
    keep = keep & valid[:, None, None, :]
    wide_q, wide_k, wide_v = _wide(q, k, jnp.where(valid[:, :, None, None], v, 0))
    scores = jnp.einsum("btnh,bsnh->bnts", wide_q, wide_k) * scale
    scores = jnp.where(keep, scores, -jnp.inf)
    if tail is not None:
        scores = jnp.concatenate([scores, _tail(q, tail, selected, block_q, scale)], axis=-1)
    top = jnp.max(scores, axis=-1, keepdims=True)
    top = jnp.where(jnp.isneginf(top), 0, top)
    weights = jnp.exp(scores - top)
    out = jnp.einsum("bnts,bsnh->bnth", weights[..., :s], wide_v)
    mass = weights[..., :s].sum(axis=-1, keepdims=True)
    if tail is not None:
        out = out + _tail_values(q, tail, weights[..., s:], order, scale)
        mass = mass + jnp.einsum("bntj,bj->bnt", weights[..., s:], *_wide(tail.length))[..., None]
    out = out / jnp.where(mass == 0, 1, mass)  # nothing kept: 0, and lse = -inf
    out = jnp.moveaxis(out, 1, 2).astype(q.dtype)
    return (out, jnp.moveaxis(top + jnp.log(mass), 1, 2)[..., 0]) if return_lse else out


def block_mass(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    lse: Float[Array, "B T N"],
    *,
    block_q: int,
    block_kv: int,
    top: int,
    kv_length: Int[Array, " B"] | None = None,
    scale: float | None = None,
) -> BlockMass:
    """See `api.block_mass`; holds every token's weights."""
    b, t, n, h = q.shape
    s = k.shape[1]
    scale = h**-0.5 if scale is None else scale
    wide_q, wide_k, wide_lse = _wide(q, k, jnp.moveaxis(lse, 1, 2)[..., None])
    scores = jnp.einsum("btnh,bsnh->bnts", wide_q, wide_k) * scale
    weights = jnp.exp(scores - jnp.where(jnp.isneginf(wide_lse), jnp.inf, wide_lse))
    valid = _valid_tokens(s, block_kv, kv_length, b)[:, None, None, :]
    weights = jnp.where(valid, weights, 0)
    i, j = num_blocks(t, block_q), num_blocks(s, block_kv)
    weights = jnp.pad(weights, ((0, 0), (0, 0), (0, i * block_q - t), (0, j * block_kv - s)))
    mass = weights.reshape(b, n, i, block_q, j, block_kv).sum(axis=(3, 5))
    ids = jnp.argsort(-mass, axis=-1, stable=True)[..., :top].astype(jnp.int32)
    return BlockMass(ids, jnp.take_along_axis(mass, ids, axis=-1), mass.sum(axis=-1))


def dense_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    *,
    kv_length: Int[Array, " B"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """See `api.dense_attention`."""
    b, t, n, _ = q.shape
    s = k.shape[1]
    everything = BlockIndex(jnp.zeros((b, n, 1, 1), jnp.int32), jnp.ones((b, n, 1), jnp.int32))
    return block_sparse_attention(
        q,
        k,
        v,
        everything,
        block_q=t,
        block_kv=s,
        kv_length=kv_length,
        scale=scale,
        return_lse=return_lse,
    )
