"""Block-sparse attention for NVIDIA GPUs from Ampere on: one Pallas Triton kernel, tail fused."""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from pasa_jax.pallas_kernels.blocks import (
    BlockIndex,
    BlockStatistics,
    group_count,
    group_tokens,
    num_blocks,
    pad_axis,
)
from pasa_jax.pallas_kernels.triton_tiles import (
    LOG2_E,
    SMALLEST_TILE,
    dot,
    exp2,
    load,
    part_bytes,
    power_of_two,
    product_precision,
    refuse,
    settle,
    within,
)
from pasa_jax.pallas_kernels.tuning import check_options, device_kind, tuned

TUNABLE = {"num_warps": (4, 8), "num_stages": (1, 2, 3)}
HOPPER = re.compile(r"\b(GH200|H\d+)\b")  # kinds of devices
TILE_QUERIES = 128
TILE_KEYS = 64
# Of keys, values and matrices two are in flight: with the queries they fit Ampere's 164 KiB.
QUERY_BYTES = 32 * 1024
KEY_BYTES = 16 * 1024
MATRIX_BYTES = 32 * 1024
# Before Hopper, and for float32, each warp holds all of a product's 16 queries in its registers.
CHANNEL_BYTES = 512
SHARED_BYTES = 232448  # of a program on Hopper; a wish for more stages than fit is refused
TWO_STAGE_BYTES = 256  # wider rows leave no memory for a second stage


class _Config(NamedTuple):
    """What the kernel is compiled for; the tile sizes change speed, never numbers."""

    t: int
    s: int
    head_dim: int
    block_kv: int
    slots: int
    tile_keys: int
    scale: float
    masked: bool  # whether some block is shorter than block_kv
    group: int  # blocks in a group of the tail; all for order 0
    columns: int  # block means in a step of the tail; 0 without a tail
    chunks: int  # steps in a group
    groups: int
    matrix_rows: int  # rows of a group's matrix in a step; 0 for order 0
    channels: int  # of a product of queries and block means
    interpret: bool


class _State(NamedTuple):
    """A running softmax in base 2: maximum [P], mass [P] and un-normalised output [P, H]."""

    top: Array
    mass: Array
    out: Array


class _Queries(NamedTuple):
    """A tile of queries, and a way to take some of its columns (start, size) from memory again."""

    q: Array  # [P, H]
    take: Callable[..., Array]


class _Columns(NamedTuple):
    """The statistics as the tail's steps read them: groups filled up to whole steps."""

    mean: Array  # [B, N, C, H]
    value: Array  # [B, N, C, H], mean of the block's values
    log_length: Array  # f32 [B, C], base 2
    skip: Array  # int8 [B, N, I, C], 1 where the block is listed or has no token
    matrix: Array | None  # [B, N, G, H, H], scale · covariance / T_g; None for order 0


def _dot(a: Array, b: Array, config: _Config, trans_b: bool = False) -> Array:
    return dot(a, b, product_precision(a.dtype, config.interpret), trans_b)


def _raise_top(state: _State, logits: Array, config: _Config) -> tuple[_State, Array, Array]:
    """Rescales the state to the maximum that includes `logits` [P, K].

    Returns the state with the mass of the logits, their weights, and the factor of older weights.
    """
    top = jnp.maximum(state.top, jnp.max(logits, axis=1))
    shift = jnp.where(top == -jnp.inf, 0.0, top)  # nothing seen yet: avoid -inf − -inf
    fade = exp2(state.top, 1.0, -shift, config.interpret)
    weights = exp2(logits, 1.0, -shift[:, None], config.interpret)
    mass = state.mass * fade + jnp.sum(weights, axis=1)
    return _State(top, mass, state.out * fade[:, None]), weights, fade


def _add_listed(t: Array, state: _State, q: Array, refs: Any, config: _Config) -> _State:
    """Adds the t-th piece of the listed blocks."""
    k_ref, v_ref, ids_ref, end_ref = refs
    pieces = jnp.int32(config.block_kv // config.tile_keys)
    last = num_blocks(config.s, config.block_kv) - 1
    block = jnp.clip(ids_ref[lax.div(t, pieces)], 0, last)
    start = block * config.block_kv + lax.rem(t, pieces) * config.tile_keys
    end = end_ref[0] if config.masked else None
    take = functools.partial(
        load,
        head=(),
        rows=(start, config.tile_keys),
        end=end,
        columns=(0, q.shape[1]),
        head_dim=config.head_dim,
    )
    logits = _dot(q, take(k_ref), config, trans_b=True) * (config.scale * LOG2_E)
    if config.masked:
        inside = within(start, config.tile_keys, end)
        logits = jnp.where(inside[None, :], logits, -jnp.inf)
    state, weights, _ = _raise_top(state, logits, config)
    v = take(v_ref)
    out = state.out + _dot(weights.astype(v.dtype), v, config)
    return state._replace(out=settle(out, config.interpret) if config.columns else out)


def _mean_logits(at: pl.Slice, queries: _Queries, ref: Any, config: _Config) -> Array:
    """Queries times block means [P, C], so many channels at a time as the registers hold."""
    size, wide = config.channels, queries.q.shape[1]
    if size == wide:
        return _dot(queries.q, ref[at, :], config, trans_b=True)

    def piece(i: Array, logits: Array) -> Array:
        columns = i * size, size
        part = queries.take(columns=columns)
        return logits + _dot(part, ref[at, pl.ds(*columns)], config, trans_b=True)

    start = jnp.zeros((queries.q.shape[0], config.columns), jnp.float32)
    return lax.fori_loop(0, wide // size, piece, start)


def _add_columns(
    step: Array,
    carry: tuple[_State, Array],
    queries: _Queries,
    refs: _Columns,
    config: _Config,
) -> tuple[_State, Array]:
    """Adds a step's blocks by their means; carries the group's mass beside the state."""
    state, group_mass = carry
    at = pl.ds(step * config.columns, config.columns)
    logits = _mean_logits(at, queries, refs.mean, config) * (config.scale * LOG2_E)
    # The block's length in the exponent makes a weight the mass of all of its tokens.
    logits = jnp.where(
        (refs.skip[at] != 0)[None, :], -jnp.inf, logits + refs.log_length[at][None, :]
    )
    state, weights, fade = _raise_top(state, logits, config)
    value = refs.value[at, :]
    out = state.out + _dot(weights.astype(value.dtype), value, config)
    if config.chunks > 1:
        out = settle(out, config.interpret)
    return state._replace(out=out), group_mass * fade + jnp.sum(weights, axis=1)


def _add_matrix(
    g: Array, state: _State, mass: Array, queries: _Queries, ref: Any, config: _Config
) -> _State:
    """Adds a group's first order, so many rows of its matrix at a time as the memory holds."""
    size, wide = config.matrix_rows, queries.q.shape[1]

    def piece(i: Array | int, out: Array) -> Array:
        part = queries.q if size == wide else queries.take(columns=(i * size, size))
        # The mass folded into the queries lets the product run straight into the output.
        weighted = (part.astype(jnp.float32) * mass[:, None]).astype(part.dtype)
        return out + _dot(weighted, ref[g, pl.ds(i * size, size), :], config)

    if size == wide:
        return state._replace(out=piece(0, state.out))
    # A loop, because unrolled pieces are all loaded before the first is used, and spill.
    return state._replace(out=lax.fori_loop(0, wide // size, piece, state.out))


def _add_tail(state: _State, queries: _Queries, refs: _Columns, config: _Config) -> _State:
    """Adds every block that is not listed by its Taylor expansion, group by group."""
    add = functools.partial(_add_columns, queries=queries, refs=refs, config=config)

    def group(g: Array, state: _State) -> _State:
        carry = state, jnp.zeros_like(state.mass)
        if config.chunks == 1:
            state, mass = add(g, carry)
        else:
            first = g * config.chunks
            state, mass = lax.fori_loop(first, first + config.chunks, add, carry)
        if config.matrix_rows:
            state = _add_matrix(g, state, mass, queries, refs.matrix, config)
        return state._replace(out=settle(state.out, config.interpret))

    return lax.fori_loop(0, config.groups, group, state)


def _kernel(q_ref, k_ref, v_ref, ids_ref, count_ref, end_ref, *refs, config: _Config):
    """One tile of queries of one head."""
    *tail_refs, out_ref, lse_ref = refs
    rows, wide = q_ref.shape
    left = config.t - pl.program_id(0) * rows  # rows of the tile that exist
    end = left if config.t % rows else None
    take = functools.partial(load, q_ref, (), (0, rows), end, head_dim=config.head_dim)
    queries = _Queries(take(columns=(0, wide)), take)
    state = _State(
        jnp.full((rows,), -jnp.inf, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows, wide), jnp.float32),
    )
    steps = jnp.minimum(count_ref[0], config.slots) * (config.block_kv // config.tile_keys)
    keys = k_ref, v_ref, ids_ref, end_ref
    listed = functools.partial(_add_listed, q=queries.q, refs=keys, config=config)
    state = lax.fori_loop(0, steps, listed, state)
    if config.columns:
        state = _add_tail(
            state, queries, _Columns(*tail_refs, *(None,) * (5 - len(tail_refs))), config
        )
    seen = state.mass != 0
    out = state.out / jnp.where(seen, state.mass, 1.0)[:, None]
    # A natural logarithm; 0 and -inf for a row that saw no key.
    lse = jnp.where(seen, (state.top + jnp.log2(state.mass)) / LOG2_E, -jnp.inf)
    row_mask = within(0, rows, left)
    mask = row_mask[:, None] & within(0, wide, config.head_dim)[None, :]
    pltriton.store(out_ref, out.astype(out_ref.dtype), mask=mask)
    pltriton.store(lse_ref, lse, mask=row_mask)


def _skipped(blocks: BlockIndex, length: Int[Array, "B J"]) -> Array:
    """bool [B, N, I, J], whether the tail leaves a block out: it is listed, or has no token."""
    b, n, i, slots = blocks.ids.shape
    columns = length.shape[1]
    live = jnp.arange(slots, dtype=jnp.int32)[None, None, None, :] < blocks.count[..., None]
    column = jnp.where(live, jnp.clip(blocks.ids, 0, columns - 1), columns).reshape(-1, slots)
    row = jnp.broadcast_to(jnp.arange(b * n * i, dtype=jnp.int32)[:, None], column.shape)
    listed = jnp.zeros((b * n * i, columns), jnp.bool_).at[row, column].set(True, mode="drop")
    return listed.reshape(b, n, i, columns) | (length == 0)[:, None, None, :]


def _cut(x: Array, axis: int, c: _Config, value: int = 0) -> Array:
    """Fills every group along `axis` up to whole steps of the tail, with `value`."""
    x = pad_axis(x, axis, c.groups * c.group, value)
    x = x.reshape(*x.shape[:axis], c.groups, c.group, *x.shape[axis + 1 :])
    x = pad_axis(x, axis + 1, c.chunks * c.columns, value)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _columns(tail: BlockStatistics, blocks: BlockIndex, dtype: jnp.dtype, c: _Config) -> _Columns:
    """The statistics in the order and type that the kernel reads."""
    wide = power_of_two(c.head_dim)
    size = jnp.maximum(tail.length, 1).astype(jnp.float32)  # [B, J]
    mean, value = (
        pad_axis(_cut(x.astype(dtype), 2, c), 3, wide)
        for x in (tail.key_mean, tail.value_sum / size[:, None, :, None])
    )
    log_length = _cut(jnp.log2(size), 1, c)
    skip = _cut(_skipped(blocks, tail.length).astype(jnp.int8), 3, c, 1)
    if c.matrix_rows == 0:
        return _Columns(mean, value, log_length, skip, None)
    tokens = group_tokens(tail.length, tail.group).astype(jnp.float32)
    share = c.scale / tokens[:, None, :, None, None]
    matrix = pad_axis(pad_axis(tail.covariance * share, 3, wide), 4, wide).astype(dtype)
    return _Columns(mean, value, log_length, skip, matrix)


def _tail_config(
    tail: BlockStatistics | None, order: int, most: int, row_bytes: int, hopper: bool
) -> dict:
    """How the tail is cut: steps of at most `most` block means, never across groups."""
    if tail is None:
        return dict(group=0, columns=0, chunks=0, groups=0, matrix_rows=0, channels=0)
    blocks = tail.length.shape[1]
    # Before Hopper a product's operands lie in registers, which a whole matrix overfills.
    matrix_bytes = MATRIX_BYTES if hopper else MATRIX_BYTES // 2
    group = blocks if order == 0 else min(tail.group, blocks)
    columns = min(most, power_of_two(group))
    wide = power_of_two(tail.key_mean.shape[3])
    return dict(
        group=group,
        columns=columns,
        chunks=num_blocks(group, columns),
        groups=group_count(blocks, group),
        matrix_rows=min(wide, matrix_bytes // row_bytes) if order == 1 else 0,
        channels=wide * min(row_bytes, CHANNEL_BYTES) // row_bytes,
    )


def _compiler_params(
    options: Mapping[str, int], tile: int, row_bytes: int, config: _Config, hopper: bool
) -> pltriton.CompilerParams:
    """The defaults and what `options` change; raises NotImplementedError for what does not fit."""
    check_options("triton", options)
    small = tile * row_bytes <= 64 * 256 and tile <= 64
    # Products before Hopper take their operands from registers: with a tail four warps spill.
    warps = 4 if small and (hopper or not config.columns) else 8
    stages = 2 if row_bytes <= TWO_STAGE_BYTES else 1
    chosen = {"num_warps": warps, "num_stages": stages} | options
    tiles = tile + 2 * chosen["num_stages"] * (config.tile_keys + config.columns)
    if "num_stages" in options and tiles * row_bytes > SHARED_BYTES:
        raise NotImplementedError(
            f"num_stages={chosen['num_stages']} needs {tiles * row_bytes} bytes of shared memory, "
            f"at most {SHARED_BYTES} are there"
        )
    return pltriton.CompilerParams(**chosen)


def _specs(
    config: _Config, tile: int, per_block: int, wide: int, columns: _Columns | None
) -> tuple[list[pl.BlockSpec], list[pl.BlockSpec]]:
    """Which part of each operand and result a program (query tile, head, batch row) sees."""
    rows = pl.BlockSpec((None, tile, None, wide), lambda i, n, b: (b, i, n, 0))
    keys = pl.BlockSpec((None, config.s, None, wide), lambda i, n, b: (b, 0, n, 0))
    ids = pl.BlockSpec((None, None, None, config.slots), lambda i, n, b: (b, n, i // per_block, 0))
    count = pl.BlockSpec((None, None, 1), lambda i, n, b: (b, n, i // per_block))
    end = pl.BlockSpec((1,), lambda i, n, b: (b,))
    lse = pl.BlockSpec((None, tile, None), lambda i, n, b: (b, i, n))
    specs = [rows, keys, keys, ids, count, end]
    if columns is not None:
        size = columns.mean.shape[2]
        mean = pl.BlockSpec((None, None, size, wide), lambda i, n, b: (b, n, 0, 0))
        length = pl.BlockSpec((None, size), lambda i, n, b: (b, 0))
        skip = pl.BlockSpec((None, None, None, size), lambda i, n, b: (b, n, i // per_block, 0))
        specs += [mean, mean, length, skip]
        if columns.matrix is not None:
            shape = (None, None, config.groups, wide, wide)
            specs.append(pl.BlockSpec(shape, lambda i, n, b: (b, n, 0, 0, 0)))
    return specs, [rows, lse]


def _attend(
    q: Array,
    k: Array,
    v: Array,
    blocks: BlockIndex,
    *,
    block_q: int,
    block_kv: int,
    tail: BlockStatistics | None = None,
    order: int = 1,
    kv_length: Array | None = None,
    scale: float | None = None,
    options: Mapping[str, int] | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """Output and log-sum-exp."""
    b, t, n, h = q.shape
    s = k.shape[1]
    refuse(q.dtype, h, block_q=block_q, block_kv=block_kv)
    wide = power_of_two(h)
    row_bytes = part_bytes(q.dtype, wide)
    hopper = bool(HOPPER.search(device_kind()))
    tile = math.gcd(block_q, min(TILE_QUERIES, QUERY_BYTES // row_bytes))
    tile_keys = math.gcd(block_kv, max(SMALLEST_TILE, min(TILE_KEYS, KEY_BYTES // row_bytes)))
    config = _Config(
        t=t,
        s=s,
        head_dim=h,
        block_kv=block_kv,
        slots=blocks.ids.shape[3],
        tile_keys=tile_keys,
        scale=h**-0.5 if scale is None else scale,
        masked=kv_length is not None or s % block_kv != 0,
        interpret=interpret,
        **_tail_config(tail, order, tile_keys, row_bytes, hopper),
    )
    end = jnp.full((b,), s, jnp.int32) if kv_length is None else kv_length.astype(jnp.int32)
    columns = None if tail is None else _columns(tail, blocks, q.dtype, config)
    operands = [] if columns is None else [x for x in columns if x is not None]
    in_specs, out_specs = _specs(config, tile, block_q // tile, wide, columns)
    if options is None:
        case = dict(head_dim=h, block_q=block_q, block_kv=block_kv, dtype=q.dtype)
        options = tuned("triton", density=config.slots / num_blocks(s, block_kv), **case)
    params = _compiler_params(options, tile, row_bytes, config, hopper)
    call = pl.pallas_call(
        functools.partial(_kernel, config=config),
        grid=(num_blocks(t, tile), n, b),  # neighbours in time share a head's keys
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(q.shape[:3], jnp.float32),
        ],
        compiler_params=params,
        interpret=interpret,
        name="block_sparse_attention",
    )
    return call(q, k, v, *blocks, jnp.minimum(end, s), *operands)


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
    """See `api.block_sparse_attention`.

    Reads q, k and v where they lie: ragged ends and head sizes that are no power of two are masked
    in the kernel, not padded. Sums and softmax run in float32; weights and statistics round to
    q.dtype before they enter a product; weights below 2^-126 of the largest are 0. float32 products
    run as three TF32 products each.

    Args:
        options: values of `TUNABLE`, for speed alone; None takes those known best (`tuned`).

    Raises:
        ValueError: an option that is not in `TUNABLE`.
        NotImplementedError: float64, heads wider than 256, blocks that are no multiple of 16, more
            stages than fit into shared memory.
    """
    out, lse = _attend(
        q,
        k,
        v,
        blocks,
        block_q=block_q,
        block_kv=block_kv,
        tail=tail,
        order=order,
        kv_length=kv_length,
        scale=scale,
        options=options,
    )
    return (out, lse) if return_lse else out
