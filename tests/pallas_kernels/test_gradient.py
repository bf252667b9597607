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


@pytest.mark.parametrize("operation", ["block_statistics", "block_covariance_norm"])
def test_a_kernel_of_statistics_has_the_plain_version_s_gradient(problem, operation):
    _, k, v, _ = problem(21, 29, 4, 8, 4, h=4, n=2, dtype=jnp.float32)
    plain = api.IMPLEMENTATIONS[operation]["xla"]

    def opaque(k, v, **options):  # as a pallas_call, it has no gradient of its own
        return jax.lax.stop_gradient(plain(k, v, **options))

    kernel = api._with_gradient_of(plain, opaque)
    kw = dict(block_kv=8, group=2, kv_length=jnp.asarray([29, 11], jnp.int32))
    if operation == "block_covariance_norm":
        kw["statistics"] = api.IMPLEMENTATIONS["block_statistics"]["xla"](k, v, **kw)

    def total(run, k, v):
        leaves = jax.tree.leaves(run(k, v, **kw))
        return sum((x**2).sum() for x in leaves if jnp.issubdtype(x.dtype, jnp.floating))

    for ours, want in zip(
        *(
            jax.jit(jax.grad(functools.partial(total, run), (0, 1)))(k, v)
            for run in (kernel, plain)
        ),
        strict=True,
    ):
        # The same float32 program but for what XLA fuses into it.
        np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-4)
        assert float(jnp.abs(want).max()) > 0.01


def test_no_gradient_passes_the_masses(problem):
    q, k, _, _ = problem(21, 29, 4, 8, 4, h=4, n=2, dtype=jnp.float32)
    lse = jnp.zeros(q.shape[:3], jnp.float32)

    def total(q):
        return api.block_mass(q, k, lse, block_q=4, block_kv=8, top=2).mass.sum()

    assert (jax.grad(total)(q) == 0).all()
