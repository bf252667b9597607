"""Pallas Mosaic GPU: block-sparse attention on Hopper by TMA and WGMMA."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pasa_jax.pallas_kernels import compat
from pasa_jax.pallas_kernels.blocks import (
    BlockIndex,
    BlockStatistics,
    group_tokens,
    num_blocks,
    pad_axis,
)
from pasa_jax.pallas_kernels.tuning import check_options, tuned

# Slots of the ring; listed blocks taken at a time; whether two warpgroups take turns, one at the
# products while the other is at its softmax. They change speed, and numbers by rounding alone.
TUNABLE = {"stages": (2, 3, 4, 5), "step": (1, 2), "take_turns": (0, 1)}
# By (block_q, block_kv).
DEFAULTS = {
    (64, 64): {"stages": 4, "step": 1, "take_turns": 0},
    (128, 64): {"stages": 4, "step": 1, "take_turns": 1},
    (128, 128): {"stages": 2, "step": 1, "take_turns": 1},
}
BLOCK_SIZES = tuple(DEFAULTS)
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
# A tiled copy wants tokens in multiples of this.
TOKENS = 8
# Shared memory of a program, and what of it the compiler takes for itself and the barriers.
MEMORY, RESERVED = 232_448, 4096
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
    step: int
    take_turns: int
    ragged: bool
    tail: _Tail | None
    simulated: bool  # interpreted: products, loads and layouts in plain jnp

    @property
    def warpgroups(self) -> int:
        """Compute warpgroups; one more issues the copies."""
        return self.block_q // ROWS


class _Operands(NamedTuple):
    """The kernel's arrays, or references to them."""

    q: Any  # [B, T, N, H]
    k: Any  # [B, S, N, H]
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
    k_free: Any  # the readers of a slot's half are done
    v_free: Any
    turn: Any = None  # both warpgroups get here
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
    return ref[...] if config.simulated else compat.load(ref, layout)


def _columns_iota(shape, config: _Config):
    if config.simulated:
        return lax.broadcasted_iota(jnp.int32, shape, 1)
    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)


def _scores(a_smem, bs_smem, config: _Config, issued=lambda: None) -> tuple:
    """a bᵀ in float32 for each b, [ROWS, rows of b]; calls `issued` while they are computed."""
    if config.simulated:
        a, bs = a_smem[...], [b[...] for b in bs_smem]
        issued()
        return tuple(jnp.dot(a, b.T, preferred_element_type=jnp.float32) for b in bs)

    def products(*acc_refs):
        for acc_ref, b in zip(acc_refs, bs_smem, strict=True):
            plgpu.wgmma(acc_ref, a_smem, b.transpose((1, 0)))
        issued()
        return tuple(acc_ref[...] for acc_ref in acc_refs)

    return pl.run_scoped(products, *(plgpu.ACC((ROWS, b.shape[0]), jnp.float32) for b in bs_smem))


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


def _raise_top(state: _State, scores: tuple, factor: float) -> tuple[_State, tuple, Any]:
    """Rescales the state to the maximum that includes factor·scores.

    Returns the state, exp2 of the scores less that maximum, and the factor of the rescaling.
    """
    highest = functools.reduce(jnp.maximum, scores).max(axis=1)
    top = jnp.maximum(state.top, highest * factor)
    fade = jnp.exp2(state.top - top)
    weights = tuple(jnp.exp2(x * factor - _rows(top, x.shape)) for x in scores)
    out = state.out * _rows(fade, state.out.shape)
    return _State(out, top, state.mass * fade), weights, fade


def _count(refs: _Operands, at, config: _Config):
    return jnp.clip(refs.count[at], 0, config.slots)


def _items(count, config: _Config):
    """Slots of the ring that listed blocks fill: whole steps."""
    return lax.div(count + (config.step - 1), jnp.int32(config.step)) * config.step


def _block_id(refs: _Operands, at, t, count, config: _Config):
    """Key block in slot t of the list, or the last one; an id out of range becomes the nearest."""
    b, n, i = at
    block = refs.ids[b, n, i, jnp.maximum(jnp.minimum(t, count - 1), 0)]
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
        slot = _slot(t, config)
        rows = (b, pl.ds(block * config.block_kv, config.block_kv), n)
        _await_free(scratch.k_free, t, config)
        plgpu.copy_gmem_to_smem(refs.k.at[rows], scratch.k_smem.at[slot], scratch.k_full.at[slot])
        _await_free(scratch.v_free, t, config)
        plgpu.copy_gmem_to_smem(refs.v.at[rows], scratch.v_smem.at[slot], scratch.v_full.at[slot])
        return _block_id(refs, at, t + 1, count, config)  # a slot ahead: hides the load's latency

    items = _items(count, config)
    lax.fori_loop(0, items, fetch, _block_id(refs, at, 0, count, config))
    if config.tail is not None:
        _copy_tail(refs, scratch, at, items, config)
        items += config.tail.spans * config.tail.items
    _drain(scratch, items, config)


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
        slot = _slot(first + x, config)
        for free in (scratch.k_free, scratch.v_free):
            _await_free(free, first + x, config)
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


def _await_free(free, item, config: _Config):
    """Waits until the item before this one in its slot is done with."""
    slot = _slot(item, config)
    pl.when(item >= config.stages)(lambda: plgpu.barrier_wait(free.at[slot]))


def _release(config: _Config, *frees):
    """Gives halves of slots back to the copying warpgroup."""
    if config.simulated:
        plgpu.commit_smem()  # plain reads, unlike WGMMA's, are not ordered before a later copy
    for free in frees:
        plgpu.barrier_arrive(free)


def _drain(scratch: _Scratch, items, config: _Config):
    """Sees the last slots freed, so that no barrier is left before its end."""

    def wait(item, _):
        for free in (scratch.k_free, scratch.v_free):
            plgpu.barrier_wait(free.at[_slot(item, config)])

    lax.fori_loop(jnp.maximum(items - config.stages, 0), items, wait, None)


def _limit(item, block, count, end, config: _Config):
    """Columns of a block to be seen: fewer at the end of the keys, none beyond the list."""
    limit = end - block * config.block_kv if config.ragged else config.block_kv
    return limit if config.step == 1 else jnp.where(item < count, limit, 0)


def _mask_columns(scores: tuple, limits: list, config: _Config) -> tuple:
    """-inf from each block's limit on; few steps of a sequence need the work."""

    def mask(scores):
        column = _columns_iota(scores[0].shape, config)
        pairs = zip(scores, limits, strict=True)
        return tuple(jnp.where(column < limit, x, -jnp.inf) for x, limit in pairs)

    cut = functools.reduce(jnp.minimum, limits) < config.block_kv
    return lax.cond(cut, mask, lambda scores: scores, scores)


def _take_turn(scratch: _Scratch):
    plgpu.barrier_arrive(scratch.turn.at[0])
    plgpu.barrier_wait(scratch.turn.at[0])


def _end_softmax(scratch: _Scratch, slots, state, weights, config: _Config):
    """Waits for the values, and for the other warpgroup where they take turns."""
    if config.take_turns:  # the softmax belongs before the arrival, the next product after
        state, weights = lax.optimization_barrier((state, weights))
        plgpu.barrier_arrive(scratch.turn.at[0])
    for slot in slots:
        plgpu.barrier_wait(scratch.v_full.at[slot])
    if config.take_turns:
        plgpu.barrier_wait(scratch.turn.at[0])
    return state, weights


def _attend_blocks(refs, scratch, q_smem, at, warpgroup, config: _Config) -> _State:
    """Exact attention over the listed blocks."""
    end, count = refs.end[at[0]], _count(refs, at, config)
    within = range(config.step)

    def next_blocks(item):
        if not config.ragged:
            return (jnp.int32(0),) * config.step
        return tuple(_block_id(refs, at, item + u, count, config) for u in within)

    def attend(t, carry):
        state, blocks = carry
        item = t * config.step
        slots = [_slot(item + u, config) for u in within]
        for slot in slots:
            plgpu.barrier_wait(scratch.k_full.at[slot])
        issued = functools.partial(_take_turn, scratch) if config.take_turns else lambda: None
        scores = _scores(q_smem, [scratch.k_smem.at[slot] for slot in slots], config, issued)
        _release(config, *(scratch.k_free.at[slot] for slot in slots))
        if config.ragged or config.step > 1:
            limits = [_limit(item + u, blocks[u], count, end, config) for u in within]
            scores = _mask_columns(scores, limits, config)
            blocks = next_blocks(item + config.step)
        state, weights, _ = _raise_top(state, scores, config.scale * LOG2_E)
        state = state._replace(mass=state.mass + sum(weights[1:], weights[0]).sum(axis=1))
        weights = tuple(x.astype(config.dtype) for x in weights)
        state, weights = _end_softmax(scratch, slots, state, weights, config)
        pairs = [(x, scratch.v_smem.at[slot]) for x, slot in zip(weights, slots, strict=True)]
        out = _add_products(state.out, pairs, config)
        _release(config, *(scratch.v_free.at[slot] for slot in slots))
        return state._replace(out=out), blocks

    if config.take_turns:  # the second one starts half a step later, the first one ends earlier
        pl.when(warpgroup == 1)(lambda: _take_turn(scratch))
    steps = lax.div(_items(count, config), jnp.int32(config.step))
    state, _ = lax.fori_loop(0, steps, attend, (_start(config), next_blocks(0)))
    if config.take_turns:
        pl.when(warpgroup == 0)(lambda: _take_turn(scratch))
    return state


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
    (scores,) = _scores(q_smem, [scratch.k_smem.at[slot, rows]], config)
    length = scratch.length_smem.at[pl.ds(tile * TILE, TILE)]
    length = _load(length, plgpu.Layout.WGMMA.reduce(0), config)
    scores = scores * (config.scale * LOG2_E) + lax.broadcast_in_dim(length, scores.shape, [1])
    scores = _mask_tail(scores, scratch, tile, config)
    state, (weights,), fade = _raise_top(state, (scores,), 1.0)
    if len(shares) == 1:
        added = weights.sum(axis=1)
        shares = (shares[0] * fade + added,)
    else:  # a tile is all of both groups
        shares = tuple(x.sum(axis=1) for x in (weights[:, :WORD], weights[:, WORD:]))
        added = shares[0] + shares[1]
    state = state._replace(mass=state.mass + added)
    weights = weights.astype(config.dtype)
    plgpu.barrier_wait(scratch.v_full.at[slot])
    out = _add_products(state.out, [(weights, scratch.v_smem.at[slot, rows])], config)
    _release(config, scratch.k_free.at[slot], scratch.v_free.at[slot])
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
    _release(config, scratch.k_free.at[slot], scratch.v_free.at[slot])
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
    state = _attend_blocks(refs, scratch, q_smem, at, warpgroup, config)
    if config.tail is not None:
        first = _items(_count(refs, at, config), config)
        state = _attend_tail(scratch, q_smem, state, first, config)
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
    scratch = dict(zip(_scratch_types(config), args[num_operands + num_outputs :], strict=True))
    scratch = _Scratch(**scratch)
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


def _scratch_types(config: _Config) -> dict[str, Any]:
    """The fields of `_Scratch` that the program has."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    tile = functools.partial(plgpu.SMEM, dtype=config.dtype, transforms=transforms)
    slot = (config.stages, config.block_kv, config.head_dim)
    extra = {}
    if config.take_turns:
        extra["turn"] = plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=1)
    if config.tail is not None:
        extra["skipped_smem"] = plgpu.SMEM((config.tail.words,), jnp.int32)
        extra["length_smem"] = plgpu.SMEM((config.tail.columns,), jnp.float32)
        copies = 1 + num_blocks(config.tail.columns, COPY)
        extra["mask_full"] = plgpu.Barrier(num_arrivals=copies, num_barriers=1)
    return dict(
        q_smem=tile((config.warpgroups, ROWS, config.head_dim)),
        k_smem=tile(slot),
        v_smem=tile(slot),
        lse_smem=plgpu.SMEM((config.warpgroups, ROWS), jnp.float32),
        q_full=plgpu.Barrier(num_barriers=config.warpgroups),
        k_full=plgpu.Barrier(num_barriers=config.stages),
        v_full=plgpu.Barrier(num_barriers=config.stages),
        k_free=plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages),
        v_free=plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages),
        **extra,
    )


def _run(operands: _Operands, config: _Config, return_lse: bool, interpret: Any) -> list[Array]:
    """The kernel: output as long as q and, if wanted, log-sum-exp [B, N, I·block_q]."""
    b, n, rows = operands.count.shape
    outputs = [jax.ShapeDtypeStruct(operands.q.shape, config.dtype)]
    if return_lse:
        outputs.append(jax.ShapeDtypeStruct((b, n, rows * config.block_q), jnp.float32))
    inputs = [x for x in operands if x is not None]
    body = functools.partial(
        _kernel, num_operands=len(inputs), num_outputs=len(outputs), config=config
    )
    extra = {} if interpret is None else {"interpret": interpret}
    return plgpu.kernel(
        body,
        out_type=outputs,
        scratch_types=list(_scratch_types(config).values()),
        # The last axis runs fastest: programs that run together share a head's keys in L2.
        grid=(b, n, rows),
        grid_names=("batch", "head", "block"),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **extra,
    )(*inputs)


def _pad(x: Array, axis: int, multiple: int, value: int = 0) -> Array:
    """`value` at the end of `axis` up to a multiple; no copy where it is one already."""
    return pad_axis(x, axis, num_blocks(x.shape[axis], multiple) * multiple, value)


def _stage_bytes(config: _Config) -> tuple[int, int]:
    """Shared memory without the ring, and of one of its slots."""
    fixed = RESERVED + config.block_q * (2 * config.head_dim + 4)
    if config.tail is not None:
        fixed += 4 * (config.tail.words + config.tail.columns)
    return fixed, 4 * config.block_kv * config.head_dim


def _with_options(config: _Config, options: Mapping[str, int] | None) -> _Config:
    """The config with the options given, or else with those known best, as far as they fit."""
    form = config.block_q, config.block_kv
    fixed, slot = _stage_bytes(config)
    most = (MEMORY - fixed) // slot
    if options is None:
        case = dict(head_dim=config.head_dim, block_q=config.block_q, block_kv=config.block_kv)
        density = config.slots / config.key_blocks
        chosen = DEFAULTS[form] | tuned("mosaic_gpu", **case, density=density, dtype=config.dtype)
        chosen["stages"] = min(chosen["stages"], most)
        chosen["step"] = min(chosen["step"], chosen["stages"] // 2)
    else:
        check_options("mosaic_gpu", options)
        chosen = DEFAULTS[form] | options
    # Of two that take turns one begins a step before the other ends its last: fewer would hang.
    if not 2 * chosen["step"] <= chosen["stages"] <= most:
        rule = f"from {2 * chosen['step']}, twice step, to {most}, what fits here"
        raise NotImplementedError(f"stages={chosen['stages']} must be {rule}")
    if chosen["step"] > 1 and config.block_kv > 64:
        raise NotImplementedError(f"step={chosen['step']} must be 1 with key blocks over 64")
    if chosen["take_turns"] and config.warpgroups == 1:
        raise NotImplementedError("take_turns=1 must be 0 with query blocks of 64")
    return dataclasses.replace(config, **chosen)


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
    words, (b, n, rows) = config.tail.words, blocks.count.shape
    bits = jnp.left_shift(jnp.uint32(1), jnp.arange(WORD, dtype=jnp.uint32))
    empty = _pad(length == 0, 1, WORD * words, True).reshape(b, 1, 1, words, WORD)
    empty = jnp.where(empty, bits[None, None, None, None, :], 0).sum(axis=-1, dtype=jnp.uint32)
    slot = jnp.arange(config.slots, dtype=jnp.int32)[None, None, None, :]
    ids = jnp.clip(blocks.ids, 0, config.key_blocks - 1)
    bit = jnp.left_shift(jnp.uint32(1), (ids % WORD).astype(jnp.uint32))
    bit = jnp.where(slot < blocks.count[..., None], bit, jnp.uint32(0))
    row = jnp.arange(b * n * rows, dtype=jnp.int32).reshape(b, n, rows, 1) * words
    # Ids are distinct, so that the sum of their bits is their union.
    listed = jnp.zeros(b * n * rows * words, jnp.uint32).at[row + ids // WORD].add(bit)
    return lax.bitcast_convert_type(listed.reshape(b, n, rows, words) | empty, jnp.int32)


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
    options: Mapping[str, int] | None = None,
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

    T and S need be no multiples of the blocks: a copy from beyond the end of an array brings zeros,
    and one to there stores nothing. They cost a padded copy of q, or of k and v, only where they
    are no multiples of 8. kv_length costs a copy of v whose padding is zero.

    Args:
        options: values of `TUNABLE`, for speed alone; None takes those known best (`tuned`).
        interpret: `compat.interpret_gpu()` simulates the kernel on a CPU; None compiles it.

    Raises:
        ValueError: an option that is not in `TUNABLE`.
        NotImplementedError: dtype, head size, block sizes or tail outside what the kernel takes, or
            options that do not go together or fit into shared memory.
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
        stages=2,
        step=1,
        take_turns=0,
        ragged=kv_length is not None or s % block_kv != 0,
        tail=None if tail is None else _plan_tail(tail.group, key_blocks, order),
        simulated=interpret is not None,
    )
    config = _with_options(config, options)
    extra = {} if tail is None else _tail_operands(blocks, tail, config)
    whole = config.simulated and not compat.SIMULATES_ENDS
    q = _pad(q, 1, block_q if whole else TOKENS)
    k, v = (_pad(x, 1, block_kv if whole else TOKENS) for x in (k, v))
    operands = _Operands(q, k, v, blocks.ids, blocks.count, length, **extra)
    out, *lse = _run(operands, config, return_lse, interpret)
    out = out[:, :t]
    return (out, jnp.moveaxis(lse[0], 1, 2)[:, :t]) if return_lse else out
