"""The Hopper kernel: interpreted against the closed form, and lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from pasa_jax.pallas_kernels import BlockIndex, mosaic_gpu, num_blocks

# The output's rounding, of values up to some units, and that of the weights before P·V.
TOLERANCE = {"bfloat16": 2**-7, "float16": 2**-10}


def distance(a, b):
    """Largest difference over the largest value of b."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.max(np.abs(a - b)) / np.max(np.abs(b))


def interpreted(*args, **kw):
    return mosaic_gpu.block_sparse_attention(*args, interpret=InterpretGPUParams(), **kw)


def poisoned(x, blocks, block):
    """x [1, S, 1, H] with NaN in every block that the one query block does not list."""
    listed = np.asarray(blocks.ids)[0, 0, 0, : int(blocks.count[0, 0, 0])]
    keep = np.isin(np.arange(x.shape[1]) // block, listed)
    return jnp.where(jnp.asarray(keep)[None, :, None, None], x, jnp.asarray(jnp.nan, x.dtype))


@pytest.mark.parametrize(
    ("t", "s", "block_q", "block_kv", "h", "dtype", "length"),
    [
        pytest.param(67, 199, 64, 64, 64, "bfloat16", (199, 70), id="T67-S199-blocks64x64"),
        pytest.param(131, 384, 128, 128, 128, "float16", None, id="T131-S384-blocks128x128-H128"),
    ],
)
def test_equals_closed_form(truth, problem, t, s, block_q, block_kv, h, dtype, length):
    b = 1 if length is None else len(length)
    kw = dict(b=b, n=1, h=h, dtype=dtype, spread=1)
    q, k, v, blocks = problem(t, s, block_q, block_kv, 3, **kw)
    count = blocks.count.at[0, 0, 0].set(0).at[0, 0, 1].set(3)  # fewer, and more than stages
    blocks = BlockIndex(blocks.ids, count)
    kw = dict(block_q=block_q, block_kv=block_kv, return_lse=True)
    kw["kv_length"] = None if length is None else jnp.asarray(length, jnp.int32)
    want, want_lse = truth.block_sparse_attention(q, k, v, blocks, **kw)
    if length is not None:  # what padding holds must not matter
        padding = (jnp.arange(s)[None, :] >= kw["kv_length"][:, None])[:, :, None, None]
        k, v = (jnp.where(padding, jnp.asarray(jnp.nan, x.dtype), x) for x in (k, v))
    out, lse = interpreted(q, k, v, blocks, **kw)
    assert out.dtype == q.dtype and lse.dtype == jnp.float32
    assert distance(out, want) < TOLERANCE[dtype]
    assert np.array_equal(np.isneginf(lse), np.isneginf(want_lse))
    seen = ~np.isneginf(want_lse)
    # float32 sums in another order.
    assert distance(np.where(seen, lse, 0), np.where(seen, want_lse, 0)) < 3e-6
    assert np.all(np.asarray(out)[0, :block_q] == 0)


def test_nan_in_dropped_blocks_stays_out(truth, problem):
    q, k, v, blocks = problem(64, 384, 64, 64, 4, b=1, n=1, h=64, dtype="bfloat16", spread=1)
    # The last slot is out of range and not valid: never followed.
    blocks = BlockIndex(blocks.ids.at[..., 3].set(10**6), jnp.full_like(blocks.count, 3))
    want = truth.block_sparse_attention(q, k, v, blocks, block_q=64, block_kv=64)
    k, v = (poisoned(x, blocks, 64) for x in (k, v))
    out = interpreted(q, k, v, blocks, block_q=64, block_kv=64)
    assert distance(out, want) < TOLERANCE["bfloat16"]


def hopper():
    """Where lowering needs a device's name: an H200 that need not be there."""
    try:
        device = jax.sharding.AbstractDevice("NVIDIA H200", 1, "cuda")
    except TypeError:  # jax 0.10 names fewer of its properties
        device = jax.sharding.AbstractDevice("NVIDIA H200", 1)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def lower(h, block_q, block_kv, dtype):
    """The kernel's module for CUDA at 512 tokens."""
    t, s, n, slots = 512, 512, 2, 3

    def run(q, k, v, ids, count, length):
        return mosaic_gpu.block_sparse_attention(
            q,
            k,
            v,
            BlockIndex(ids, count),
            block_q=block_q,
            block_kv=block_kv,
            kv_length=length,
            return_lse=True,
        )

    rows = num_blocks(t, block_q)
    shapes = [((1, t, n, h), dtype), ((1, s, n, h), dtype), ((1, s, n, h), dtype)]
    shapes += [((1, n, rows, slots), "int32"), ((1, n, rows), "int32"), ((1,), "int32")]
    specs = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    with hopper():
        return jax.jit(run).trace(*specs).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("block_q, block_kv", mosaic_gpu.BLOCK_SIZES)
def test_lowers_for_cuda(block_q, block_kv):
    h, dtype = (64, "float16") if block_kv == block_q == 64 else (128, "bfloat16")
    assert "mosaic_gpu" in lower(h, block_q, block_kv, dtype)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(dtype="float32"), "q.dtype.name"),
        (dict(h=96), "head size"),
        (dict(block_q=32), "block_q, block_kv"),
        (dict(scale=0.0), "must be positive"),
    ],
    ids=["dtype", "head_size", "block_sizes", "scale"],
)
def test_refuses(problem, change, reason):
    sizes = dict(block_q=64, dtype="bfloat16", h=64, scale=None) | change
    q, k, v, blocks = problem(
        64, 64, sizes["block_q"], 64, 1, b=1, n=1, h=sizes["h"], dtype=sizes["dtype"]
    )
    with pytest.raises(NotImplementedError, match=reason):
        mosaic_gpu.block_sparse_attention(
            q, k, v, blocks, block_q=sizes["block_q"], block_kv=64, scale=sizes["scale"]
        )


def test_refuses_a_tail(truth, problem):
    q, k, v, blocks = problem(64, 64, 64, 64, 1, b=1, n=1, h=64, dtype="bfloat16")
    tail = truth.block_statistics(k, v, block_kv=64, group=32)
    with pytest.raises(NotImplementedError, match="tail"):
        mosaic_gpu.block_sparse_attention(q, k, v, blocks, block_q=64, block_kv=64, tail=tail)
