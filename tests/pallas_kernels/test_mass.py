"""block_mass against the closed form, and AdaSpa's oracles of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax.pallas_kernels import api

# Sums of some thousand positive float32 terms in another order; bfloat16 operands are exact.
TOLERANCE = 1e-5


@pytest.mark.parametrize(
    "t, s, block_q, block_kv, top, dtype",
    [(53, 101, 8, 4, 5, "float32"), (29, 61, 16, 16, 4, "bfloat16"), (5, 3, 16, 16, 1, "float32")],
)
def test_equals_the_closed_form(pieces, truth, problem, t, s, block_q, block_kv, top, dtype):
    q, k, v, _ = problem(t, s, block_q, block_kv, 1, dtype=dtype)
    kw = dict(kv_length=jnp.asarray([s, s // 2 + 1], jnp.int32), scale=0.3)
    lse = truth.dense_attention(q, k, v, return_lse=True, **kw)[1]
    kw |= dict(block_q=block_q, block_kv=block_kv, top=top)
    ours, want = (x.block_mass(q, k, lse, **kw) for x in (pieces, truth))
    np.testing.assert_array_equal(ours.ids, want.ids)
    np.testing.assert_allclose(ours.mass, want.mass, rtol=TOLERANCE, atol=1e-7)
    # With the queries' own log-sum-exp every valid query spreads a mass of 1.
    queries = np.clip(t - block_q * np.arange(want.total.shape[2]), 0, block_q)
    assert ours.total.shape == want.total.shape and ours.ids.dtype == jnp.int32
    np.testing.assert_allclose(
        ours.total, np.broadcast_to(queries, ours.total.shape), rtol=TOLERANCE
    )


def test_a_stale_lse_weighs_queries_alone(ops, truth, problem):
    q, k, v, _ = problem(64, 96, 16, 8, 1, b=1, n=1)
    lse = truth.dense_attention(q, k, v, return_lse=True)[1]
    shift = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 1)), jnp.float32)
    shift = jnp.repeat(shift, 16, axis=1)  # one a query block
    kw = dict(block_q=16, block_kv=8, top=12)
    fresh, stale = ops.block_mass(q, k, lse, **kw), ops.block_mass(q, k, lse - shift, **kw)
    np.testing.assert_array_equal(fresh.ids, stale.ids)
    total = jnp.exp(shift).reshape(1, 1, 4, 16).sum(axis=-1)
    np.testing.assert_allclose(stale.total, total, rtol=TOLERANCE)


def test_padding_and_rows_that_saw_nothing(ops, truth, problem):
    q, k, v, _ = problem(32, 64, 16, 16, 1, n=1)
    kv_length = jnp.asarray([40, 0], jnp.int32)
    lse = truth.dense_attention(q, k, v, return_lse=True, kv_length=kv_length)[1]
    kw = dict(block_q=16, block_kv=16, kv_length=kv_length)
    want = ops.block_mass(q, k, lse, top=3, **kw)
    beyond = jnp.arange(64, dtype=jnp.int32)[None, :, None, None] >= kv_length[:, None, None, None]
    ours = ops.block_mass(q, jnp.where(beyond, jnp.nan, k), lse, top=3, **kw)
    jax.tree.map(np.testing.assert_array_equal, ours, want)
    assert not np.asarray(ours.total[1]).any()
    assert set(np.ravel(ours.ids[0])) == {0, 1, 2}


def test_streams():
    """Neither T·S scores nor I·J masses are held."""

    def bytes_of(tokens):
        x = jax.ShapeDtypeStruct((1, tokens, 1, 8), jnp.float32)
        lse = jax.ShapeDtypeStruct((1, tokens, 1), jnp.float32)
        kw = dict(block_q=16, block_kv=16, top=4)
        lowered = jax.jit(lambda q, k, lse: api.block_mass(q, k, lse, **kw)).lower(x, x, lse)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    # 16 times the tokens; a map of blocks alone would take 67 MB at 65,536.
    assert bytes_of(65536) < 17 * bytes_of(4096)
    assert bytes_of(65536) < 40e6


@pytest.mark.parametrize("top, words", [(4, "at most the 3 key blocks"), (0, "at least 1")])
def test_bad_top(top, words):
    x = jnp.zeros((2, 12, 3, 4))
    with pytest.raises(ValueError, match=f"top={top} must be {words}"):
        api.block_mass(x, x, jnp.zeros((2, 12, 3)), block_q=4, block_kv=4, top=top)


@pytest.mark.parametrize("lse", [jnp.zeros((2, 12, 2)), jnp.zeros((2, 12, 3), jnp.int32)])
def test_bad_lse(lse):
    with pytest.raises(ValueError, match=r"must be floating point \[B, T, N\] = \(2, 12, 3\)"):
        api.check_lse(lse, (2, 12, 3))
