"""Triton's block statistics, interpreted, against the closed form; and their lowering for a GPU."""

import functools
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pasa_jax.pallas_kernels import triton_statistics

# Means and sums: float32 sums of up to 192 terms in another order.
TOLERANCE = 1e-6
# Matrices: the same, and in half precision a centred key's rounding, of each of many products.
MATRIX_TOLERANCE = {"float32": 5e-6, "float16": 2**-10, "bfloat16": 2**-8}

CASES = [
    pytest.param(101, 16, 2, 24, 4, "float32", id="S101-H24-group4"),
    pytest.param(133, 16, 1, 16, 99, "bfloat16", id="S133-one_group_in_runs-bfloat16"),
    pytest.param(700, 192, 1, 256, 2, "float16", id="S700-H256-blocks_of_tiles-float16"),
]


@pytest.fixture(scope="module")
def triton():
    """The interpreted operations, compiled once per shape."""

    def interpreted(function):
        static = ("block_kv", "group")
        return jax.jit(functools.partial(function, interpret=True), static_argnames=static)

    return types.SimpleNamespace(
        block_statistics=interpreted(triton_statistics._block_statistics),
        block_covariance_norm=interpreted(triton_statistics._block_covariance_norm),
    )


def close(a, b, tolerance, size=None):
    """Whether a and b agree relative to `size`, by default the largest of b."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    assert a.shape == b.shape
    assert np.max(np.abs(a - b)) <= tolerance * np.max(np.abs(b if size is None else size))


@pytest.mark.parametrize(("s", "block_kv", "n", "h", "group", "dtype"), CASES)
def test_equals_closed_form(truth, triton, problem, monkeypatch, s, block_kv, n, h, group, dtype):
    monkeypatch.setattr(triton_statistics, "RUN_BLOCKS", 4)
    _, k, v, _ = problem(s, s, block_kv, block_kv, 1, n=n, h=h, dtype=dtype)
    k = k + 1  # centring matters
    kv_length = jnp.asarray([s, s // 2], jnp.int32)
    kw = dict(block_kv=block_kv, group=group, kv_length=kv_length)
    want, want_norm = truth.block_statistics(k, v, **kw), truth.block_covariance_norm(k, v, **kw)
    beyond = jnp.arange(s)[None, :] >= kv_length[:, None]
    k, v = (jnp.where(beyond[:, :, None, None], jnp.nan, x) for x in (k, v))
    got = triton.block_statistics(k, v, **kw)
    assert got.group == want.group and np.array_equal(got.length, want.length)
    assert all(x.dtype == jnp.float32 for x in (got.key_mean, got.value_sum, got.covariance))
    close(got.key_mean, want.key_mean, TOLERANCE)
    close(got.value_sum, want.value_sum, TOLERANCE)
    close(got.covariance, want.covariance, MATRIX_TOLERANCE[dtype])
    # It may be 0: one block is its group's mean.
    size, tolerance = want.covariance, MATRIX_TOLERANCE[dtype]
    norm = triton.block_covariance_norm(k, v, statistics=got, **kw)
    close(norm, want_norm, tolerance, size)
    assert np.array_equal(triton.block_covariance_norm(k, v, **kw), norm)


def test_nan_reaches_its_own_block_and_group_alone(triton, problem):
    _, k, v, _ = problem(96, 96, 16, 16, 1, b=1, n=2, h=16)
    kw = dict(block_kv=16, group=2)
    want, want_norm = triton.block_statistics(k, v, **kw), triton.block_covariance_norm(k, v, **kw)
    k = k.at[0, 40, 1].set(jnp.nan)  # of the second head, block 2 and group 1
    got, norm = triton.block_statistics(k, v, **kw), triton.block_covariance_norm(k, v, **kw)
    for ours, finite, at in (
        (got.key_mean, want.key_mean, 2),
        (got.covariance, want.covariance, 1),
        (norm, want_norm, slice(2, 4)),
        (got.value_sum, want.value_sum, slice(0, 0)),
    ):
        assert np.isnan(ours[0, 1, at]).all()
        assert np.array_equal(ours.at[0, 1, at].set(0), finite.at[0, 1, at].set(0))


def test_norm_of_equal_blocks_vanishes_and_means_of_groups_add_up(truth, triton, problem):
    _, k, v, _ = problem(96, 96, 16, 16, 1, b=1, n=2, h=16)
    statistics = triton.block_statistics(k, v, block_kv=16, group=2)
    kw = dict(block_kv=16, group=6)
    norm = triton.block_covariance_norm(k, v, statistics=statistics, **kw)
    want = truth.block_covariance_norm(k, v, **kw)
    close(norm, want, MATRIX_TOLERANCE["float32"], statistics.covariance)
    k, v = (jnp.tile(x[:, :16], (1, 6, 1, 1)) for x in (k, v))
    same = triton.block_covariance_norm(k, v, **kw)
    assert np.max(same) < 1e-6 * np.max(want)


@pytest.mark.parametrize(
    ("dtype", "h", "block_kv", "message"),
    [
        ("float64", 8, 16, "dtype.name='float64' must be one of bfloat16, float16, float32"),
        ("float32", 257, 16, "head_dim=257 must be at most 256"),
        ("float32", 8, 8, "block_kv=8 must be a multiple of 16"),
    ],
)
def test_refuses_what_it_does_not_take(x64, dtype, h, block_kv, message):
    x = jax.ShapeDtypeStruct((1, 48, 1, h), dtype)
    for function in (triton_statistics.block_statistics, triton_statistics.block_covariance_norm):
        with pytest.raises(NotImplementedError, match=message):
            jax.eval_shape(functools.partial(function, block_kv=block_kv, group=1), x, x)


@pytest.mark.parametrize(("h", "dtype"), [(96, "float16"), (128, "bfloat16"), (256, "float32")])
def test_lowers_for_a_gpu(h, dtype):
    b, s, n = 2, 3001, 3
    x = jax.ShapeDtypeStruct((b, s, n, h), dtype)

    @jax.jit
    def run(k, v, kv_length):
        kw = dict(block_kv=64, group=32, kv_length=kv_length)
        statistics = triton_statistics.block_statistics(k, v, **kw)
        norm = triton_statistics.block_covariance_norm(k, v, statistics=statistics, **kw)
        return statistics.key_mean, statistics.value_sum, statistics.covariance, norm

    device = AbstractDevice("NVIDIA H200", 1, "cuda")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # newer JAX prefers Mosaic GPU
            traced = run.trace(x, x, jax.ShapeDtypeStruct((b,), jnp.int32))
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 2
    shapes = [x.shape for x in traced.out_info]
    assert shapes == [(b, n, 47, h), (b, n, 47, h), (b, n, 2, h, h), (b, n, 47)]
