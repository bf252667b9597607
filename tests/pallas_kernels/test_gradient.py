"""The gradient of block_sparse_attention against that of the closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax.pallas_kernels import BlockIndex, api, reference

# float64, and sums of some hundred terms; float32 operands lose the same digits forward and back.
TOLERANCE = 1e-11

CASES = {
    "no tail": (21, 29, 4, 8, None, 1),
    "no tail, a row without keys": (21, 29, 8, 4, None, 0),
    "one group": (13, 37, 4, 4, 99, 1),
    "groups, the last one short": (13, 37, 4, 4, 3, 1),
    "order 0": (13, 37, 4, 4, 3, 0),
}


def loss(module, group, kw, q, k, v, blocks, targets):
    """A number that weighs every output and log-sum-exp; statistics are part of the graph."""
    if group is not None:
        shared = {"block_kv": kw["block_kv"], "kv_length": kw["kv_length"]}
        kw = kw | {"tail": module.block_statistics(k, v, group=group, **shared)}
    out, lse = module.block_sparse_attention(q, k, v, blocks, return_lse=True, **kw)
    lse = jnp.where(jnp.isneginf(lse), 0, lse)
    return jnp.vdot(out, targets[0]) + jnp.vdot(lse, targets[1])


@pytest.mark.parametrize("t, s, block_q, block_kv, group, order", CASES.values(), ids=CASES)
def test_equals_the_closed_form_s(problem, x64, t, s, block_q, block_kv, group, order):
    q, k, v, blocks = problem(t, s, block_q, block_kv, 4, h=4, n=2, dtype=jnp.float64, spread=1)
    if order == 1:
        blocks = BlockIndex(blocks.ids, jnp.maximum(blocks.count, 1))
    rng = np.random.default_rng(1)
    targets = [jnp.asarray(rng.standard_normal(shape)) for shape in (q.shape, q.shape[:3])]
    kw = dict(block_q=block_q, block_kv=block_kv, order=order, scale=0.7)
    kw |= dict(kv_length=jnp.asarray([s, s - 5], jnp.int32))

    def gradient(module):
        run = functools.partial(loss, module, group, kw)
        return jax.jit(jax.grad(run, argnums=(0, 1, 2)))(q, k, v, blocks, targets)

    for ours, want in zip(gradient(api), gradient(reference), strict=True):
        want = jnp.nan_to_num(want)  # the closed form's own 0/0 in a row without keys
        assert np.max(np.abs(ours - want)) < TOLERANCE * np.max(np.abs(want))


def test_a_nan_in_a_dropped_block_stays_out(problem):
    q, k, v, _ = problem(8, 24, 8, 8, 1, b=1, n=1)
    blocks = BlockIndex(jnp.full((1, 1, 1, 2), 2, jnp.int32), jnp.ones((1, 1, 1), jnp.int32))
    k, v = (x.at[:, :8].set(jnp.nan) for x in (k, v))

    def loss(q, k, v):
        return api.block_sparse_attention(q, k, v, blocks, block_q=8, block_kv=8).sum()

    dq, dk, dv = jax.grad(loss, argnums=(0, 1, 2))(q, k, v)
    assert all(np.isfinite(x).all() for x in (dq, dk, dv))
    assert not dk[:, :16].any() and not dv[:, :16].any() and dk[:, 16:].any()


def test_keeps_no_scores_of_all_tokens():
    def gradient(tokens):
        shape = jax.ShapeDtypeStruct((1, tokens, 1, 8), jnp.float32)
        rows = tokens // 16
        ids = jax.ShapeDtypeStruct((1, 1, rows, 4), jnp.int32)
        count = jax.ShapeDtypeStruct((1, 1, rows), jnp.int32)

        def loss(q, k, v, ids, count):
            tail = api.block_statistics(k, v, block_kv=16, group=8)
            kw = dict(block_q=16, block_kv=16, tail=tail)
            return api.block_sparse_attention(q, k, v, BlockIndex(ids, count), **kw).sum()

        lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape, ids, count)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    # Linear: four times the tokens take about four times the bytes, and not sixteen.
    assert gradient(16384) < 6 * gradient(4096)
    assert gradient(16384) < 16384 * 16384
