"""SpargeAttn: its mask against the definition on every pair of tokens, and what comes of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax.attention import Attention, attend
from pasa_jax.grid import TokenGrid, gilbert_order
from pasa_jax.policies import Context, Sparge
from pasa_jax.policies import sparge as module

B, N, H, BLOCK_Q, BLOCK_KV = 2, 3, 8, 16, 8
GRID = TokenGrid(3, 5, 8, text=11)  # 8 query blocks, and 17 key blocks, the last two of them text's
TOKENS = GRID.num_tokens + GRID.text
LENGTH = jnp.asarray([TOKENS, 124], jnp.int32)  # prompt 1's last block is padding


def make(**fields):
    return Sparge(block_q=BLOCK_Q, block_kv=BLOCK_KV, **fields)


@pytest.fixture(scope="module")
def qkv():
    """Blocks of tokens about a mean of their own, some close to it and some not."""
    rng = np.random.default_rng(0)

    def blocks(block):
        shape = (B, -(-TOKENS // block), 1, N, H)
        mean = rng.standard_normal(shape) + 0.3
        spread = np.repeat(rng.choice([0.3, 1.0, 3.0], (*shape[:-1], 1)), block, 2)
        tokens = 2 * mean + spread * rng.standard_normal((*spread.shape[:-1], H))
        return jnp.asarray(tokens.reshape(B, -1, N, H)[:, :TOKENS], jnp.float32)

    v = rng.standard_normal((B, TOKENS, N, H))
    return blocks(BLOCK_Q), blocks(BLOCK_KV), jnp.asarray(v, jnp.float32)


def run_of(policy, grid=GRID):
    blocks = grid.num_blocks(BLOCK_KV)
    budget, bound = policy.budgets(1, blocks)[0], policy.max_budget(1, blocks)
    keys = jax.random.split(jax.random.key(0), 1)
    return Attention(policy, "sparse", jnp.int32(0), jnp.int32(budget), keys, bound)


@functools.partial(jax.jit, static_argnames=("policy", "grid"))
def blocks_of(policy, q, k, grid=GRID, kv_length=LENGTH):
    run = run_of(policy, grid)
    where = Context(
        run.step, jnp.int32(1), run.budget, run.keys, run.max_budget, "sparse", grid, kv_length
    )
    return policy.plan(q[:, : grid.num_tokens], k, k, where, ())[0].blocks


def planned(policy, q, k, **where):
    """bool [B, N, I, J]."""
    ids, count = map(np.asarray, blocks_of(policy, q, k, **where))
    mask = np.zeros((*ids.shape[:3], -(-k.shape[1] // BLOCK_KV)), bool)
    for row in np.ndindex(*count.shape):
        listed = ids[row][: count[row]]
        assert len(set(listed)) == len(listed)
        mask[row][listed] = True
    return mask


def pooled(x, block):
    """Means, and mean cosine of all pairs of tokens, of one head's valid tokens."""
    parts = [x[at : at + block] for at in range(0, len(x), block)]
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in parts]
    return np.stack([p.mean(0) for p in parts]), np.array([(u @ u.T).mean() for u in unit])


def defined(policy, q, k):
    """The mask of one head in float64: q [T, H] of the video, k [valid, H], text among them."""
    text = GRID.text_blocks(BLOCK_KV)[: -(-len(k) // BLOCK_KV)]
    query, query_like = pooled(q, BLOCK_Q)
    key, key_like = pooled(k - k.mean(0), BLOCK_KV)
    alike = key_like > policy.threshold
    score = np.where(alike, query @ key.T / np.sqrt(H), -np.inf)
    mask = np.zeros_like(score, bool)
    forced = text | (policy.sink & (np.arange(len(text)) == 0))
    for row, chosen in zip(score, mask, strict=True):
        if policy.cdf is None:
            number = int(policy.density * GRID.num_blocks(BLOCK_KV))
            chosen[np.argsort(-np.where(forced, np.inf, row), kind="stable")[:number]] = True
        else:
            weight = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
            order = np.argsort(-weight, kind="stable")
            number = (np.cumsum(weight[order]) <= policy.cdf).sum()
            chosen[order[: max(1, number)]] = True
    mask |= forced | ~alike
    mask[query_like <= policy.threshold] = True
    return mask


CASES = [
    make(density=0.4),
    make(density=0.3, similarity=0.5, sink=True),
    make(cdf=0.98),
    make(cdf=0.8, similarity=0.4, sink=True),
    make(cdf=0.0, similarity=-1.0),
]


@pytest.mark.parametrize("policy", CASES)
def test_the_mask_is_the_definition(policy, qkv):
    q, k, _ = qkv
    mask = planned(policy, q, k)
    for b, n in np.ndindex(B, N):
        query, key = (np.asarray(x, np.float64)[b, :, n] for x in (q, k))
        want = defined(policy, query[: GRID.num_tokens], key[: LENGTH[b]])
        assert want.shape[1] == (17, 16)[b] and not want.all()
        # Of 17 scores in a row none are close enough for float32 to turn them.
        assert (mask[b, n, :, : want.shape[1]] == want).all()
        assert not mask[b, n, :, want.shape[1] :].any()


def test_the_density_is_kept_where_all_blocks_are_alike(qkv):
    mask = planned(make(density=0.4), *qkv[:2])
    assert (mask.sum(-1) == 6).all() and mask[:, :, :, 15].all()
    # Of equal scores the first are taken, and no more; text comes first.
    mask = planned(make(density=0.4), 0 * qkv[0], qkv[1])
    assert (mask[0] == np.isin(np.arange(17), [0, 1, 2, 3, 15, 16])).all()
    # Text alone fills lists that are shorter than it.
    mask = planned(make(density=0.01), *qkv[:2])
    assert (mask[0] == np.isin(np.arange(17), [15, 16])).all()


@pytest.mark.parametrize("fields", [{"similarity": 1.0}, {"cdf": 1.0}, {"density": 1.0}])
def test_nothing_alike_or_nothing_dropped_is_dense(fields, qkv):
    mask = planned(make(**fields), *qkv[:2])
    assert mask[0].all() and mask[1, :, :, :16].all()


def test_blocks_of_one_token_repeated_are_alike_and_zeros_are_not(qkv):
    video = dataclasses.replace(GRID, text=0)
    q, k = (np.array(x[:, : video.num_tokens]) for x in qkv[:2])
    for x, block in ((q, BLOCK_Q), (k, BLOCK_KV)):
        x[:] = x[:, np.arange(x.shape[1]) // block * block]
    same = {"grid": video, "kv_length": None}
    policy = make(density=0.2, similarity=0.999)
    assert (planned(policy, *map(jnp.asarray, (q, k)), **same).sum(-1) == 3).all()
    q[0, :BLOCK_Q, 0] = 0
    mask = planned(policy, *map(jnp.asarray, (q, k)), **same)
    assert mask[0, 0, 0].all() and (mask.sum(-1) == 3).sum() == mask[..., 0].size - 1


def test_what_all_keys_share_plays_no_part(qkv):
    q, k, _ = qkv
    policy = make(cdf=0.9, similarity=0.4)
    shifted = k + jnp.linspace(-4, 4, H).reshape(1, 1, 1, H)
    assert (planned(policy, q, shifted) == planned(policy, q, k)).all()


def test_heads_in_turn_are_planned_alike(qkv, monkeypatch):
    policy = make(cdf=0.9)
    want = planned(policy, *qkv[:2])
    monkeypatch.setattr(module, "_MAX_SCORES", 1)
    blocks_of.clear_cache()
    assert (planned(policy, *qkv[:2]) == want).all()


def test_attention_is_the_masked_softmax(qkv):
    policy = make(cdf=0.9)
    q, k, v = qkv

    @jax.jit
    def attended(q, k, v):
        return attend(q, k, v, run_of(policy), layer=jnp.int32(1), grid=GRID, kv_length=LENGTH)

    out, record = attended(q, k, v)
    mask = planned(policy, q, k)
    sees = mask.repeat(BLOCK_Q, 2)[:, :, : GRID.num_tokens].repeat(BLOCK_KV, 3)[..., :TOKENS]
    sees = np.pad(sees, ((0, 0), (0, 0), (0, GRID.text), (0, 0)), constant_values=True)
    sees &= (np.arange(TOKENS) < np.asarray(LENGTH)[:, None])[:, None, None]
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    score = np.where(sees, np.einsum("btnh,bsnh->bnts", q, k) * H**-0.5, -np.inf)
    weight = np.exp(score - score.max(-1, keepdims=True))
    want = np.einsum("bnts,bsnh->btnh", weight / weight.sum(-1, keepdims=True), v)
    # float32 logits of 8 products as large as 60.
    np.testing.assert_allclose(out, want, atol=1e-4)
    np.testing.assert_allclose(record.density, mask.mean(), rtol=1e-6)


def test_lists_are_as_long_as_they_can_fill():
    grid = TokenGrid(21, 45, 80)
    x = jax.ShapeDtypeStruct((2, grid.num_tokens, 40, 128), jnp.bfloat16)

    def shape(**fields):
        policy = Sparge(block_q=64, **fields)
        bound = policy.max_budget(50, 1182)
        keys = jax.random.split(jax.random.key(0), 1)
        where = Context(jnp.int32(9), jnp.int32(1), jnp.int32(1), keys, bound, "sparse", grid)
        return jax.eval_shape(lambda x: policy.plan(x, x, x, where, ())[0].blocks.ids, x).shape

    assert shape(density=0.15) == (2, 40, 1182, 177)
    assert shape(density=0.15, similarity=0.0) == shape(cdf=0.98) == (2, 40, 1182, 1182)


def test_fields_choose_order_budget_and_threshold():
    assert (Sparge().token_order(GRID) == gilbert_order(GRID)).all()
    assert Sparge(hilbert=False).token_order(GRID) is None
    assert Sparge(density=0.29).budgets(3, 100).tolist() == [29] * 3
    assert Sparge(cdf=0.9).budgets(3, 100).tolist() == [100] * 3
    assert [Sparge().threshold, Sparge(cdf=0.9).threshold] == [-0.1, 0.6]
    assert Sparge(cdf=0.9, similarity=0.0).threshold == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"density": 0.0}, r"density=0.0 must be in \(0, 1\]"),
        ({"cdf": 1.1}, r"cdf=1.1 must be in \[0, 1\]"),
        ({"similarity": -1.1}, r"similarity=-1.1 must be in \[-1, 1\]"),
        ({"similarity": float("nan")}, r"similarity=nan must be in \[-1, 1\]"),
    ],
)
def test_bad_fields_are_refused(fields, message, untyped):
    with pytest.raises(ValueError, match=message):
        Sparge(**fields)
