"""Dense attention on a TPU by the splash attention that comes with JAX."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask_info,
)
from jaxtyping import Array, Float, Int

from pasa_jax.pallas_kernels import xla
from pasa_jax.pallas_kernels.blocks import num_blocks, pad_axis
from pasa_jax.pallas_kernels.mosaic_tpu import HEAD_SIZES, heads_first

# Tokens a block; a smaller one where it would leave more than an eighth of the work as padding.
BLOCK_Q = 1024
BLOCK_KV = 2048
# Of a block of keys, how many are worked on at once.
COMPUTE_KV = 512
# In the gradient's two kernels, which hold more.
BLOCK_BACKWARD = 512
SMALLEST = 128


def _block(tokens: int, most: int) -> int:
    """Size of the blocks that `tokens` are padded to."""
    size = most
    while size > SMALLEST and 8 * (num_blocks(tokens, size) * size - tokens) > tokens:
        size //= 2
    return size


def _call(
    q: Array,
    k: Array,
    v: Array,
    outside: Array | None,
    *,
    return_lse: bool,
    interpret: bool = False,
) -> Array | tuple[Array, Array]:
    """On scaled q [B, N, T, H], k and v [B, N, S, H], whole blocks; `outside` [B, S] is padding."""
    block_q, block_kv = _block(q.shape[2], BLOCK_Q), _block(k.shape[2], BLOCK_KV)
    backward_q, backward_kv = (min(BLOCK_BACKWARD, size) for size in (block_q, block_kv))
    # No mask at all: the library would make one of ones, block by block, whenever it is traced.
    everything = splash_attention_mask_info.MaskInfo(None, None, None, None, None)
    kernel = splash_attention_kernel.SplashAttentionKernel(
        everything,
        everything,
        everything,
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_kv_compute=min(COMPUTE_KV, block_kv),
            block_q_dkv=backward_q,
            block_kv_dkv=backward_kv,
            block_kv_dkv_compute=backward_kv,
            block_q_dq=backward_q,
            block_kv_dq=backward_kv,
        ),
        is_mqa=False,
        save_residuals=return_lse,
        mask_value=splash_attention_kernel.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=None,
        interpret=interpret,
    )
    segments = None
    if outside is not None:
        inside = jnp.zeros((q.shape[0], q.shape[2]), jnp.int32)
        segments = splash_attention_kernel.SegmentIds(inside, outside.astype(jnp.int32))
    precision = "highest" if q.dtype == jnp.float32 else None
    with jax.default_matmul_precision(precision):
        found = jax.vmap(kernel)(q, k, v, segments)
    return (found[0], found[1][0]) if return_lse else found


def _attend(
    q: Array, k: Array, v: Array, kv_length: Array | None, scale: float, return_lse: bool
) -> Array | tuple[Array, Array]:
    """`dense_attention` without its checks."""
    t, s = q.shape[1], k.shape[1]
    padded = num_blocks(s, size := _block(s, BLOCK_KV)) * size
    outside = None
    if padded > s or kv_length is not None:
        end = jnp.full(q.shape[:1], s, jnp.int32) if kv_length is None else kv_length
        at = lax.broadcasted_iota(jnp.int32, (q.shape[0], padded), 1)
        outside = at >= jnp.minimum(end, s)[:, None]
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    q = pad_axis(jnp.swapaxes(q, 1, 2), 2, num_blocks(t, size := _block(t, BLOCK_Q)) * size)
    k, v = (heads_first(x, kv_length, padded) for x in (k, v))
    found = _call(q, k, v, outside, return_lse=return_lse)
    out, *lse = found if return_lse else (found,)
    out = jnp.swapaxes(out[:, :, :t], 1, 2)
    lse = [jnp.swapaxes(x[:, :, :t], 1, 2) for x in lse]
    if kv_length is not None:
        # With every key masked the kernel weighs all alike.
        seen = kv_length > 0
        out = jnp.where(seen[:, None, None, None], out, 0)
        lse = [jnp.where(seen[:, None, None], x, -jnp.inf) for x in lse]
    return (out, *lse) if return_lse else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend_with_lse(q, k, v, kv_length, scale):
    """Output and log-sum-exp; the library has no gradient of the two."""
    return _attend(q, k, v, kv_length, scale, True)


def _forward(q, k, v, kv_length, scale):
    return _attend_with_lse(q, k, v, kv_length, scale), (q, k, v, kv_length)


def _backward(scale, operands, cotangent):
    *operands, kv_length = operands
    dense = functools.partial(
        xla.dense_attention, kv_length=kv_length, scale=scale, return_lse=True
    )
    return *jax.vjp(dense, *operands)[1](cotangent), None  # None: lengths are integers


_attend_with_lse.defvjp(_forward, _backward)


def dense_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    *,
    kv_length: Int[Array, " B"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """See `api.dense_attention`; `jax.experimental.pallas.ops.tpu.splash_attention` without a mask.

    q, k, v and the output are copied once each between [B, T, N, H] and the kernel's [B, N, T, H]
    unless XLA gives their producer that layout; T and S are padded to whole blocks. Softmax, sums
    and the log-sum-exp are float32; for bfloat16 input the scaled q rounds to bfloat16. The
    gradient is the library's (float32 input multiplies at JAX's default precision there); with
    `return_lse` it is XLA's.

    Args:
        q, k, v: bfloat16 or float32, H one of 64, 96, 128, 256.
        kv_length: valid keys of each batch row; None means all S.
        scale: factor on q·k; None means H^-1/2.
        return_lse: also return the log-sum-exp.

    Returns:
        Output in q.dtype, and with `return_lse` the natural log-sum-exp in float32.

    Raises:
        NotImplementedError: dtype or head size are not as above.
    """
    if q.dtype.name not in ("bfloat16", "float32"):
        raise NotImplementedError(f"{q.dtype.name=} must be bfloat16 or float32")
    if (h := q.shape[3]) not in HEAD_SIZES:
        raise NotImplementedError(f"head size {h} must be one of {HEAD_SIZES}")
    scale = h**-0.5 if scale is None else scale
    if return_lse:
        return _attend_with_lse(q, k, v, kv_length, scale)
    return _attend(q, k, v, kv_length, scale, False)
