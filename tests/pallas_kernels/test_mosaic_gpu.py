"""The Hopper kernel: interpreted against the closed form, and lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from pasa_jax.pallas_kernels import BlockIndex, BlockStatistics, mosaic_gpu, num_blocks

# The output's rounding, of values up to some units, and that of the weights before P·V.
TOLERANCE = {"bfloat16": 2**-7, "float16": 2**-10}
# Block means and q times a group's weight are rounded, too, and a rounded mean moves a score.
TAIL_TOLERANCE = {"bfloat16": 2**-6, "float16": 2**-9}


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


def worst_first(q, k, block_q, block_kv, slots):
    """The key blocks that each query block's mean likes least, in whole blocks."""
    b, t, n, h = q.shape
    q = q.astype(jnp.float32).reshape(b, t // block_q, block_q, n, h).mean(axis=2)
    k = k.astype(jnp.float32).reshape(b, -1, block_kv, n, h).mean(axis=2)
    ids = jnp.argsort(jnp.einsum("binh,bjnh->bnij", q, k), axis=-1)[..., :slots]
    return BlockIndex(ids.astype(jnp.int32), jnp.full(ids.shape[:3], slots, jnp.int32))


@pytest.mark.parametrize(
    ("s", "block_q", "block_kv", "h", "group", "order", "dtype"),
    [
        pytest.param(64 * 34, 64, 64, 64, 32, 1, "bfloat16", id="groups_of_32"),
        pytest.param(64 * 66, 64, 64, 64, 99, 1, "bfloat16", id="one_group-two_tiles"),
        pytest.param(64 * 6, 64, 64, 64, 32, 0, "float16", id="order0-float16"),
        pytest.param(128 * 6, 128, 128, 128, 32, 1, "float16", id="blocks128x128-H128"),
    ],
)
def test_tail_after_the_worst_blocks(truth, problem, s, block_q, block_kv, h, group, order, dtype):
    """Keys in clusters and the least liked blocks listed: the running maximum rises in the tail."""
    q, k, v, _ = problem(block_q, s, block_q, block_kv, 1, b=1, n=1, h=h, dtype=dtype, spread=1)
    q = q[:, :1] + q / 2
    k = jnp.repeat(k[:, ::block_kv], block_kv, axis=1) + k
    v = v + k / 2  # values that follow their keys: the first order counts
    blocks = worst_first(q, k, block_q, block_kv, 3)
    kw = dict(block_q=block_q, block_kv=block_kv, order=order, return_lse=True)
    kw["kv_length"] = jnp.asarray([s - block_kv - 7], jnp.int32)  # an empty block, and a ragged
    kw["tail"] = truth.block_statistics(
        k, v, block_kv=block_kv, group=group, kv_length=kw["kv_length"]
    )
    want, want_lse = truth.block_sparse_attention(q, k, v, blocks, **kw)
    other = truth.block_sparse_attention(q, k, v, blocks, **(kw | dict(order=1 - order)))[0]
    assert distance(other, want) > 8 * TAIL_TOLERANCE[dtype]
    out, lse = interpreted(q, k, v, blocks, **kw)
    assert distance(out, want) < TAIL_TOLERANCE[dtype]
    assert np.max(np.abs(lse - want_lse)) < TAIL_TOLERANCE[dtype]


def lower(h, block_q, block_kv, dtype, group):
    """The kernel's module for CUDA at 512 tokens, with a tail in groups or in none."""
    t, s, n, slots = 512, 512, 2, 3

    def run(q, k, v, ids, count, length, *statistics):
        return mosaic_gpu.block_sparse_attention(
            q,
            k,
            v,
            BlockIndex(ids, count),
            block_q=block_q,
            block_kv=block_kv,
            tail=BlockStatistics(*statistics, group) if statistics else None,
            kv_length=length,
            return_lse=True,
        )

    rows = num_blocks(t, block_q)
    shapes = [((1, t, n, h), dtype), ((1, s, n, h), dtype), ((1, s, n, h), dtype)]
    shapes += [((1, n, rows, slots), "int32"), ((1, n, rows), "int32"), ((1,), "int32")]
    if group:
        columns = num_blocks(s, block_kv)
        shapes += [((1, n, columns, h), "float32")] * 2 + [((1, columns), "int32")]
        shapes.append(((1, n, num_blocks(columns, group), h, h), "float32"))
    specs = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    with hopper():
        return jax.jit(run).trace(*specs).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("group", [None, 32, 999], ids=["no_tail", "groups", "one_group"])
@pytest.mark.parametrize(("block_q", "block_kv"), mosaic_gpu.BLOCK_SIZES)
def test_lowers_for_cuda(block_q, block_kv, group):
    h, dtype = (64, "float16") if block_kv == block_q == 64 else (128, "bfloat16")
    assert "mosaic_gpu" in lower(h, block_q, block_kv, dtype, group)


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


@pytest.mark.parametrize(
    ("group", "blocks", "reason"),
    [(48, 99, "multiple of 64"), (32, mosaic_gpu.MOST_BLOCKS + 1, "at most 8192")],
    ids=["group", "blocks"],
)
def test_refuses_a_tail(group, blocks, reason):
    with pytest.raises(NotImplementedError, match=reason):
        mosaic_gpu._plan_tail(group, blocks, 1)
