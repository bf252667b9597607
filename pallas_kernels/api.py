"""The public operations: checks, and the choice of the implementation that runs."""

import functools
import importlib
import logging
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pasa_jax.pallas_kernels import xla
from pasa_jax.pallas_kernels.blocks import (
    BlockIndex,
    BlockMass,
    BlockStatistics,
    accumulation_dtype,
    group_count,
    num_blocks,
)
from pasa_jax.pallas_kernels.gradient import block_sparse_gradient

FLOAT_TYPES = ("bfloat16", "float16", "float32", "float64")


def check_qkv(q: jax.Array, k: jax.Array, v: jax.Array, kv_length: jax.Array | None) -> None:
    """Raises ValueError unless q [B, T, N, H], k and v [B, S, N, H] and kv_length [B] agree."""
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"{q.shape=} must be [B, T, N, H] with no axis of size 0")
    want = (q.shape[0], *k.shape[1:2], *q.shape[2:])
    if k.ndim != 4 or k.shape != want or 0 in k.shape:
        raise ValueError(f"{k.shape=} must be [B, S, N, H] with B, N and H of {q.shape=}")
    if v.shape != k.shape:
        raise ValueError(f"{v.shape=} must be {k.shape=}")
    if not q.dtype == k.dtype == v.dtype or q.dtype.name not in FLOAT_TYPES:
        raise ValueError(
            f"q, k, v have {q.dtype.name=}, {k.dtype.name=}, {v.dtype.name=}; "
            f"they must be one of {', '.join(FLOAT_TYPES)}, the same for all"
        )
    if kv_length is None:
        return
    shape, dtype = getattr(kv_length, "shape", None), getattr(kv_length, "dtype", None)
    if shape != q.shape[:1] or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"{kv_length=} must be integers in an array [B], B = {q.shape[0]}")


def _valid_keys(kv_length: jax.Array | None, keys: int) -> jax.Array | None:
    """kv_length as int32, cut to 0 and S: no kernel reads or writes beyond."""
    return None if kv_length is None else jnp.clip(kv_length, 0, keys).astype(jnp.int32)


def check_scale(scale: float | None) -> None:
    """Raises ValueError unless the factor is None or a finite number known before compilation."""
    if scale is not None and not (isinstance(scale, (int, float)) and math.isfinite(scale)):
        raise ValueError(f"{scale=} must be a finite Python number, or None")


def check_positive(**sizes: int) -> None:
    """Raises ValueError unless every size is a whole number from 1 on."""
    for name, size in sizes.items():
        if not isinstance(size, (int, np.integer)):
            raise ValueError(f"{name}={size} must be a whole number")
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")


def check_blocks(blocks: BlockIndex, shape: tuple[int, int, int]) -> None:
    """Raises ValueError unless ids are int32 [B, N, I, L] and count int32 [B, N, I]."""
    ids, count = blocks
    if ids.ndim != 4 or ids.shape[:3] != shape or ids.shape[3] < 1:
        raise ValueError(f"{ids.shape=} must be [B, N, I, L] with [B, N, I] = {shape} and L ≥ 1")
    if count.shape != shape:
        raise ValueError(f"{count.shape=} must be [B, N, I] = {shape}")
    if ids.dtype != jnp.int32 or count.dtype != jnp.int32:
        raise ValueError(f"{ids.dtype=} and {count.dtype=} must be int32")


def check_lists(blocks: BlockIndex, key_blocks: int) -> None:
    """Looks into block lists, which the operations themselves never do: a check for debugging.

    Inside the operations lists are data: a count above L reads L entries, an id out of range reads
    another key block or none, and nothing is read out of bounds. With a tail an id that is out of
    range or repeated may also leave other blocks out of it, or count them twice.

    Args:
        blocks: concrete lists, outside jit.
        key_blocks: J.

    Raises:
        ValueError: ids or counts are no integers; or a count lies outside [0, L], or among a row's
            first `count` ids one outside [0, J), or one stands twice: the message names the first
            such row.
    """
    ids, count = (np.asarray(x) for x in blocks)
    if not all(np.issubdtype(x.dtype, np.integer) for x in (ids, count)):
        raise ValueError(f"{ids.dtype=} and {count.dtype=} must be integers")
    slots = ids.shape[-1]

    def refuse(bad: np.ndarray, rule: str) -> None:
        if bad.any():
            row = tuple(int(i) for i in np.argwhere(bad)[0])
            told = f"count={count[row]}, ids={ids[row][: max(0, count[row])].tolist()}"
            raise ValueError(f"row {row} has {told}: {rule}")

    refuse((count < 0) | (count > slots), f"a count must be from 0 to {slots}")
    live = np.arange(slots) < count[..., None]
    outside = (ids < 0) | (ids >= key_blocks)
    refuse((outside & live).any(axis=-1), f"ids must be from 0 to {key_blocks - 1}")
    # Dead entries become distinct negative numbers, so that only live ones can repeat.
    told = np.sort(np.where(live, ids, -1 - np.arange(slots)), axis=-1)
    refuse((np.diff(told, axis=-1) == 0).any(axis=-1), "an id must stand only once")


def check_lse(lse: jax.Array, shape: tuple[int, int, int]) -> None:
    """Raises ValueError unless the log-sum-exp is floating point of `shape` [B, T, N]."""
    if lse.shape != shape or lse.dtype.name not in FLOAT_TYPES:
        raise ValueError(
            f"lse {lse.dtype.name}{lse.shape} must be floating point [B, T, N] = {shape}"
        )


def check_tail(tail: BlockStatistics | None, order: int, shape: tuple[int, int, int, int]) -> None:
    """Raises ValueError unless the statistics fit key blocks of `shape` [B, N, J, H]."""
    if order not in (0, 1):
        raise ValueError(f"{order=} must be 0 or 1")
    if tail is None:
        return
    if tail.group < 1:
        raise ValueError(f"{tail.group=} must be at least 1 block")
    b, n, j, h = shape
    if tail.key_mean.shape != shape or tail.value_sum.shape != shape or tail.length.shape != (b, j):
        raise ValueError(
            f"{tail.key_mean.shape=} must be [B, N, J, H] = {shape}: block_kv differs?"
        )
    want = (b, n, group_count(j, tail.group), h, h)
    if tail.covariance.shape != want:
        raise ValueError(f"{tail.covariance.shape=} must be [B, N, G, H, H] = {want}")


def _cudnn_dense_attention(q, k, v, *, kv_length=None, scale=None, return_lse=False):
    """cuDNN's fused attention; everything it does not take goes to the next implementation."""
    if return_lse:
        raise NotImplementedError("its log-sum-exp is rounded to q.dtype")
    try:
        return jax.nn.dot_product_attention(
            q, k, v, scale=scale, key_value_seq_lengths=kv_length, implementation="cudnn"
        )
    except (ValueError, RuntimeError) as error:
        raise NotImplementedError(str(error)) from error


def _kernel(module: str, operation: str) -> Callable[..., Any]:
    """The operation of a kernel's module, which is imported when first called."""

    def run(*args: Any, **kwargs: Any) -> Any:
        kernels = importlib.import_module(f"pasa_jax.pallas_kernels.{module}")
        return getattr(kernels, operation)(*args, **kwargs)

    return run


def _with_gradient_of(plain: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel of statistics of k and v, differentiated as the jnp version `plain` of it."""

    def run(k, v, *, kv_length=None, statistics=None, **sizes):
        # Leaves, as the zero cotangents of integers fit no record.
        extra, extra_tree = jax.tree.flatten(statistics)
        trees = []

        def flat(function, k, v, kv_length, extra):
            told = {"statistics": jax.tree.unflatten(extra_tree, extra)} if extra else {}
            leaves, tree = jax.tree.flatten(function(k, v, kv_length=kv_length, **told, **sizes))
            trees.append(tree)
            return leaves

        @jax.custom_vjp
        def call(*operands):
            return flat(kernel, *operands)

        def forward(*operands):
            return call(*operands), operands

        def backward(operands, cotangents):
            k, v, kv_length, extra = operands
            again = functools.partial(flat, plain)
            _, pull = jax.vjp(lambda k, v, extra: again(k, v, kv_length, extra), k, v, extra)
            dk, dv, dextra = pull(cotangents)
            return dk, dv, None, dextra

        call.defvjp(forward, backward)
        leaves = call(k, v, kv_length, extra)
        return jax.tree.unflatten(trees[0], leaves)

    return run


def _dense_by_blocks(implementation: str) -> Callable[..., Any]:
    """Dense attention as a block-sparse kernel with every block listed, for its log-sum-exp."""

    def run(q, k, v, *, kv_length=None, scale=None, return_lse=False):
        if not return_lse:
            raise NotImplementedError("runs dense attention for its log-sum-exp alone")
        (b, t, n, _), rows, keys = q.shape, 128, 64
        columns = num_blocks(k.shape[1], keys)
        count = jnp.full((b, n, num_blocks(t, rows)), columns, jnp.int32)
        every = jnp.arange(columns, dtype=jnp.int32).reshape(1, 1, 1, columns)
        blocks = BlockIndex(jnp.broadcast_to(every, (*count.shape, columns)), count)
        sizes = {"block_q": rows, "block_kv": keys}
        call = _Call(implementation, True, 0, tuple({**sizes, "order": 1, "scale": scale}.items()))
        return _sparse(call, q, k, v, blocks, None, None, kv_length)

    return run


IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {
    "block_sparse_attention": {
        "mosaic_gpu": _kernel("mosaic_gpu", "block_sparse_attention"),
        "triton": _kernel("triton", "block_sparse_attention"),
        "mosaic_tpu": _kernel("mosaic_tpu", "block_sparse_attention"),
        "xla": xla.block_sparse_attention,
    },
    "block_statistics": {
        "triton": _with_gradient_of(
            xla.block_statistics, _kernel("triton_statistics", "block_statistics")
        ),
        "xla": xla.block_statistics,
    },
    "block_covariance_norm": {
        "triton": _with_gradient_of(
            xla.block_covariance_norm, _kernel("triton_statistics", "block_covariance_norm")
        ),
        "xla": xla.block_covariance_norm,
    },
    "block_mass": {"triton": _kernel("triton_mass", "block_mass"), "xla": xla.block_mass},
    "dense_attention": {
        "cudnn": _cudnn_dense_attention,
        "mosaic_gpu": _dense_by_blocks("mosaic_gpu"),
        "triton": _dense_by_blocks("triton"),
        "splash": _kernel("splash", "dense_attention"),
        "xla": xla.dense_attention,
    },
}
# By platform, best first; an operation's table may lack some of them.
PREFERENCE = {
    "gpu": ("cudnn", "mosaic_gpu", "triton", "xla"),
    "tpu": ("splash", "mosaic_tpu", "xla"),
}
# The platform of an implementation; xla runs on any.
PLATFORMS = {
    "cudnn": "gpu",
    "mosaic_gpu": "gpu",
    "triton": "gpu",
    "mosaic_tpu": "tpu",
    "splash": "tpu",
}
# Compute capabilities from and to which a kernel is built.
CAPABILITIES = {"mosaic_gpu": ((9, 0), (9, 0)), "triton": ((8, 0), (99, 0))}


def _check_device(name: str) -> None:
    """Raises NotImplementedError unless the device is of the kernel's platform and generation.

    An abstract device, set to lower a program for a machine that is not here, tells its platform
    alone.
    """
    absent = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if absent is None else absent.platform
    platform = "gpu" if platform == "cuda" else platform
    if PLATFORMS.get(name, platform) != platform:
        raise NotImplementedError(f"runs on a {PLATFORMS[name]}, the backend is {platform}")
    if name not in CAPABILITIES or absent is not None:
        return
    told = str(getattr(jax.devices()[0], "compute_capability", "none"))
    least, most = CAPABILITIES[name]
    match = re.fullmatch(r"(\d+)\.(\d+)", told)
    if not match or not least <= (int(match[1]), int(match[2])) <= most:
        want = "9.0 (Hopper)" if least == most else f"{least[0]}.{least[1]} or more"
        raise NotImplementedError(f"needs compute capability {want}, this device has {told}")


def _preferred(operation: str) -> list[str]:
    """The operation's implementations for this platform, best first."""
    names = PREFERENCE.get(jax.default_backend(), ("xla",))
    return [name for name in names if name in IMPLEMENTATIONS[operation]]


@functools.cache
def _log_choice(operation: str, name: str, reasons: tuple[str, ...]) -> None:
    """One line a process for each choice; a warning where better ones refused."""
    level = logging.WARNING if reasons else logging.INFO
    refused = f" ({'; '.join(reasons)})" if reasons else ""
    logging.getLogger("pasa_jax").log(level, "%s runs on %s%s", operation, name, refused)


def _dispatch(operation: str, implementation: str | None, *args: Any, **kwargs: Any) -> Any:
    """Runs the named implementation, or the platform's first that does not refuse."""
    table = IMPLEMENTATIONS[operation]
    if implementation is not None and implementation not in table:
        raise ValueError(f"{implementation=} must be one of {', '.join(table)}, or None")
    if implementation is not None:
        try:
            _check_device(implementation)
            return table[implementation](*args, **kwargs)
        except NotImplementedError as reason:
            raise NotImplementedError(f"{implementation}: {reason}") from reason
    reasons = []
    for name in _preferred(operation):
        try:
            _check_device(name)
            result = table[name](*args, **kwargs)
        except NotImplementedError as reason:
            reasons.append(f"{name}: {reason}")
            continue
        _log_choice(operation, name, tuple(reasons))
        return result
    raise NotImplementedError(f"no implementation of {operation} runs here; " + "; ".join(reasons))


def availability(operation: str, *args: Any, **kwargs: Any) -> dict[str, str | None]:
    """What would run an operation here, computing nothing.

    Args:
        operation: its name.
        args, kwargs: as the operation takes them, `implementation` left out. Under
            `jax.eval_shape` they need not exist either.

    Returns:
        This platform's implementations, best first: None for one that takes the call, the reason
        for one that refuses. The first None is the one that runs.
    """
    told = {}
    for name in _preferred(operation):
        run = functools.partial(IMPLEMENTATIONS[operation][name], *args, **kwargs)
        try:
            _check_device(name)
            jax.eval_shape(lambda run=run: jax.tree.leaves(run()))
            told[name] = None
        except NotImplementedError as reason:
            told[name] = str(reason)
    return told


class _Call(NamedTuple):
    """What is static in a call of `block_sparse_attention`; options as (name, value)."""

    implementation: str | None
    return_lse: bool
    group: int
    options: tuple[tuple[str, Any], ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sparse(call: _Call, q, k, v, blocks, moments, length, kv_length):
    """`block_sparse_attention`, differentiable; `moments` and `length` are the tail's arrays."""
    tail = None if moments is None else _tail(call, moments, length)
    return _dispatch(
        "block_sparse_attention",
        call.implementation,
        q,
        k,
        v,
        blocks,
        tail=tail,
        kv_length=kv_length,
        return_lse=call.return_lse,
        **dict(call.options),
    )


def _tail(call: _Call, moments: tuple, length: jax.Array) -> BlockStatistics:
    mean, value, covariance = moments
    return BlockStatistics(mean, value, length, covariance, call.group)


def _sparse_forward(call: _Call, *operands):
    return _sparse(call, *operands), operands


def _sparse_backward(call: _Call, operands, cotangent):
    q, k, v, blocks, moments, length, kv_length = operands
    if not call.return_lse:
        cotangent = cotangent, jnp.zeros(q.shape[:3], accumulation_dtype(q.dtype))
    tail = None if moments is None else _tail(call, moments, length)
    dq, dk, dv, dmoments = block_sparse_gradient(
        q, k, v, blocks, tail, kv_length, cotangent, **dict(call.options)
    )
    return dq, dk, dv, None, dmoments, None, None  # None: lists and lengths are integers


_sparse.defvjp(_sparse_forward, _sparse_backward)


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
    implementation: str | None = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Softmax attention of each query block over its listed key blocks, and a tail for the rest.

    Args:
        q, k, v: projected tokens after rotation, all of one dtype. T and S need not be multiples of
            the block sizes, and need not be equal.
        blocks: distinct key blocks of each query block; I = ceil(T / block_q). Ids beyond `count`
            may hold anything. A count of 0 is legal. `check_lists` looks for bad ones.
        block_q, block_kv: tokens per query block and per key block.
        tail: statistics of all key blocks (`block_statistics` with the same block_kv and
            kv_length); blocks not listed are then replaced by their Taylor expansion. None drops
            them and renormalises over the listed ones.
        order: order of that expansion, 0 or 1.
        kv_length: valid keys of each batch row, from the start, cut to 0 and S; None means all S.
        scale: factor on q·k, static; None means H^-1/2.
        return_lse: also return the log-sum-exp.
        implementation: "mosaic_gpu", "triton", "mosaic_tpu" or "xla", whatever the platform; None
            picks the best that runs here.

    Returns:
        Attention output in q.dtype, accumulated in float32 (float64 for float64 input). With
        `return_lse` also the natural logarithm of the denominator, tail included, [B, T, N] in the
        accumulation type. Rows that see no key at all (count 0 without a tail, kv_length 0) get
        output 0 and log-sum-exp -inf. NaN in a key block that is not listed stays out of the
        output when tail is None; with a tail it is part of the statistics. NaN in a query row
        reaches that row alone. Differentiable in reverse, in q, k, v and `tail`, with the lists
        fixed: see `gradient`.

    Raises:
        ValueError: shapes, dtypes, block sizes or `order` do not fit together.
        NotImplementedError: no implementation runs on this backend; the message has all reasons.

    Source: PISA (arXiv:2602.01077), one group; PASA (arXiv:2604.12219), groups of 32 blocks. The
    tail's mass is rescaled with the running maximum, which PISA's released kernel leaves out.
    """
    check_qkv(q, k, v, kv_length)
    kv_length = _valid_keys(kv_length, k.shape[1])
    check_positive(block_q=block_q, block_kv=block_kv)
    check_scale(scale)
    b, t, n, h = q.shape
    check_blocks(blocks, (b, n, num_blocks(t, block_q)))
    check_tail(tail, order, (b, n, num_blocks(k.shape[1], block_kv), h))
    options = {"block_q": block_q, "block_kv": block_kv, "order": order, "scale": scale}
    moments, length, group = None, None, 0
    if tail is not None:
        moments, length = (tail.key_mean, tail.value_sum, tail.covariance), tail.length
        group = tail.group
    call = _Call(implementation, return_lse, group, tuple(options.items()))
    return _sparse(call, q, k, v, blocks, moments, length, kv_length)


def block_statistics(
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    *,
    block_kv: int,
    group: int,
    kv_length: Int[Array, " B"] | None = None,
    implementation: str | None = None,
) -> BlockStatistics:
    """Key means, value sums and lengths of the key blocks, and first-order matrices of the groups.

    Args:
        k, v: keys after rotation, and values.
        block_kv: tokens per key block.
        group: blocks per group; the number of key blocks or more means one group.
        kv_length: valid keys of each batch row, from the start, cut to 0 and S; None means all S.
        implementation: "triton" or "xla"; None picks the best that runs here.

    Returns:
        Statistics in float32 (float64 for float64 input). Tokens beyond kv_length count nowhere;
        NaN in a valid token reaches its block's mean or sum and its group's matrix.

    Raises:
        ValueError: shapes or dtypes do not fit together, or a size is below 1.

    Source: PISA (arXiv:2602.01077) with one group; PASA (arXiv:2604.12219) with groups of 32.
    """
    check_qkv(k, k, v, kv_length)
    kv_length = _valid_keys(kv_length, k.shape[1])
    check_positive(block_kv=block_kv, group=group)
    return _dispatch(
        "block_statistics",
        implementation,
        k,
        v,
        block_kv=block_kv,
        group=group,
        kv_length=kv_length,
    )


def block_covariance_norm(
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    *,
    block_kv: int,
    group: int,
    kv_length: Int[Array, " B"] | None = None,
    statistics: BlockStatistics | None = None,
    implementation: str | None = None,
) -> Float[Array, "B N J"]:
    """How far each block's first-order matrix lies from its group's mean, ‖H_j − H̄_j‖_F.

    H_j = Σ_n (k_n − kbar_j)ᵀ v_n over the block's valid tokens; H̄_j = len_j / T_g · Σ_{i∈g} H_i is
    the group's mean for a block of that length. It is the error of the grouped expansion, and the
    covariance term of the routing score.

    Args:
        k, v: keys after rotation, and values.
        block_kv: tokens per key block.
        group: blocks per mean; the number of key blocks or more means one mean for all.
        kv_length: valid keys of each batch row, from the start, cut to 0 and S; None means all S.
        statistics: `block_statistics` of the same operands, which spares a pass; its group is
            `group`, or any where `group` spans all blocks.
        implementation: "triton" or "xla"; None picks the best that runs here.

    Returns:
        Frobenius norms in float32 (float64 for float64 input); 0 for a block with no valid token.

    Raises:
        ValueError: shapes, dtypes or the statistics do not fit together, or a size is below 1.

    Source: PISA (arXiv:2602.01077), covariance-aware routing.
    """
    check_qkv(k, k, v, kv_length)
    kv_length = _valid_keys(kv_length, k.shape[1])
    check_positive(block_kv=block_kv, group=group)
    blocks = num_blocks(k.shape[1], block_kv)
    check_tail(statistics, 1, (k.shape[0], k.shape[2], blocks, k.shape[3]))
    if statistics is not None and group < blocks and statistics.group != group:
        raise ValueError(f"{statistics.group=} must be {group=}")
    return _dispatch(
        "block_covariance_norm",
        implementation,
        k,
        v,
        block_kv=block_kv,
        group=group,
        kv_length=kv_length,
        statistics=statistics,
    )


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
    implementation: str | None = None,
) -> BlockMass:
    """Attention mass of key blocks, Σ exp(scale · q·k − lse) over the tokens of both blocks.

    Args:
        q, k: queries and keys after rotation, all of one dtype.
        lse: natural log-sum-exp of every query, fresh (`dense_attention` with return_lse) or of an
            earlier step; a stale one weighs queries, never keys within a query. -inf gives no mass.
        block_q, block_kv: tokens per query block and per key block.
        top: key blocks kept of each query block, from 1 to all J.
        kv_length: valid keys of each batch row, from the start, cut to 0 and S; None means all S.
        scale: factor on q·k, static; None means H^-1/2.
        implementation: "triton" or "xla"; None picks the best that runs here.

    Returns:
        The heaviest key blocks with their masses, and the total; no gradient passes. Sums run in
        float32 (float64 for float64 input); no array of all query by all key blocks is held.

    Raises:
        ValueError: shapes or dtypes do not fit together, or a size is out of range.

    Source: AdaSpa (arXiv:2502.21079), fused search and its refresh from a cached log-sum-exp.
    """
    check_qkv(q, k, k, kv_length)
    kv_length = _valid_keys(kv_length, k.shape[1])
    check_positive(block_q=block_q, block_kv=block_kv, top=top)
    check_scale(scale)
    q, k, lse = (lax.stop_gradient(x) for x in (q, k, lse))
    check_lse(lse, q.shape[:3])
    blocks = num_blocks(k.shape[1], block_kv)
    if top > blocks:
        raise ValueError(f"{top=} must be at most the {blocks} key blocks")
    return _dispatch(
        "block_mass",
        implementation,
        q,
        k,
        lse,
        block_q=block_q,
        block_kv=block_kv,
        top=top,
        kv_length=kv_length,
        scale=scale,
    )


def dense_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    *,
    kv_length: Int[Array, " B"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Softmax attention over all keys: cuDNN on a GPU, splash on a TPU, streaming jnp elsewhere.

    Args:
        q, k, v: projected tokens after rotation, all of one dtype.
        kv_length: valid keys of each batch row, from the start, cut to 0 and S; None means all S.
        scale: factor on q·k, static; None means H^-1/2.
        return_lse: also return the log-sum-exp.
        implementation: "cudnn", "splash" or "xla"; "mosaic_gpu" and "triton" with return_lse, which
            cuDNN rounds; None picks the best that runs here.

    Returns:
        Attention output in q.dtype, accumulated in float32 (float64 for float64 input). With
        `return_lse` also its natural logarithm [B, T, N] in the accumulation type. A batch row with
        kv_length 0 gets output 0 and log-sum-exp -inf. Differentiable in q, k and v; neither
        direction stores T·S scores beyond short sequences.

    Raises:
        ValueError: shapes or dtypes do not fit together.
        NotImplementedError: the implementation asked for does not run on this backend.
    """
    check_qkv(q, k, v, kv_length)
    kv_length = _valid_keys(kv_length, k.shape[1])
    check_scale(scale)
    return _dispatch(
        "dense_attention",
        implementation,
        q,
        k,
        v,
        kv_length=kv_length,
        scale=scale,
        return_lse=return_lse,
    )
