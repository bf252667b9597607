"""Memory-lean jnp versions: the CPU's default and a fallback anywhere; no T×S array, ever."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pasa_jax.pallas_kernels.blocks import (
    BlockIndex,
    BlockMass,
    BlockStatistics,
    accumulation_dtype,
    block_lengths,
    group_count,
    group_tokens,
    num_blocks,
    pad_axis,
)
from pasa_jax.pallas_kernels.tuning import check_options, tuned

# Scores held at once, in elements: small enough for a core's cache, large enough that XLA:CPU
# splits the elementwise work over threads.
TILE_QUERIES = 512
TILE_KEYS = 512
# What `pasa-jax tune` tries in their place.
TUNABLE = {"tile_queries": (256, 512, 1024), "tile_keys": (256, 512, 1024)}
# Block means a step of the tail's scan takes, in whole groups, if a group has no more.
TAIL_COLUMNS = 512
# Blocks the statistics work on at once where one group holds them all; H_j held at once.
STATISTICS_BLOCKS = 32
NORM_BLOCKS = 16
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
    # The result does not depend on the maximum, so neither does its gradient.
    top = jnp.maximum(state.top, lax.stop_gradient(jnp.max(scores, axis=-1)))
    shift = jnp.where(jnp.isneginf(top), 0, top)  # nothing seen yet: avoid -inf − -inf
    fade = jnp.exp(state.top - shift)
    weights = jnp.exp(scores - shift[..., None])
    return _Softmax(top, state.mass * fade, state.out * fade[..., None]), weights


def _finish(state: _Softmax) -> tuple[Array, Array]:
    """Normalised output and log-sum-exp; 0 and -inf for a row that saw no key."""
    out = state.out / jnp.where(state.mass == 0, 1, state.mass)[..., None]
    return out, jnp.where(state.mass == 0, -jnp.inf, state.top + jnp.log(state.mass))


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


class _Head(NamedTuple):
    """One head's key blocks, followed by one block of zeros for slots that list nothing."""

    k: Array  # [J + 1, block_kv, H]
    v: Array
    inside: Array  # [J + 1, block_kv], 1 where the token is valid, in the type of k
    length: Array  # [J]
    tail: "_TailHead | None"


class _TailHead(NamedTuple):
    """One head's block statistics, cut into steps of a few groups, zero-padded."""

    mean: Array  # [steps, columns, H]
    value: Array  # [steps, columns, H]
    live: Array  # bool [steps, columns], whether the block has a valid token
    tokens: Array  # [steps, columns, groups in a step], the block's length in its group's column
    matrix: Array  # [steps, groups in a step · H, H], covariance / T_g


class _Tile(NamedTuple):
    """A few query blocks of one head."""

    q: Array  # [R, block_q, H], scaled
    ids: Array  # [R, L]
    count: Array  # [R]


def _slots(tile: _Tile, length: Array) -> tuple[Array, Array, Array]:
    """Per slot the block to take keys and values from, and whether it lists one: [R, L] each.

    A slot that lists nothing takes its values, and so its weights, from the block of zeros; its
    keys repeat a listed block's, so that they cannot raise the maximum.
    """
    blocks = length.shape[0]
    live = jnp.arange(tile.ids.shape[1], dtype=jnp.int32)[None, :] < tile.count[:, None]
    ids = jnp.clip(tile.ids, 0, blocks - 1)
    live = live & (length[ids] > 0)
    first = jnp.take_along_axis(ids, jnp.argmax(live, axis=1, keepdims=True), axis=1)
    first = jnp.where(jnp.any(live, axis=1, keepdims=True), first, blocks)
    return jnp.where(live, ids, first), jnp.where(live, ids, blocks), live


def _add_slots(
    state: _Softmax, tile: _Tile, head: _Head, key_ids: Array, value_ids: Array
) -> _Softmax:
    """Adds the blocks of some slots [R, C]."""
    rows, _, h = tile.q.shape
    keys = head.k[key_ids].reshape(rows, -1, h)  # [R, C · block_kv, H]
    values = head.v[value_ids].reshape(rows, -1, h)
    inside = head.inside[value_ids].reshape(rows, -1)
    state, weights = _raise_top(state, jnp.einsum("rqh,rkh->rqk", tile.q, keys))
    return _Softmax(
        state.top,
        state.mass + jnp.einsum("rqk,rk->rq", weights, inside),
        state.out + jnp.einsum("rqk,rkh->rqh", weights, values),
    )


def _listed(tile: _Tile, head: _Head, chunks: tuple[int, int]) -> _Softmax:
    """Softmax over the listed blocks, many slots at a time and then few: time follows the count."""
    rows, block_q, h = tile.q.shape
    key_ids, value_ids, live = _slots(tile, head.length)
    state = _start((rows, block_q), h, tile.q.dtype)
    most, start = jnp.max(tile.count), jnp.int32(0)
    many, few = chunks
    for size, steps in ((many, most // many), (few, (most % many + few - 1) // few)):

        def add(i: Array, state: _Softmax, start: Array = start, size: int = size) -> _Softmax:
            at = start + i * size
            ids = (lax.dynamic_slice_in_dim(x, at, size, axis=1) for x in (key_ids, value_ids))
            return _add_slots(state, tile, head, *ids)

        state = lax.fori_loop(0, steps, add, state)
        start = start + steps * size
    # A row without a listed block has met the zero keys only: forget their maximum.
    top = jnp.where(jnp.any(live, axis=1)[:, None], state.top, -jnp.inf)
    return state._replace(top=top)


def _is_listed(tile: _Tile, blocks: int) -> Bool[Array, "R J"]:
    """Whether a key block is among the first `count` ids of a row."""
    rows, slots = tile.ids.shape
    live = jnp.arange(slots, dtype=jnp.int32)[None, :] < tile.count[:, None]
    column = jnp.where(live, tile.ids, blocks)
    row = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32)[:, None], column.shape)
    return jnp.zeros((rows, blocks), jnp.bool_).at[row, column].set(True, mode="drop")


def _tail_head(tail: BlockStatistics, b: Array, n: Array, dtype: jnp.dtype) -> _TailHead:
    """Cuts one head's statistics into steps."""
    blocks, h = tail.key_mean.shape[2:]
    size = min(tail.group, blocks)
    groups = group_count(blocks, size)
    wide = _balanced(groups, max(1, min(TAIL_COLUMNS // h, TAIL_COLUMNS // size)))
    steps = -(-groups // wide)
    mean, value, matrix = (
        _slice(x, (b, n, *(0,) * (x.ndim - 2)), (1, 1, *x.shape[2:]))[0, 0].astype(dtype)
        for x in (tail.key_mean, tail.value_sum, tail.covariance)
    )
    length = pad_axis(tail.length[b], 0, steps * wide * size).reshape(steps, wide, size)
    length = length.astype(dtype)
    total = jnp.maximum(length.sum(axis=2), 1).reshape(-1)[:groups]
    matrix = pad_axis(matrix / total[:, None, None], 0, steps * wide)
    own = jnp.eye(wide, dtype=dtype)[None, :, None, :]
    return _TailHead(
        pad_axis(mean, 0, steps * wide * size).reshape(steps, wide * size, h),
        pad_axis(value, 0, steps * wide * size).reshape(steps, wide * size, h),
        (length > 0).reshape(steps, wide * size),
        (length[..., None] * own).reshape(steps, wide * size, wide),
        matrix.reshape(steps, wide * h, h),
    )


def _add_tail(state: _Softmax, q: Array, listed: Array, tail: _TailHead, order: int) -> _Softmax:
    """Adds every block that is not listed by its Taylor expansion, in one scan over the groups.

    `q` [P, H] holds the scale; `listed` [R, J] says which blocks were added exactly.
    """
    rows, blocks = listed.shape
    steps, columns = tail.live.shape
    free = pad_axis(~listed, 1, steps * columns).reshape(rows, steps, columns)

    def step(state: _Softmax, piece: tuple[_TailHead, Array]) -> tuple[_Softmax, None]:
        part, free = piece
        keep = jnp.repeat(free & part.live[None, :], q.shape[0] // rows, axis=0)  # [P, columns]
        scores = jnp.where(keep, jnp.einsum("ph,jh->pj", q, part.mean), -jnp.inf)
        state, weights = _raise_top(state, scores)
        mass = weights @ part.tokens  # ω_g [P, groups], relative to this step's maximum
        out = state.out + weights @ part.value
        if order == 1:
            weighted = mass[:, :, None] * q[:, None, :]
            out = out + weighted.reshape(q.shape[0], -1) @ part.matrix
        return _Softmax(state.top, state.mass + mass.sum(axis=1), out), None

    return lax.scan(step, state, (tail, jnp.moveaxis(free, 1, 0)))[0]


def _repeat_valid(k: Array, v: Array, inside: Array) -> tuple[Array, Array]:
    """Makes the tokens that are not `inside` harmless without masking scores.

    k, v [C, K, H]: their keys become the piece's first key, which cannot raise a maximum, and
    their values zero, because a weight of zero does not silence a NaN.
    """
    first = jnp.where(inside[:, :1, None], k[:, :1], 0)
    return jnp.where(inside[..., None], k, first), jnp.where(inside[..., None], v, 0)


def _take_head(x: Array, b: Array, n: Array, dtype: jnp.dtype) -> Array:
    """One head [S, H] of x [B, S, N, H]."""
    return _slice(x, (b, 0, n, 0), (1, x.shape[1], 1, x.shape[3]))[0, :, 0].astype(dtype)


def _cut_head(k: Array, v: Array, length: Array, block: int, tail: _TailHead | None) -> _Head:
    """Cuts one head's k, v [S, H] into blocks; `length` [J] are their valid tokens."""
    blocks = length.shape[0]
    inside = jnp.arange(block, dtype=jnp.int32)[None, :] < pad_axis(length, 0, blocks + 1)[:, None]
    k, v = (pad_axis(x, 0, (blocks + 1) * block).reshape(-1, block, x.shape[1]) for x in (k, v))
    k, v = _repeat_valid(k, v, inside)
    return _Head(k, v, inside.astype(k.dtype), length, tail)


def _attend_tile(
    tile: _Tile, head: _Head, chunks: tuple[int, int], order: int
) -> tuple[Array, Array]:
    """Output [P, H] and log-sum-exp [P] of one tile's rows."""
    state = _listed(tile, head, chunks)
    rows, block_q, h = tile.q.shape
    state = jax.tree.map(lambda x: x.reshape(rows * block_q, *x.shape[2:]), state)
    if head.tail is not None:
        listed = _is_listed(tile, head.length.shape[0])
        state = _add_tail(state, tile.q.reshape(-1, h), listed, head.tail, order)
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
    options: Mapping[str, int] | None = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """See `api.block_sparse_attention`. Products and sums run in float32; only q, k, v round.

    `options` are those of `TUNABLE`; None takes the ones tuned for this device.
    """
    b, t, n, h = q.shape
    dtype = accumulation_dtype(q.dtype)
    scale = jnp.asarray(h**-0.5 if scale is None else scale, dtype)
    lengths = block_lengths(k.shape[1], block_kv, kv_length, b)
    query_blocks, slots = blocks.ids.shape[2:]
    if options is None:
        case = dict(head_dim=h, block_q=block_q, block_kv=block_kv, dtype=q.dtype)
        options = tuned("xla", density=slots / lengths.shape[1], **case)
    check_options("xla", options)
    few = max(1, options.get("tile_keys", TILE_KEYS) // block_kv // 4)
    chunks = (4 * few, few)
    rows = _balanced(query_blocks, options.get("tile_queries", TILE_QUERIES) // block_q)
    tiles = -(-query_blocks // rows)
    q = pad_axis(q, 1, tiles * rows * block_q)
    ids = pad_axis(pad_axis(blocks.ids, 2, tiles * rows), 3, max(4 * few, -(-slots // few) * few))
    count = pad_axis(jnp.minimum(blocks.count, slots), 2, tiles * rows)

    def one_tile(i: Array, bi: Array, ni: Array, head: _Head, carry: tuple[Array, Array]):
        at = (bi, i * rows * block_q, ni, 0)
        piece = _slice(q, at, (1, rows * block_q, 1, h)).reshape(rows, block_q, h)
        row_ids = _slice(ids, (bi, ni, i * rows, 0), (1, 1, rows, ids.shape[3]))[0, 0]
        row_count = _slice(count, (bi, ni, i * rows), (1, 1, rows))[0, 0]
        tile = _Tile(piece.astype(dtype) * scale, row_ids, row_count)
        out, lse = _attend_tile(tile, head, chunks, order)
        return _write(carry[0], out[None, :, None], at), _write(
            carry[1], lse[None, :, None], at[:3]
        )

    def one_head(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        bi, ni = i // n, i % n
        part = None if tail is None else _tail_head(tail, bi, ni, dtype)
        head_k, head_v = (_take_head(x, bi, ni, dtype) for x in (k, v))
        head = _cut_head(head_k, head_v, lengths[bi], block_kv, part)
        return lax.fori_loop(0, tiles, lambda i, carry: one_tile(i, bi, ni, head, carry), carry)

    carry = jnp.zeros_like(q), jnp.zeros(q.shape[:3], dtype)
    out, lse = lax.fori_loop(0, b * n, one_head, carry)
    return (out[:, :t], lse[:, :t]) if return_lse else out[:, :t]


def _mass_rows(q: Array, lse: Array, k: Array, inside: Array, block_q: int) -> Array:
    """Mass [R, J] of query blocks q [R · block_q, H], scaled; k [pieces, J of one, block, H]."""

    def piece(_: None, piece: tuple[Array, Array]) -> tuple[None, Array]:
        k, inside = piece
        blocks, size, h = k.shape
        weights = jnp.exp(q @ k.reshape(-1, h).T - lse[:, None])
        weights = jnp.where(inside.reshape(1, -1), weights, 0)
        return None, weights.reshape(-1, block_q, blocks, size).sum(axis=(1, 3))

    _, mass = lax.scan(piece, None, (k, inside))  # [pieces, R, J of a piece]
    return jnp.moveaxis(mass, 0, 1).reshape(mass.shape[1], -1)


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
    """See `api.block_mass`. Holds the masses of a few query blocks of one head at a time."""
    b, t, n, h = q.shape
    dtype = accumulation_dtype(q.dtype)
    scale = jnp.asarray(h**-0.5 if scale is None else scale, dtype)
    lengths = block_lengths(k.shape[1], block_kv, kv_length, b)
    query_blocks, blocks = num_blocks(t, block_q), lengths.shape[1]
    rows = _balanced(query_blocks, TILE_QUERIES // block_q)
    wide = _balanced(blocks, DENSE_KEYS // block_kv)
    tiles, pieces = -(-query_blocks // rows), -(-blocks // wide)
    # A row that saw no key has log-sum-exp -inf, and no mass; nor has one beyond T.
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse.astype(dtype))
    beyond = ((0, 0), (0, tiles * rows * block_q - t), (0, 0))
    lse = jnp.pad(lse, beyond, constant_values=jnp.inf)
    q = pad_axis(q, 1, tiles * rows * block_q)
    lengths = pad_axis(lengths, 1, pieces * wide)

    def head(i: Array) -> BlockMass:
        bi, ni = i // n, i % n
        inside = jnp.arange(block_kv, dtype=jnp.int32)[None, :] < lengths[bi][:, None]
        keys = pad_axis(_take_head(k, bi, ni, dtype), 0, pieces * wide * block_kv)
        keys = keys.reshape(pieces, wide, block_kv, h)
        inside = inside.reshape(pieces, wide, block_kv)
        queries = _take_head(q, bi, ni, dtype).reshape(tiles, rows * block_q, h) * scale
        own = _slice(lse, (bi, 0, ni), (1, lse.shape[1], 1)).reshape(tiles, rows * block_q)

        def tile(piece: tuple[Array, Array]) -> BlockMass:
            mass = _mass_rows(*piece, keys, inside, block_q)[:, :blocks]
            best, ids = lax.top_k(mass, top)
            return BlockMass(ids, best, mass.sum(axis=1))

        found = lax.map(tile, (queries, own))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:query_blocks], found)

    found = lax.map(head, jnp.arange(b * n, dtype=jnp.int32))
    return jax.tree.map(lambda x: x.reshape(b, n, *x.shape[1:]), found)


def _dense_rows(q: Array, k: Array, v: Array, inside: Array) -> tuple[Array, Array]:
    """Rows q [P, H], scaled, against keys [C, K, H] that come in C pieces."""

    def piece(state: _Softmax, piece: tuple[Array, Array, Array]) -> tuple[_Softmax, None]:
        k, v, inside = piece
        state, weights = _raise_top(state, q @ k.T)
        return _Softmax(state.top, state.mass + weights @ inside, state.out + weights @ v), None

    state, _ = lax.scan(piece, _start(q.shape[:1], q.shape[1], q.dtype), (k, v, inside))
    return _finish(state)


def _dense_head(q: Array, k: Array, v: Array, end: Array) -> tuple[Array, Array]:
    """One head: q [T, H], scaled, and k, v [S, H], of which the first `end` are valid."""
    t, h = q.shape
    rows, keys = _balanced(t, DENSE_QUERIES), _balanced(k.shape[0], DENSE_KEYS)
    tiles, pieces = -(-t // rows), -(-k.shape[0] // keys)
    inside = jnp.arange(pieces * keys, dtype=jnp.int32) < end
    k, v = _repeat_valid(*(pad_axis(x, 0, pieces * keys)[None] for x in (k, v)), inside[None])
    inside = inside.astype(q.dtype).reshape(pieces, keys)
    k, v = (x.reshape(pieces, keys, h) for x in (k, v))
    q = pad_axis(q, 0, tiles * rows).reshape(tiles, rows, h)
    # The checkpoint keeps the gradient from storing every tile's weights, which is T×S again.
    out, lse = lax.map(jax.checkpoint(lambda rows: _dense_rows(rows, k, v, inside)), q)
    return out.reshape(-1, h)[:t], lse.reshape(-1)[:t]


def _dense_small(q: Array, k: Array, v: Array, end: Array) -> tuple[Array, Array]:
    """All heads of [B, T, N, H] at once, for sequences whose scores are few."""
    keep = jnp.arange(k.shape[1], dtype=jnp.int32)[None, :] < end[:, None]
    v = jnp.where(keep[:, :, None, None], v, 0)  # a weight of 0 does not silence a NaN
    scores = jnp.einsum("btnh,bsnh->bnts", q, k)
    scores = jnp.where(keep[:, None, None, :], scores, -jnp.inf)
    top = lax.stop_gradient(jnp.max(scores, axis=-1))
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
    if t * s <= DENSE_SMALL:
        out, lse = _dense_small(q.astype(dtype) * scale, k.astype(dtype), v.astype(dtype), end)
    else:

        def head(i: Array) -> tuple[Array, Array]:
            bi, ni = i // n, i % n
            rows, keys, values = (_take_head(x, bi, ni, dtype) for x in (q, k, v))
            out, lse = _dense_head(rows * scale, keys, values, end[bi])
            return out.astype(q.dtype), lse

        out, lse = lax.map(head, jnp.arange(b * n, dtype=jnp.int32))
        out = jnp.moveaxis(out.reshape(b, n, t, h), 1, 2)
        lse = jnp.moveaxis(lse.reshape(b, n, t), 1, 2)
    return (out.astype(q.dtype), lse) if return_lse else out.astype(q.dtype)


class _Run(NamedTuple):
    """The tokens of a run of key blocks of one head, zero where not valid."""

    k: Array  # [J, block_kv, H]
    v: Array
    inside: Array  # bool [J, block_kv, 1]
    length: Array  # [J], in the type of k


def _map_runs(
    one: Callable[..., Any],
    k: Array,
    v: Array,
    lengths: Array,
    block: int,
    size: int,
    means: Array | None = None,
) -> Any:
    """`one` of every run of `size` blocks of every head; leaves stacked to [B, N, runs, ...].

    With `means` [B, N, G, H, H] `one` takes the run's as its second argument; the last serves all
    further runs.
    """
    b, _, n, h = k.shape
    dtype = accumulation_dtype(k.dtype)
    runs = group_count(lengths.shape[1], size)
    lengths = pad_axis(lengths, 1, runs * size).reshape(b, runs, size)

    def cut(x: Array, bi: Array, ni: Array) -> Array:
        x = pad_axis(_take_head(x, bi, ni, x.dtype), 0, runs * size * block)
        return x.reshape(runs, size, block, h)

    def head(i: Array) -> Any:
        bi, ni = i // n, i % n

        def run(piece: tuple[Array, Array, Array, Array]) -> Any:
            i, k, v, length = piece
            inside = (jnp.arange(block, dtype=jnp.int32)[None, :] < length[:, None])[..., None]
            k, v = (jnp.where(inside, x.astype(dtype), 0) for x in (k, v))
            mean = () if means is None else (means[bi, ni, jnp.minimum(i, means.shape[2] - 1)],)
            return one(_Run(k, v, inside, length.astype(dtype)), *mean)

        number = jnp.arange(runs, dtype=jnp.int32)
        return lax.map(run, (number, cut(k, bi, ni), cut(v, bi, ni), lengths[bi]))

    out = lax.map(head, jnp.arange(b * n, dtype=jnp.int32))
    return jax.tree.map(lambda x: x.reshape(b, n, *x.shape[1:]), out)


def _run_size(group: int, blocks: int) -> int:
    """Blocks worked on at once: a group, unless one group holds everything."""
    return min(STATISTICS_BLOCKS, blocks) if group >= blocks else group


def _centred(run: _Run) -> tuple[Array, Array]:
    """Means [J, H] of the valid keys, and keys less their block's mean, zero where not valid."""
    mean = run.k.sum(axis=1) / jnp.maximum(run.length, 1)[:, None]
    return mean, jnp.where(run.inside, run.k - mean[:, None], 0)


def _flat(x: Array) -> Array:
    """Tokens of several blocks [J, block_kv, H] in a row."""
    return x.reshape(-1, x.shape[-1])


def _join_runs(x: Array, blocks: int) -> Array:
    """Blocks of all runs [B, N, runs, J of a run, ...] in a row [B, N, J, ...]."""
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :blocks]


def block_statistics(
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    *,
    block_kv: int,
    group: int,
    kv_length: Int[Array, " B"] | None = None,
) -> BlockStatistics:
    """See `api.block_statistics`. Works on a run of blocks of one head, and holds no H_j."""
    lengths = block_lengths(k.shape[1], block_kv, kv_length, k.shape[0])
    blocks = lengths.shape[1]

    def one(run: _Run) -> tuple[Array, Array, Array]:
        mean, centred = _centred(run)
        return mean, run.v.sum(axis=1), _flat(centred).T @ _flat(run.v)

    mean, total, covariance = _map_runs(one, k, v, lengths, block_kv, _run_size(group, blocks))
    if group >= blocks:
        covariance = covariance.sum(axis=2, keepdims=True)
    mean, total = (_join_runs(x, blocks) for x in (mean, total))
    return BlockStatistics(mean, total, lengths, covariance, group)


def block_covariance_norm(
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    *,
    block_kv: int,
    group: int,
    kv_length: Int[Array, " B"] | None = None,
    statistics: BlockStatistics | None = None,
) -> Float[Array, "B N J"]:
    """See `api.block_covariance_norm`. Holds the H_j of a few blocks of one head at a time."""
    if statistics is None:
        statistics = block_statistics(k, v, block_kv=block_kv, group=group, kv_length=kv_length)
    lengths, covariance = statistics.length, statistics.covariance
    if group >= lengths.shape[1]:
        covariance = covariance.sum(axis=2, keepdims=True)
    blocks = lengths.shape[1]
    tokens = group_tokens(lengths, group).astype(covariance.dtype)
    means = covariance / tokens[:, None, :, None, None]

    def one(run: _Run, mean: Array) -> Array:
        def norm(block: tuple[Array, Array, Array]) -> Array:
            centred, v, length = block
            # Subtracted before it is squared: exactly small where all H_j agree.
            return jnp.sqrt(jnp.sum(jnp.square(centred.T @ v - length * mean)))

        return lax.map(norm, (_centred(run)[1], run.v, run.length), batch_size=NORM_BLOCKS)

    size = _run_size(group, blocks)
    return _join_runs(_map_runs(one, k, v, lengths, block_kv, size, means), blocks)
