"""Triton's block masses, interpreted, against the closed form; and their lowering for a GPU."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pasa_jax.pallas_kernels import num_blocks, triton_mass

# Sums of some thousand positive float32 terms in another order; operands in any type are exact.
TOLERANCE = 1e-5

CASES = [
    pytest.param(53, 101, 16, 32, 3, 24, "float32", id="T53-S101-H24-tile_of_many_blocks"),
    pytest.param(200, 300, 32, 16, 7, 96, "bfloat16", id="T200-S300-H96-bfloat16"),
    pytest.param(600, 333, 384, 192, 2, 256, "float16", id="T600-S333-H256-blocks_of_tiles"),
]


def interpreted(q, k, lse, **kw):
    return jax.jit(functools.partial(triton_mass._block_mass, interpret=True, **kw))(q, k, lse)


@pytest.mark.parametrize(("t", "s", "block_q", "block_kv", "top", "h", "dtype"), CASES)
def test_equals_closed_form(truth, problem, monkeypatch, t, s, block_q, block_kv, top, h, dtype):
    monkeypatch.setattr(triton_mass, "MASS_BYTES", 1)  # as many steps as there can be
    q, k, v, _ = problem(t, s, block_q, block_kv, 1, n=2, h=h, dtype=dtype, spread=1)
    kw = dict(kv_length=jnp.asarray([s, s // 2 + 1], jnp.int32), scale=-0.2)
    lse = truth.dense_attention(q, k, v, return_lse=True, **kw)[1]
    kw |= dict(block_q=block_q, block_kv=block_kv, top=top)
    want = truth.block_mass(q, k, lse, **kw)
    beyond = jnp.arange(s)[None, :] >= kw["kv_length"][:, None]
    k = jnp.where(beyond[:, :, None, None], jnp.nan, k)
    ours = interpreted(q, k, lse, **kw)
    np.testing.assert_array_equal(ours.ids, want.ids)
    assert ours.ids.dtype == jnp.int32 and ours.mass.dtype == ours.total.dtype == jnp.float32
    np.testing.assert_allclose(ours.mass, want.mass, rtol=TOLERANCE, atol=1e-7)
    np.testing.assert_allclose(ours.total, want.total, rtol=TOLERANCE)


def test_uneven_steps_rows_that_saw_nothing_and_equals(truth, problem, monkeypatch):
    """Seven tiles of two heads in steps of three; every second key block repeats its neighbour."""
    q, k, v, _ = problem(7 * 16, 96, 16, 16, 1, b=1, n=2, h=16)
    monkeypatch.setattr(triton_mass, "TILE_QUERIES", 16)
    monkeypatch.setattr(triton_mass, "MASS_BYTES", 3 * 6 * 4)
    k = jnp.repeat(k.reshape(1, 6, 16, 2, 16)[:, ::2], 2, axis=1).reshape(k.shape)
    lse = truth.dense_attention(q, k, v, return_lse=True)[1]
    lse = lse.at[0, :16].set(-jnp.inf).at[0, 20].set(-jnp.inf)
    kw = dict(block_q=16, block_kv=16, top=5)
    want, ours = truth.block_mass(q, k, lse, **kw), interpreted(q, k, lse, **kw)
    np.testing.assert_array_equal(ours.ids, want.ids)
    np.testing.assert_allclose(ours.mass, want.mass, rtol=TOLERANCE)
    np.testing.assert_allclose(ours.total, want.total, rtol=TOLERANCE)
    ids = np.asarray(ours.ids)
    assert np.all(ids[:, :, 0] == np.arange(5)), "without mass all blocks are equal"
    assert np.all(ids[..., :4:2] + 1 == ids[..., 1:4:2]), "of equals the first"
    q = q.at[0, 40].set(jnp.nan)  # a bad query reaches its own block alone
    bad = np.isnan(interpreted(q, k, lse, **kw).total)
    assert np.array_equal(np.flatnonzero(bad.any(axis=(0, 1))), [2])


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
    x, lse = jax.ShapeDtypeStruct((1, 48, 1, h), dtype), jax.ShapeDtypeStruct((1, 48, 1), "float32")
    kw = dict(block_q=block_q, block_kv=block_kv, top=1)
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(functools.partial(triton_mass.block_mass, **kw), x, x, lse)


@pytest.mark.parametrize(("h", "dtype"), [(64, "float16"), (128, "bfloat16"), (256, "float32")])
def test_lowers_for_a_gpu(h, dtype):
    b, t, n, top = 2, 3001, 3, 9
    x, lse = jax.ShapeDtypeStruct((b, t, n, h), dtype), jax.ShapeDtypeStruct((b, t, n), "float32")
    length = jax.ShapeDtypeStruct((b,), jnp.int32)

    @jax.jit
    def run(q, k, lse, kv_length):
        kw = dict(block_q=128, block_kv=64, top=top, kv_length=kv_length)
        return triton_mass.block_mass(q, k, lse, **kw)

    device = AbstractDevice("NVIDIA H200", 1, "cuda")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # newer JAX prefers Mosaic GPU
            traced = run.trace(x, x, lse, length)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 1
    shape = (b, n, num_blocks(t, 128))
    assert [x.shape for x in traced.out_info] == [(*shape, top), (*shape, top), shape]
