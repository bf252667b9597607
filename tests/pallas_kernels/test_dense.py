"""dense_attention against the closed form, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax.pallas_kernels import api, reference

# float32: other order of summation. bfloat16: one rounding of the output.
TOLERANCE = {"float32": 3e-6, "bfloat16": 2**-7}


def distance(a, b):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.max(np.abs(a - b)) / np.max(np.abs(b))


@pytest.mark.parametrize(
    ("chunked", "dtype"),
    [(False, "float32"), (True, "float32"), (True, "bfloat16")],
    ids=["at_once", "streamed", "streamed-bfloat16"],
)
def test_equals_closed_form(request, truth, problem, chunked, dtype):
    dense = request.getfixturevalue("pieces" if chunked else "ops").dense_attention
    q, k, v, _ = problem(53, 31, 8, 8, 1, dtype=dtype)
    kv_length = jnp.asarray([31, 11], jnp.int32)
    kw = dict(kv_length=kv_length, scale=0.3, return_lse=True)
    want, want_lse = truth.dense_attention(q, k, v, **kw)
    beyond = jnp.arange(31)[None, :] >= kv_length[:, None]
    k, v = (jnp.where(beyond[:, :, None, None], jnp.nan, x) for x in (k, v))
    out, lse = dense(q, k, v, **kw)
    assert out.dtype == q.dtype and lse.dtype == jnp.float32
    assert distance(out, want) < TOLERANCE[dtype]
    assert distance(lse, want_lse) < TOLERANCE["float32"]


@pytest.mark.parametrize("chunked", [False, True], ids=["at_once", "streamed"])
def test_rows_that_see_nothing_or_nan(request, problem, chunked):
    dense = request.getfixturevalue("pieces" if chunked else "ops").dense_attention
    q, k, v, _ = problem(53, 31, 8, 8, 1)
    k, v = (x.at[0].set(jnp.nan) for x in (k, v))
    q = q.at[1, 7, 2].set(jnp.nan)
    kv_length = jnp.asarray([0, 31], jnp.int32)
    out, lse = dense(q, k, v, kv_length=kv_length, return_lse=True)
    assert np.all(np.asarray(out[0]) == 0) and np.all(np.isneginf(lse[0]))
    bad = np.zeros(out.shape, bool)
    bad[1, 7, 2] = True
    assert np.array_equal(np.isnan(out), bad)


@pytest.mark.parametrize("chunked", [False, True], ids=["at_once", "streamed"])
def test_gradient(request, problem, chunked, x64):
    if chunked:
        request.getfixturevalue("pieces")
    q, k, v, _ = problem(29, 31, 8, 8, 1, dtype=jnp.float64, spread=1)
    target = problem(29, 31, 8, 8, 1, dtype=jnp.float64, seed=1)[0]

    def loss(function):
        return jax.jit(jax.grad(lambda *qkv: jnp.vdot(function(*qkv), target), argnums=(0, 1, 2)))

    wants = loss(reference.dense_attention)(q, k, v)
    for got, want in zip(loss(api.dense_attention)(q, k, v), wants, strict=True):
        assert distance(got, want) < 1e-12


def test_streamed_gradient_stores_no_scores(pieces, problem):
    """The backward pass keeps arrays of the operands' size, not the T·S scores of each head."""
    q, k, v, _ = problem(211, 211, 8, 8, 1)
    _, pullback = jax.vjp(lambda *qkv: api.dense_attention(*qkv), q, k, v)
    assert max(x.size for x in jax.tree.leaves(pullback)) < 2 * 3 * 211 * 211 / 16


def test_a_gpu_lists_every_block_for_the_log_sum_exp(monkeypatch, problem):
    """cuDNN rounds it; the kernel that would run is stood in for by XLA's."""
    table = api.IMPLEMENTATIONS["block_sparse_attention"]
    monkeypatch.setitem(table, "triton", table["xla"])
    monkeypatch.setattr(api, "_check_device", lambda name: None)
    q, k, v, _ = problem(300, 210, 8, 8, 1, dtype="float32")
    length = jnp.asarray([210, 70], jnp.int32)
    call = dict(kv_length=length, return_lse=True)
    for got, want in zip(
        api.dense_attention(q, k, v, implementation="triton", **call),
        reference.dense_attention(q, k, v, **call),
        strict=True,
    ):
        assert distance(got, want) < TOLERANCE["float32"]
    with pytest.raises(NotImplementedError, match="for its log-sum-exp alone"):
        api.dense_attention(q, k, v, implementation="triton")
