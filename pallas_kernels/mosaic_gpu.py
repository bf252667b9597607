"""Pallas Mosaic GPU: block-sparse attention on Hopper by TMA and WGMMA."""

import dataclasses
import functools
import inspect
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pasa_jax.pallas_kernels.blocks import (
    BlockIndex,
    BlockStatistics,
    group_tokens,
    num_blocks,
    pad_axis,
)

# By (block_q, block_kv): slots of the ring. They change speed, never numbers.
STAGES = {(64, 64): 2, (128, 64): 3, (128, 128): 2}
BLOCK_SIZES = tuple(STAGES)
HEAD_SIZES = (64, 128)
DTYPES = ("bfloat16", "float16")
# Rows of one compute warpgroup.
ROWS = 64
# Key blocks, or rows of a first-order matrix, that the tail takes at a time.
TILE = 64
# Key blocks in a word of the mask.
WORD = 32
# A copy by TMA spans at most this many elements of an axis.
COPY = 256
# The mask of a query block is copied in one piece.
MOST_BLOCKS = WORD * COPY
# Stands for "nothing seen": finite, so that differences of maxima are never NaN.
LOWEST = -1e38
LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class _Tail:
    """How the tail walks: `spans` runs of `tiles` tiles, each followed by its `parts` matrices."""

    spans: int
    tiles: int
    parts: int  # two where a group is half a tile, else one
    order: int

    @property
    def group(self) -> int:
        """Key blocks of a group, padding included."""
        return TILE * self.tiles // self.parts

    @property
    def columns(self) -> int:
        """Key blocks, padding included."""
        return TILE * self.tiles * self.spans

    @property
    def words(self) -> int:
        """Words of a mask; a copy's bytes divide by 128."""
        return -(-self.columns // WORD // 32) * 32

    @property
    def items(self) -> int:
        """Slots of the ring that a span fills."""
        return self.tiles + self.order * self.parts


@dataclasses.dataclass(frozen=True)
class _Config:
    """One kernel's static sizes."""

    block_q: int
    block_kv: int
    head_dim: int
    dtype: Any
    scale: float
    key_blocks: int
    slots: int
    stages: int
    ragged: bool
    tail: _Tail | None
    simulated: bool  # interpreted: products, loads and layouts in plain jnp

    @property
    def warpgroups(self) -> int:
        """Compute warpgroups; one more issues the copies."""
        return self.block_q // ROWS


class _Operands(NamedTuple):
    """The kernel's arrays, or references to them."""

    q: Any  # [B, I·block_q, N, H]
    k: Any  # [B, J·block_kv, N, H]
    v: Any
    ids: Any  # int32 [B, N, I, L]
    count: Any  # int32 [B, N, I]
    end: Any  # int32 [B], valid keys
    skipped: Any = None  # int32 [B, N, I, words], a bit for each key block not in the tail
    log2_length: Any = None  # f32 [B, columns]
    key_mean: Any = None  # [B, N, columns, H]
    value_mean: Any = None
    first_order: Any = None  # [B, N, matrices·H, H]


class _Scratch(NamedTuple):
    """Shared memory and barriers of one program."""

    q_smem: Any  # [warpgroups, ROWS, H]; the output leaves through it
    k_smem: Any  # [stages, block_kv, H]
    v_smem: Any
    lse_smem: Any  # f32 [warpgroups, ROWS]
    q_full: Any
    k_full: Any
    v_full: Any
    free: Any  # a slot's readers are done
    skipped_smem: Any = None
    length_smem: Any = None
    mask_full: Any = None


class _State(NamedTuple):
    """A running softmax in base 2 over one warpgroup's rows."""

    out: Any  # f32 [ROWS, H], un-normalised
    top: Any  # f32 [ROWS]
    mass: Any  # f32 [ROWS]


def _cast(x, layout, config: _Config):
    return x if config.simulated else plgpu.layout_cast(x, layout)


def _load(ref, layout, config: _Config):
    if config.simulated:
        return ref[...]
    index = [()] if "idx" in inspect.signature(plgpu.load).parameters else []  # until jax 0.11
    return plgpu.load(ref, *index, layout=layout)


def _columns_iota(shape, config: _Config):
    if config.simulated:
        return lax.broadcasted_iota(jnp.int32, shape, 1)
    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)


def _scores(a_smem, b_smem, config: _Config):
    """a bᵀ in float32, [ROWS, rows of b]."""
    if config.simulated:
        return jnp.dot(a_smem[...], b_smem[...].T, preferred_element_type=jnp.float32)

    def product(acc_ref):
        plgpu.wgmma(acc_ref, a_smem, b_smem.transpose((1, 0)))
        return acc_ref[...]

    return pl.run_scoped(product, plgpu.ACC((ROWS, b_smem.shape[0]), jnp.float32))


def _add_products(out, pairs, config: _Config):
    """out + Σ a b, accumulated in float32; a lies in registers, b in shared memory."""
    if config.simulated:
        return out + sum(jnp.dot(a, b[...], preferred_element_type=jnp.float32) for a, b in pairs)

    def products(acc_ref):
        for a, b in pairs:
            plgpu.wgmma(acc_ref, a, b)

    return pl.run_state(products)(plgpu.ACC.init(out))


def _rows(x, shape):
    return lax.broadcast_in_dim(x, shape, [0])


def _full_rows(value: float, config: _Config):
    return _cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1), config)


def _start(config: _Config) -> _State:
    out = jnp.zeros((ROWS, config.head_dim), jnp.float32)
    out = _cast(out, plgpu.Layout.WGMMA, config)
    return _State(out, _full_rows(LOWEST, config), _full_rows(0.0, config))


def _raise_top(state: _State, scores, factor: float) -> tuple[_State, Any, Any]:
    """Rescales the state to the maximum that includes factor·scores.

    Returns the state, exp2 of the scores less that maximum, and the factor of the rescaling.
    """
    top = jnp.maximum(state.top, scores.max(axis=1) * factor)
    fade = jnp.exp2(state.top - top)
    weights = jnp.exp2(scores * factor - _rows(top, scores.shape))
    mass = state.mass * fade + weights.sum(axis=1)
    return _State(state.out * _rows(fade, state.out.shape), top, mass), weights, fade


def _count(refs: _Operands, at, config: _Config):
    return jnp.clip(refs.count[at], 0, config.slots)


def _block_id(refs: _Operands, at, t, config: _Config):
    """Key block in slot t of the list; a slot or an id out of range becomes the nearest valid."""
    b, n, i = at
    block = refs.ids[b, n, i, jnp.minimum(t, config.slots - 1)]
    return jnp.clip(block, 0, config.key_blocks - 1)


def _slot(item, config: _Config):
    return lax.rem(item, jnp.int32(config.stages))


def _copy_blocks(refs: _Operands, scratch: _Scratch, at, config: _Config):
    """The copying warpgroup: fetches listed blocks into the ring, as slots become free."""
    b, n, _ = at
    count = _count(refs, at, config)
    if config.tail is not None:
        _copy_mask(refs, scratch, at, config)

    def fetch(t, block):
        slot = _free_slot(scratch, t, config)
        rows = (b, pl.ds(block * config.block_kv, config.block_kv), n)
        plgpu.copy_gmem_to_smem(refs.k.at[rows], scratch.k_smem.at[slot], scratch.k_full.at[slot])
        plgpu.copy_gmem_to_smem(refs.v.at[rows], scratch.v_smem.at[slot], scratch.v_full.at[slot])
        return _block_id(refs, at, t + 1, config)  # a step ahead: hides the load's latency

    lax.fori_loop(0, count, fetch, _block_id(refs, at, 0, config))
    if config.tail is not None:
        _copy_tail(refs, scratch, at, count, config)
        count += config.tail.spans * config.tail.items
    _drain(scratch, count, config)


def _copy_mask(refs: _Operands, scratch: _Scratch, at, config: _Config):
    """The mask and the blocks' lengths, once a program."""
    b, n, i = at
    full = scratch.mask_full.at[0]
    plgpu.copy_gmem_to_smem(refs.skipped.at[b, n, i], scratch.skipped_smem, full)
    for start in range(0, config.tail.columns, COPY):
        part = pl.ds(start, min(COPY, config.tail.columns - start))
        plgpu.copy_gmem_to_smem(refs.log2_length.at[b, part], scratch.length_smem.at[part], full)


def _copy_tail(refs: _Operands, scratch: _Scratch, at, first, config: _Config):
    """Fills the ring from item `first` on with each span's tiles, then its matrices."""
    b, n, _ = at
    tail, half = config.tail, pl.ds(0, TILE)

    def fetch(x, _):
        slot = _free_slot(scratch, first + x, config)
        span, item = lax.div(x, jnp.int32(tail.items)), lax.rem(x, jnp.int32(tail.items))
        k_smem, v_smem = scratch.k_smem.at[slot, half], scratch.v_smem.at[slot, half]
        k_full, v_full = scratch.k_full.at[slot], scratch.v_full.at[slot]

        @pl.when(item < tail.tiles)
        def _():
            rows = (b, n, pl.ds((span * tail.tiles + item) * TILE, TILE))
            plgpu.copy_gmem_to_smem(refs.key_mean.at[rows], k_smem, k_full)
            plgpu.copy_gmem_to_smem(refs.value_mean.at[rows], v_smem, v_full)

        @pl.when(item >= tail.tiles)
        def _():
            row = (span * tail.parts + item - tail.tiles) * config.head_dim
            rows = (b, n, pl.ds(row, TILE))
            plgpu.copy_gmem_to_smem(refs.first_order.at[rows], k_smem, k_full)
            if config.head_dim > TILE:
                rows = (b, n, pl.ds(row + TILE, TILE))
                plgpu.copy_gmem_to_smem(refs.first_order.at[rows], v_smem, v_full)

    lax.fori_loop(0, tail.spans * tail.items, fetch, None)


def _free_slot(scratch: _Scratch, item, config: _Config):
    """The slot of an item, once the item before it there is done with."""
    slot = _slot(item, config)
    pl.when(item >= config.stages)(lambda: plgpu.barrier_wait(scratch.free.at[slot]))
    return slot


def _release(scratch: _Scratch, slot, config: _Config):
    """Gives a slot back to the copying warpgroup."""
    if config.simulated:
        plgpu.commit_smem()  # plain reads, unlike WGMMA's, are not ordered before a later copy
    plgpu.barrier_arrive(scratch.free.at[slot])


def _drain(scratch: _Scratch, items, config: _Config):
    """Sees the last slots freed, so that no barrier is left before its end."""

    def wait(item, _):
        plgpu.barrier_wait(scratch.free.at[_slot(item, config)])

    lax.fori_loop(jnp.maximum(items - config.stages, 0), items, wait, None)


def _mask_end(scores, block, end, config: _Config):
    """-inf for keys beyond the last valid one; only one block of a sequence needs the work."""
    limit = end - block * config.block_kv

    def mask(scores):
        column = _columns_iota(scores.shape, config)
        return jnp.where(column < limit, scores, -jnp.inf)

    return lax.cond(limit < config.block_kv, mask, lambda scores: scores, scores)


def _attend_blocks(refs, scratch, q_smem, state, at, config: _Config) -> _State:
    """Exact attention over the listed blocks."""
    end = refs.end[at[0]]

    def attend(t, carry):
        state, block = carry
        slot = _slot(t, config)
        plgpu.barrier_wait(scratch.k_full.at[slot])
        scores = _scores(q_smem, scratch.k_smem.at[slot], config)
        if config.ragged:
            scores = _mask_end(scores, block, end, config)
            block = _block_id(refs, at, t + 1, config)
        state, weights, _ = _raise_top(state, scores, config.scale * LOG2_E)
        weights = weights.astype(config.dtype)
        plgpu.barrier_wait(scratch.v_full.at[slot])
        out = _add_products(state.out, [(weights, scratch.v_smem.at[slot])], config)
        _release(scratch, slot, config)
        return state._replace(out=out), block

    block = _block_id(refs, at, 0, config) if config.ragged else jnp.int32(0)
    return lax.fori_loop(0, _count(refs, at, config), attend, (state, block))[0]


def _mask_tail(scores, scratch: _Scratch, tile, config: _Config):
    """-inf for the key blocks of a tile that are listed, empty or padding."""
    column = _columns_iota(scores.shape, config)
    low, high = (scratch.skipped_smem[2 * tile + u] for u in range(2))
    word = jnp.where(column < WORD, low, high)
    bit = lax.shift_right_logical(word, column & (WORD - 1)) & 1
    return jnp.where(bit == 0, scores, -jnp.inf)


def _attend_tile(scratch, q_smem, state, shares, tile, item, config: _Config):
    """Zeroth order of 64 key blocks; adds their weights to the shares of their groups."""
    slot, rows = _slot(item, config), pl.ds(0, TILE)
    plgpu.barrier_wait(scratch.k_full.at[slot])
    scores = _scores(q_smem, scratch.k_smem.at[slot, rows], config)
    length = scratch.length_smem.at[pl.ds(tile * TILE, TILE)]
    length = _load(length, plgpu.Layout.WGMMA.reduce(0), config)
    scores = scores * (config.scale * LOG2_E) + lax.broadcast_in_dim(length, scores.shape, [1])
    scores = _mask_tail(scores, scratch, tile, config)
    state, weights, fade = _raise_top(state, scores, 1.0)
    if len(shares) == 1:
        shares = (shares[0] * fade + weights.sum(axis=1),)
    else:  # a tile is all of both groups
        shares = tuple(x.sum(axis=1) for x in (weights[:, :WORD], weights[:, WORD:]))
    weights = weights.astype(config.dtype)
    plgpu.barrier_wait(scratch.v_full.at[slot])
    out = _add_products(state.out, [(weights, scratch.v_smem.at[slot, rows])], config)
    _release(scratch, slot, config)
    return state._replace(out=out), shares


def _add_first_order(scratch, q_smem, out, share, item, config: _Config):
    """out + (q·share) times a group's matrix; q·share is rounded to the operands' type."""
    slot = _slot(item, config)
    share = share * (1 / config.tail.group)  # at most 1: float16 cannot overflow

    def part(c):
        q = _load(q_smem.at[:, pl.ds(c * TILE, TILE)], plgpu.Layout.WGMMA, config)
        return (q.astype(jnp.float32) * _rows(share, q.shape)).astype(config.dtype)

    halves = (scratch.k_smem, scratch.v_smem)[: config.head_dim // TILE]
    pairs = [(part(c), x.at[slot, pl.ds(0, TILE)]) for c, x in enumerate(halves)]
    for full in (scratch.k_full, scratch.v_full)[: len(halves)]:
        plgpu.barrier_wait(full.at[slot])
    out = _add_products(out, pairs, config)
    _release(scratch, slot, config)
    return out


def _attend_tail(scratch, q_smem, state, first, config: _Config) -> _State:
    """Taylor expansion of the key blocks not listed, from the ring's item `first` on."""
    tail = config.tail
    plgpu.barrier_wait(scratch.mask_full.at[0])

    def attend(span, state):
        item = first + span * tail.items

        def tile(t, carry):
            return _attend_tile(scratch, q_smem, *carry, span * tail.tiles + t, item + t, config)

        shares = (_full_rows(0.0, config),) * tail.parts
        state, shares = lax.fori_loop(0, tail.tiles, tile, (state, shares))
        out = state.out
        for part in range(tail.order * tail.parts):
            at = item + tail.tiles + part
            out = _add_first_order(scratch, q_smem, out, shares[part], at, config)
        return state._replace(out=out)

    return lax.fori_loop(0, tail.spans, attend, state)


def _compute(refs, scratch, out_ref, lse_ref, at, warpgroup, config: _Config):
    """A computing warpgroup: 64 query rows from load to store."""
    b, n, i = at
    q_smem, lse_smem = scratch.q_smem.at[warpgroup], scratch.lse_smem.at[warpgroup]
    rows = pl.ds(i * config.block_q + warpgroup * ROWS, ROWS)
    q_full = scratch.q_full.at[warpgroup]
    plgpu.copy_gmem_to_smem(refs.q.at[b, rows, n], q_smem, q_full)
    plgpu.barrier_wait(q_full)
    state = _attend_blocks(refs, scratch, q_smem, _start(config), at, config)
    if config.tail is not None:
        state = _attend_tail(scratch, q_smem, state, _count(refs, at, config), config)
    mass = jnp.where(state.mass == 0, 1.0, state.mass)  # no key at all: 0
    q_smem[...] = (state.out / _rows(mass, state.out.shape)).astype(config.dtype)
    if lse_ref is not None:
        lse_smem[...] = (state.top + jnp.log(state.mass) * LOG2_E) / LOG2_E
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_smem, out_ref.at[b, rows, n])
    if lse_ref is not None:
        plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[b, n, rows])
    plgpu.wait_smem_to_gmem(0)


def _kernel(*args, num_operands: int, num_outputs: int, config: _Config):
    refs = _Operands(*args[:num_operands])
    out_ref, lse_ref = (*args[num_operands : num_operands + num_outputs], None)[:2]
    scratch = _Scratch(*args[num_operands + num_outputs :])
    at = tuple(lax.axis_index(name) for name in ("batch", "head", "block"))
    warpgroup = lax.axis_index("warpgroup")
    shared = config.warpgroups > 1  # alone, a compute warpgroup fits twice on a multiprocessor

    @pl.when(warpgroup < config.warpgroups)
    def _():
        if shared:
            plgpu.set_max_registers(232, action="increase")
        _compute(refs, scratch, out_ref, lse_ref, at, warpgroup, config)

    @pl.when(warpgroup == config.warpgroups)
    def _():
        if shared:
            plgpu.set_max_registers(40, action="decrease")
        _copy_blocks(refs, scratch, at, config)


def _scratch_types(config: _Config) -> _Scratch:
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    tile = functools.partial(plgpu.SMEM, dtype=config.dtype, transforms=transforms)
    slot = (config.stages, config.block_kv, config.head_dim)
    masks = {}
    if config.tail is not None:
        masks["skipped_smem"] = plgpu.SMEM((config.tail.words,), jnp.int32)
        masks["length_smem"] = plgpu.SMEM((config.tail.columns,), jnp.float32)
        copies = 1 + num_blocks(config.tail.columns, COPY)
        masks["mask_full"] = plgpu.Barrier(num_arrivals=copies, num_barriers=1)
    return _Scratch(
        q_smem=tile((config.warpgroups, ROWS, config.head_dim)),
        k_smem=tile(slot),
        v_smem=tile(slot),
        lse_smem=plgpu.SMEM((config.warpgroups, ROWS), jnp.float32),
        q_full=plgpu.Barrier(num_barriers=config.warpgroups),
        k_full=plgpu.Barrier(num_barriers=config.stages),
        v_full=plgpu.Barrier(num_barriers=config.stages),
        free=plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages),
        **masks,
    )


def _run(operands: _Operands, config: _Config, return_lse: bool, interpret: Any) -> list[Array]:
    """The kernel on padded operands: output and, if wanted, log-sum-exp [B, N, I·block_q]."""
    b, t, n, _ = operands.q.shape
    outputs = [jax.ShapeDtypeStruct(operands.q.shape, config.dtype)]
    if return_lse:
        outputs.append(jax.ShapeDtypeStruct((b, n, t), jnp.float32))
    inputs = [x for x in operands if x is not None]
    body = functools.partial(
        _kernel, num_operands=len(inputs), num_outputs=len(outputs), config=config
    )
    extra = {} if interpret is None else {"interpret": interpret}
    return plgpu.kernel(
        body,
        out_type=outputs,
        scratch_types=[x for x in _scratch_types(config) if x is not None],
        # The last axis runs fastest: programs that run together share a head's keys in L2.
        grid=(b, n, t // config.block_q),
        grid_names=("batch", "head", "block"),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **extra,
    )(*inputs)


def _pad(x: Array, axis: int, multiple: int) -> Array:
    """Zeros at the end of `axis` up to a multiple; no copy where it is one already."""
    return pad_axis(x, axis, num_blocks(x.shape[axis], multiple) * multiple)


def _plan_tail(group: int, key_blocks: int, order: int) -> _Tail:
    if key_blocks > MOST_BLOCKS:
        raise NotImplementedError(f"{key_blocks=} must be at most {MOST_BLOCKS} with a tail")
    if group >= key_blocks:
        return _Tail(1, num_blocks(key_blocks, TILE), 1, order)
    if group != WORD and group % TILE:
        raise NotImplementedError(f"{group=} must be {WORD}, a multiple of {TILE}, or span all")
    tiles, parts = (1, 2) if group == WORD else (group // TILE, 1)
    return _Tail(num_blocks(key_blocks, tiles * TILE), tiles, parts, order)


def _skipped_words(blocks: BlockIndex, length: Array, config: _Config) -> Int[Array, "B N I W"]:
    """A bit for each key block that is listed, empty or padding."""
    columns, shape = WORD * config.tail.words, blocks.count.shape
    empty = jnp.ones((len(length), columns), jnp.bool_).at[:, : length.shape[1]].set(length == 0)
    slot = jnp.arange(config.slots, dtype=jnp.int32)[None, None, None, :]
    ids = jnp.clip(blocks.ids, 0, config.key_blocks - 1)
    ids = jnp.where(slot < blocks.count[..., None], ids, columns)
    skipped = jnp.broadcast_to(empty[:, None, None, :], (*shape, columns))
    skipped = jnp.put_along_axis(skipped, ids, True, axis=-1, inplace=False, mode="drop")
    bit = jnp.left_shift(jnp.uint32(1), jnp.arange(WORD, dtype=jnp.uint32))
    words = jnp.where(skipped.reshape(*shape, -1, WORD), bit[None, None, None, None, :], 0)
    return lax.bitcast_convert_type(words.sum(axis=-1, dtype=jnp.uint32), jnp.int32)


def _tail_operands(blocks: BlockIndex, tail: BlockStatistics, config: _Config) -> dict[str, Array]:
    """The statistics as the kernel's product operands, rounded to its type once."""
    plan, length = config.tail, tail.length
    b, n, _, h = tail.key_mean.shape
    size = jnp.maximum(length, 1).astype(jnp.float32)  # [B, J]
    value_mean = tail.value_sum.astype(jnp.float32) / size[:, None, :, None]
    means = (_pad(x.astype(config.dtype), 2, plan.columns) for x in (tail.key_mean, value_mean))
    factor = config.scale * plan.group / group_tokens(length, tail.group).astype(jnp.float32)
    matrices = tail.covariance.astype(jnp.float32) * factor[:, None, :, None, None]
    matrices = _pad(matrices.astype(config.dtype), 2, plan.spans * plan.parts)
    key_mean, value_mean = means
    return {
        "skipped": _skipped_words(blocks, length, config),
        "log2_length": _pad(jnp.log2(size), 1, plan.columns),
        "key_mean": key_mean,
        "value_mean": value_mean,
        "first_order": matrices.reshape(b, n, -1, h),
    }


def _check_supported(q, block_q, block_kv, scale) -> None:
    if q.dtype.name not in DTYPES:
        raise NotImplementedError(f"{q.dtype.name=} must be one of {', '.join(DTYPES)}")
    if q.shape[-1] not in HEAD_SIZES:
        raise NotImplementedError(f"head size {q.shape[-1]} must be one of {HEAD_SIZES}")
    if (block_q, block_kv) not in BLOCK_SIZES:
        raise NotImplementedError(f"{(block_q, block_kv)=} must be one of {BLOCK_SIZES}")
    if scale <= 0:
        raise NotImplementedError(f"{scale=} must be positive")


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
    interpret: Any = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """See `api.block_sparse_attention`. One program a query block; needs a Hopper GPU.

    A warpgroup copies listed blocks into a ring of shared memory by TMA; one or two others, of 64
    query rows each, multiply by WGMMA. Softmax in float32; the weights are rounded to q.dtype for
    their product with the values. Ids outside [0, J) and counts outside [0, L] are clipped: nothing
    is read out of bounds.

    The tail is fused: its block means, and its matrices, pass through the same ring; means,
    matrices and q times a group's weight are rounded to q.dtype, sums stay in float32. Groups of
    32 blocks, of multiples of 64, or one group.

    T and S that are no multiples of the blocks cost a padded copy of q, or of k and v, and a slice
    of the output; kv_length costs a copy of v whose padding is zero.

    Args:
        interpret: `InterpretGPUParams()` simulates the kernel on a CPU; None compiles it.

    Raises:
        NotImplementedError: dtype, head size, block sizes or tail outside what the kernel takes.
    """
    b, t, _, h = q.shape
    s = k.shape[1]
    scale = h**-0.5 if scale is None else scale
    _check_supported(q, block_q, block_kv, scale)
    key_blocks = num_blocks(s, block_kv)
    if kv_length is not None:
        length = jnp.clip(kv_length, 0, s).astype(jnp.int32)
        valid = jnp.arange(s, dtype=jnp.int32)[None, :] < length[:, None]
        v = jnp.where(valid[:, :, None, None], v, jnp.zeros((), v.dtype))  # NaN there stays out
    else:
        length = jnp.full((b,), s, jnp.int32)
    config = _Config(
        block_q=block_q,
        block_kv=block_kv,
        head_dim=h,
        dtype=q.dtype,
        scale=scale,
        key_blocks=key_blocks,
        slots=blocks.ids.shape[-1],
        stages=STAGES[block_q, block_kv],
        ragged=kv_length is not None or s % block_kv != 0,
        tail=None if tail is None else _plan_tail(tail.group, key_blocks, order),
        simulated=interpret is not None,
    )
    extra = {} if tail is None else _tail_operands(blocks, tail, config)
    k, v = (_pad(x, 1, block_kv) for x in (k, v))
    operands = _Operands(_pad(q, 1, block_q), k, v, blocks.ids, blocks.count, length, **extra)
    out, *lse = _run(operands, config, return_lse, interpret)
    out = out[:, :t]
    return (out, jnp.moveaxis(lse[0], 1, 2)[:, :t]) if return_lse else out
