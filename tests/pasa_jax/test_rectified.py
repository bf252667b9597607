"""Rectified SpaAttn: the plan against the published order of operations, and what follows from it.

`published` follows the specification in float64: softmax first, then the reallocation of the
isolated text, then a full sort. The policy takes logits with log-multiplicities and a threshold.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax.attention import Attention, attend
from pasa_jax.grid import TokenGrid, gilbert_order
from pasa_jax.pallas_kernels import api
from pasa_jax.policies import Context, rectified
from pasa_jax.policies.rectified import Rectified

B, N, H, BLOCK = 2, 2, 8, 8
VIDEO = TokenGrid(3, 5, 6)  # 90 tokens: 12 blocks, the last of 2
TEXT = dataclasses.replace(
    VIDEO, text=18
)  # block 11 holds 2 of video and 6 of text, 12 and 13 text
VALID = (108, 99)  # of prompt 1 block 12 holds 3 tokens, and block 13 none
# 3 blocks of 12 by weight.
POLICY = Rectified(block_q=BLOCK, block_kv=BLOCK, dense_layers=(), p_remain=0.4)
ALONE = dataclasses.replace(POLICY, neighbours=False)


def qkv(grid, own=1.0, seed=0):
    """Tokens that are their block's, plus noise of the size `own`."""
    rng = np.random.default_rng(seed)
    tokens = grid.num_tokens + grid.text
    block = rng.standard_normal((3, B, -(-tokens // BLOCK), N, H)).repeat(BLOCK, 2)[:, :, :tokens]
    x = block * (own < 1) + own * rng.standard_normal(block.shape)
    return [jnp.asarray(one, jnp.float32) for one in x]


def run_of(policy, grid, budget=None, bound=None):
    """The policy at a sparse step, and the rest of an attention call."""
    own = policy.max_budget(10, grid.num_blocks(policy.block_kv))
    keys = jax.random.split(jax.random.key(0), 1)
    length = jnp.asarray(VALID, jnp.int32) if grid.text else None
    budget = jnp.int32(budget or own)
    return Attention(policy, "sparse", jnp.int32(5), budget, keys, bound or own), length


@functools.partial(jax.jit, static_argnames="grid")
def attended(q, k, v, run, length, *, grid):
    return attend(q, k, v, run, layer=jnp.int32(3), grid=grid, kv_length=length)[0]


def output(grid, q, k, v, budget=3):
    """`ALONE`'s output; the budget is data, so that there is one compilation a grid."""
    run, length = run_of(ALONE, grid, budget, grid.num_blocks(BLOCK))
    return np.asarray(attended(q, k, v, run, length, grid=grid))


@functools.partial(jax.jit, static_argnames=("policy", "grid"))
def compiled(policy, grid, q, k, v):
    run, length = run_of(policy, grid)
    where = Context(
        run.step, jnp.int32(3), run.budget, run.keys, run.max_budget, "sparse", grid, length
    )
    return policy.plan(q[:, : grid.num_tokens], k, v, where, ())[0]


def planned(policy, grid, q, k, v):
    """The plan's mask [B, N, I, J] of exact blocks, its shares and its compensations."""
    plan = compiled(policy, grid, q, k, v)
    blocks = grid.num_blocks(policy.block_kv)
    api.check_lists(plan.blocks, blocks)
    mask = np.zeros((*plan.blocks.count.shape, blocks), bool)
    for row in np.ndindex(plan.blocks.count.shape):
        mask[row][plan.blocks.ids[row][: plan.blocks.count[row]]] = True
    return mask, *map(np.asarray, plan.rectification)


@functools.cache
def dense(grid, own=1.0, seed=0):
    length = run_of(POLICY, grid)[1]
    return np.asarray(jax.jit(api.dense_attention)(*qkv(grid, own, seed), kv_length=length))


def touching(grid):
    """bool [12, 12]: blocks of the curve with tokens at most one frame, row and column apart."""
    path = np.stack(np.unravel_index(gilbert_order(grid), grid.sizes), 1)
    near = (np.abs(path[:, None] - path[None]).max(-1) <= 1).astype(int)
    starts = np.arange(0, grid.num_tokens, BLOCK)
    return np.add.reduceat(np.add.reduceat(near, starts, 0), starts, 1) > 0


def published(policy, grid, q, k, v):
    """Mask, share and compensation of one head in float64; q and v video, k valid keys."""
    video = grid.num_tokens
    starts = range(0, video, BLOCK)
    parts = [[x[:video][s : s + BLOCK] for s in starts] for x in (q, k, v)]
    qm, km, vm = (np.stack([part.mean(0) for part in one]) for one in parts)
    qd, kd = (np.stack([np.abs(part - part.mean(0)).mean(0) for part in one]) for one in parts[:2])
    g = qm @ km.T
    p = np.exp(np.concatenate([g, qm @ k[video:].T], 1) * H**-0.5)
    p /= p.sum(1, keepdims=True)
    p = np.concatenate([p[:, :12] * [len(part) for part in parts[1]], p[:, 12:]], 1)
    p = np.concatenate([p[:, :12], p[:, 12:].sum(1, keepdims=True)], 1)  # text in one column
    p /= p.sum(1, keepdims=True)
    passes = {
        "signed": np.abs(g) > np.abs(qd @ km.T) + np.abs(qm @ kd.T),
        "bound": np.abs(g) > qd @ np.abs(km).T + np.abs(qm) @ kd.T,
        "none": np.full_like(g, True, bool),
    }[policy.test]
    exact = np.zeros((12, 13), bool)
    for row, columns in enumerate(np.argsort(-p[:, : 12 + (grid.text > 0)], axis=1)):
        cumulative = np.cumsum(p[row, columns])
        number = max((cumulative <= policy.p_remain).sum() + 1, int(policy.density * 12))
        exact[row, columns[:number]] = True
    exact[:, :12] |= touching(grid) & policy.neighbours
    if grid.text:
        exact[:, 11] = True
    else:
        exact[:4, :4] = True  # 12 blocks of 3 frames
    exact[:, 12] = True
    held = exact[:, :12] | ~passes
    credited = np.c_[held if policy.credit == "kept" else exact[:, :12], exact[:, 12]]
    return exact[:, :12], (p * credited).sum(1), np.where(held, 0, p[:, :12]) @ vm


both = pytest.mark.parametrize("grid", [VIDEO, TEXT], ids=["video", "text"])
LITERAL = dataclasses.replace(POLICY, test="bound", credit="literal")
TRUSTING = dataclasses.replace(ALONE, test="none")
POLICIES = {"default": POLICY, "literal": LITERAL, "trusting": TRUSTING, "alone": ALONE}


@both
@pytest.mark.parametrize("name", POLICIES)
def test_the_plan_is_the_published_one(grid, name):
    policy = POLICIES[name]
    q, k, v = qkv(grid, 0.7)
    mask, share, compensation = planned(policy, grid, q, k, v)
    for b, n in np.ndindex(B, N):
        valid = VALID[b] if grid.text else None
        one = [np.asarray(x, np.float64)[b, :valid, n] for x in (q, k, v)]
        exact, want_share, want_compensation = published(policy, grid, *one)
        np.testing.assert_array_equal(mask[b, n, :, :12], exact)
        # float32 sums of 13 weights, and of them times values up to 4.
        np.testing.assert_allclose(share[b, n], want_share, atol=2e-6)
        np.testing.assert_allclose(compensation[b, n], want_compensation, atol=1e-5)
    if grid.text:  # what holds text, to the valid end
        assert mask[:, :, :, 12].all() and mask[0, :, :, 13].all() and not mask[1, :, :, 13].any()


@both
def test_all_blocks_exact_is_dense(grid):
    out = output(grid, *qkv(grid), budget=grid.num_blocks(BLOCK))
    np.testing.assert_allclose(out, dense(grid), atol=3e-6)  # float32, 108 keys in another order


def test_the_texts_column_takes_no_block_from_a_full_budget():
    grid = dataclasses.replace(VIDEO, text=5)  # in the last of 12 blocks, hence a 13th column
    policy = dataclasses.replace(ALONE, density=1.0, p_remain=0.0)
    q, k, v = qkv(grid)
    assert planned(policy, grid, 20 * q, k, v)[0].all()


def test_a_weight_of_one_takes_all_blocks_for_any_size_of_query_blocks():
    policy = dataclasses.replace(POLICY, block_q=2 * BLOCK, p_remain=1.0)
    mask, share, compensation = planned(policy, VIDEO, *qkv(VIDEO))
    assert mask.shape == (B, N, 6, 12) and mask.all() and not compensation.any()
    np.testing.assert_allclose(share, 1, atol=1e-6)


@both
def test_queries_and_keys_constant_in_blocks_are_exact_for_any_selection(grid):
    # Columns of 8 tokens, a ragged one of 2 and the text weigh as many tokens as they stand for.
    q, k, _ = qkv(grid, own=0)
    _, texts, v = qkv(grid)
    k = k.at[:, 90:].set(texts[:, 90:])
    assert (planned(ALONE, grid, q, k, v)[1] < 0.9).any()
    exact = api.dense_attention(q, k, v, kv_length=run_of(ALONE, grid)[1])
    np.testing.assert_allclose(output(grid, q, k, v), exact, atol=5e-6)


def test_where_no_pair_passes_attention_is_plainly_sparse():
    q, k, v = qkv(VIDEO)
    q = q.at[:, 1::2].set(-q[:, ::2])  # means of 0
    plan = compiled(ALONE, VIDEO, q, k, v)
    np.testing.assert_allclose(plan.rectification.share, 1, atol=1e-6)
    plain = api.block_sparse_attention(q, k, v, plan.blocks, block_q=BLOCK, block_kv=BLOCK)
    np.testing.assert_allclose(output(VIDEO, q, k, v), plain, atol=3e-6)
    assert np.abs(plain - api.dense_attention(q, k, v)).max() > 0.1


@both
def test_weights_sum_to_one_unless_credit_is_literal(grid):
    q, k, v = qkv(grid, 0.7)
    _, share, compensation = planned(ALONE, grid, q, k, jnp.ones_like(v))
    assert share.min() > 0 and share.max() < 1 + 1e-6 and compensation.max() > 0.05
    np.testing.assert_allclose(share + compensation[..., 0], 1, atol=2e-6)
    _, share, compensation = planned(LITERAL, grid, q, k, jnp.ones_like(v))
    assert (share + compensation[..., 0]).min() < 0.9


def test_blocks_of_one_token_are_exact_for_any_selection():
    grid = TokenGrid(2, 3, 4, text=3)
    policy = dataclasses.replace(ALONE, block_q=1, block_kv=1, density=0.1, p_remain=0.0)
    q, k, v = qkv(grid)
    out = attended(q, k, v, run_of(policy, grid)[0], None, grid=grid)
    np.testing.assert_allclose(out, api.dense_attention(q, k, v), atol=5e-6)


def test_a_shift_of_all_keys_moves_the_test_of_pairs():
    # Softmax does not see the shift; the published test does.
    q, k, v = qkv(VIDEO, 0.7)
    np.testing.assert_allclose(api.dense_attention(q, k + 1, v), dense(VIDEO, 0.7), atol=1e-5)
    share, moved = (planned(ALONE, VIDEO, q, keys, v)[1] for keys in (k, k + 1))
    assert np.abs(share - moved).max() > 0.1
    share, moved = (planned(TRUSTING, VIDEO, q, keys, v)[1] for keys in (k, k + 1))
    np.testing.assert_allclose(share, moved, atol=1e-5)


def test_text_runs_dense_and_its_padding_is_never_read():
    q, k, v = qkv(TEXT)
    clean = output(TEXT, q, k, v)
    # The same kernel on fewer queries, which sums float32 in another order.
    np.testing.assert_allclose(clean[:, 90:], dense(TEXT)[:, 90:], atol=1e-6)
    poisoned = (x.at[1, VALID[1] :].set(jnp.nan) for x in (k, v))
    np.testing.assert_array_equal(output(TEXT, q, *poisoned)[:, :90], clean[:, :90])


def test_more_blocks_come_nearer_to_dense():
    x = qkv(VIDEO, 0.3)
    errors = [
        np.linalg.norm(output(VIDEO, *x, budget=budget) - dense(VIDEO, 0.3))
        for budget in (3, 6, 9, 12)
    ]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.1


def test_of_equal_weights_the_first_are_taken_and_no_more():
    q, k, v = qkv(VIDEO)
    mask, *_ = planned(ALONE, VIDEO, 0 * q, k, v)
    want = np.zeros((12, 12), bool)
    want[:, :5] = True  # 4 blocks hold 32 of 90 tokens, below p_remain; the corner is inside
    np.testing.assert_array_equal(mask, np.broadcast_to(want, mask.shape))


def test_heads_and_blocks_in_turn_plan_as_all_at_once(monkeypatch):
    grid = TokenGrid(2, 4, 5, text=3)  # 5 blocks of video
    x = qkv(grid)
    together = planned(POLICY, grid, *x)
    monkeypatch.setattr(rectified, "_MAX_SCORES", 1)
    monkeypatch.setattr(rectified, "_MAX_POOLED", 700)  # 2 parts of 3 blocks
    again = dataclasses.replace(POLICY, density=0.26)  # another trace of the same budget
    for one, other in zip(together, planned(again, grid, *x), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)  # float32 sums in another order


def test_bfloat16_is_pooled_in_float32():
    x = [one.astype(jnp.bfloat16) for one in qkv(VIDEO)]
    narrow, wide = (planned(POLICY, VIDEO, *one) for one in (x, [y.astype(jnp.float32) for y in x]))
    for one, other in zip(narrow, wide, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_tokens_follow_the_curve():
    assert POLICY.token_order(VIDEO) is gilbert_order(VIDEO)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"density": 0.0}, r"density=0.0 must be in \(0, 1\]"),
        ({"p_remain": 1.5}, r"p_remain=1.5 must be in \[0, 1\]"),
        ({"test": "sure"}, r"test='sure' must be one of \('signed', 'bound', 'none'\)"),
        ({"credit": "all"}, r"credit='all' must be one of \('kept', 'literal'\)"),
        ({"block_q": 0}, "block_q=0 must be at least 1 token"),
    ],
)
def test_bad_fields_are_refused(fields, message, untyped):
    with pytest.raises(ValueError, match=message):
        Rectified(**fields)


def test_the_grid_is_needed():
    run, _ = run_of(POLICY, VIDEO)
    with pytest.raises(ValueError, match="grid=None must be a TokenGrid: Rectified works on"):
        attend(*qkv(VIDEO), run, layer=jnp.int32(1))
