"""TPU kernel: one head's keys and values in VMEM, or its listed blocks gathered from HBM."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pasa_jax.pallas_kernels.blocks import (
    BlockIndex,
    BlockStatistics,
    group_tokens,
    num_blocks,
    pad_axis,
)
from pasa_jax.pallas_kernels.mosaic_tpu_gather import (
    Ring,
    append_following,
    fill,
    ring_shapes,
    wait,
)
from pasa_jax.pallas_kernels.tuning import check_options, tuned

LANES = 128
HEAD_SIZES = (64, 96, 128, 256)
QUERY_BLOCKS = (64, 128, 256)
KEY_BLOCKS = (64, 128)
# Keys a chunk: two chunks a loop body hide one's softmax behind the other's products.
CHUNK_KEYS = 2048
# Block means a step of the tail, in tiles of 128; the steps are unrolled.
TAIL_TILES = 4
TUNABLE = {"chunk_keys": (512, 1024, 2048, 4096), "tail_tiles": (1, 2, 4, 5, 8)}
# Words before a row's ids: its count, and the end of the valid keys.
HEADER = 2
# exp2 of a masked score is exactly 0 even where no key was seen: the maximum starts above it.
MASKED = -2e30
LOWEST = -1e30
LOG2E = math.log2(math.e)
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class _Config:
    """What one compilation of the kernel fixes."""

    block_q: int
    block_kv: int
    slots: int  # listed blocks a chunk
    factor: float  # on q·k, for exp2
    group: int  # key blocks of one first-order matrix, cut at a tile's 128
    tail_tiles: int  # tiles a step of the tail
    gather: bool = False  # listed blocks come from HBM, because VMEM does not hold a head


class _State(NamedTuple):
    """A running softmax in base 2: rows [block_q, ...], or columns where the tail is transposed."""

    top: Any
    mass: Any
    out: Any


class _Tail(NamedTuple):
    """One head's block statistics, J filled up to whole tiles; no matrix for the zeroth order."""

    mean: Any  # [J, H]
    value: Any  # [H, J]
    length: Any  # [J, LANES]
    matrix: Any = None  # [G, H, H], transposed, over T_g


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """a · b in float32; float32 operands are not rounded on the way."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _fit(x: Array, width: int) -> Array:
    """x [P, LANES], equal along its lanes, widened or cut to [P, width]."""
    if width > LANES:
        x = jnp.concatenate([x] * -(-width // LANES), axis=1)
    return x[:, :width]


def _lanes(x: Array) -> Array:
    """x [P, 1] along the lanes [P, LANES]."""
    return jnp.broadcast_to(x, (x.shape[0], LANES))


def _penalty(limits: list[Array], block_kv: int) -> Array:
    """0 for the first `limits` tokens of each block of a chunk, MASKED for the rest: [1, W]."""
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    tiles = []
    for at in range(0, len(limits), LANES // block_kv):
        keep = lane < limits[at]
        if block_kv < LANES:
            keep = lane < jnp.where(lane < block_kv, limits[at], limits[at + 1] + block_kv)
        tiles.append(jnp.where(keep, 0.0, MASKED))
    return jnp.concatenate(tiles, axis=1)


def _listed_blocks(row_ref: Any, first: Array, slots: int) -> list[Array]:
    """Key blocks in a row's slots from `first` on."""
    return [row_ref[0, HEADER + first + slot] for slot in range(slots)]


def _limits(row_ref: Any, first: Array, blocks: list[Array], size: int) -> list[Array]:
    """Valid tokens in each of the blocks, which stand in the slots from `first` on."""
    count, end = row_ref[0, 0], row_ref[0, 1]
    return [
        jnp.where(first + slot < count, jnp.minimum(end - block * size, size), 0)
        for slot, block in enumerate(blocks)
    ]


def _mark(words_ref: Any, blocks: list[Array]) -> None:
    """Sets the bits of the blocks."""
    for block in blocks:
        word = lax.shift_right_logical(block, 5)
        words_ref[word] = words_ref[word] | lax.shift_left(jnp.int32(1), block & 31)


def _scores(q: Array, keys: Array, limits: list[Array], block_kv: int) -> Array:
    """Base-2 logits of a chunk [P, W], keys [W, H]."""
    return _dot(q, keys, (1, 1)) + _penalty(limits, block_kv)


def _softmax(scores: Array, values: Array) -> _State:
    """Softmax over a chunk's scores [P, W], values [W, H]."""
    top = _lanes(jnp.maximum(jnp.max(scores, axis=1, keepdims=True), LOWEST))
    weights = jnp.exp2(scores - _fit(top, scores.shape[1]))
    mass = sum(weights[:, at : at + LANES] for at in range(0, weights.shape[1], LANES))
    return _State(top, mass, _dot(weights.astype(values.dtype), values, (1, 0)))


def _merge(*parts: _State) -> _State:
    """One softmax of several over other keys; rows [P, LANES], out [P, H]."""
    top = functools.reduce(jnp.maximum, [part.top for part in parts])
    fades = [jnp.exp2(part.top - top) for part in parts]
    mass = sum(part.mass * fade for part, fade in zip(parts, fades, strict=True))
    out = sum(
        part.out * _fit(fade, part.out.shape[1]) for part, fade in zip(parts, fades, strict=True)
    )
    return _State(top, mass, out)


def _bodies(count: Array, slots: int) -> Array:
    """Loop bodies of `slots` slots that hold `count`."""
    return lax.div(count + (slots - 1), jnp.int32(slots))


def _listed(words_ref: Any, tile: int) -> Array:
    """MASKED for the blocks of a tile that are listed, 0 for the others: [128, LANES]."""
    row = lax.broadcasted_iota(jnp.int32, (32, LANES), 0)
    pieces = []
    for word in range(4 * tile, 4 * tile + 4):
        word = jnp.broadcast_to(words_ref[word], row.shape)
        pieces.append(jnp.where((lax.shift_right_logical(word, row) & 1) == 1, MASKED, 0.0))
    return jnp.concatenate(pieces, axis=0)


def _tail_scores(q: Array, tail: _Tail, words_ref: Any, tiles: range) -> Array:
    """Base-2 logits [., P] of the block means of some tiles, MASKED where a block is listed."""
    at = slice(tiles.start * LANES, tiles.stop * LANES)
    penalty = jnp.concatenate([_listed(words_ref, tile) for tile in tiles], axis=0)
    penalty = jnp.where(tail.length[at, :].astype(jnp.float32) > 0, penalty, MASKED)
    return _dot(tail.mean[at, :], q, (1, 1)) + _fit(penalty, q.shape[0])


def _add_tail(
    state: _State, scores: Array, q: Array, tail: _Tail, tiles: range, config: _Config
) -> _State:
    """Adds the blocks of some tiles that are not listed; everything is transposed, [., block_q].

    Sums over a group of blocks then run along sublanes, where they are nearly free.
    """
    at = slice(tiles.start * LANES, tiles.stop * LANES)
    top = jnp.maximum(state.top, jnp.max(scores, axis=0, keepdims=True))
    fade = jnp.exp2(state.top - top)
    weights = jnp.exp2(scores - top)
    out = state.out * fade + _dot(tail.value[:, at], weights.astype(q.dtype), (1, 0))
    mass = state.mass * fade
    weights = weights * _fit(tail.length[at, :].astype(jnp.float32), q.shape[0])
    step = min(config.group, LANES)
    for start in range(0, weights.shape[0], step):
        total = jnp.sum(weights[start : start + step], axis=0, keepdims=True)
        mass = mass + total
        if tail.matrix is not None:
            group = min((at.start + start) // config.group, tail.matrix.shape[0] - 1)
            out = out + total * _dot(tail.matrix[group], q, (1, 1))
    return _State(top, mass, out)


def _attend_tail(q: Array, tail: _Tail, words_ref: Any, config: _Config) -> _State:
    """Softmax over all blocks that are not listed, as rows."""
    rows, h = q.shape
    state = _State(
        jnp.full((1, rows), LOWEST, jnp.float32),
        jnp.zeros((1, rows), jnp.float32),
        jnp.zeros((h, rows), jnp.float32),
    )
    tiles = range(tail.mean.shape[0] // LANES)
    steps = [tiles[at : at + config.tail_tiles] for at in tiles[:: config.tail_tiles]]
    following = _tail_scores(q, tail, words_ref, steps[0])
    for step, after in itertools.zip_longest(steps, steps[1:]):
        # One step ahead, so that the products run on while the softmax waits for its maximum.
        scores = following
        following = after and _tail_scores(q, tail, words_ref, after)
        state = _add_tail(state, scores, q, tail, step, config)
    top, mass = (jnp.broadcast_to(x, (LANES, rows)).T for x in state[:2])
    return _State(top, mass, state.out.T)


def _read(k_ref: Any, v_ref: Any, blocks: list[Array], size: int) -> list[Array]:
    """Keys and values of the blocks of a head in VMEM, joined."""
    places = [pl.ds(pl.multiple_of(block * size, size), size) for block in blocks]
    return [jnp.concatenate([ref[place, :] for place in places], axis=0) for ref in (k_ref, v_ref)]


def _attend_listed(
    q: Array,
    row_ref: Any,
    sources: tuple[Any, Any],
    state: _State,
    words_ref: Any,
    ring: Ring | tuple[()],
    config: _Config,
) -> None:
    """Adds a row's listed blocks to `state`, from a head in VMEM or through a ring; marks them."""
    slots, size = 2 * config.slots, config.block_kv
    bodies = _bodies(row_ref[0, 0], slots)
    turn = ring.turn[0] if ring else 0

    def body(i: Array, _: None) -> None:
        first, half = i * slots, (turn + i) & 1
        if ring:
            fill(ring, 1 - half, _listed_blocks(row_ref, first + slots, slots), size, sources)
            wait(ring, half)
        blocks = _listed_blocks(row_ref, first, slots)
        if words_ref:
            _mark(words_ref[0], blocks)
        limits = _limits(row_ref, first, blocks, size)
        scores, held = [], []
        for at in (0, config.slots):
            chunk = slice(at, at + config.slots)
            place = slice(chunk.start * size, chunk.stop * size)
            if ring:
                keys, values = ring.keys[half, place, :], ring.values[half, place, :]
            else:
                keys, values = _read(*sources, blocks[chunk], size)
            scores.append(_scores(q, keys, limits[chunk], size))
            held.append(values)
        # The compiler keeps this order: all scores first, or the second chunk's wait for the first
        # chunk's output.
        parts = [_softmax(*chunk) for chunk in zip(scores, held, strict=True)]
        merged = _merge(_State(*(ref[...] for ref in state)), *parts)
        for ref, value in zip(state, merged, strict=True):
            ref[...] = value

    lax.fori_loop(jnp.int32(0), bodies, body, None)
    if ring:
        ring.turn[0] = (turn + bodies) & 1


def _kernel(
    row_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, tail: Any, *refs: Any, config: _Config
) -> None:
    """One query block: its listed key blocks, then the tail."""
    *out_refs, state, words_ref, ring = refs
    b, n, i = (pl.program_id(axis) for axis in range(3))
    sources = (k_ref.at[b, n], v_ref.at[b, n]) if ring else (k_ref, v_ref)
    q = (q_ref[...].astype(jnp.float32) * config.factor).astype(q_ref.dtype)
    state.top[...] = jnp.full(state.top.shape, LOWEST, jnp.float32)
    state.mass[...] = jnp.zeros(state.mass.shape, jnp.float32)
    state.out[...] = jnp.zeros(state.out.shape, jnp.float32)
    for ref in words_ref:
        for word in range(ref.shape[0]):
            ref[word] = jnp.int32(0)

    if ring:

        @pl.when(i == 0)
        def begin():
            ring.turn[0] = jnp.int32(0)
            blocks = _listed_blocks(row_ref, jnp.int32(0), 2 * config.slots)
            fill(ring, jnp.int32(0), blocks, config.block_kv, sources)

    _attend_listed(q, row_ref, sources, state, words_ref, ring, config)
    if ring:

        @pl.when(i == pl.num_programs(2) - 1)
        def end():
            wait(ring, ring.turn[0])

    total = _State(*(ref[...] for ref in state))
    total = total._replace(mass=_lanes(jnp.sum(total.mass, axis=1, keepdims=True)))
    if tail:
        total = _merge(total, _attend_tail(q, _Tail(*tail), words_ref[0], config))
    mass = jnp.where(total.mass == 0, 1.0, total.mass)
    out_refs[0][...] = (total.out / _fit(mass, total.out.shape[1])).astype(q.dtype)
    for ref in out_refs[1:]:
        lse = jnp.where(total.mass == 0, -jnp.inf, (total.top + jnp.log2(mass)) / LOG2E)
        ref[...] = lse.T[:1]


def heads_first(x: Array, end: Array | None, tokens: int) -> Array:
    """x [B, S, N, H] as [B, N, tokens, H], 0 from `end` on: a weight of 0 silences no NaN."""
    if end is not None:
        inside = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :] < end[:, None]
        x = jnp.where(inside[:, :, None, None], x, 0)
    return pad_axis(jnp.swapaxes(x, 1, 2), 2, tokens)


def _rows(blocks: BlockIndex, end: Array, key_blocks: int, config: _Config) -> Array:
    """A query block's integers [B, N, I, 1, HEADER + slots]: count, end of the keys, ids.

    Slots that list nothing repeat the first id, which the row reads anyway: no NaN comes in.
    """
    b, n, i, most = blocks.ids.shape
    body = 2 * config.slots
    slots = num_blocks(most, body) * body
    count = jnp.clip(blocks.count, 0, most)
    ids = jnp.clip(pad_axis(blocks.ids, 3, slots), 0, key_blocks - 1)
    live = jnp.arange(slots, dtype=jnp.int32)[None, None, None, :] < count[..., None]
    ids = jnp.where(live, ids, ids[..., :1])
    if config.gather:
        ids = append_following(ids, count, body)
    end = jnp.broadcast_to(end.astype(jnp.int32)[:, None, None, None], (b, n, i, 1))
    return jnp.concatenate([count[..., None], end, ids], axis=3)[:, :, :, None]


def _tail_operands(tail: BlockStatistics, order: int, dtype: jnp.dtype) -> tuple[Array, ...]:
    """The statistics as `_Tail` wants them, with the blocks padded to whole tiles."""
    blocks = tail.key_mean.shape[2]
    padded = num_blocks(blocks, LANES) * LANES
    mean = pad_axis(tail.key_mean, 2, padded).astype(dtype)
    value = jnp.swapaxes(pad_axis(tail.value_sum, 2, padded), 2, 3).astype(dtype)
    # Whole numbers up to 128 are exact in bfloat16.
    length = pad_axis(tail.length, 1, padded)[..., None].astype(jnp.bfloat16)
    operands = (mean, value, jnp.broadcast_to(length, (*length.shape[:2], LANES)))
    if order == 0:
        return operands
    tokens = group_tokens(tail.length, tail.group).astype(jnp.float32)
    # The kernel's q holds log2(e) for exp2.
    tokens = tokens[:, None, :, None, None] * LOG2E
    return (*operands, (jnp.swapaxes(tail.covariance, 3, 4) / tokens).astype(dtype))


def _configure(
    blocks: BlockIndex,
    block_q: int,
    block_kv: int,
    factor: float,
    tail: BlockStatistics | None,
    key_blocks: int,
    options: Mapping[str, int],
) -> _Config:
    """Chunks that fit the lists, and one group that spans all blocks as whole tiles."""
    pairs = num_blocks(blocks.ids.shape[3], 2)
    bodies = num_blocks(pairs * block_kv, options["chunk_keys"])
    step = LANES // block_kv
    slots = num_blocks(num_blocks(pairs, bodies), step) * step
    group = LANES if tail is None else tail.group
    if group >= key_blocks:
        group = num_blocks(key_blocks, LANES) * LANES
    return _Config(block_q, block_kv, slots, factor, group, options["tail_tiles"])


def _options(
    options: Mapping[str, int] | None, q: Array, block_q: int, block_kv: int, density: float
) -> dict[str, int]:
    """The options asked for or measured best, and the defaults of the others."""
    if options is None:
        options = tuned(
            "mosaic_tpu",
            head_dim=q.shape[3],
            block_q=block_q,
            block_kv=block_kv,
            density=density,
            dtype=q.dtype,
        )
    check_options("mosaic_tpu", options)
    return {"chunk_keys": CHUNK_KEYS, "tail_tiles": TAIL_TILES} | dict(options)


def _check(q: Array, block_q: int, block_kv: int, blocks: int, tail: Any) -> None:
    """Raises NotImplementedError for what the kernel does not take."""
    if q.dtype.name not in ("bfloat16", "float32"):
        raise NotImplementedError(f"{q.dtype.name=} must be bfloat16 or float32")
    for name, value, taken in (
        ("head size", q.shape[3], HEAD_SIZES),
        ("block_q", block_q, QUERY_BLOCKS),
        ("block_kv", block_kv, KEY_BLOCKS),
    ):
        if value not in taken:
            raise NotImplementedError(f"{name} {value} must be one of {taken}")
    if tail is not None and tail.group < blocks:
        if tail.group % LANES and tail.group not in (8, 16, 32, 64):
            raise NotImplementedError(
                f"{tail.group=} must be 8, 16, 32, 64, a multiple of {LANES}, or all blocks"
            )


def _vmem_capacity() -> int:
    """Bytes of VMEM of the TPU at hand or compiled for; of v5e and v6e where none is named."""
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:
        return 128 * MIB


def _vmem_bytes(config: _Config, k: Array, tail: tuple[Any, ...]) -> tuple[int, int]:
    """VMEM one program cannot do without, and ample room for the chunks at work."""
    padded = num_blocks(k.shape[3], LANES) * LANES
    size, rows = k.dtype.itemsize, max(config.block_q, LANES)
    keys = config.slots * config.block_kv
    # Gathered: two halves of two chunks, and what the compiler needs to read one.
    held = 4.5 * keys if config.gather else k.shape[2]
    resident = int(2 * held) * padded * size
    for x in jax.tree.leaves(tail):
        resident += (
            math.prod(x.shape[-2 if x.ndim < 5 else -3 : -1])
            * x.dtype.itemsize
            * max(x.shape[-1], LANES)
        )
    rows_held = rows * (padded * (4 * size + 4) + 2 * LANES * 4)  # q and output twice, and state
    if tail:
        rows_held += 4 * rows * LANES * config.tail_tiles  # the scores one step ahead
    # What the compiler got by with, found by halves, lies 0.1 to 3 MiB below, over all head sizes
    # and types; a float32 product of several passes takes its share for every 128 channels.
    passes = 1 + padded // LANES if size == 4 else 1
    chunk = int(rows * max(keys, 1024) * (3.5 + 7 * passes))
    working = 2 * keys * (2 * padded * size + rows * 12) + 16 * rows * padded * 4
    return resident + rows_held + chunk, working


def _fit_vmem(config: _Config, k: Array, tail: tuple[Any, ...]) -> _Config:
    """The form that VMEM holds: a head resident, else gathered by the longest chunks that fit."""
    capacity = _vmem_capacity()
    step = LANES // config.block_kv
    shorter = [config.slots]
    while shorter[-1] > step:
        shorter.append(num_blocks(shorter[-1], 2 * step) * step)
    for gather, slots in [(False, config.slots)] + [(True, slots) for slots in shorter]:
        config = dataclasses.replace(config, gather=gather, slots=slots)
        need, _ = _vmem_bytes(config, k, tail)
        if need <= capacity:
            return config
    raise NotImplementedError(
        f"one head's statistics of {k.shape[2]} keys need {need / MIB:.1f} MiB of VMEM "
        f"with the chunks at work, which must be at most {capacity / MIB:.1f}"
    )


def _specs(config: _Config, k: Array, rows: Array, tail: tuple[Any, ...]) -> tuple[Any, ...]:
    """Block specs of the operands: a row of integers, a query block, and what a head shares."""

    def whole(x: Array) -> pl.BlockSpec:
        # Loaded once a head: a second buffer would halve the longest sequence.
        heads = x.ndim > 3
        shape = (None,) * (1 + heads) + x.shape[1 + heads :]
        index = lambda b, n, i: ((b, n) if heads else (b,)) + (0,) * (x.ndim - 1 - heads)  # noqa: E731
        return pl.BlockSpec(shape, index, pipeline_mode=pl.Buffered(1))

    row = pl.BlockSpec(
        (None, None, None, *rows.shape[3:]),
        lambda b, n, i: (b, n, i, 0, 0),
        memory_space=pltpu.SMEM,
    )
    query = pl.BlockSpec((None, None, config.block_q, k.shape[3]), lambda b, n, i: (b, n, i, 0))
    head = pl.BlockSpec(memory_space=pltpu.HBM) if config.gather else whole(k)
    return row, query, head, head, jax.tree.map(whole, tail)


def _in_hbm(x: Array) -> Array:
    return pltpu.with_memory_space_constraint(x, pltpu.HBM)


def _call(
    config: _Config,
    q: Array,
    k: Array,
    v: Array,
    rows: Array,
    tail: tuple[Any, ...],
    *,
    return_lse: bool,
    interpret: Any = False,
) -> tuple[Array, ...]:
    """The kernel on q [B, N, T, H], k and v [B, N, S, H]: output, and lse [B, N, I, 1, block_q]."""
    b, n, t, h = q.shape
    i, block_q = rows.shape[2], config.block_q
    need, working = _vmem_bytes(config, k, tail)
    specs = _specs(config, k, rows, tail)
    out_shape = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    out_specs = [specs[1]]
    if return_lse:
        out_shape.append(jax.ShapeDtypeStruct((b, n, i, 1, block_q), jnp.float32))
        out_specs.append(
            pl.BlockSpec((None, None, None, 1, block_q), lambda b, n, i: (b, n, i, 0, 0))
        )
    row = pltpu.VMEM((block_q, LANES), jnp.float32)
    words = [pltpu.SMEM((jax.tree.leaves(tail)[0].shape[2] // 32,), jnp.int32)] if tail else []
    ring = ring_shapes(2 * config.slots * config.block_kv, h, k.dtype) if config.gather else ()
    kernel = pl.pallas_call(
        functools.partial(_kernel, config=config),
        grid=(b, n, i),
        in_specs=specs,
        out_specs=tuple(out_specs),
        out_shape=tuple(out_shape),
        scratch_shapes=[_State(row, row, pltpu.VMEM((block_q, h), jnp.float32)), words, ring],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=min(need + working, _vmem_capacity()),
            # Ids are clipped: no copy leaves its head.
            disable_bounds_checks=config.gather,
        ),
        interpret=interpret,
    )
    if not interpret:
        # Few heads would fit VMEM whole, and XLA would move them there, beside the kernel's own.
        k, v, tail = jax.tree.map(_in_hbm, (k, v, tail))
    return kernel(rows, q, k, v, tail)


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
    """See `api.block_sparse_attention`; one pass over a head that stays in VMEM.

    Where VMEM does not hold a head (beyond some 23,000 tokens of 128 bfloat16 channels on a v4,
    120,000 on a v5p, 240,000 on others), its listed blocks are copied from HBM while those before
    them are computed; the statistics of the tail stay in VMEM.

    q, k, v and the output are copied once each between [B, T, N, H] and the kernel's [B, N, T, H]
    unless XLA gives their producer that layout; padding of a ragged S and zeros beyond kv_length
    ride on that copy. Softmax, sums and the output accumulate in float32; for bfloat16 input the
    scaled q, the softmax weights and the tail's statistics round to bfloat16 before a product.
    Ids out of range are clipped to the nearest block, counts to 0 and L.

    Args:
        q, k, v: bfloat16 or float32, H one of 64, 96, 128, 256.
        blocks: distinct key blocks of each query block.
        block_q: 64, 128 or 256 tokens.
        block_kv: 64 or 128 tokens.
        tail: its group is 8, 16, 32, 64, a multiple of 128, or spans all blocks.
        order: order of the tail's expansion, 0 or 1.
        kv_length: valid keys of each batch row; None means all S.
        scale: factor on q·k; None means H^-1/2.
        return_lse: also return the log-sum-exp.
        options: of `TUNABLE`; None takes what was measured best for the device, see `tuning`. They
            change no number beyond rounding; gathered chunks are halved until VMEM holds them.

    Returns:
        Output in q.dtype, and with `return_lse` the natural log-sum-exp in float32.

    Raises:
        ValueError: an option is unknown, or its value is none to choose.
        NotImplementedError: dtype, head size, block sizes or group are not as above, or VMEM does
            not hold one head's statistics and the chunks at work.

    Source: PISA (arXiv:2602.01077) and PASA (arXiv:2604.12219).
    """
    b, t, n, h = q.shape
    end = jnp.full((b,), k.shape[1], jnp.int32) if kv_length is None else kv_length
    end = jnp.minimum(end, k.shape[1])
    count = num_blocks(k.shape[1], block_kv)
    _check(q, block_q, block_kv, count, tail)
    factor = (h**-0.5 if scale is None else scale) * LOG2E
    options = _options(options, q, block_q, block_kv, blocks.ids.shape[3] / count)
    config = _configure(blocks, block_q, block_kv, factor, tail, count, options)
    k, v = (heads_first(x, kv_length, count * block_kv) for x in (k, v))
    operands = () if tail is None else _tail_operands(tail, order, q.dtype)
    config = _fit_vmem(config, k, operands)
    out, *lse = _call(
        config,
        pad_axis(jnp.swapaxes(q, 1, 2), 2, max(t, block_q)),
        k,
        v,
        _rows(blocks, end, count, config),
        operands,
        return_lse=return_lse,
    )
    out = jnp.swapaxes(out[:, :, :t], 1, 2)
    if not return_lse:
        return out
    return out, jnp.swapaxes(lse[0].reshape(b, n, -1)[:, :, :t], 1, 2)
