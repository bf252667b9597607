"""Pallas Mosaic GPU: block-sparse attention on Hopper by TMA and WGMMA."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pasa_jax.pallas_kernels.blocks import BlockIndex, BlockStatistics, num_blocks

BLOCK_SIZES = ((64, 64), (128, 64), (128, 128))
HEAD_SIZES = (64, 128)
DTYPES = ("bfloat16", "float16")
# Rows of one compute warpgroup, and key blocks (or rows of a matrix) the tail takes at a time.
ROWS = 64
# A copy by TMA spans at most this many elements of an axis.
COPY = 256
# Selection words are copied in one piece; 32 key blocks a word.
MOST_BLOCKS = 32 * COPY
# Stands for "nothing seen": finite, so that differences of maxima are never NaN.
LOWEST = -1e38
LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class _Config:
    """One kernel's static sizes; `stages` changes speed, never numbers."""

    block_q: int
    block_kv: int
    head_dim: int
    dtype: Any
    scale: float
    key_blocks: int
    slots: int
    stages: int
    ragged: bool
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


class _State(NamedTuple):
    """A running softmax in base 2 over one warpgroup's rows."""

    out: Any  # f32 [ROWS, H], un-normalised
    top: Any  # f32 [ROWS]
    mass: Any  # f32 [ROWS]


def _cast(x, layout, config: _Config):
    return x if config.simulated else plgpu.layout_cast(x, layout)


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


def _add_product(out, a, b_smem, config: _Config):
    """out + a b, accumulated in float32; a lies in registers."""
    if config.simulated:
        return out + jnp.dot(a, b_smem[...], preferred_element_type=jnp.float32)

    def product(acc_ref):
        plgpu.wgmma(acc_ref, a, b_smem)

    return pl.run_state(product)(plgpu.ACC.init(out))


def _rows(x, shape):
    return lax.broadcast_in_dim(x, shape, [0])


def _start(config: _Config) -> _State:
    layout = plgpu.Layout.WGMMA
    full = lambda shape, value: jnp.full(shape, value, jnp.float32)  # noqa: E731
    return _State(
        _cast(full((ROWS, config.head_dim), 0), layout, config),
        _cast(full((ROWS,), LOWEST), layout.reduce(1), config),
        _cast(full((ROWS,), 0), layout.reduce(1), config),
    )


def _raise_top(state: _State, scores, factor: float) -> tuple[_State, Any]:
    """Rescales the state to the maximum that includes factor·scores; returns their exp2, too."""
    top = jnp.maximum(state.top, scores.max(axis=1) * factor)
    fade = jnp.exp2(state.top - top)
    weights = jnp.exp2(scores * factor - _rows(top, scores.shape))
    mass = state.mass * fade + weights.sum(axis=1)
    return _State(state.out * _rows(fade, state.out.shape), top, mass), weights


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

    def fetch(t, block):
        slot = _slot(t, config)
        pl.when(t >= config.stages)(lambda: plgpu.barrier_wait(scratch.free.at[slot]))
        rows = (b, pl.ds(block * config.block_kv, config.block_kv), n)
        plgpu.copy_gmem_to_smem(refs.k.at[rows], scratch.k_smem.at[slot], scratch.k_full.at[slot])
        plgpu.copy_gmem_to_smem(refs.v.at[rows], scratch.v_smem.at[slot], scratch.v_full.at[slot])
        return _block_id(refs, at, t + 1, config)  # a step ahead: hides the load's latency

    lax.fori_loop(0, count, fetch, _block_id(refs, at, 0, config))
    _drain(scratch, count, config)


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
        state, weights = _raise_top(state, scores, config.scale * LOG2_E)
        weights = weights.astype(config.dtype)
        plgpu.barrier_wait(scratch.v_full.at[slot])
        out = _add_product(state.out, weights, scratch.v_smem.at[slot], config)
        plgpu.barrier_arrive(scratch.free.at[slot])
        return state._replace(out=out), block

    block = _block_id(refs, at, 0, config) if config.ragged else jnp.int32(0)
    return lax.fori_loop(0, _count(refs, at, config), attend, (state, block))[0]


def _compute(refs, scratch, out_ref, lse_ref, at, warpgroup, config: _Config):
    """A computing warpgroup: 64 query rows from load to store."""
    b, n, i = at
    q_smem, lse_smem = scratch.q_smem.at[warpgroup], scratch.lse_smem.at[warpgroup]
    rows = pl.ds(i * config.block_q + warpgroup * ROWS, ROWS)
    q_full = scratch.q_full.at[warpgroup]
    plgpu.copy_gmem_to_smem(refs.q.at[b, rows, n], q_smem, q_full)
    plgpu.barrier_wait(q_full)
    state = _attend_blocks(refs, scratch, q_smem, _start(config), at, config)
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
    return _Scratch(
        q_smem=tile((config.warpgroups, ROWS, config.head_dim)),
        k_smem=tile(slot),
        v_smem=tile(slot),
        lse_smem=plgpu.SMEM((config.warpgroups, ROWS), jnp.float32),
        q_full=plgpu.Barrier(num_barriers=config.warpgroups),
        k_full=plgpu.Barrier(num_barriers=config.stages),
        v_full=plgpu.Barrier(num_barriers=config.stages),
        free=plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages),
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
        scratch_types=list(_scratch_types(config)),
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
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths) if widths[axis][1] else x


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
    if tail is not None:
        raise NotImplementedError("a tail is not fused yet")
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
        key_blocks=num_blocks(s, block_kv),
        slots=blocks.ids.shape[-1],
        stages=2,
        ragged=kv_length is not None or s % block_kv != 0,
        simulated=interpret is not None,
    )
    k, v = (_pad(x, 1, block_kv) for x in (k, v))
    operands = _Operands(_pad(q, 1, block_q), k, v, blocks.ids, blocks.count, length)
    out, *lse = _run(operands, config, return_lse, interpret)
    out = out[:, :t]
    return (out, jnp.moveaxis(lse[0], 1, 2)[:, :t]) if return_lse else out
