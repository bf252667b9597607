"""Dense attention by JAX's splash attention: interpreted against the closed form, and lowering."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax.pallas_kernels import splash, xla

# float32: sums of some hundred terms in another order. bfloat16: the scaled q and the output round.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-6}
STATIC = ("scale", "return_lse")


@pytest.fixture
def blocks_of_128(monkeypatch):
    """Splash attention interpreted, in blocks of 128 and 256."""
    monkeypatch.setattr(splash, "BLOCK_Q", 128)
    monkeypatch.setattr(splash, "BLOCK_KV", 256)
    monkeypatch.setattr(splash, "COMPUTE_KV", 128)
    monkeypatch.setattr(splash, "_call", functools.partial(splash._call, interpret=True))


@pytest.fixture
def dense(blocks_of_128):
    """Splash attention, compiled."""
    call = lambda *args, **kw: splash.dense_attention(*args, **kw)  # noqa: E731
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(call, static_argnames=STATIC, compiler_options=options)


def distance(a, b):
    """Largest difference over the largest value of b."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.max(np.abs(a - b)) / np.max(np.abs(b))


@pytest.mark.parametrize(
    ("t", "s", "h", "dtype", "lengths"),
    [
        pytest.param(150, 450, 64, "float32", None, id="ragged"),
        pytest.param(128, 512, 128, "bfloat16", None, id="whole_blocks-bfloat16"),
        pytest.param(131, 512, 96, "float32", [512, 300], id="kv_length-H96"),
    ],
)
def test_equals_closed_form(dense, truth, problem, t, s, h, dtype, lengths):
    q, k, v, _ = problem(t, s, 64, 64, 1, n=2, h=h, dtype=dtype, spread=1)
    lengths = lengths and jnp.asarray(lengths, jnp.int32)
    out, lse = dense(q, k, v, kv_length=lengths, return_lse=True)
    want, want_lse = truth.dense_attention(q, k, v, kv_length=lengths, return_lse=True)
    assert out.dtype == q.dtype and lse.dtype == jnp.float32
    assert distance(out, want) < TOLERANCE[dtype]
    assert distance(lse, want_lse) < TOLERANCE[dtype]


def test_keys_beyond_the_length_and_rows_without_keys(dense, truth, problem):
    q, k, v, _ = problem(130, 300, 64, 64, 1, n=1, h=64, spread=1)
    lengths = jnp.asarray([0, 200], jnp.int32)
    want = truth.dense_attention(q, k, v, kv_length=lengths, scale=0.3)
    beyond = jnp.arange(300)[None, :, None, None] >= lengths[:, None, None, None]
    k, v = (jnp.where(beyond, jnp.nan, x) for x in (k, v))
    out, lse = dense(q, k, v, kv_length=lengths, scale=0.3, return_lse=True)
    assert np.all(np.asarray(out[0]) == 0) and np.all(np.isneginf(lse[0]))
    assert distance(out[1], want[1]) < TOLERANCE["float32"]


@pytest.mark.parametrize("return_lse", [False, True])
def test_gradient(blocks_of_128, problem, return_lse):
    q, k, v, _ = problem(130, 200, 64, 64, 1, n=1, h=64, spread=1)
    lengths = jnp.asarray([200, 90], jnp.int32)

    def loss(attention, q, k, v):
        found = attention(q, k, v, kv_length=lengths, return_lse=return_lse)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(found))

    got, want = (
        jax.jit(
            jax.grad(functools.partial(loss, attention), argnums=(0, 1, 2)),
            compiler_options={"xla_backend_optimization_level": 0},
        )(q, k, v)
        for attention in (splash.dense_attention, xla.dense_attention)
    )
    for a, b in zip(got, want, strict=True):
        assert distance(a, b) < TOLERANCE["float32"]


def test_refuses(problem):
    q, k, v, _ = problem(5, 7, 5, 7, 1, h=64, dtype="float16")
    with pytest.raises(NotImplementedError, match="float16"):
        splash.dense_attention(q, k, v)
    q, k, v, _ = problem(5, 7, 5, 7, 1, h=80)
    with pytest.raises(NotImplementedError, match="head size 80"):
        splash.dense_attention(q, k, v)


def test_lowers_for_tpu_without_scores():
    x = jax.ShapeDtypeStruct((1, 75600, 40, 128), jnp.bfloat16)
    traced = jax.jit(splash.dense_attention).trace(x, x, x)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text and "75776x75776" not in text
