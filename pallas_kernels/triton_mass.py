"""Attention mass of key blocks for NVIDIA GPUs: a Pallas Triton kernel over chunks of queries."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from pasa_jax.pallas_kernels.blocks import BlockMass, num_blocks
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
    within,
)

TILE_QUERIES = 256
TILE_KEYS = 64
# Queries and two tiles of keys in flight fill less than half of Hopper's shared memory: while one
# program of a multiprocessor waits for its product, the other takes powers.
QUERY_BYTES = 64 * 1024
KEY_BYTES = 16 * 1024
TWO_STAGE_BYTES = 256  # wider rows leave no memory for a second stage
# Masses held at once, all key blocks of so many query blocks; XLA sorts a copy.
MASS_BYTES = 128 * 1024 * 1024


class _Config(NamedTuple):
    """What the kernel is compiled for; the tile sizes change speed, never numbers."""

    t: int
    s: int
    batch: int
    heads: int
    head_dim: int
    block_kv: int
    rows: int  # queries in a tile
    part: int  # queries whose mass is summed: a query block, or a tile if that is smaller
    tiles: int  # of a head
    tile_keys: int
    scale: float
    interpret: bool


def _add_piece(t: Array, carry: Array, own: tuple, refs: tuple, end: Array | None, c: _Config):
    """Stores the masses of the block of the t-th key tile so far; carries its sums by query.

    `end` masks the keys from there on; None where the tile has none.
    """
    q, lse, b, n = own
    k_ref, mass_ref = refs
    wide = q.shape[1]
    pieces = jnp.int32(c.block_kv // c.tile_keys)
    block, start = lax.div(t, pieces), t * c.tile_keys
    k = load(k_ref, (b, n), (start, c.tile_keys), end, (0, wide), c.head_dim)
    scores = dot(q, k, product_precision(q.dtype, c.interpret), trans_b=True)
    weights = exp2(scores, c.scale * LOG2_E, -lse[:, None], c.interpret)
    if end is not None:
        weights = jnp.where(within(start, c.tile_keys, end)[None, :], weights, 0.0)
    sums = jnp.sum(weights, axis=1)
    if c.block_kv != c.tile_keys:
        sums = jnp.where(lax.rem(t, pieces) == 0, 0.0, carry) + sums
    mass_ref[:, block] = jnp.sum(sums.reshape(c.rows // c.part, c.part), axis=1)
    return sums


def _kernel(q_ref, k_ref, lse_ref, end_ref, first_ref, mass_ref, *, config: _Config):
    """One tile of queries of one head, against all of the head's keys."""
    c = config
    last = c.batch * c.heads * c.tiles - 1
    tile = jnp.minimum(first_ref[0] + pl.program_id(0), last)  # the last step may have some over
    head, start = lax.div(tile, jnp.int32(c.tiles)), lax.rem(tile, jnp.int32(c.tiles)) * c.rows
    b, n = lax.div(head, jnp.int32(c.heads)), lax.rem(head, jnp.int32(c.heads))
    wide = power_of_two(c.head_dim)
    q = load(q_ref, (b, n), (start, c.rows), c.t, (0, wide), c.head_dim)
    lse = pltriton.load(
        lse_ref.at[b, pl.ds(start, c.rows), n], mask=within(start, c.rows, c.t), other=jnp.inf
    )
    # A row that saw no key has log-sum-exp -inf, and no mass; nor has one beyond T.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse) * LOG2_E
    own, refs, end = (q, lse, b, n), (k_ref, mass_ref), end_ref[b]
    add = functools.partial(_add_piece, own=own, refs=refs, c=c)
    whole, some = lax.div(end, jnp.int32(c.tile_keys)), pl.cdiv(end, c.tile_keys)
    carry = jnp.zeros((c.rows,), jnp.float32)
    carry = lax.fori_loop(0, whole, functools.partial(add, end=None), carry)
    lax.fori_loop(whole, some, functools.partial(add, end=end), carry)

    def clear(block: Array, _: None) -> None:
        mass_ref[:, block] = jnp.zeros((c.rows // c.part,), jnp.float32)

    lax.fori_loop(pl.cdiv(end, c.block_kv), num_blocks(c.s, c.block_kv), clear, None)


def _masses(
    q: Array, k: Array, lse: Array, end: Array, first: Array, tiles: int, c: _Config
) -> Array:
    """Masses [parts, J] of `tiles` tiles of queries, counted over all heads, from `first` on."""
    wide, parts, blocks = power_of_two(c.head_dim), c.rows // c.part, num_blocks(c.s, c.block_kv)

    def whole(x: Array, *last: int) -> pl.BlockSpec:
        return pl.BlockSpec((*x.shape[:3], *last), lambda p: (0,) * x.ndim)

    call = pl.pallas_call(
        functools.partial(_kernel, config=c),
        grid=(tiles,),  # neighbours in time share a head's keys
        in_specs=[
            whole(q, wide),
            whole(k, wide),
            whole(lse),
            pl.BlockSpec(end.shape, lambda p: (0,)),
            pl.BlockSpec((1,), lambda p: (0,)),
        ],
        out_specs=pl.BlockSpec((parts, blocks), lambda p: (p, 0)),
        out_shape=jax.ShapeDtypeStruct((tiles * parts, blocks), jnp.float32),
        compiler_params=pltriton.CompilerParams(
            num_warps=8 if c.rows * c.tile_keys >= 128 * 64 else 4,
            num_stages=2 if part_bytes(q.dtype, wide) <= TWO_STAGE_BYTES else 1,
        ),
        interpret=c.interpret,
        name="block_mass",
    )
    return call(q, k, lse, end, first[None])


def _config(
    q: Array, k: Array, block_q: int, block_kv: int, scale: float | None, interpret: bool
) -> _Config:
    """Cuts the queries into tiles of several query blocks, or a query block into several tiles."""
    _, t, n, h = q.shape
    row_bytes = part_bytes(q.dtype, power_of_two(h))
    most = min(TILE_QUERIES, QUERY_BYTES // row_bytes)
    part = math.gcd(block_q, most)
    rows = most if part == block_q else part
    return _Config(
        t=t,
        s=k.shape[1],
        batch=q.shape[0],
        heads=n,
        head_dim=h,
        block_kv=block_kv,
        rows=rows,
        part=part,
        tiles=num_blocks(t, max(rows, block_q)) * max(1, block_q // rows),
        tile_keys=math.gcd(block_kv, max(SMALLEST_TILE, min(TILE_KEYS, KEY_BYTES // row_bytes))),
        scale=h**-0.5 if scale is None else scale,
        interpret=interpret,
    )


def _block_mass(
    q: Array,
    k: Array,
    lse: Array,
    *,
    block_q: int,
    block_kv: int,
    top: int,
    kv_length: Array | None = None,
    scale: float | None = None,
    interpret: bool = False,
) -> BlockMass:
    refuse(q.dtype, q.shape[3], block_q=block_q, block_kv=block_kv)
    b, t, n, _ = q.shape
    c = _config(q, k, block_q, block_kv, scale, interpret)
    end = jnp.full((b,), c.s, jnp.int32) if kv_length is None else kv_length.astype(jnp.int32)
    end, lse = jnp.clip(end, 0, c.s), lse.astype(jnp.float32)
    # A step of the map takes so many pieces, each a tile or the tiles of one query block.
    split = block_q // c.part
    pieces = b * n * c.tiles // split
    piece_bytes = 4 * num_blocks(c.s, block_kv) * split * (c.rows // c.part)
    steps = num_blocks(pieces, max(1, MASS_BYTES // piece_bytes))
    size = num_blocks(pieces, steps) * split

    def step(first: Array) -> BlockMass:
        mass = _masses(q, k, lse, end, first, size, c)
        mass = mass.reshape(-1, split, mass.shape[1]).sum(axis=1)
        best, ids = lax.top_k(mass, top)
        return BlockMass(ids, best, mass.sum(axis=1))

    found = lax.map(step, jnp.arange(steps, dtype=jnp.int32) * size)
    blocks = c.tiles * c.rows // block_q  # of a head, with those beyond T

    def join(x: Array) -> Array:
        x = x.reshape(-1, *x.shape[2:])[: b * n * blocks]
        return x.reshape(b, n, blocks, *x.shape[1:])[:, :, : num_blocks(t, block_q)]

    return jax.tree.map(join, found)


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
    """See `api.block_mass`.

    A kernel writes the masses of a run of query blocks for all key blocks, 128 MiB in float32, and
    XLA sorts each row and keeps its heaviest before the next run; nothing larger is held beside the
    operands and the result. Products take q and k as they are, sums run in float32; weights below
    2^-126 are 0. float32 products run as three TF32 products each.

    Raises:
        NotImplementedError: float64, heads wider than 256, blocks that are no multiple of 16.
    """
    return _block_mass(
        q, k, lse, block_q=block_q, block_kv=block_kv, top=top, kv_length=kv_length, scale=scale
    )
