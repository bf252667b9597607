"""What the Triton kernels share: masked tiles, products, and what none of them takes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array

DTYPES = ("bfloat16", "float16", "float32")
HEAD_DIM = 256  # the largest; wider accumulators do not fit the registers
SMALLEST_TILE = 16  # Triton's matrix product takes no fewer rows or columns
# A float32 product holds several parts of each operand, so its rows count as wider by this.
FLOAT32_PARTS = 2
LOG2_E = math.log2(math.e)


def dot(a: Array, b: Array, precision: Any, trans_b: bool = False, trans_a: bool = False) -> Array:
    """a · b in float32, or with one of them transposed."""
    contract = (((0 if trans_a else 1,), (1 if trans_b else 0,)), ((), ()))
    return lax.dot_general(a, b, contract, precision=precision, preferred_element_type=jnp.float32)


def exp2(x: Array, factor: float, offset: Array, interpret: bool) -> Array:
    """2^(factor · x + offset) of float32, two instructions an element.

    Triton's own would multiply and add apart, and scale around denormals, which here become 0.
    """
    offset = jnp.broadcast_to(offset, x.shape)
    if interpret:
        return jnp.exp2(factor * x + offset)
    word = np.float32(factor).view(np.uint32)
    [power] = pltriton.elementwise_inline_asm(
        f"fma.rn.f32 $0, $1, 0f{word:08X}, $2; ex2.approx.ftz.f32 $0, $0;",
        args=[x, offset],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return power


def settle(x: Array, interpret: bool) -> Array:
    """x, waited for: at the end of a loop's body it keeps a product from running into the next.

    Triton lets it where nothing else uses the result; with a second loop behind, the assembler then
    serialises every product of the kernel (its message C7515).
    """
    if interpret:
        return x
    [x] = pltriton.elementwise_inline_asm(
        "mov.b32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return x


def product_precision(dtype: jnp.dtype, interpret: bool) -> Any:
    """float32 products run as three TF32 products each."""
    exact = lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return exact if dtype == jnp.float32 else None


def within(start: Array | int, size: int, end: Array | int) -> Array:
    """bool [size], which of `size` numbers from `start` on lie below `end`."""
    return start + jnp.arange(size, dtype=jnp.int32) < end


def load(
    ref: Any,
    head: tuple,
    rows: tuple[Array | int, int],
    end: Array | int | None,
    columns: tuple[Array | int, int],
    head_dim: int,
) -> Array:
    """Rows and columns, each (start, size): zeros from row `end`, column `head_dim` on.

    `ref` is [B, T, N, H] and `head` its (b, n), or [T, H] and `head` empty.
    """
    mask = None if end is None else within(*rows, end)[:, None]
    if head_dim != ref.shape[-1]:
        inside = within(*columns, head_dim)[None, :]
        mask = inside if mask is None else mask & inside
    rows, columns = pl.ds(*rows), pl.ds(*columns)
    ref = ref.at[head[0], rows, head[1], columns] if head else ref.at[rows, columns]
    if mask is None:
        return pltriton.load(ref)
    return pltriton.load(ref, mask=jnp.broadcast_to(mask, ref.shape), other=0.0)


def power_of_two(size: int) -> int:
    """The smallest power of two, from SMALLEST_TILE on, that is at least `size`."""
    return max(SMALLEST_TILE, 1 << (size - 1).bit_length())


def part_bytes(dtype: jnp.dtype, wide: int) -> int:
    """Shared memory of a row of `wide` channels."""
    return wide * dtype.itemsize * (FLOAT32_PARTS if dtype == jnp.float32 else 1)


def refuse(dtype: jnp.dtype, head_dim: int, **blocks: int) -> None:
    """Raises NotImplementedError for what no Triton kernel takes."""
    if dtype.name not in DTYPES:
        raise NotImplementedError(f"{dtype.name=} must be one of {', '.join(DTYPES)}")
    if head_dim > HEAD_DIM:
        raise NotImplementedError(f"{head_dim=} must be at most {HEAD_DIM}")
    for name, size in blocks.items():
        if size % SMALLEST_TILE:
            raise NotImplementedError(f"{name}={size} must be a multiple of {SMALLEST_TILE}")
