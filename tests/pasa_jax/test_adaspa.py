"""AdaSpa against a plain NumPy search, and its schedule, state and invariances."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax.attention import Attention, attend
from pasa_jax.grid import TokenGrid
from pasa_jax.pallas_kernels import api
from pasa_jax.policies import AdaSpa, AttentionShape
from pasa_jax.policies.adaspa import head_tiers

B, N, H, BLOCK = 2, 5, 8, 8
GRID = TokenGrid(2, 5, 11, text=10)  # 13 blocks of video, one of both, one of text
S, VIDEO, ROWS = 120, 13, 14
POLICY = AdaSpa(density=0.3, block_q=BLOCK, block_kv=BLOCK)  # 2, 4 or 6 blocks of video
SHARPNESS = np.asarray([0.2, 1.0, 2.0, 9.0, 12.0]).reshape(
    1, 1, N, 1
)  # recalls on both sides of 0.8


def qkv(seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((B, S, N, H)) for _ in range(3))
    return [jnp.asarray(x, jnp.float32) for x in (q * SHARPNESS, k, v)]


def start(policy, grid=GRID):
    state = policy.init_state(AttentionShape(3, B, N, H, grid))
    return jax.tree.map(lambda x: x[0], state)


@functools.partial(jax.jit, static_argnames=("policy", "mode", "grid"))
def step(q, k, v, state, policy=POLICY, mode="sparse", grid=GRID, kv_length=None):
    keys = jax.random.split(jax.random.key(0), 1)
    run = Attention(policy, mode, jnp.int32(0), jnp.int32(1), keys, 1)
    where = dict(layer=jnp.int32(1), state=state, grid=grid, kv_length=kv_length)
    return attend(q, k, v, run, **where)


def searched(q, k, v, policy=POLICY, grid=GRID, **where):
    return step(q, k, v, start(policy, grid), policy, "search", grid, **where)[1].state


def masks(state):
    """bool [B, N, I, J], from the lists' first entries."""
    ids, count = np.asarray(state.ids, int), np.asarray(state.count)
    mask = np.zeros((*ids.shape[:3], S // BLOCK), bool)
    for b, n, i in np.ndindex(ids.shape[:3]):
        listed = ids[b, n, i, : count[b, n, i]]
        assert len(set(listed)) == len(listed)
        mask[b, n, i, listed] = True
    return mask


def counts(state):
    """[B, N]: all rows of a head keep as many."""
    count = np.asarray(state.count)
    assert (count == count[..., :1]).all()
    return count[..., 0]


def logits(q, k):
    q, k = (np.asarray(x, np.float64) for x in (q[:, : GRID.num_tokens], k))
    return np.einsum("btnh,bsnh->bnts", q, k) * H**-0.5


def block_masses(q, k, lse):
    """W [B, N, I, J] in float64, by its definition."""
    weights = np.exp(logits(q, k) - np.moveaxis(np.asarray(lse, np.float64), 1, 2)[..., None])
    rows = np.add.reduceat(weights, np.arange(0, GRID.num_tokens, BLOCK), axis=2)
    return np.add.reduceat(rows, np.arange(0, S, BLOCK), axis=3)


def best_masks(mass, kept):
    """Text's blocks, and in each row the `kept` heaviest of the video's, by head [B, N]."""
    order = np.argsort(-mass[..., :VIDEO], axis=-1, kind="stable")
    rank = np.argsort(order, axis=-1)
    mask = np.ones(mass.shape, bool)
    mask[..., :VIDEO] = rank < kept[..., None, None]
    return mask


def tier_sizes(mass):
    """Video blocks each head keeps [B, N], from the recall of 4."""
    recall = (mass * best_masks(mass, np.full((B, N), 4))).sum((2, 3)) / mass.sum((2, 3))
    outer = np.minimum((recall > 0.8).sum(1, keepdims=True), N // 2)
    rank = np.argsort(np.argsort(-recall, axis=1, kind="stable"), axis=1)
    return np.where(rank < outer, 2, np.where(rank >= N - outer, 6, 4))


def masked_attention(q, k, v, mask):
    """The video's queries under a mask of blocks, in float64."""
    keep = mask.repeat(BLOCK, axis=2)[:, :, : GRID.num_tokens].repeat(BLOCK, axis=3)
    scores = np.where(keep, logits(q, k), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bnts,bsnh->btnh", weights, np.asarray(v, np.float64))


def lse_of(q, k):
    return np.moveaxis(np.logaddexp.reduce(logits(q, k), axis=-1), 1, 2)


@pytest.fixture(scope="module")
def fresh():
    q, k, v = qkv()
    return q, k, v, searched(q, k, v)


def test_the_search_step_is_dense_and_keeps_its_log_sum_exp(fresh):
    q, k, v, state = fresh
    out, record = step(q, k, v, start(POLICY), mode="search")
    # Not bit for bit: with the log-sum-exp kept, XLA fuses the same float32 sums otherwise.
    np.testing.assert_allclose(out, jax.jit(api.dense_attention)(q, k, v), atol=2e-6)
    assert float(record.density) == 1 and state.lse.dtype == jnp.float32
    np.testing.assert_allclose(state.lse, lse_of(q, k), rtol=1e-5, atol=1e-5)  # float32 sums


def test_lists_hold_text_and_the_heaviest_blocks_of_each_tier(fresh):
    q, k, v, state = fresh
    mass = block_masses(q, k, state.lse)
    kept = tier_sizes(mass)
    assert set(kept.ravel()) == {2, 4, 6}
    np.testing.assert_array_equal(counts(state), kept + 2)
    np.testing.assert_array_equal(masks(state), best_masks(mass, kept))
    assert state.ids.dtype == jnp.int16 and state.ids.shape == (B, N, ROWS, 8)
    record = step(q, k, v, state)[1]
    np.testing.assert_allclose(record.density, (kept + 2).mean() / 15, rtol=1e-6)


def test_no_other_mask_of_as_many_blocks_keeps_more_mass(fresh):
    q, k, _, state = fresh
    mass, mask = block_masses(q, k, state.lse)[..., :VIDEO], masks(state)[..., :VIDEO]
    rng = np.random.default_rng(1)
    for _ in range(50):
        other = rng.permuted(mask, axis=-1)
        assert ((mass * other).sum(-1) <= (mass * mask).sum(-1) * (1 + 1e-6)).all()


def test_sparse_steps_attend_by_the_cached_lists(fresh):
    q, k, v, state = fresh
    q, k, v = qkv(1)
    out, record = step(q, k, v, state)
    jax.tree.map(np.testing.assert_array_equal, record.state, state)
    want = masked_attention(q, k, v, masks(state))
    np.testing.assert_allclose(out[:, : GRID.num_tokens], want, atol=2e-5)  # float32, logits to 40
    dense = api.dense_attention(q, k, v)
    text = slice(GRID.num_tokens, None)
    np.testing.assert_allclose(out[:, text], dense[:, text], atol=2e-6)


def test_what_a_list_leaves_out_does_not_reach_its_output(fresh):
    q, k, v, state = fresh
    row, args = 5, (state, POLICY)
    queries = slice(row * BLOCK, (row + 1) * BLOCK)
    # By head: what one query block takes, others leave out.
    out = np.moveaxis(~masks(state)[:, :, row], 1, 2).repeat(BLOCK, axis=1)[..., None]
    assert out.any(1).all()
    for bad in (jnp.nan, 1e30):
        dirty = (jnp.where(out, bad, x) for x in (k, v))
        got = step(q, *dirty, *args)[0][:, queries]
        np.testing.assert_array_equal(got, step(q, k, v, *args)[0][:, queries])


def global_masks(mass, kept):
    """Text's blocks, every row's heaviest of the video's, and of the rest the head's heaviest."""
    mass = mass[..., :VIDEO].copy()
    np.put_along_axis(mass, mass.argmax(-1)[..., None], np.inf, axis=-1)
    rank = np.argsort(np.argsort(-mass.reshape(B, N, -1), axis=-1, kind="stable"), axis=-1)
    video = (rank < ROWS * kept[..., None]).reshape(mass.shape)
    return np.pad(video, ((0, 0),) * 3 + ((0, 2),), constant_values=True)


def test_global_lists_are_the_heaviest_of_a_head(fresh):
    q, k, v, row_wise = fresh
    policy = AdaSpa(density=0.3, top_k="global", block_q=BLOCK, block_kv=BLOCK)
    length = jnp.asarray([S, 72], jnp.int32)  # the second row's last 4 blocks of video are padding
    state = searched(q, k, v, policy, kv_length=length)
    mass, mask = block_masses(q, k, state.lse), masks(state)
    middle = (mass * global_masks(mass, np.full((B, N), 4))).sum((2, 3)) / mass.sum((2, 3))
    outer = np.minimum((middle[0] > 0.8).sum(), N // 2)
    rank = np.argsort(np.argsort(-middle[0], kind="stable"))
    kept = np.where(rank < outer, 2, np.where(rank >= N - outer, 6, 4))
    assert outer == 2
    np.testing.assert_array_equal(mask[0], global_masks(mass, np.stack([kept] * 2))[0])
    # As many blocks as row by row, more mass, and rows differ.
    assert mask[0].sum((1, 2)).tolist() == [ROWS * (n + 2) for n in kept]
    same = kept == counts(row_wise)[0] - 2
    gain = (mass * mask).sum((2, 3)) / (mass * masks(row_wise)).sum((2, 3))
    assert same.any() and (gain[0][same] > 1).all()
    assert np.ptp(mask[0].sum(-1), axis=-1).min() > 0 and mask[0, ..., :VIDEO].any(-1).all()
    assert not mask[1, ..., 9:].any() and mask[1, ..., :9].any(-1).all()
    out, record = step(q, k, v, state, policy, kv_length=length)
    np.testing.assert_allclose(record.density, mask.mean(), rtol=1e-6)
    want = masked_attention(q, k, v, mask)[:1]
    np.testing.assert_allclose(out[:1, : GRID.num_tokens], want, atol=2e-5)


def test_global_lists_take_weightless_blocks_before_padding():
    mass, live = jnp.asarray([[[1.0, 0, 0], [1, 0, 0]]], jnp.float32), jnp.asarray([2], jnp.int32)
    lengths = AdaSpa(top_k="global")._lengths(mass, live, (1, 2, 3))
    assert lengths.tolist() == [[[1, 2, 2]] * 2]


def test_a_refresh_attends_by_its_own_lists_and_keeps_the_log_sum_exp(fresh):
    q, k, v, state = fresh
    q, k, v = qkv(1)
    out, record = step(q, k, v, state, mode="refresh")
    new = record.state
    np.testing.assert_array_equal(new.lse, state.lse)
    assert (masks(new) != masks(state)).any()
    mass = block_masses(q, k, state.lse)
    np.testing.assert_array_equal(masks(new), best_masks(mass, counts(new) - 2))
    want = masked_attention(q, k, v, masks(new))
    np.testing.assert_allclose(out[:, : GRID.num_tokens], want, atol=2e-5)  # float32, logits to 40
    assert np.abs(want - masked_attention(q, k, v, masks(state))).max() > 0.1


def test_a_refresh_of_the_same_queries_and_keys_is_the_search(fresh):
    q, k, v, state = fresh
    new = step(q, k, v, state, mode="refresh")[1].state
    jax.tree.map(np.testing.assert_array_equal, new, state)


def test_a_drift_of_whole_query_blocks_changes_no_list(fresh):
    q, k, v, state = fresh
    drift = np.random.default_rng(2).standard_normal((B, ROWS, N)).repeat(BLOCK, axis=1)
    stale = state._replace(lse=state.lse + jnp.asarray(drift[:, : GRID.num_tokens], jnp.float32))
    new = step(q, k, v, stale, mode="refresh")[1].state
    np.testing.assert_array_equal(new.ids, state.ids)


def test_density_one_is_dense_attention():
    q, k, v = qkv()
    policy = AdaSpa(density=1.0, block_q=BLOCK, block_kv=BLOCK)
    state = searched(q, k, v, policy)
    assert (np.asarray(state.count) == 15).all()
    out = step(q, k, v, state, policy)[0]
    np.testing.assert_allclose(out, api.dense_attention(q, k, v), atol=1e-5)


def test_lists_of_a_lower_density_are_prefixes(fresh):
    q, k, v, state = fresh
    policy = AdaSpa(density=0.3, head_adaptive=False, block_q=BLOCK, block_kv=BLOCK)
    plain = searched(q, k, v, policy)
    assert (np.asarray(plain.count) == 4 + 2).all()
    np.testing.assert_array_equal(plain.ids, state.ids[..., :6])


def test_heads_and_batch_rows_do_not_know_of_each_other(fresh):
    q, k, v, state = fresh
    out = step(q, k, v, state)[0]
    turn = [3, 0, 4, 2, 1]
    # The order of heads with equal recall is the only thing that could differ.
    moved = [x[:, :, jnp.asarray(turn)] for x in (q, k, v)]
    moved = [x.at[1].set(7 * x[1]) for x in moved]
    new = searched(*moved)
    np.testing.assert_array_equal(new.ids[0], state.ids[0][jnp.asarray(turn)])
    np.testing.assert_array_equal(new.count[0], state.count[0][jnp.asarray(turn)])
    np.testing.assert_array_equal(step(*moved, new)[0][0], out[0][:, jnp.asarray(turn)])


def test_scaling_queries_against_keys_changes_nothing(fresh):
    q, k, v, state = fresh
    new = searched(q * 4, k / 4, v)  # powers of two: exact
    jax.tree.map(np.testing.assert_array_equal, new, state)


def test_a_planted_pattern_is_found():
    rng = np.random.default_rng(3)
    directions = 10 * np.concatenate([np.eye(H), -np.eye(H)])[:VIDEO]
    want = np.stack([rng.permutation(H)[:4] for _ in range(ROWS)])
    keys, queries = (x.repeat(BLOCK, axis=0) for x in (directions, directions[want].sum(1)))
    k, q = (np.zeros((B, S, N, H), np.float32) for _ in range(2))
    k[:, : len(keys)], q[:, : len(queries)] = keys[:, None], queries[:, None]
    q, k, v = jnp.asarray(q), jnp.asarray(k), qkv()[2]
    state = searched(q, k, v)
    assert (counts(state) == [4, 4, 6, 8, 8]).all()  # all recalls are near 1
    np.testing.assert_array_equal(
        np.sort(state.ids[:, 2, :, 2:6]), np.broadcast_to(np.sort(want), (B, ROWS, 4))
    )
    out = step(q, k, v, state)[0][:, :, 2:]
    np.testing.assert_allclose(out, api.dense_attention(q, k, v)[:, :, 2:], atol=1e-5)


def test_padded_text_is_neither_read_nor_listed(fresh):
    q, k, v, state = fresh
    length = jnp.asarray([112, S], jnp.int32)  # the first row's last block of text is padding
    padded = jnp.arange(S)[None, :, None, None] >= length[:, None, None, None]
    k, v = (jnp.where(padded, jnp.nan, x) for x in (k, v))
    new = searched(q, k, v, kv_length=length)
    text = [set(np.asarray(new.ids[b, :, :, : 1 + b]).ravel()) for b in range(B)]
    assert text == [{13}, {13, 14}]
    mask = masks(new)
    assert not mask[0, ..., 14].any() and mask[1, ..., 14].all() and mask[..., 13].all()
    clean = jnp.where(padded, 0, k)
    np.testing.assert_allclose(new.lse[0], lse_of(q, clean[:, :112])[0], rtol=1e-5, atol=1e-5)
    mass = block_masses(q, clean, new.lse)
    mass[0, ..., 14] = 0
    kept = tier_sizes(mass)
    np.testing.assert_array_equal(counts(new), kept + [[1], [2]])
    np.testing.assert_array_equal(mask[..., :VIDEO], best_masks(mass, kept)[..., :VIDEO])
    out = step(q, k, v, new, kv_length=length)[0]
    want = masked_attention(q, clean, jnp.where(padded, 0, v), mask)
    np.testing.assert_allclose(out[:, : GRID.num_tokens], want, atol=2e-5)


def test_padded_video_is_not_counted():
    q, k, v = qkv()
    new = searched(q, k, v, kv_length=jnp.asarray([17, S], jnp.int32))  # 3 blocks, no text
    assert (np.asarray(new.count[0]) <= 3).all() and not masks(new)[0, ..., 3:].any()


def test_text_in_budget_and_out_of_recall():
    q, k, v = qkv()
    mass = block_masses(q, k, lse_of(q, k))
    kept = mass * best_masks(mass, np.full((B, N), 3))
    with_text, without = (
        (kept[..., :end].sum((2, 3)) / mass[..., :end].sum((2, 3))).max() for end in (S, VIDEO)
    )
    assert with_text > without + 1e-3
    fields = dict(density=0.3, text_in_budget=True, recall_threshold=without + 1e-4)
    for flag in (False, True):
        policy = AdaSpa(text_in_recall=flag, block_q=BLOCK, block_kv=BLOCK, **fields)
        count = counts(searched(q, k, v, policy))
        # 0.3 · 15 halves up, of which text takes two.
        assert (count == 5).all() != flag and (count[0].mean() == 5)


@pytest.mark.parametrize(
    ("recall", "tiers"),
    [
        ([0.52, 0.95, 0.96, 0.97, 0.98, 0.99, 1.0], [2, 2, 2, 1, 0, 0, 0]),  # n falls to 3
        ([0.1, 0.9, 0.5, 0.7, 0.6], [2, 0, 1, 1, 1]),
        ([0.8, 0.3, 0.2, 0.1], [1, 1, 1, 1]),
        ([0.9, 0.9, 0.1, 0.1], [0, 0, 2, 2]),
        ([0.9], [1]),
    ],
)
def test_as_many_heads_rise_as_fall(recall, tiers):
    recall = jnp.asarray([recall, recall[::-1]], jnp.float32)
    ours = np.asarray(head_tiers(recall, 0.8))
    assert ours[0].tolist() == tiers and ours[1].tolist() == tiers[::-1]
    assert ours.mean() == 1


def lists(policy, tokens):
    """The shape and type of a video's lists; nothing is held."""
    shape = AttentionShape(1, 1, 1, 8, TokenGrid(1, 1, tokens))
    return jax.eval_shape(lambda: policy.init_state(shape)).ids


@pytest.mark.parametrize(
    ("blocks", "density", "kept"),
    # The paper's shapes at sparsity 0.8: HunyuanVideo, CogVideoX1.5, Wan; then caps.
    [
        (1856, 0.2, (186, 371, 557)),
        (1339, 0.2, (134, 268, 402)),
        (1182, 0.2, (118, 236, 355)),
        (100, 0.8, (60, 80, 100)),
        (100, 1.0, (100, 100, 100)),
        (3, 0.01, (1, 1, 1)),
        (355, 0.3, (53, 107, 160)),  # 53.25, 106.5, 159.75
    ],
)
def test_blocks_of_the_tiers(blocks, density, kept):
    policy = AdaSpa(density=density, block_q=1, block_kv=1)
    assert lists(policy, blocks).shape[-1] == kept[2]
    assert policy._kept(blocks, 0) == kept
    assert policy.budgets(10, blocks).tolist() == [blocks] * 3 + [kept[1]] * 7


def test_many_blocks_need_wider_numbers():
    policy = AdaSpa(block_q=1, block_kv=1)
    for tokens, dtype in ((2**15 - 1, jnp.int16), (2**15, jnp.int32)):
        assert lists(policy, tokens).dtype == dtype


def test_a_single_block_of_video_and_text():
    policy = AdaSpa(block_q=BLOCK, block_kv=BLOCK)
    grid = TokenGrid(1, 1, 5, text=2)
    shape = jax.eval_shape(lambda: searched(*(x[:, :7] for x in qkv()), policy, grid=grid))
    assert shape.ids.shape == (B, N, 1, 1)  # kept as video's, so that text is seen
    assert policy._sizes(1, grid) == (1, 0, (1, 1, 1), 1)


def where(policy, steps, mode):
    return [i for i, name in enumerate(policy.modes(steps)) if name == mode]


def test_the_papers_schedule():
    policy = AdaSpa()
    assert where(policy, 50, "dense") == list(range(10))
    assert where(policy, 50, "search") == [10] and where(policy, 50, "refresh") == [30]
    assert len(where(policy, 50, "sparse")) == 38
    more = AdaSpa(searches=(0.4, 0.6, 0.8), lse_cache=False)
    assert where(more, 50, "search") == [10, 20, 30, 40] and not where(more, 50, "refresh")
    early = AdaSpa(step_base=1)
    assert where(early, 50, "search") == [9] and where(early, 50, "refresh") == [29]
    scaling = AdaSpa(dense_prefix=0.0, step_base=1)
    assert where(scaling, 50, "search") == [0] and not where(scaling, 50, "dense")


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs(steps):
    for policy in (AdaSpa(), AdaSpa(step_base=1), AdaSpa(dense_prefix=1.0)):
        modes = policy.modes(steps)
        assert len(modes) == steps and set(modes) <= {"dense", "search", "sparse", "refresh"}
        sparse = [i for i, mode in enumerate(modes) if mode in ("sparse", "refresh")]
        assert not sparse or modes.index("search") < sparse[0]
    assert set(AdaSpa(dense_prefix=0.7).modes(50)[36:]) == {"sparse"}  # 0.6 lies in the prefix


def test_a_run_searches_twice_and_leaves_no_trace():
    def run(seed):
        state, changed = start(POLICY), []
        for i, mode in enumerate(POLICY.modes(10)):
            q, k, v = qkv(100 * seed + i)
            out, record = step(q, k, v, state, mode=mode)
            old, state = state, record.state
            changed.append([bool((a != b).any()) for a, b in zip(old[:2], state[:2], strict=True)])
        return out, np.asarray(changed)

    first, changed = run(1)
    assert np.flatnonzero(changed[:, 0]).tolist() == [2]  # the log-sum-exp
    assert np.flatnonzero(changed[:, 1]).tolist() == [2, 6]  # the lists
    run(2)
    np.testing.assert_array_equal(run(1)[0], first)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"density": 0.0}, r"density=0.0 must be in \(0, 1\]"),
        ({"searches": (1.5,)}, r"searches=\(1.5,\) must be a tuple of shares in \[0, 1\]"),
        ({"searches": [0.5]}, r"searches=\[0.5\] must be a tuple of shares in \[0, 1\]"),
        ({"step_base": 2}, r"step_base=2 must be one of \(0, 1\)"),
        ({"top_k": "all"}, r"top_k='all' must be one of \('row', 'global'\)"),
        ({"recall_threshold": -0.1}, r"recall_threshold=-0.1 must be in \[0, 1\]"),
        ({"block_q": 0}, "block_q=0 must be at least 1 token"),
    ],
)
def test_bad_fields_are_refused(fields, message, untyped):
    with pytest.raises(ValueError, match=message):
        AdaSpa(**fields)
