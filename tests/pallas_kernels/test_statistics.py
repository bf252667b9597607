"""block_statistics and block_covariance_norm against the closed form."""

import jax.numpy as jnp
import numpy as np
import pytest

TOLERANCE = 1e-5  # float32 sums of up to 101 products in another order, relative to the largest

CASES = [
    pytest.param(101, 8, 4, "float32", id="S101-group4"),
    pytest.param(101, 4, 1, "float32", id="S101-group1"),
    pytest.param(517, 8, 32, "bfloat16", id="S517-last_group_one_block_of_5-bfloat16"),
    pytest.param(47, 16, 99, "float32", id="S47-one_group"),
    pytest.param(5, 16, 2, "float32", id="S5-less_than_a_block"),
]


def close(a, b, size=None):
    """Whether a and b agree relative to `size`, by default the largest of b."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    assert a.shape == b.shape
    assert np.max(np.abs(a - b)) <= TOLERANCE * np.max(np.abs(b if size is None else size))


@pytest.mark.parametrize(("s", "block_kv", "group", "dtype"), CASES)
def test_equals_closed_form(pieces, truth, problem, s, block_kv, group, dtype):
    _, k, v, _ = problem(s, s, block_kv, block_kv, 1, dtype=dtype)
    kv_length = jnp.asarray([s, s // 2], jnp.int32)
    beyond = jnp.arange(s)[None, :] >= kv_length[:, None]
    kw = dict(block_kv=block_kv, group=group, kv_length=kv_length)
    want = truth.block_statistics(k, v, **kw)
    want_norm = truth.block_covariance_norm(k, v, **kw)
    k, v = (jnp.where(beyond[:, :, None, None], jnp.nan, x) for x in (k, v))
    got = pieces.block_statistics(k, v, **kw)
    norm = pieces.block_covariance_norm(k, v, **kw)
    assert got.group == want.group and norm.dtype == jnp.float32
    assert all(x.dtype == jnp.float32 for x in (got.key_mean, got.value_sum, got.covariance))
    assert np.array_equal(got.length, want.length)
    for name in ("key_mean", "value_sum", "covariance"):
        close(getattr(got, name), getattr(want, name))
    close(norm, want_norm, size=want.covariance)  # it may be 0: one block is its group's mean
    again = pieces.block_covariance_norm(k, v, **kw, statistics=got)
    close(again, want_norm, size=want.covariance)


def test_by_hand(ops):
    """Two blocks of two tokens; the second holds one valid token."""
    k = jnp.asarray([1.0, 3.0, 5.0, 7.0]).reshape(1, 4, 1, 1)
    v = jnp.asarray([10.0, 20.0, 30.0, 40.0]).reshape(1, 4, 1, 1)
    kw = dict(block_kv=2, group=2, kv_length=jnp.asarray([3], jnp.int32))
    statistics = ops.block_statistics(k, v, **kw)
    assert np.asarray(statistics.key_mean).ravel().tolist() == [2, 5]
    assert np.asarray(statistics.value_sum).ravel().tolist() == [30, 30]
    assert np.asarray(statistics.length).ravel().tolist() == [2, 1]
    # H_0 = −1·10 + 1·20 = 10; H_1 = 0·30.
    assert np.asarray(statistics.covariance).ravel().tolist() == [10]
    # Means for blocks of 2 and 1 tokens: 2/3·10 and 1/3·10.
    norm = np.asarray(ops.block_covariance_norm(k, v, **kw)).ravel()
    assert norm == pytest.approx([10 / 3, 10 / 3], rel=1e-6)


def test_statistics_of_groups_serve_the_global_norm(ops, truth, problem):
    _, k, v, _ = problem(101, 101, 8, 8, 1)
    statistics = ops.block_statistics(k, v, block_kv=8, group=4)
    norm = ops.block_covariance_norm(k, v, block_kv=8, group=99, statistics=statistics)
    close(norm, truth.block_covariance_norm(k, v, block_kv=8, group=99))


@pytest.mark.parametrize("group", [4, 8])
def test_norm_vanishes_where_all_blocks_agree(ops, problem, group):
    _, k, v, _ = problem(64, 64, 8, 8, 1)
    k, v = (jnp.tile(x[:, :8], (1, 8, 1, 1)) for x in (k, v))
    norm = ops.block_covariance_norm(k, v, block_kv=8, group=group)
    size = ops.block_covariance_norm(k, v.at[:, :8].set(0), block_kv=8, group=group)
    assert np.max(norm) < 1e-6 * np.max(size)


def test_group_means_are_never_farther_than_the_global_one(ops, problem):
    """The law of total variance: why grouping can only tighten the bound (pasa.md 6)."""
    _, k, v, _ = problem(96, 96, 8, 8, 1)
    by_group, overall = (
        np.asarray(ops.block_covariance_norm(k, v, block_kv=8, group=group)) for group in (3, 99)
    )
    assert np.all((by_group**2).sum(-1) < (overall**2).sum(-1))


def test_groups_add_up(ops, problem):
    _, k, v, _ = problem(101, 101, 8, 8, 1)
    one = ops.block_statistics(k, v, block_kv=8, group=99).covariance
    many = ops.block_statistics(k, v, block_kv=8, group=4).covariance
    close(many.sum(axis=2, keepdims=True), one)
