"""Sparse VideoGen: the two masks, how heads are told apart, and attention in each head's order.

`published` states the rule block by block from the tokens' frames and positions; the policy takes
distances of centres as matrices.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax.attention import Attention, attend
from pasa_jax.grid import TokenGrid
from pasa_jax.pallas_kernels import api
from pasa_jax.policies import Context
from pasa_jax.policies.svg import Svg, _kinds

B, H, BLOCK = 2, 16, 8
VIDEO = TokenGrid(6, 4, 6)  # 144 tokens, 18 blocks, 3 a frame
RAGGED = TokenGrid(5, 3, 5, text=12)  # 75 + 12 tokens: frames end inside blocks, as video does


def small(block_q=BLOCK, block_kv=BLOCK, **fields):
    return Svg(block_q=block_q, block_kv=block_kv, dense_layers=(), **fields)


def context(grid, *, step=5, layer=1, prompts=1, length=None):
    keys = jax.random.split(jax.random.key(0), prompts)
    return Context(jnp.int32(step), jnp.int32(layer), jnp.int32(1), keys, 1, "sparse", grid, length)


@functools.partial(jax.jit, static_argnums=0)
def compiled(policy, q, k, v, where):
    return policy.plan(q[:, : where.grid.num_tokens], k, v, where, ())[0]


def heads(grid, seed=0):
    """q, k, v [B, T, 3, H]: keys drawn by an equal frame, by an equal position, by nothing."""
    rng = np.random.default_rng(seed)
    tokens, frame = grid.num_tokens + grid.text, grid.rows * grid.columns
    q, k, v = (rng.standard_normal((B, tokens, 3, H)).astype(np.float32) for _ in range(3))
    number = np.arange(grid.num_tokens)
    for head, code in ((0, number // frame), (1, number % frame)):
        # Random signs of 16 entries: their product is 16 for equal codes, and 9 below on average.
        sign = rng.choice([-1.0, 1.0], (code.max() + 1, H)).astype(np.float32)[code]
        q[:, : len(code), head] = 3 * sign
        k[:, : len(code), head] = sign
    return [jnp.asarray(x) for x in (q, k, v)]


def mask_of(blocks, columns):
    """bool [B, N, I, J]."""
    api.check_lists(blocks, columns)
    ids, count = map(np.asarray, blocks)
    live = np.arange(ids.shape[-1]) < count[..., None]
    mask = np.zeros((*count.shape, columns + 1), bool)
    np.put_along_axis(mask, np.where(live, ids, columns), True, axis=-1)
    return mask[..., :columns]


def published(policy, grid, *, temporal):
    """Order [T] and mask [I, J] of one kind of heads, block by block."""
    size, frame, frames = grid.num_tokens, grid.rows * grid.columns, grid.frames

    def line(token):
        return (token % frame) * frames + token // frame if temporal else token

    def shown(token):
        return policy.sink and token < frame

    order = sorted(range(size), key=lambda token: (not shown(token), line(token)))
    if policy.sink:
        order[:frame] = range(frame)
    columns = grid.num_blocks(policy.block_kv)

    def parts(block, i):
        tokens = order[i * block : (i + 1) * block]
        split = [[t for t in tokens if shown(t) == which] for which in (True, False)]
        return tokens, [np.mean([line(t) for t in part]) for part in split if part]

    rows = -(-size // policy.block_q)
    distance = np.zeros((rows, columns))
    forced = np.zeros((rows, columns), bool)
    for i, j in np.ndindex(rows, columns):
        (mine, here), (theirs, there) = parts(policy.block_q, i), parts(policy.block_kv, j)
        holds_text = (j + 1) * policy.block_kv > size and grid.text > 0
        forced[i, j] = holds_text or bool(set(mine) & set(theirs)) or any(map(shown, theirs))
        if there:
            distance[i, j] = min(abs(a - b) for a in here for b in there)
    best = forced
    for reach in sorted(set(distance[~forced])):
        wider = forced | (distance <= reach)
        if wider.mean() > policy.density + 1e-9:
            break
        best = wider
    return np.array(order), best


CASES = [
    (VIDEO, {"density": 0.5}),
    (VIDEO, {"density": 0.4, "sink": False}),
    (VIDEO, {"density": 0.05}),  # less than what is always exact
    (RAGGED, {"density": 0.6}),
    (RAGGED, {"density": 0.6, "block_q": 16}),
    (RAGGED, {"density": 0.7, "block_q": 6, "block_kv": 12, "sink": False}),
]


@pytest.mark.parametrize(("grid", "fields"), CASES)
def test_each_head_has_its_kinds_order_and_mask(grid, fields):
    policy = small(**fields)
    plan = compiled(policy, *heads(grid), context(grid))
    mask = mask_of(plan.blocks, grid.num_blocks(policy.block_kv))
    order = np.asarray(plan.head_order)
    assert (np.sort(order) == np.arange(grid.num_tokens)).all()
    for head, temporal in ((0, False), (1, True)):
        want_order, want = published(policy, grid, temporal=temporal)
        assert (order[:, head] == want_order).all()
        assert (mask[:, head] == want).all()
        assert want.mean() <= policy.density or fields["density"] == 0.05
        assert want.mean() > 0.75 * policy.density


def test_a_head_is_told_by_its_own_batch_row():
    q, k, v = heads(VIDEO)
    swap = jnp.asarray([1, 0, 2])
    mixed = [jnp.concatenate([x[:1], x[1:, :, swap]]) for x in (q, k, v)]
    plan, other = (compiled(small(), *x, context(VIDEO)) for x in ((q, k, v), mixed))
    # Row 0 does not depend on row 1, whose first two heads have changed places.
    for one, two in zip(
        (*plan.blocks, plan.head_order), (*other.blocks, other.head_order), strict=True
    ):
        assert (one[0] == two[0]).all() and (one[1, swap] == two[1]).all()
    assert not (plan.head_order[1] == other.head_order[1]).all()


def is_temporal(policy, q, k, v, where):
    order = compiled(policy, q, k, v, where).head_order
    return np.asarray((order != jnp.arange(order.shape[-1])[None, None]).any(-1))


def random_heads(grid, heads, seed=1):
    shape = (3, B, grid.num_tokens + grid.text, heads, H)
    return [jnp.asarray(x, jnp.float32) for x in np.random.default_rng(seed).standard_normal(shape)]


def test_the_mask_with_the_smaller_error_wins():
    """All sampled rows are token 0, whose output under either mask is summed in float64."""
    policy, grid = small(max_row=1, density=0.6, sink=False), RAGGED
    length = np.array([87, 81])
    q, k, v = random_heads(grid, 24)
    where = context(grid, length=jnp.asarray(length, jnp.int32))
    q64, k64, v64 = (np.asarray(x, np.float64) for x in (q[:, 0], k, v))
    weight = np.exp(np.einsum("bnh,bsnh->bsn", q64, k64) * H**-0.5)
    weight *= (np.arange(87) < length[:, None])[..., None]

    def error(temporal):
        order, mask = published(policy, grid, temporal=temporal)
        seen = np.ones(87, bool)
        seen[order] = mask[0].repeat(BLOCK)[:75]
        out, full = (
            np.einsum("bsn,bsnh->bnh", w, v64) / w.sum(1)[..., None]
            for w in (weight * seen[:, None], weight)
        )
        return ((out - full) ** 2).mean(-1)

    want = error(True) < error(False)
    assert 10 < want.sum() < 38
    assert (is_temporal(policy, q, k, v, where) == want).all()


def test_rows_are_drawn_by_prompt_step_and_layer():
    policy = small(num_rows=1)
    q, k, v = (jnp.concatenate([x[:1], x[:1]]) for x in random_heads(VIDEO, 24))
    first = is_temporal(policy, q, k, v, context(VIDEO))
    assert (first == is_temporal(policy, q, k, v, context(VIDEO))).all()
    assert (first[0] == first[1]).all()  # two branches of one prompt
    assert (first != is_temporal(policy, q, k, v, context(VIDEO, step=6))).any()
    assert (first != is_temporal(policy, q, k, v, context(VIDEO, layer=2))).any()
    two = is_temporal(policy, q, k, v, context(VIDEO, prompts=2))
    assert (two[0] != two[1]).any()


def test_one_frame_is_dense():
    plan = compiled(small(), *heads(TokenGrid(1, 5, 6)), context(TokenGrid(1, 5, 6)))
    assert (plan.blocks.count == 4).all()


@pytest.mark.parametrize("density", [0.6, 1.0])
def test_attention_is_the_masked_softmax_in_each_heads_order(density):
    policy, grid = small(density=density), RAGGED
    length = np.array([87, 79])  # of row 1 the last block, of 7 tokens, holds none
    q, k, v = heads(grid)
    keys = jax.random.split(jax.random.key(0), 1)
    run = Attention(policy, "sparse", jnp.int32(5), jnp.int32(1), keys, 1)
    valid = jnp.asarray(length, jnp.int32)

    @jax.jit
    def attended(q, k, v):
        return attend(q, k, v, run, layer=jnp.int32(1), grid=grid, kv_length=valid)

    out, record = attended(q, k, v)
    temporal = np.zeros((B, 3), bool)  # of no matter where all blocks are exact
    if density < 1:
        temporal = is_temporal(policy, q, k, v, context(grid, length=valid))
    sees, kept = np.ones((B, 3, 87, 87), bool), []
    for row, head in np.ndindex(B, 3):
        order, mask = published(policy, grid, temporal=temporal[row, head])
        place = np.argsort(order)
        column = np.concatenate([place, np.arange(75, 87)]) // BLOCK
        sees[row, head, :75] = mask[place // BLOCK][:, column]
        sees[row, head] &= np.arange(87) < length[row]
        kept.append((mask.sum() - (row == 1) * len(mask)) / mask.size)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    weight = np.exp(np.einsum("btnh,bsnh->bnts", q, k) * H**-0.5) * sees
    want = np.einsum("bnts,bsnh->btnh", weight / weight.sum(-1, keepdims=True), v)
    # float32 sums of 87 terms, and logits up to 12 before the softmax.
    np.testing.assert_allclose(out, want, atol=2e-5)
    np.testing.assert_allclose(record.density, np.mean(kept), rtol=1e-6)


def test_720p_keeps_its_density():
    """Both kinds, at the published size: what text-free video keeps, sink included."""
    grid, policy = TokenGrid(21, 45, 80), Svg()
    k = jax.ShapeDtypeStruct((B, grid.num_tokens, 40, 128), jnp.bfloat16)
    plan = jax.eval_shape(lambda k: policy.plan(k, k, k, context(grid), ())[0], k)
    assert plan.blocks.count.shape == (B, 40, 591) and plan.head_order.shape == (B, 40, 75_600)
    for kind in _kinds(policy, grid):
        assert 0.3 - 2 / 591 < kind.mask.mean() <= 0.3  # to the next two diagonals


def test_the_budget_is_what_the_density_asks_for():
    assert Svg().budgets(50, 540).tolist() == [540] * 10 + [162] * 40


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"density": 0.0}, r"density=0.0 must be in \(0, 1\]"),
        ({"num_rows": 0}, "num_rows=0 must be at least 1"),
        ({"max_row": -1}, "max_row=-1 must be at least 1"),
    ],
)
def test_bad_fields_are_refused(fields, message, untyped):
    with pytest.raises(ValueError, match=message):
        Svg(**fields)


def test_the_grid_is_needed():
    with pytest.raises(ValueError, match="grid=None must be a TokenGrid: Svg"):
        small().plan(*heads(VIDEO), dataclasses.replace(context(VIDEO), grid=None), ())
