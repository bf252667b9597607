"""The Triton kernel, interpreted, against the closed form; and its lowering for a GPU."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pasa_jax.pallas_kernels import BlockIndex, BlockStatistics, num_blocks, triton

# float32: sums of some hundred terms in another order than the reference's.
# float16, bfloat16: the weights of a product and the statistics round once each, and the output.
TOLERANCE = {"float32": 5e-6, "float16": 2**-10, "bfloat16": 2**-7}
# Only the rounded means enter the log-sum-exp: half a unit of the last place on scores up to 10.
LSE_TOLERANCE = {"float32": 1e-6, "float16": 2**-11, "bfloat16": 2**-8}

CASES = [
    # t, s, block_q, block_kv, slots, head_dim, group, order, dtype; group None: no tail
    pytest.param(53, 101, 32, 16, 4, 24, None, 1, "float32", id="T53-S101-H24-no_tail"),
    pytest.param(53, 101, 16, 32, 3, 24, 99, 0, "float32", id="T53-S101-order0"),
    pytest.param(
        29, 1093, 16, 16, 11, 16, 32, 1, "float32", id="T29-S1093-group32-last_of_5_blocks"
    ),
    pytest.param(29, 1093, 16, 16, 11, 16, 99, 1, "bfloat16", id="T29-S1093-one_group-bfloat16"),
    pytest.param(53, 101, 16, 16, 4, 96, 3, 1, "float16", id="T53-S101-H96-group3-float16"),
    pytest.param(200, 300, 192, 192, 1, 256, 1, 1, "float32", id="T200-S300-H256-blocks_of_tiles"),
]


def distance(a, b):
    """Largest difference over the largest value of b."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.max(np.abs(a - b)) / np.max(np.abs(b))


def interpreted(q, k, v, blocks, **kw):
    """Output and log-sum-exp; for many calls of one shape wrap it in jax.jit."""
    return jax.jit(functools.partial(triton._attend, interpret=True, **kw))(q, k, v, blocks)


@pytest.mark.parametrize(
    ("t", "s", "block_q", "block_kv", "slots", "h", "group", "order", "dtype"), CASES
)
def test_equals_closed_form(truth, problem, t, s, block_q, block_kv, slots, h, group, order, dtype):
    q, k, v, blocks = problem(t, s, block_q, block_kv, slots, n=2, h=h, dtype=dtype)
    kv_length = jnp.asarray([s, s // 2 + 1], jnp.int32)
    kw = dict(block_q=block_q, block_kv=block_kv, order=order, kv_length=kv_length, scale=-0.2)
    if group is not None:
        kw["tail"] = truth.block_statistics(
            k, v, block_kv=block_kv, group=group, kv_length=kv_length
        )
    out, lse = interpreted(q, k, v, blocks, **kw)
    want, want_lse = truth.block_sparse_attention(q, k, v, blocks, return_lse=True, **kw)
    assert out.dtype == q.dtype and lse.dtype == jnp.float32
    assert distance(out, want) < TOLERANCE[dtype]
    seen = ~np.isneginf(want_lse)
    assert np.array_equal(np.isneginf(lse), ~seen)
    assert distance(np.where(seen, lse, 0), np.where(seen, want_lse, 0)) < LSE_TOLERANCE[dtype]


def test_count_is_data(truth, problem):
    q, k, v, blocks = problem(32, 96, 16, 16, 5, b=1, n=2, h=16)
    tail = truth.block_statistics(k, v, block_kv=16, group=4)
    kw = dict(block_q=16, block_kv=16, tail=tail)
    run = jax.jit(functools.partial(triton._attend, interpret=True, **kw))
    for count in (0, 3, 99):  # 99: every slot counts
        counted = BlockIndex(blocks.ids, jnp.full_like(blocks.count, count))
        want = truth.block_sparse_attention(q, k, v, counted, **kw)
        out = run(q, k, v, counted)[0]
        assert distance(out, want) < TOLERANCE["float32"]
        assert np.array_equal(out, run(q, k, v, counted)[0]), "a second run must be bit-equal"
    assert run._cache_size() == 1


def test_worst_first_selection(truth, problem):
    """The running maximum rises in the tail, also within a group cut into several steps."""
    q, k, v, _ = problem(32, 96 * 16, 16, 16, 1, b=1, n=1, h=16, spread=3)
    k = jnp.repeat(k[:, ::16], 16, axis=1) + 0.3 * k  # or single tokens outbid every mean
    mean = [x.reshape(1, -1, 16, 1, 16).mean(axis=2) for x in (q, k)]
    ids = jnp.argsort(jnp.einsum("binh,bjnh->bnij", *mean), axis=-1)[..., :2].astype(jnp.int32)
    blocks = BlockIndex(ids, jnp.full(ids.shape[:3], 2, jnp.int32))
    for group in (4, 80):
        tail = truth.block_statistics(k, v, block_kv=16, group=group)
        kw = dict(block_q=16, block_kv=16, tail=tail)
        want = truth.block_sparse_attention(q, k, v, blocks, **kw)
        # Scores near 50: their rounding, 4e-6, is that of the weights.
        assert distance(interpreted(q, k, v, blocks, **kw)[0], want) < 2e-5


@pytest.mark.parametrize("unused", [-1, 10**6, 5], ids=["minus_one", "out_of_range", "poisoned"])
def test_nan_in_dropped_blocks_stays_out(problem, unused):
    q, k, v, blocks = problem(53, 101, 16, 16, 4, n=1, h=16)
    ids = jnp.where(blocks.ids == 5, 0, blocks.ids)  # nobody lists block 5
    slot = jnp.arange(4, dtype=jnp.int32)[None, None, None, :]
    blocks = BlockIndex(jnp.where(slot < blocks.count[..., None], ids, unused), blocks.count)
    kv_length = jnp.asarray([98, 70], jnp.int32)
    run = jax.jit(
        functools.partial(
            triton._attend, block_q=16, block_kv=16, kv_length=kv_length, interpret=True
        )
    )
    want = run(q, k, v, blocks)[0]
    token = jnp.arange(101, dtype=jnp.int32)[None, :]
    dropped = (token // 16 == 5) | (token >= kv_length[:, None])
    k, v = (jnp.where(dropped[:, :, None, None], jnp.nan, x) for x in (k, v))
    assert np.all(np.isfinite(want))
    assert np.array_equal(run(q, k, v, blocks)[0], want)


def test_nothing_to_see(problem):
    q, k, v, blocks = problem(53, 53, 16, 16, 4, n=1, h=16)
    k, v = (x.at[0].set(jnp.nan) for x in (k, v))
    blocks = BlockIndex(blocks.ids, jnp.broadcast_to(jnp.asarray([4, 0])[:, None, None], (2, 1, 4)))
    kv_length = jnp.asarray([0, 53], jnp.int32)
    out, lse = interpreted(q, k, v, blocks, block_q=16, block_kv=16, kv_length=kv_length)
    assert np.all(np.asarray(out) == 0) and np.all(np.isneginf(lse))


@pytest.mark.parametrize(
    ("dtype", "h", "block_q", "block_kv", "message"),
    [
        ("float64", 8, 16, 16, "dtype.name='float64' must be one of bfloat16, float16, float32"),
        ("float32", 257, 16, 16, "head_dim=257 must be at most 256"),
        ("float32", 8, 24, 16, "block_q=24 must be a multiple of 16"),
        ("float32", 8, 16, 8, "block_kv=8 must be a multiple of 16"),
    ],
)
def test_refuses_what_it_does_not_take(x64, dtype, h, block_q, block_kv, message):
    x = jax.ShapeDtypeStruct((1, 48, 1, h), dtype)
    ids = jax.ShapeDtypeStruct((1, 1, num_blocks(48, block_q), 1), jnp.int32)
    count = jax.ShapeDtypeStruct(ids.shape[:3], jnp.int32)

    def run(q, k, v, ids, count):
        blocks = BlockIndex(ids, count)
        return triton.block_sparse_attention(q, k, v, blocks, block_q=block_q, block_kv=block_kv)

    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(run, x, x, x, ids, count)


def traced(options, h=64, dtype="bfloat16", group=4):
    """What is compiled for blocks of 64, with a tail, as text."""
    x = jax.ShapeDtypeStruct((1, 512, 1, h), dtype)
    ids, count = (jax.ShapeDtypeStruct((1, 1, 8, *last), jnp.int32) for last in ((2,), ()))
    moment = jax.ShapeDtypeStruct((1, 1, 8, h), jnp.float32)
    matrix = jax.ShapeDtypeStruct((1, 1, num_blocks(8, group), h, h), jnp.float32)
    length = jax.ShapeDtypeStruct((1, 8), jnp.int32)

    def run(x, ids, count, moment, length, matrix):
        tail = BlockStatistics(moment, moment, length, matrix, group)
        kw = dict(block_q=64, block_kv=64, tail=tail, options=options)
        return triton.block_sparse_attention(x, x, x, BlockIndex(ids, count), **kw)

    return str(jax.make_jaxpr(run)(x, ids, count, moment, length, matrix))


def test_options_reach_the_compiler(monkeypatch):
    asked = {}

    def tuned(*args, **case):
        asked.update(case)
        return {"num_warps": 8}

    monkeypatch.setattr(triton, "tuned", tuned)
    given = traced({"num_warps": 4, "num_stages": 3})
    assert "num_warps=4" in given and "num_stages=3" in given and not asked
    known = traced(None)
    assert "num_warps=8" in known and "num_stages=2" in known
    want = dict(head_dim=64, block_q=64, block_kv=64, density=2 / 8, dtype="bfloat16")
    assert asked == want
    with pytest.raises(ValueError, match="option 'warps' must be one of triton's"):
        traced({"warps": 4})
    with pytest.raises(ValueError, match="num_warps=3 must be one of"):
        traced({"num_warps": 3})
    with pytest.raises(NotImplementedError, match="num_stages=3 needs .* bytes of shared memory"):
        traced({"num_stages": 3}, h=256, dtype="float32")


@pytest.mark.parametrize("block_q", [64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("h", [64, 96, 128, 256])
def test_lowers_for_a_gpu(h, dtype, block_q):
    """PASA's whole contract becomes one Triton kernel: ragged, with lengths, tail and sums."""
    b, t, n, j, i = 2, 3001, 3, num_blocks(3001, 64), num_blocks(3001, block_q)

    def spec(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    x = spec(b, t, n, h, dtype=dtype)
    whole = functools.partial(spec, dtype=jnp.int32)
    mean = spec(b, n, j, h)
    tail = mean, mean, whole(b, j), spec(b, n, 2, h, h)
    blocks = whole(b, n, i, 7), whole(b, n, i)

    @jax.jit
    def run(q, k, v, blocks, tail, kv_length):
        return triton.block_sparse_attention(
            *(q, k, v, BlockIndex(*blocks)),
            block_q=block_q,
            block_kv=64,
            tail=BlockStatistics(*tail, group=32),
            kv_length=kv_length,
            return_lse=True,
        )

    device = AbstractDevice("NVIDIA H200", 1, "cuda")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # newer JAX prefers Mosaic GPU
            traced = run.trace(x, x, x, blocks, tail, whole(b))
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 1
    out, lse = traced.out_info
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (x.shape, x.dtype, (b, t, n), "float32")
