"""Statistics of key blocks for NVIDIA GPUs: Pallas Triton kernels that read k and v once."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from pasa_jax.pallas_kernels.blocks import (
    BlockStatistics,
    block_lengths,
    group_count,
    group_tokens,
    num_blocks,
)
from pasa_jax.pallas_kernels.triton_tiles import (
    SMALLEST_TILE,
    dot,
    load,
    part_bytes,
    power_of_two,
    product_precision,
    refuse,
    within,
)

RUN_BLOCKS = 32  # blocks that one program adds up, at most: a group has more where it is larger
KEY_BYTES = 16 * 1024  # a tile of keys, and one of values
MATRIX_SIZE = 128 * 128  # float32 numbers of a matrix in a program's registers


class _Config(NamedTuple):
    """What the kernels are compiled for; the tile sizes change speed, never numbers."""

    head_dim: int
    block_kv: int
    blocks: int
    group: int
    run: int  # blocks of a program
    runs: int  # of a group
    tile_keys: int
    columns: int  # of the matrix that a program holds
    masked: bool  # whether some block is shorter than block_kv
    interpret: bool


class _Refs(NamedTuple):
    """Keys and values of a head, [S, H], the number that is valid, and the columns of v."""

    k: Any
    v: Any
    end: Any
    columns: tuple[Array, int]


def _matrix_mask(columns: tuple[Array, int], c: _Config) -> Array:
    rows = within(0, power_of_two(c.head_dim), c.head_dim)
    return rows[:, None] & within(*columns, c.head_dim)[None, :]


def _place(c: _Config) -> tuple[Array, Array, Array]:
    """This program's first block, the block where it ends, and its piece of the columns."""
    pieces = jnp.int32(power_of_two(c.head_dim) // c.columns)
    number, piece = lax.div(pl.program_id(0), pieces), lax.rem(pl.program_id(0), pieces)
    group, run = lax.div(number, jnp.int32(c.runs)), lax.rem(number, jnp.int32(c.runs))
    first = group * c.group + run * c.run
    end = jnp.minimum(first + c.run, jnp.minimum((group + 1) * c.group, c.blocks))
    return first, end, piece


def _add_block(j: Array, matrix: Array, refs: _Refs, c: _Config) -> tuple[Array, Array, Array]:
    """Key mean and value sum of the j-th block, and `matrix` with the block's added to it."""
    start, tiles = j * c.block_kv, c.block_kv // c.tile_keys
    wide = power_of_two(c.head_dim)
    end = refs.end[0] if c.masked else None
    size = float(c.block_kv)
    if c.masked:
        size = jnp.clip(end - start, 1, c.block_kv).astype(jnp.float32)

    def take(t: Array | int) -> tuple[Array, Array]:
        rows = start + t * c.tile_keys, c.tile_keys
        return (
            load(refs.k, (), rows, end, (0, wide), c.head_dim),
            load(refs.v, (), rows, end, refs.columns, c.head_dim),
        )

    def sums(k: Array, v: Array) -> tuple[Array, Array]:
        return tuple(jnp.sum(x.astype(jnp.float32), axis=0) for x in (k, v))

    def add(t: Array | int, matrix: Array, mean: Array, k: Array, v: Array) -> Array:
        centred = k.astype(jnp.float32) - mean[None, :]
        if c.masked:
            inside = within(start + t * c.tile_keys, c.tile_keys, end)
            centred = jnp.where(inside[:, None], centred, 0.0)
        precision = product_precision(k.dtype, c.interpret)
        return matrix + dot(centred.astype(k.dtype), v, precision, trans_a=True)

    if tiles == 1:
        k, v = take(0)
        mean, value = sums(k, v)
        mean = mean / size
        return mean, value, add(0, matrix, mean, k, v)
    zero = jnp.zeros((wide,), jnp.float32), jnp.zeros((c.columns,), jnp.float32)
    mean, value = lax.fori_loop(
        0, tiles, lambda t, carry: jax.tree.map(jnp.add, carry, sums(*take(t))), zero
    )
    mean = mean / size
    matrix = lax.fori_loop(0, tiles, lambda t, matrix: add(t, matrix, mean, *take(t)), matrix)
    return mean, value, matrix


def _statistics_kernel(k_ref, v_ref, end_ref, mean_ref, value_ref, matrix_ref, *, config: _Config):
    """Some columns of a run's matrix, and its blocks' means and value sums."""
    c = config
    wide = power_of_two(c.head_dim)
    first, end, piece = _place(c)
    columns = piece * c.columns, c.columns
    refs = _Refs(k_ref, v_ref, end_ref, columns)

    def add(j: Array, matrix: Array) -> Array:
        mean, value, matrix = _add_block(j, matrix, refs, c)
        # Every piece of the columns has the whole mean, and writes the same.
        for ref, x, at in ((mean_ref, mean, (0, wide)), (value_ref, value, columns)):
            pltriton.store(ref.at[j, pl.ds(*at)], x, mask=within(*at, c.head_dim))
        return matrix

    matrix = lax.fori_loop(first, end, add, jnp.zeros((wide, c.columns), jnp.float32))
    pltriton.store(matrix_ref, matrix, mask=_matrix_mask(columns, c))


def _norm_kernel(k_ref, v_ref, end_ref, mean_ref, norm_ref, *, config: _Config):
    """Squared distance of the matrices of a run's blocks from the group's, in some columns."""
    c = config
    first, end, piece = _place(c)
    columns = piece * c.columns, c.columns
    refs = _Refs(k_ref, v_ref, end_ref, columns)
    mean = pltriton.load(mean_ref, mask=_matrix_mask(columns, c), other=0.0)

    def norm(j: Array, _: None) -> None:
        length = jnp.clip(end_ref[0] - j * c.block_kv, 0, c.block_kv).astype(jnp.float32)
        # Subtracted before it is squared: exactly small where all matrices agree.
        matrix = _add_block(j, -length * mean, refs, c)[2]
        norm_ref[piece, j] = jnp.sum(matrix * matrix)

    lax.fori_loop(first, end, norm, None)


def _config(
    k: Array, block_kv: int, group: int, kv_length: Array | None, interpret: bool
) -> _Config:
    """Cuts the groups into runs of nearly equal length, and blocks into tiles."""
    refuse(k.dtype, k.shape[3], block_kv=block_kv)
    wide = power_of_two(k.shape[3])
    blocks = num_blocks(k.shape[1], block_kv)
    group = min(group, blocks)
    run = num_blocks(group, num_blocks(group, RUN_BLOCKS))
    return _Config(
        head_dim=k.shape[3],
        block_kv=block_kv,
        blocks=blocks,
        group=group,
        run=run,
        runs=num_blocks(group, run),
        tile_keys=math.gcd(block_kv, max(SMALLEST_TILE, KEY_BYTES // part_bytes(k.dtype, wide))),
        columns=min(wide, MATRIX_SIZE // wide),
        masked=kv_length is not None or k.shape[1] % block_kv != 0,
        interpret=interpret,
    )


def _call(
    kernel: Callable,
    k: Array,
    v: Array,
    kv_length: Array | None,
    c: _Config,
    extra: list,
    out: list,
) -> tuple[Array, ...]:
    """Runs a kernel with a program for some columns of a run of blocks, of every run and head.

    `extra` are further operands and `out` the results, each with its BlockSpec.
    """
    b, s, n, _ = k.shape
    wide = power_of_two(c.head_dim)
    end = jnp.full((b,), s, jnp.int32) if kv_length is None else kv_length.astype(jnp.int32)
    keys = pl.BlockSpec((None, s, None, wide), lambda i, n, b: (b, 0, n, 0))
    ends = pl.BlockSpec((1,), lambda i, n, b: (b,))
    operands = [(k, keys), (v, keys), (jnp.minimum(end, s), ends), *extra]
    call = pl.pallas_call(
        functools.partial(kernel, config=c),
        grid=(group_count(c.blocks, c.group) * c.runs * (wide // c.columns), n, b),
        in_specs=[spec for _, spec in operands],
        out_specs=[spec for _, spec in out],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape, _ in out],
        compiler_params=pltriton.CompilerParams(num_warps=8, num_stages=3),
        interpret=c.interpret,
        name=kernel.__name__.strip("_"),
    )
    return tuple(call(*(x for x, _ in operands)))


def _of_head(*shape: int) -> pl.BlockSpec:
    """A head's whole part of an array [B, N, ...]."""
    return pl.BlockSpec((None, None, *shape), lambda i, n, b: (b, n, *(0,) * len(shape)))


def _matrix(c: _Config, runs: int) -> pl.BlockSpec:
    """A program's columns of a matrix of [B, N, runs of all heads / `runs`, H, H]."""
    wide = power_of_two(c.head_dim)
    pieces = wide // c.columns
    return pl.BlockSpec(
        (None, None, None, wide, c.columns),
        lambda i, n, b: (b, n, i // (pieces * runs), 0, i % pieces),
    )


def _block_statistics(
    k: Array,
    v: Array,
    *,
    block_kv: int,
    group: int,
    kv_length: Array | None = None,
    interpret: bool = False,
) -> BlockStatistics:
    c = _config(k, block_kv, group, kv_length, interpret)
    b, s, n, h = k.shape
    groups = group_count(c.blocks, c.group)
    moment = (b, n, c.blocks, h), _of_head(c.blocks, power_of_two(h))
    parts = (b, n, groups * c.runs, h, h), _matrix(c, 1)
    mean, value, matrix = _call(_statistics_kernel, k, v, kv_length, c, [], [moment, moment, parts])
    matrix = matrix.reshape(b, n, groups, c.runs, h, h).sum(axis=3)
    return BlockStatistics(mean, value, block_lengths(s, block_kv, kv_length, b), matrix, group)


def _block_covariance_norm(
    k: Array,
    v: Array,
    *,
    block_kv: int,
    group: int,
    kv_length: Array | None = None,
    statistics: BlockStatistics | None = None,
    interpret: bool = False,
) -> Array:
    c = _config(k, block_kv, group, kv_length, interpret)
    if statistics is None:
        statistics = _block_statistics(
            k, v, block_kv=block_kv, group=group, kv_length=kv_length, interpret=interpret
        )
    covariance = statistics.covariance
    if group >= c.blocks:
        covariance = covariance.sum(axis=2, keepdims=True)
    tokens = group_tokens(statistics.length, group).astype(jnp.float32)
    means = covariance / tokens[:, None, :, None, None]
    given = means, _matrix(c, c.runs)
    pieces = power_of_two(c.head_dim) // c.columns
    out = (*means.shape[:2], pieces, c.blocks), _of_head(pieces, c.blocks)
    (squares,) = _call(_norm_kernel, k, v, kv_length, c, [given], [out])
    return jnp.sqrt(squares.sum(axis=2))


def block_statistics(
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    *,
    block_kv: int,
    group: int,
    kv_length: Int[Array, " B"] | None = None,
) -> BlockStatistics:
    """See `api.block_statistics`.

    Reads k and v once where they lie (k once for every 64 channels of v in heads wider than 128),
    and keeps the matrices in registers. Means and sums run in float32; keys less their block's mean
    round to k.dtype before the product. float32 products run as three TF32 products each. A group
    of more than 32 blocks is added up in several programs, and these by XLA, always in one order.

    Raises:
        NotImplementedError: float64, heads wider than 256, blocks that are no multiple of 16.
    """
    return _block_statistics(k, v, block_kv=block_kv, group=group, kv_length=kv_length)


def block_covariance_norm(
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    *,
    block_kv: int,
    group: int,
    kv_length: Int[Array, " B"] | None = None,
    statistics: BlockStatistics | None = None,
) -> Float[Array, "B N J"]:
    """See `api.block_covariance_norm`. Rounds as `block_statistics`; H_j stays in registers.

    Raises:
        NotImplementedError: float64, heads wider than 256, blocks that are no multiple of 16.
    """
    return _block_covariance_norm(
        k, v, block_kv=block_kv, group=group, kv_length=kv_length, statistics=statistics
    )
