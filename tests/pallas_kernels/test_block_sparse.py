"""block_sparse_attention against the closed form, and the oracles of PISA and PASA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax.pallas_kernels import BlockIndex, api, num_blocks

# float32: sums of some hundred terms in another order than the reference's.
# bfloat16: both accumulate in float32, so they differ by one rounding of the output.
TOLERANCE = {"float32": 3e-6, "bfloat16": 2**-7, "float64": 1e-13}

CASES = [
    # t, s, block_q, block_kv, slots, group, order, dtype; group None: no tail
    pytest.param(53, 53, 8, 8, 4, 99, 0, "float32", id="T53-S53-one_group-order0"),
    pytest.param(53, 101, 8, 4, 9, 4, 1, "float32", id="T53-S101-blocks8x4-group4"),
    pytest.param(53, 101, 8, 4, 9, None, 1, "float32", id="T53-S101-blocks8x4-no_tail"),
    pytest.param(101, 47, 4, 16, 3, 1, 1, "float32", id="T101-S47-blocks4x16-group1"),
    pytest.param(101, 47, 4, 16, 3, None, 1, "bfloat16", id="T101-S47-no_tail-bfloat16"),
    pytest.param(29, 517, 8, 8, 11, 32, 1, "float32", id="T29-S517-last_group_one_block_of_5"),
    pytest.param(29, 517, 8, 8, 11, 32, 1, "bfloat16", id="T29-S517-bfloat16"),
    pytest.param(5, 3, 16, 16, 1, 32, 1, "float32", id="T5-S3-less_than_a_block"),
]


def distance(a, b):
    """Largest difference over the largest value of b."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.max(np.abs(a - b)) / np.max(np.abs(b))


def all_blocks(b, n, t, s, block_q, block_kv):
    """Every key block listed for every query block."""
    rows, columns = num_blocks(t, block_q), num_blocks(s, block_kv)
    ids = np.broadcast_to(np.arange(columns, dtype=np.int32), (b, n, rows, columns))
    return BlockIndex(jnp.asarray(ids), jnp.asarray(np.full((b, n, rows), columns, np.int32)))


def with_count(blocks, count):
    return BlockIndex(blocks.ids, jnp.asarray(np.full(blocks.count.shape, count, np.int32)))


@pytest.mark.parametrize(
    ("t", "s", "block_q", "block_kv", "slots", "group", "order", "dtype"), CASES
)
def test_equals_closed_form(
    pieces, truth, problem, t, s, block_q, block_kv, slots, group, order, dtype
):
    q, k, v, blocks = problem(t, s, block_q, block_kv, slots, dtype=dtype)
    kv_length = jnp.asarray([s, max(1, s // 2 + 1)], jnp.int32)
    kw = dict(block_q=block_q, block_kv=block_kv, order=order, kv_length=kv_length)
    kw |= dict(scale=0.3, return_lse=True)
    if group is not None:
        kw["tail"] = truth.block_statistics(
            k, v, block_kv=block_kv, group=group, kv_length=kv_length
        )
    out, lse = pieces.block_sparse_attention(q, k, v, blocks, **kw)
    want, want_lse = truth.block_sparse_attention(q, k, v, blocks, **kw)
    assert out.dtype == q.dtype and lse.dtype == jnp.float32
    assert distance(out, want) < TOLERANCE[dtype]
    assert np.array_equal(np.isneginf(lse), np.isneginf(want_lse))
    seen = ~np.isneginf(want_lse)
    assert distance(np.where(seen, lse, 0), np.where(seen, want_lse, 0)) < TOLERANCE["float32"]


def test_default_tiles_equal_closed_form(ops, truth, problem):
    q, k, v, blocks = problem(2 * 613, 1229, 64, 64, 7, b=1, n=1)
    tail = truth.block_statistics(k, v, block_kv=64, group=4)
    kw = dict(block_q=64, block_kv=64, tail=tail)
    out = ops.block_sparse_attention(q, k, v, blocks, **kw)
    want = truth.block_sparse_attention(q, k, v, blocks, **kw)
    assert distance(out, want) < TOLERANCE["float32"]
    assert np.array_equal(out, ops.block_sparse_attention(q, k, v, blocks, **kw)), (
        "a second run must be bit-equal"
    )


@pytest.mark.parametrize("t", [53, 5, 17], ids=["ragged", "T<b", "T=b+1"])
def test_all_blocks_is_dense(ops, truth, problem, t):
    q, k, v, _ = problem(t, t, 16, 16, 1)
    blocks = all_blocks(2, 3, t, t, 16, 16)
    want, want_lse = truth.dense_attention(q, k, v, return_lse=True)
    tail = truth.block_statistics(k, v, block_kv=16, group=2)
    for statistics in (None, tail):
        out, lse = ops.block_sparse_attention(
            q, k, v, blocks, block_q=16, block_kv=16, tail=statistics, return_lse=True
        )
        assert distance(out, want) < TOLERANCE["float32"]
        assert distance(lse, want_lse) < TOLERANCE["float32"]


def test_keys_constant_in_blocks_make_every_selection_dense(ops, truth, problem):
    q, k, v, blocks = problem(53, 53, 8, 8, 4)
    k = jnp.repeat(k[:, ::8], 8, axis=1)[:, :53]
    tail = ops.block_statistics(k, v, block_kv=8, group=4)
    # Means of equal keys are exact up to their rounding, times the sum of eight values.
    assert np.abs(tail.covariance).max() < 1e-4
    want = truth.dense_attention(q, k, v)
    for order in (0, 1):
        out = ops.block_sparse_attention(
            q, k, v, blocks, block_q=8, block_kv=8, tail=tail, order=order
        )
        assert distance(out, want) < TOLERANCE["float32"]


def test_block_sizes_that_divide_runs_of_equal_keys_agree(ops, truth, problem):
    q, k, v, _ = problem(48, 48, 16, 16, 1)
    k = jnp.repeat(k[:, ::16], 16, axis=1)
    want = truth.dense_attention(q, k, v)
    for block in (4, 16):
        tail = ops.block_statistics(k, v, block_kv=block, group=2)
        nothing = with_count(all_blocks(2, 3, 48, 48, 8, block), 0)
        out = ops.block_sparse_attention(q, k, v, nothing, block_q=8, block_kv=block, tail=tail)
        assert distance(out, want) < TOLERANCE["float32"]


@pytest.mark.parametrize("order", [0, 1])
def test_constant_values_give_that_constant(ops, problem, order):
    q, k, v, blocks = problem(53, 53, 8, 8, 4)
    v = jnp.broadcast_to(v[:, :1], v.shape)
    tail = ops.block_statistics(k, v, block_kv=8, group=4)
    out = ops.block_sparse_attention(q, k, v, blocks, block_q=8, block_kv=8, tail=tail, order=order)
    assert distance(out, v) < 1e-5  # the centred keys sum to their rounding, not to 0


def test_linear_in_values(ops, problem):
    q, k, v, blocks = problem(53, 53, 8, 8, 4)
    w = problem(53, 53, 8, 8, 4, seed=1)[2]

    def run(v):
        tail = ops.block_statistics(k, v, block_kv=8, group=4)
        return ops.block_sparse_attention(q, k, v, blocks, block_q=8, block_kv=8, tail=tail)

    assert distance(run(2 * v - w), 2 * run(v) - run(w)) < 1e-5  # three outputs' roundings


def test_invariant_to_order_in_blocks_and_to_a_shift_of_all_keys(ops, problem, x64):
    q, k, v, blocks = problem(48, 48, 8, 8, 4, dtype=jnp.float64)

    def run(k, v):
        tail = ops.block_statistics(k, v, block_kv=8, group=4)
        return ops.block_sparse_attention(q, k, v, blocks, block_q=8, block_kv=8, tail=tail)

    want = run(k, v)
    turn = [8 * (i // 8) + (3 * i + 1) % 8 for i in range(48)]
    assert distance(run(k[:, turn], v[:, turn]), want) < TOLERANCE["float64"]
    # Scores near ±200: without the running maximum, exp overflows or every weight is 0.
    for shift in (100.0, -100.0):
        assert distance(run(k + shift, v), want) < 1e-11  # 1e2 times the rounding of the scores


def worst_first(q, k, block):
    """The two key blocks that each query block's mean likes least."""
    b, t, n, h = q.shape
    mean = [x.reshape(b, t // block, block, n, h).mean(axis=2) for x in (q, k)]
    scores = jnp.einsum("binh,bjnh->bnij", *mean)
    ids = jnp.argsort(scores, axis=-1)[..., :2].astype(jnp.int32)
    return BlockIndex(ids, jnp.full(ids.shape[:3], 2, jnp.int32))


def naive_online(q, k, v, blocks, tail, block, rescale):
    """Exact blocks, then group by group; `rescale` lowers the tail's mass as the maximum rises."""
    q, k, v, ids = (np.asarray(x) for x in (q, k, v, blocks.ids))
    scale = q.shape[-1] ** -0.5
    out = np.empty_like(q)
    for b, t, n in np.ndindex(q.shape[:3]):
        row, listed = q[b, t, n] * scale, ids[b, n, t // block]
        exact = np.concatenate([np.arange(j * block, (j + 1) * block) for j in listed])
        scores = k[b, exact, n] @ row
        top = scores.max()
        mass, acc, tail_mass = 0.0, np.exp(scores - top) @ v[b, exact, n], 0.0
        mass = np.exp(scores - top).sum()
        for g in range(tail.covariance.shape[2]):
            members = np.arange(g * tail.group, min((g + 1) * tail.group, tail.length.shape[1]))
            live = np.setdiff1d(members, listed)
            if not live.size:
                continue
            scores = np.asarray(tail.key_mean)[b, n, live] @ row
            fade = np.exp(top - max(top, scores.max()))
            top = max(top, scores.max())
            weights = np.exp(scores - top)
            share = weights.sum() * block / (members.size * block)
            first = share * (row @ np.asarray(tail.covariance)[b, n, g])
            acc = acc * fade + weights @ np.asarray(tail.value_sum)[b, n, live] + first
            mass *= fade
            tail_mass = tail_mass * (fade if rescale else 1) + weights.sum() * block
        out[b, t, n] = acc / (mass + tail_mass)
    return out


@pytest.mark.parametrize("group", [1, 4])
def test_worst_first_selection_needs_the_rescaled_tail(pieces, truth, problem, x64, group):
    q, k, v, _ = problem(64, 64, 8, 8, 1, b=1, n=2, dtype=jnp.float64, spread=3)
    blocks = worst_first(q, k, 8)
    tail = truth.block_statistics(k, v, block_kv=8, group=group)
    want = truth.block_sparse_attention(q, k, v, blocks, block_q=8, block_kv=8, tail=tail)
    out = pieces.block_sparse_attention(q, k, v, blocks, block_q=8, block_kv=8, tail=tail)
    assert distance(out, want) < TOLERANCE["float64"]
    assert distance(naive_online(q, k, v, blocks, tail, 8, True), want) < TOLERANCE["float64"]
    unscaled = naive_online(q, k, v, blocks, tail, 8, False)
    assert distance(unscaled, want) > 0.1, "the case does not bite"


def expansion_error(ops, truth, q, k, v, blocks, group, order):
    tail = ops.block_statistics(k, v, block_kv=8, group=group)
    out = ops.block_sparse_attention(q, k, v, blocks, block_q=8, block_kv=8, tail=tail, order=order)
    return float(jnp.linalg.norm((out - truth.dense_attention(q, k, v)).reshape(-1)))


def test_order_of_the_error_in_small_logits(ops, truth, problem, x64):
    q, k, v, _ = problem(64, 64, 8, 8, 1, b=1, dtype=jnp.float64, spread=1)
    nothing = with_count(all_blocks(1, 3, 64, 64, 8, 8), 0)
    some = with_count(all_blocks(1, 3, 64, 64, 8, 8), 3)

    def ratio(blocks, group, order):
        errors = [
            expansion_error(ops, truth, q * s, k, v, blocks, group, order) for s in (2e-3, 1e-3)
        ]
        return errors[0] / errors[1]

    assert ratio(nothing, 1, 0) == pytest.approx(2, rel=0.02)
    assert ratio(nothing, 1, 1) == pytest.approx(4, rel=0.02)
    # Listed blocks leave the group's mean: the first order no longer cancels, but helps.
    assert ratio(some, 4, 1) == pytest.approx(2, rel=0.02)
    errors = [expansion_error(ops, truth, q * 1e-3, k, v, some, 4, order) for order in (0, 1)]
    assert errors[1] < 0.8 * errors[0]


def test_equal_block_matrices_make_the_group_size_irrelevant(ops, problem):
    q, k, v, blocks = problem(64, 64, 8, 8, 3, b=1)
    offset = jnp.repeat(k[:, ::8], 8, axis=1)
    k = jnp.tile(k[:, :8], (1, 8, 1, 1)) + offset
    v = jnp.tile(v[:, :8], (1, 8, 1, 1)) + offset  # H_j does not see a block's own offset
    outs = []
    for group in (1, 8):
        tail = ops.block_statistics(k, v, block_kv=8, group=group)
        outs.append(ops.block_sparse_attention(q, k, v, blocks, block_q=8, block_kv=8, tail=tail))
    assert distance(outs[0], outs[1]) < 1e-5  # roundings of two different sums
    zeroth = ops.block_sparse_attention(q, k, v, blocks, block_q=8, block_kv=8, tail=tail, order=0)
    assert distance(zeroth, outs[1]) > 1e-2, "without a first-order term the case does not bite"


def test_count_is_data(ops, truth, problem):
    q, k, v, blocks = problem(53, 101, 8, 8, 5)
    tail = ops.block_statistics(k, v, block_kv=8, group=4)
    traces = []

    @jax.jit
    def run(q, k, v, blocks):
        traces.append(1)
        return api.block_sparse_attention(q, k, v, blocks, block_q=8, block_kv=8, tail=tail)

    for count in (0, 1, 3, 5, 99):  # 99: every slot counts
        counted = with_count(blocks, count)
        want = truth.block_sparse_attention(q, k, v, counted, block_q=8, block_kv=8, tail=tail)
        assert distance(run(q, k, v, counted), want) < TOLERANCE["float32"]
    assert len(traces) == 1


def test_nothing_listed(ops, problem):
    q, k, v, blocks = problem(53, 53, 8, 8, 4)
    nothing = with_count(blocks, 0)
    out, lse = ops.block_sparse_attention(q, k, v, nothing, block_q=8, block_kv=8, return_lse=True)
    assert np.all(np.asarray(out) == 0) and np.all(np.isneginf(lse))


def test_scores_far_below_zero_beside_rows_that_list_nothing(ops, truth, problem):
    """Empty slots meet keys of zeros, whose score of 0 must not become the row's maximum."""
    q, k, v, blocks = problem(53, 53, 8, 8, 4)
    assert np.min(blocks.count) == 0 and np.max(blocks.count) == 4
    q, k = jnp.abs(q) + 1, k - 100.0  # scores from -500 down
    kw = dict(block_q=8, block_kv=8, return_lse=True)
    kw["tail"] = ops.block_statistics(k, v, block_kv=8, group=4)
    out, lse = ops.block_sparse_attention(q, k, v, blocks, **kw)
    want, want_lse = truth.block_sparse_attention(q, k, v, blocks, **kw)
    assert distance(out, want) < 1e-3  # scores of 1e3 carry roundings of 1e-4
    assert distance(lse, want_lse) < 1e-6


def test_batch_row_without_keys(ops, problem):
    q, k, v, blocks = problem(53, 53, 8, 8, 4)
    kv_length = jnp.asarray([0, 53], jnp.int32)
    k, v = (x.at[0].set(jnp.nan) for x in (k, v))
    tail = ops.block_statistics(k, v, block_kv=8, group=4, kv_length=kv_length)
    out, lse = ops.block_sparse_attention(
        q,
        k,
        v,
        with_count(blocks, 4),
        block_q=8,
        block_kv=8,
        tail=tail,
        kv_length=kv_length,
        return_lse=True,
    )
    assert np.all(np.asarray(out[0]) == 0) and np.all(np.isneginf(lse[0]))
    assert np.all(np.isfinite(out[1])) and np.all(np.isfinite(lse[1]))


@pytest.mark.parametrize("unused", [-1, 10**6, 5], ids=["minus_one", "out_of_range", "poisoned"])
def test_nan_in_dropped_blocks_stays_out(pieces, problem, unused):
    q, k, v, blocks = problem(53, 53, 8, 8, 4)
    ids = jnp.where(blocks.ids == 5, 0, blocks.ids)  # nobody lists block 5
    slot = jnp.arange(4, dtype=jnp.int32)[None, None, None, :]
    ids = jnp.where(slot < blocks.count[..., None], ids, unused)
    kw = dict(block_q=8, block_kv=8, kv_length=jnp.asarray([50, 44], jnp.int32))
    want = pieces.block_sparse_attention(q, k, v, BlockIndex(ids, blocks.count), **kw)
    dropped = (jnp.arange(53) // 8 == 5)[None, :] | (
        jnp.arange(53)[None, :] >= kw["kv_length"][:, None]
    )
    k, v = (jnp.where(dropped[:, :, None, None], jnp.nan, x) for x in (k, v))
    out = pieces.block_sparse_attention(q, k, v, BlockIndex(ids, blocks.count), **kw)
    assert np.array_equal(out, want)


@pytest.mark.parametrize("with_tail", [False, True])
def test_nan_in_a_query_reaches_its_row_alone(ops, problem, with_tail):
    q, k, v, blocks = problem(53, 53, 8, 8, 4)
    blocks = with_count(blocks, 3)
    tail = ops.block_statistics(k, v, block_kv=8, group=4) if with_tail else None
    q = q.at[1, 19, 2, 0].set(jnp.nan)
    out = ops.block_sparse_attention(q, k, v, blocks, block_q=8, block_kv=8, tail=tail)
    bad = np.zeros(out.shape, bool)
    bad[1, 19, 2] = True
    assert np.array_equal(np.isnan(out), bad)


def largest_intermediate(jaxpr):
    """Elements of the largest value any equation makes, inner programs included."""
    size = 0
    for equation in jaxpr.eqns:
        size = max([size] + [getattr(out.aval, "size", 0) for out in equation.outvars])
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                size = max(size, largest_intermediate(inner))
    return size


def test_no_intermediate_grows_with_tokens_squared():
    t, n, h, block = 16384, 2, 64, 64
    x = jax.ShapeDtypeStruct((1, t, n, h), jnp.float32)
    rows = jax.ShapeDtypeStruct((1, n, t // block), jnp.int32)
    ids = jax.ShapeDtypeStruct((*rows.shape, 38), jnp.int32)

    def sparse(q, k, v, ids, count):
        tail = api.block_statistics(k, v, block_kv=block, group=32)
        norm = api.block_covariance_norm(k, v, block_kv=block, group=32)
        blocks = BlockIndex(ids, count)
        out = api.block_sparse_attention(q, k, v, blocks, block_q=block, block_kv=block, tail=tail)
        return out, norm

    pair = jax.make_jaxpr(sparse)(x, x, x, ids, rows).jaxpr
    dense = jax.make_jaxpr(api.dense_attention)(x, x, x).jaxpr
    full = jax.make_jaxpr(jax.nn.dot_product_attention)(x, x, x).jaxpr
    # The operands themselves are the largest: T·N·H = 2 Mi elements; T·T would be 256 Mi.
    assert largest_intermediate(pair) == t * n * h
    assert largest_intermediate(dense) == t * n * h
    assert largest_intermediate(full) >= n * t * t, "the walk misses inner programs"
