"""Memory-lean jnp versions: the CPU's default and a fallback anywhere; no T×S array, ever."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pasa_jax.pallas_kernels.blocks import (
    BlockIndex,
    BlockStatistics,
    accumulation_dtype,
    block_lengths,
    group_count,
)

# Scores held at once, in elements: small enough for a core's cache, large enough that XLA:CPU
# splits the elementwise work over threads.
TILE_QUERIES = 512
TILE_KEYS = 512
# Blocks whose centred keys or H_j are held at once by the statistics.
STATISTICS_BLOCKS = 32
NORM_BLOCKS = 8
DENSE_QUERIES = 512
DENSE_KEYS = 1024
# Up to this T·S the scores of all heads are held at once.
DENSE_SMALL = 1024 * 1024


class _Softmax(NamedTuple):
    """A running softmax over rows [..., P]: maximum, denominator and un-normalised output."""

    top: Array
    mass: Array
    out: Array


def _start(shape: tuple[int, ...], head_dim: int, dtype: jnp.dtype) -> _Softmax:
    return _Softmax(
        jnp.full(shape, -jnp.inf, dtype),
        jnp.zeros(shape, dtype),
        jnp.zeros((*shape, head_dim), dtype),
    )


def _raise_top(state: _Softmax, scores: Array) -> tuple[_Softmax, Array]:
    """Rescales the state to the maximum that includes `scores` [..., P, K]; returns exp(scores)."""
    top = jnp.maximum(state.top, jnp.max(scores, axis=-1))
    shift = jnp.where(jnp.isneginf(top), 0, top)  # nothing seen yet: avoid -inf − -inf
    fade = jnp.exp(state.top - shift)
    weights = jnp.exp(scores - shift[..., None])
    return _Softmax(top, state.mass * fade, state.out * fade[..., None]), weights


def _finish(state: _Softmax) -> tuple[Array, Array]:
    """Normalised output and log-sum-exp; 0 and -inf for a row that saw no key."""
    out = state.out / jnp.where(state.mass == 0, 1, state.mass)[..., None]
    return out, jnp.where(state.mass == 0, -jnp.inf, state.top + jnp.log(state.mass))


def _pad_axis(x: Array, axis: int, size: int) -> Array:
    """Zeros at the end of `axis`, up to `size`; no copy when it already has that size."""
    if x.shape[axis] == size:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def _at(start: Sequence[Array | int]) -> list[Array]:
    """Start indices of one type, also where x64 is on."""
    return [jnp.asarray(i, jnp.int32) for i in start]


def _slice(x: Array, start: Sequence[Array | int], sizes: Sequence[int]) -> Array:
    return lax.dynamic_slice(x, _at(start), sizes)


def _write(x: Array, piece: Array, start: Sequence[Array | int]) -> Array:
    return lax.dynamic_update_slice(x, piece.astype(x.dtype), _at(start))


def _balanced(total: int, most: int) -> int:
    """The piece size, at most `most`, that cuts `total` into the fewest and most equal pieces."""
    pieces = -(-total // max(1, min(most, total)))
    return -(-total // pieces)


# --- block_sparse_attention ---------------------------------------------------------------------


def _take_blocks(x: Array, b: Array, n: Array, start: Array, block: int) -> Array:
    """Tokens start … start + block of one head of x [B, S, N, H], for starts of any shape."""

    def one(at):
        piece = _slice(x, (b, at, n, 0), (1, block, 1, x.shape[-1]))
        return piece[0, :, 0]

    return jax.vmap(jax.vmap(one))(start)


class _Tile(NamedTuple):
    """The query blocks of one head that a loop step works on."""

    b: Array
    n: Array
    q: Array  # [R, block_q, H], scaled
    ids: Array  # [R, L]
    count: Array  # [R]


def _add_listed(
    state: _Softmax, tile: _Tile, k: Array, v: Array, length: Array, block: int, slot: Array, c: int
) -> _Softmax:
    """Adds the listed blocks in slots slot … slot + c. `length` [J] is that of the tile's batch."""
    rows = tile.ids.shape[0]
    ids = jnp.clip(lax.dynamic_slice_in_dim(tile.ids, slot, c, axis=1), 0, length.shape[0] - 1)
    # The last block starts early where it is ragged, so that the slice stays inside the array.
    start = jnp.minimum(ids * block, k.shape[1] - block)  # [R, c]
    inside = (start - ids * block)[:, :, None] + jnp.arange(block, dtype=jnp.int32)[None, None]
    listed = (slot + jnp.arange(c, dtype=jnp.int32))[None, :] < tile.count[:, None]
    end = jnp.where(listed, length[ids], 0)
    keep = (inside >= 0) & (inside < end[:, :, None])  # [R, c, block]
    keys = _take_blocks(k, tile.b, tile.n, start, block).astype(tile.q.dtype)
    values = _take_blocks(v, tile.b, tile.n, start, block).astype(tile.q.dtype)
    values = jnp.where(keep[..., None], values, 0)  # a weight of 0 does not silence a NaN
    keep, keys, values = (x.reshape(rows, c * block, *x.shape[3:]) for x in (keep, keys, values))
    scores = jnp.einsum("rqh,rkh->rqk", tile.q, keys)
    state, weights = _raise_top(state, jnp.where(keep[:, None, :], scores, -jnp.inf))
    return _Softmax(
        state.top,
        state.mass + weights.sum(axis=-1),
        state.out + jnp.einsum("rqk,rkh->rqh", weights, values),
    )


def _is_listed(tile: _Tile, blocks: int) -> Bool[Array, "R J"]:
    """Whether a key block is among the first `count` ids of a row."""
    rows, slots = tile.ids.shape
    live = jnp.arange(slots, dtype=jnp.int32)[None, :] < tile.count[:, None]
    column = jnp.where(live, tile.ids, blocks)
    row = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32)[:, None], column.shape)
    return jnp.zeros((rows, blocks), jnp.bool_).at[row, column].set(True, mode="drop")


def _add_tail(state: _Softmax, tile: _Tile, tail: BlockStatistics, order: int) -> _Softmax:
    """Adds every block that is not listed by its Taylor expansion, one group a step."""
    rows, block_q, h = tile.q.shape
    blocks = tail.length.shape[1]
    size = min(tail.group, blocks)
    q = tile.q.reshape(rows * block_q, h)
    dtype = q.dtype
    length = tail.length[tile.b]
    live = ~_is_listed(tile, blocks) & (length > 0)[None, :]

    def group(g: Array, state: _Softmax) -> _Softmax:
        g = g.astype(jnp.int32)
        # The last group starts early where it is ragged; `fresh` drops the blocks seen before.
        start = jnp.minimum(g * size, blocks - size)
        fresh = start + jnp.arange(size, dtype=jnp.int32) >= g * size
        at = (tile.b, tile.n, start, 0)
        mean = _slice(tail.key_mean, at, (1, 1, size, h))[0, 0].astype(dtype)
        value = _slice(tail.value_sum, at, (1, 1, size, h))[0, 0].astype(dtype)
        tokens = jnp.where(fresh, _slice(length, (start,), (size,)), 0).astype(dtype)
        keep = _slice(live, (0, start), (rows, size)) & fresh[None, :]
        keep = jnp.repeat(keep, block_q, axis=0)  # [P, size]
        scores = jnp.where(keep, jnp.einsum("ph,jh->pj", q, mean), -jnp.inf)
        state, weights = _raise_top(state, scores)
        mass = weights @ tokens  # ω_g, in the scale of this step's maximum
        out = state.out + weights @ value
        if order == 1:
            at = (tile.b, tile.n, g, 0, 0)
            matrix = _slice(tail.covariance, at, (1, 1, 1, h, h))[0, 0, 0].astype(dtype)
            share = mass / jnp.maximum(tokens.sum(), 1)
            out = out + (q @ matrix) * share[:, None]  # q holds the scale already
        return _Softmax(state.top, state.mass + mass, out)

    return lax.fori_loop(0, group_count(blocks, size), group, state)


def _attend_tile(
    tile: _Tile,
    k: Array,
    v: Array,
    lengths: Array,
    block: int,
    tail: BlockStatistics | None,
    order: int,
) -> tuple[Array, Array]:
    """Output [P, H] and log-sum-exp [P] of one tile's rows."""
    rows, block_q, h = tile.q.shape
    chunk = _balanced(tile.ids.shape[1], TILE_KEYS // block)
    slots = -(-tile.ids.shape[1] // chunk) * chunk
    tile = tile._replace(ids=_pad_axis(tile.ids, 1, slots))
    length = lengths[tile.b]
    state = _start((rows, block_q), h, tile.q.dtype)
    state = lax.fori_loop(
        0,
        (jnp.max(tile.count) + chunk - 1) // chunk,  # time follows the budget
        lambda i, state: _add_listed(state, tile, k, v, length, block, i * chunk, chunk),
        state,
    )
    state = jax.tree.map(lambda x: x.reshape(rows * block_q, *x.shape[2:]), state)
    if tail is not None:
        state = _add_tail(state, tile, tail, order)
    return _finish(state)


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
    """See `api.block_sparse_attention`. Products and sums run in float32; only q, k, v round."""
    b, t, n, h = q.shape
    dtype = accumulation_dtype(q.dtype)
    scale = h**-0.5 if scale is None else scale
    lengths = block_lengths(k.shape[1], block_kv, kv_length, b)
    k, v = (_pad_axis(x, 1, max(block_kv, x.shape[1])) for x in (k, v))
    query_blocks, slots = blocks.ids.shape[2:]
    rows = _balanced(query_blocks, TILE_QUERIES // block_q)
    tiles = -(-query_blocks // rows)
    q = _pad_axis(q, 1, tiles * rows * block_q)
    ids = _pad_axis(blocks.ids, 2, tiles * rows)
    count = _pad_axis(jnp.minimum(blocks.count, slots), 2, tiles * rows)

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        out, lse = carry
        i = i.astype(jnp.int32)  # int64 where x64 is on
        bi, ni, row = i // (n * tiles), i // tiles % n, i % tiles * rows
        at = (bi, row * block_q, ni, 0)
        piece = _slice(q, at, (1, rows * block_q, 1, h)).reshape(rows, block_q, h)
        tile = _Tile(
            bi,
            ni,
            piece.astype(dtype) * jnp.asarray(scale, dtype),
            _slice(ids, (bi, ni, row, 0), (1, 1, rows, slots))[0, 0],
            _slice(count, (bi, ni, row), (1, 1, rows))[0, 0],
        )
        tile_out, tile_lse = _attend_tile(tile, k, v, lengths, block_kv, tail, order)
        out = _write(out, tile_out[None, :, None], at)
        return out, _write(lse, tile_lse[None, :, None], at[:3])

    carry = jnp.zeros_like(q), jnp.zeros(q.shape[:3], dtype)
    out, lse = lax.fori_loop(0, b * n * tiles, step, carry)
    return (out[:, :t], lse[:, :t]) if return_lse else out[:, :t]


# --- dense_attention ----------------------------------------------------------------------------


def _dense_rows(q: Array, k: Array, v: Array, keep: Array) -> tuple[Array, Array]:
    """Rows q [P, H], scaled, against keys [C, K, H] that come in C pieces, with `keep` [C, K]."""

    def piece(state: _Softmax, piece: tuple[Array, Array, Array]) -> tuple[_Softmax, None]:
        k, v, keep = piece
        scores = jnp.where(keep[None, :], q @ k.T, -jnp.inf)
        state, weights = _raise_top(state, scores)
        mass = state.mass + weights.sum(axis=-1)
        return _Softmax(state.top, mass, state.out + weights @ v), None

    state, _ = lax.scan(piece, _start(q.shape[:1], q.shape[1], q.dtype), (k, v, keep))
    return _finish(state)


def _dense_head(q: Array, k: Array, v: Array, end: Array) -> tuple[Array, Array]:
    """One head: q [T, H], scaled, and k, v [S, H], of which the first `end` are valid."""
    t, h = q.shape
    rows, keys = _balanced(t, DENSE_QUERIES), _balanced(k.shape[0], DENSE_KEYS)
    tiles, pieces = -(-t // rows), -(-k.shape[0] // keys)
    k, v = (_pad_axis(x, 0, pieces * keys).reshape(pieces, keys, h) for x in (k, v))
    keep = (jnp.arange(pieces * keys, dtype=jnp.int32) < end).reshape(pieces, keys)
    q = _pad_axis(q, 0, tiles * rows).reshape(tiles, rows, h)
    # The checkpoint keeps the gradient from storing every tile's weights, which is T×S again.
    out, lse = lax.map(jax.checkpoint(lambda rows: _dense_rows(rows, k, v, keep)), q)
    return out.reshape(-1, h)[:t], lse.reshape(-1)[:t]


def _dense_small(q: Array, k: Array, v: Array, end: Array) -> tuple[Array, Array]:
    """All heads of [B, T, N, H] at once, for sequences whose scores are few."""
    keep = jnp.arange(k.shape[1], dtype=jnp.int32)[None, :] < end[:, None]
    scores = jnp.einsum("btnh,bsnh->bnts", q, k)
    scores = jnp.where(keep[:, None, None, :], scores, -jnp.inf)
    top = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - jnp.where(jnp.isneginf(top), 0, top)[..., None])
    mass = weights.sum(axis=-1)
    out = jnp.einsum("bnts,bsnh->bnth", weights, v)
    out, lse = _finish(_Softmax(top, mass, out))
    return jnp.moveaxis(out, 1, 2), jnp.moveaxis(lse, 1, 2)


def dense_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    *,
    kv_length: Int[Array, " B"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """See `api.dense_attention`. Products and sums run in float32; only q, k, v round."""
    b, t, n, h = q.shape
    s = k.shape[1]
    dtype = accumulation_dtype(q.dtype)
    scale = jnp.asarray(h**-0.5 if scale is None else scale, dtype)
    end = jnp.full((b,), s, jnp.int32) if kv_length is None else kv_length
    if kv_length is not None:  # a weight of 0 does not silence a NaN
        inside = jnp.arange(s, dtype=jnp.int32)[None, :] < end[:, None]
        v = jnp.where(inside[:, :, None, None], v, 0)
    if t * s <= DENSE_SMALL:
        out, lse = _dense_small(q.astype(dtype) * scale, k.astype(dtype), v.astype(dtype), end)
    else:

        def head(i: Array) -> tuple[Array, Array]:
            bi, ni = i // n, i % n
            rows, keys, values = (
                _slice(x, (bi, 0, ni, 0), (1, x.shape[1], 1, h))[0, :, 0].astype(dtype)
                for x in (q, k, v)
            )
            out, lse = _dense_head(rows * scale, keys, values, end[bi])
            return out.astype(q.dtype), lse

        out, lse = lax.map(head, jnp.arange(b * n, dtype=jnp.int32))
        out = jnp.moveaxis(out.reshape(b, n, t, h), 1, 2)
        lse = jnp.moveaxis(lse.reshape(b, n, t), 1, 2)
    return (out.astype(q.dtype), lse) if return_lse else out.astype(q.dtype)


# --- block statistics ---------------------------------------------------------------------------


class _Pieces(NamedTuple):
    """The valid tokens of a run of key blocks, zero elsewhere."""

    first: Array  # number of the first block
    k: Array  # [B, c, block_kv, N, H]
    v: Array
    inside: Array  # bool [B, c, block_kv, 1, 1]
    length: Array  # [B, c], in the type of k


def _pieces(k: Array, v: Array, lengths: Array, block: int, first: Array, c: int) -> _Pieces:
    """Cuts c blocks out of k and v; blocks that start before the end may reach over it."""
    b, s, n, h = k.shape
    dtype = accumulation_dtype(k.dtype)
    size = min(c * block, s)
    start = jnp.minimum(first * block, s - size)
    shift = first * block - start
    lengths = lax.dynamic_slice_in_dim(
        _pad_axis(lengths, 1, lengths.shape[1] + c), first, c, axis=1
    )
    inside = jnp.arange(block, dtype=jnp.int32)[None, None, :] < lengths[:, :, None]
    inside = inside[..., None, None]

    def cut(x: Array) -> Array:
        x = lax.dynamic_slice_in_dim(x, start, size, axis=1)
        x = jnp.roll(_pad_axis(x, 1, c * block), -shift, axis=1)
        return jnp.where(inside, x.reshape(b, c, block, n, h).astype(dtype), 0)

    return _Pieces(first, cut(k), cut(v), inside, lengths.astype(dtype))


def _centred(pieces: _Pieces) -> tuple[Array, Array]:
    """Block means [B, c, N, H] and keys less their block's mean, zero where not valid."""
    size = jnp.maximum(pieces.length, 1)[..., None, None]
    mean = pieces.k.sum(axis=2) / size
    return mean, jnp.where(pieces.inside, pieces.k - mean[:, :, None], 0)


def _join(x: Array, blocks: int) -> Array:
    """Stacked outputs of a scan [C, B, c, N, ...] → [B, N, J, ...]."""
    x = jnp.moveaxis(x, 3, 1)  # [C, N, B, c, ...]
    x = jnp.moveaxis(x, (2, 1), (0, 1))  # [B, N, C, c, ...]
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :blocks]


def block_statistics(
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    *,
    block_kv: int,
    group: int,
    kv_length: Int[Array, " B"] | None = None,
) -> BlockStatistics:
    """See `api.block_statistics`. Holds the centred keys of a few blocks at a time, and no H_j."""
    b, s, n, h = k.shape
    dtype = accumulation_dtype(k.dtype)
    lengths = block_lengths(s, block_kv, kv_length, b)
    blocks = lengths.shape[1]
    chunk = STATISTICS_BLOCKS if group >= blocks else math.gcd(group, STATISTICS_BLOCKS)
    chunk = min(chunk, blocks)

    def step(covariance: Array, first: Array) -> tuple[Array, tuple[Array, Array]]:
        pieces = _pieces(k, v, lengths, block_kv, first, chunk)
        mean, centred = _centred(pieces)
        part = jnp.einsum("bcknh,bcknd->bnhd", centred, pieces.v)
        return covariance.at[:, :, first // group].add(part), (mean, pieces.v.sum(axis=2))

    first = jnp.arange(0, blocks, chunk, dtype=jnp.int32)
    covariance = jnp.zeros((b, n, group_count(blocks, group), h, h), dtype)
    covariance, (mean, total) = lax.scan(step, covariance, first)
    return BlockStatistics(_join(mean, blocks), _join(total, blocks), lengths, covariance, group)


def block_covariance_norm(
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    *,
    block_kv: int,
    group: int,
    kv_length: Int[Array, " B"] | None = None,
) -> Float[Array, "B N J"]:
    """See `api.block_covariance_norm`. Two passes; the second holds the H_j of a few blocks."""
    statistics = block_statistics(k, v, block_kv=block_kv, group=group, kv_length=kv_length)
    lengths = statistics.length
    blocks = lengths.shape[1]
    chunk = min(NORM_BLOCKS, blocks)
    of = jnp.arange(-(-blocks // chunk) * chunk, dtype=jnp.int32) // group  # group of a block
    covariance = statistics.covariance
    groups = covariance.shape[2]
    tokens = jax.ops.segment_sum(lengths.T, of[:blocks], groups).T.astype(covariance.dtype)

    def step(_: None, first: Array) -> tuple[None, Array]:
        pieces = _pieces(k, v, lengths, block_kv, first, chunk)
        matrix = jnp.einsum("bcknh,bcknd->bnchd", _centred(pieces)[1], pieces.v)
        groups = lax.dynamic_slice_in_dim(of, first, chunk)
        share = pieces.length / jnp.maximum(tokens[:, groups], 1)
        mean = covariance[:, :, groups] * share[:, None, :, None, None]
        norm = jnp.sqrt(jnp.sum(jnp.square(matrix - mean), axis=(3, 4)))  # [B, N, c]
        return None, jnp.moveaxis(norm, 1, 2)

    _, norm = lax.scan(step, None, jnp.arange(0, blocks, chunk, dtype=jnp.int32))
    return _join(norm, blocks)
