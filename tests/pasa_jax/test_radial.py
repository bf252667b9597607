"""Radial Attention: the mask token by token against the policy's runs of tokens, and its densities.

`published` is the specification's rule on every pair of tokens of every pair of frames.
"""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax.attention import Attention, attend
from pasa_jax.grid import TokenGrid
from pasa_jax.policies import Context
from pasa_jax.policies.radial import Radial

B, N, H, BLOCK = 2, 2, 8, 8


def small(block_q=BLOCK, block_kv=BLOCK, **fields):
    return Radial(block_q=block_q, block_kv=block_kv, dense_layers=(), **fields)


def run_of(policy):
    """The policy at a sparse step; it reads no budget."""
    keys = jax.random.split(jax.random.key(0), 1)
    return Attention(policy, "sparse", jnp.int32(5), jnp.int32(1), keys, 1)


def planned(policy, grid):
    """The plan's mask [I, J], which all heads share."""
    k = jnp.zeros((B, grid.num_tokens + grid.text, N, 1))
    run, layer = run_of(policy), jnp.int32(1)
    where = Context(run.step, layer, run.budget, run.keys, 1, "sparse", grid)
    blocks = policy.plan(k[:, : grid.num_tokens], k, k, where, ())[0].blocks
    ids, count = map(np.asarray, blocks)
    assert (ids == ids[:1, :1]).all() and (count == count[:1, :1]).all()
    ids, count = ids[0, 0], count[0, 0]
    mask = np.zeros((len(count), grid.num_blocks(policy.block_kv)), bool)
    for row, listed, length in zip(mask, ids, count, strict=True):
        assert len(set(listed[:length])) == length
        row[listed[:length]] = True
    return mask


def published(policy, grid):
    """The mask of the video's blocks."""
    size, block = grid.rows * grid.columns, max(policy.block_q, policy.block_kv)
    place, frames = np.arange(size), grid.frames
    apart = abs(place[:, None] - place[None, :])
    mask = np.zeros([-(-frames * size // b) for b in (policy.block_q, policy.block_kv)], bool)
    for i, j in np.ndindex(frames, frames):
        distance = abs(i - j)
        band = 2 ** size.bit_length() / 2 ** distance.bit_length()
        keep = apart <= max(block, band * policy.decay_factor)
        if band < block and distance % int(block / band):
            keep = np.zeros_like(keep)
        if distance <= 1 or (policy.sink and j == 0):
            keep = np.ones_like(keep)
        query, key = (
            (frame * size + place) // b for frame, b in ((i, policy.block_q), (j, policy.block_kv))
        )
        for row in np.unique(query):
            for column in np.unique(key):
                share = keep[query == row][:, key == column].mean(0)
                seen = (share > 0).sum()
                mask[row, column] |= seen > 0 and (share > 1 / 3).sum() / seen > 0.6
    return mask


@pytest.mark.parametrize(
    ("frames", "decay", "sink", "density", "fewest", "most"),
    # HunyuanVideo, Wan 2.1, Wan 2.2, and twice HunyuanVideo's length, whose far frames are thinned.
    [
        (30, 0.95, False, 0.27463, 144, 281),
        (18, 0.2, True, 0.28713, 92, 162),
        (20, 0.8, True, 0.35253, 114, 240),
        (64, 0.95, False, 0.17455, 180, 385),
    ],
)
def test_the_published_masks_have_their_density(frames, decay, sink, density, fewest, most):
    mask = planned(Radial(decay_factor=decay, sink=sink), TokenGrid(frames, 48, 80))
    count = mask.sum(1)
    assert (count.min(), count.max()) == (fewest, most)
    np.testing.assert_allclose(mask.mean(), density, atol=1e-5)
    assert np.diagonal(mask).all()
    inner = mask[30:, 30:] if sink else mask  # without the first frame, which all see
    assert (inner == inner.T).all()
    assert mask[:, :30].all() == sink


GRIDS = [
    (TokenGrid(5, 6, 8), 8, 8),  # whole blocks a frame
    (TokenGrid(9, 4, 8), 16, 16),  # thinned from distance 4 on
    (TokenGrid(9, 4, 8), 32, 4),  # key blocks inside query blocks
    (TokenGrid(5, 5, 7), 8, 8),  # blocks of two frames, and a ragged last one
    (TokenGrid(4, 5, 7), 16, 8),
    (TokenGrid(4, 5, 7), 6, 12),
    (TokenGrid(12, 1, 5), 8, 8),  # three frames in a block
]


@pytest.mark.parametrize(("grid", "block_q", "block_kv"), GRIDS)
@pytest.mark.parametrize(("decay", "sink"), [(0.3, True), (1.0, False)])
def test_the_mask_is_the_rule_on_every_token(grid, block_q, block_kv, decay, sink):
    policy = small(block_q, block_kv, decay_factor=decay, sink=sink)
    want = published(policy, grid)
    assert 0.1 < want.mean() < 1
    assert (planned(policy, grid) == want).all()


def test_a_larger_factor_keeps_all_that_a_smaller_one_does():
    grid = TokenGrid(6, 7, 9)
    masks = [planned(small(decay_factor=decay), grid) for decay in (0.0, 0.7, 1.1, 1e300)]
    for smaller, larger in zip(masks, masks[1:], strict=False):
        assert (larger | ~smaller).all() and larger.sum() > smaller.sum()


@pytest.mark.parametrize("size", [(2, 6, 8), (2, 1, 5), (1, 5, 7)])
def test_two_frames_are_dense(size):
    assert planned(small(decay_factor=0.0, sink=False), TokenGrid(*size)).all()


def test_text_is_seen_by_all():
    text, video = TokenGrid(5, 5, 7, text=12), TokenGrid(5, 5, 7)  # 175 tokens; block 21 holds both
    with_text, without = planned(small(), text), planned(small(), video)
    assert with_text[:, 21:].all() and with_text.shape == (22, 24)
    assert (with_text[:, :21] == without[:, :21]).all() and not without[:, 21].all()


THIN = TokenGrid(9, 4, 8)  # with blocks of 16, pairs at distance 5, 6 and 7 are never seen


@pytest.mark.parametrize("grid", [TokenGrid(8, 8, 12), TokenGrid(8, 8, 12, text=40)])
def test_density_sets_the_decay_factor(grid):
    reached = [planned(small(decay_factor=d), grid).mean() for d in np.linspace(0, 3, 16).tolist()]
    for density in (0.65, 0.8, 0.9):
        nearest = max(mean for mean in reached if mean <= density)
        assert nearest > min(reached)
        assert nearest <= planned(small(density=density), grid).mean() <= density


def test_a_density_out_of_reach_takes_the_nearest():
    least = planned(small(16, 16, decay_factor=0.0), THIN)
    most = planned(small(16, 16, decay_factor=100.0), THIN)
    assert least.mean() > 0.3 and most.mean() < 0.95
    assert (planned(small(16, 16, density=0.3), THIN) == least).all()
    assert (planned(small(16, 16, density=0.95), THIN) == most).all()
    assert planned(small(16, 16, density=1.0), THIN).all()


def test_the_budget_is_what_the_density_asks_for():
    assert Radial(density=0.3).budgets(50, 540).tolist() == [540] * 12 + [162] * 38
    assert Radial().max_budget(50, 540) == 540


def test_720p_takes_little_memory():
    grid = TokenGrid(21, 45, 80)
    k = jax.ShapeDtypeStruct((B, grid.num_tokens, 40, 128), jnp.bfloat16)
    policy = Radial(block_q=64, block_kv=64, density=0.3)
    run = run_of(policy)
    where = Context(run.step, jnp.int32(1), run.budget, run.keys, 1, "sparse", grid)
    tracemalloc.start()
    blocks = jax.eval_shape(lambda k: policy.plan(k, k, k, where, ())[0].blocks, k)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert blocks.ids.shape == (B, 40, 1182, 440)
    assert peak < 40e6  # blocks by blocks of indices; all blocks by tokens would be 89 MB of bits


def qkv(grid):
    shape = (3, B, grid.num_tokens + grid.text, N, H)
    return [jnp.asarray(x, jnp.float32) for x in np.random.default_rng(0).standard_normal(shape)]


@pytest.mark.parametrize("fields", [{"decay_factor": 0.1}, {"density": 1.0}])
def test_attention_is_the_masked_softmax(fields):
    grid, policy = TokenGrid(5, 5, 7, text=12), small(**fields)
    length = jnp.asarray([187, 183], jnp.int32)  # of prompt 1 the last text block holds none
    q, k, v = qkv(grid)
    run = run_of(policy)

    @jax.jit
    def attended(q, k, v):
        return attend(q, k, v, run, layer=jnp.int32(1), grid=grid, kv_length=length)

    out, record = attended(q, k, v)
    mask = planned(policy, grid)
    sees = mask.repeat(BLOCK, 0)[:175].repeat(BLOCK, 1)[:, :187]
    sees = np.pad(sees, ((0, 12), (0, 0)), constant_values=True)
    sees = sees[None] & (np.arange(187) < np.asarray(length)[:, None])[:, None]
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    weight = np.exp(np.einsum("btnh,bsnh->bnts", q, k) * H**-0.5) * sees[:, None]
    want = np.einsum("bnts,bsnh->btnh", weight / weight.sum(-1, keepdims=True), v)
    # float32 sums of 187 terms.
    np.testing.assert_allclose(out, want, atol=1e-5)
    assert mask.all() == ("density" in fields)
    live = mask.sum() - 0.5 * len(mask)
    np.testing.assert_allclose(record.density, live / mask.size, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"density": 0.0}, r"density=0.0 must be in \(0, 1\]"),
        ({"decay_factor": -0.1}, "decay_factor=-0.1 must be 0 or more and finite"),
        ({"decay_factor": float("nan")}, "decay_factor=nan must be 0 or more and finite"),
        ({"decay_factor": float("inf")}, "decay_factor=inf must be 0 or more and finite"),
    ],
)
def test_bad_fields_are_refused(fields, message, untyped):
    with pytest.raises(ValueError, match=message):
        Radial(**fields)


def test_the_grid_is_needed():
    q, k, v = qkv(THIN)
    with pytest.raises(ValueError, match="grid=None must be a TokenGrid: Radial"):
        attend(q, k, v, run_of(small()), layer=jnp.int32(1))
