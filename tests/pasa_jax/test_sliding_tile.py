"""Sliding Tile Attention: the windows as the paper counts them, and attention through them.

`visible` follows the paper's rule pair by pair of tokens, in raster order; the policy takes the
product of three axes, in the order of tiles.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax.attention import Attention, attend, sequence_order
from pasa_jax.calibration import CurveKey
from pasa_jax.grid import TokenGrid, tile_order
from pasa_jax.pallas_kernels import api
from pasa_jax.policies import Context
from pasa_jax.policies.sliding_tile import SlidingTile

B, N, H, BLOCK = 2, 2, 8, 8
VIDEO = TokenGrid(6, 4, 8)  # 3 × 2 × 4 tiles of 2 × 2 × 2 tokens
TEXT = dataclasses.replace(VIDEO, text=10)  # behind them two blocks, the last of 2 tokens
VALID = (202, 195)  # of prompt 1 the last block holds none
HUNYUAN = TokenGrid(30, 48, 80)
WAN = TokenGrid(18, 48, 80)


def small(**fields):
    return SlidingTile(block_q=BLOCK, block_kv=BLOCK, dense_layers=(), **fields)


def run_of(policy):
    """The policy at a sparse step; it reads no budget."""
    keys = jax.random.split(jax.random.key(0), 1)
    return Attention(policy, "sparse", jnp.int32(5), jnp.int32(1), keys, 1)


def planned(policy, grid, length=None):
    """The plan's mask [B, I, J], which all heads share."""
    k = jnp.zeros((B, grid.num_tokens + grid.text, N, 1))
    run, layer = run_of(policy), jnp.int32(1)
    where = Context(run.step, layer, run.budget, run.keys, 1, "sparse", grid, length)
    blocks = policy.plan(k[:, : grid.num_tokens], k, k, where, ())[0].blocks
    api.check_lists(blocks, grid.num_blocks(policy.block_kv))
    ids, count = map(np.asarray, blocks)
    assert (ids == ids[:1, :1]).all() and (count == count[:, :1]).all()
    mask = np.zeros((*count[:, 0].shape, grid.num_blocks(policy.block_kv)), bool)
    for row in np.ndindex(count[:, 0].shape):
        mask[row][ids[row[0], 0, row[1], : count[row[0], 0, row[1]]]] = True
    return mask


def visible(grid, tile, window):
    """Whether a video token [T] sees a token [S], by the paper's rule; text is seen by all."""
    tokens = np.arange(grid.num_tokens)
    place = np.stack(np.unravel_index(tokens, grid.sizes)) // np.array(tile)[:, None]
    sees = np.ones((grid.num_tokens, grid.num_tokens), bool)
    for x, size, part, side in zip(place, grid.sizes, tile, window, strict=True):
        count, reach = -(-size // part), side // 2
        centre = np.minimum(np.maximum(x, reach), count - 1 - reach)
        sees &= abs(x[None, :] - centre[:, None]) <= reach
    return np.pad(sees, ((0, 0), (0, grid.text)), constant_values=True)


CASES = [
    (VIDEO, (2, 2, 2), (3, 1, 3)),
    (VIDEO, (1, 2, 4), (5, 1, 1)),
    (VIDEO, (6, 1, 4), (1, 3, 1)),  # axes of 1, 4 and 2 tiles
    (TEXT, (2, 2, 2), (1, 1, 3)),
]


@pytest.mark.parametrize(("grid", "tile", "window"), CASES)
def test_a_tile_sees_the_papers_window(grid, tile, window):
    policy = SlidingTile(
        block_q=math.prod(tile), block_kv=math.prod(tile), tile=tile, window=window
    )
    order = sequence_order(run_of(policy), grid)
    text = [(grid.text > 0) * 2] * (B * (grid.num_tokens // policy.block_q))
    mask = planned(policy, grid)
    # Every row has exactly the window's tiles, those at the video's edge as well.
    assert mask.sum(-1).ravel().tolist() == [math.prod(window) + t for t in text]
    tokens = mask[0].repeat(policy.block_q, 0).repeat(policy.block_kv, 1)[:, : len(order)]
    back = np.argsort(order)
    tokens = tokens[back[: grid.num_tokens]][:, back]
    assert (tokens == visible(grid, tile, window)).all()


RAGGED = TokenGrid(5, 6, 7, text=11)  # 3 × 2 × 2 tiles of 2 × 4 × 4 tokens, 36 to 2


@pytest.mark.parametrize("blocks", [(8, 8), (16, 4), (6, 35), (3, 11)])
@pytest.mark.parametrize("window", [(1, 1, 1), (3, 1, 1), (1, 2, 1)])
def test_a_block_sees_what_any_of_its_tokens_sees(blocks, window):
    fields = {"tile": (2, 4, 4), "window": window, "block_q": blocks[0], "block_kv": blocks[1]}
    policy = SlidingTile(dense_layers=(), **fields)
    order = sequence_order(run_of(policy), RAGGED)
    # The oracle: all pairs of tokens, then whether there is one in a pair of blocks.
    sees = visible(RAGGED, (2, 4, 4), window)[order[: RAGGED.num_tokens]][:, order]
    rows, columns = (range(0, n, block) for n, block in zip(sees.shape, blocks, strict=True))
    want = np.logical_or.reduceat(np.logical_or.reduceat(sees, rows, 0), columns, 1)
    mask = planned(policy, RAGGED)
    assert (mask == want).all() and not want.all()
    assert planned(dataclasses.replace(policy, window=(3, 2, 2)), RAGGED).all()
    assert planned(dataclasses.replace(policy, window=None, density=1.0), RAGGED).all()


@pytest.mark.parametrize("density", [0.2, 0.417, 0.8])
@pytest.mark.parametrize("grid", [TokenGrid(21, 30, 52), TokenGrid(21, 45, 80)])
def test_wan_s_own_videos_have_the_paper_s_tile(grid, density):
    policy = SlidingTile(density=density)
    policy.check_setting(CurveKey("wan", grid, 50, "unipc", 5.0, 5.0))
    order = policy.token_order(grid)
    assert np.array_equal(order, tile_order(grid, (6, 8, 8)))
    assert np.array_equal(np.sort(order), np.arange(grid.num_tokens))
    mask = planned(policy, grid)[0]
    assert density - 0.08 < mask.mean() <= density


@pytest.mark.parametrize(
    ("window", "same"), [((2, 1, 2), (3, 1, 3)), ((9, 1, 4), (3, 1, 4)), ((3, 2, 5), (3, 2, 4))]
)
def test_even_windows_grow_and_large_ones_stop_at_the_grid(window, same):
    mask = planned(small(window=window), VIDEO)
    assert (mask.sum(-1) == math.prod(same)).all()
    odd = tuple(side + 1 - side % 2 for side in window)
    assert (mask == planned(small(window=odd), VIDEO)).all()


@pytest.mark.parametrize(
    ("fields", "grid", "kept"),
    [
        # The paper's tile is taken; its 30 × 40 × 40 and 18 × 24 × 24 tokens of 5 × 6 × 10 tiles.
        ({}, HUNYUAN, (5, 5, 5)),
        ({"density": 0.09}, HUNYUAN, (3, 3, 3)),  # rather than (1, 3, 9)
        ({"density": 0.0899}, HUNYUAN, (1, 5, 5)),  # of 25; 27 would pass it
        ({"density": 0.31}, WAN, (1, 6, 9)),  # 54 of 180; (3, 6, 3) is less even
        ({"density": 0.001}, WAN, (1, 1, 1)),  # which passes it
        ({"density": 1.0}, WAN, (3, 6, 10)),
        ({"window": (3, 1, 10), "density": 0.9}, WAN, (3, 1, 10)),
    ],
)
def test_density_picks_the_window(fields, grid, kept):
    policy = SlidingTile(**fields)
    mask = planned(policy, grid)[0]
    assert (mask.sum(1) == 6 * math.prod(kept)).all()  # blocks of 64 in tiles of 384
    assert (mask == planned(dataclasses.replace(policy, window=kept), grid)[0]).all()


def test_the_budget_is_what_the_density_allows():
    assert SlidingTile().budgets(50, 300).tolist() == [300] * 12 + [125] * 38
    assert SlidingTile(window=(1, 1, 1)).max_budget(50, 300) == 300


def test_no_other_window_comes_nearer_the_density():
    sides = [(1, 3), (1, 2), (1, 3, 4)]
    sizes = {math.prod(window) for window in itertools.product(*sides)}
    for density in np.arange(0.05, 1.01, 0.05):
        mask = planned(small(density=float(density)), VIDEO)
        want = max(size for size in sizes if size <= density * 24 + 1e-6)
        assert (mask.sum(-1) == want).all()


def test_text_counts_towards_the_density():
    # 26 blocks, of which 2 are text: 7 allow 5 of video, hence 4.
    assert (planned(small(density=7 / 26), TEXT).sum(-1) == 4 + 2).all()


def test_padding_alone_is_not_listed():
    mask = planned(small(window=(1, 1, 3)), TEXT, jnp.asarray(VALID, jnp.int32))
    assert mask[0, :, 24:].all() and mask[1, :, 24].all() and not mask[1, :, 25].any()
    assert (mask[0, :, :25] == mask[1, :, :25]).all()


def qkv(grid):
    shape = (3, B, grid.num_tokens + grid.text, N, H)
    return [jnp.asarray(x, jnp.float32) for x in np.random.default_rng(0).standard_normal(shape)]


@jax.jit
def dense(q, k, v, length):
    return api.dense_attention(q, k, v, kv_length=length)


@pytest.mark.parametrize("fields", [{"window": (3, 1, 3)}, {"density": 1.0}])
def test_attention_in_tile_order_is_the_masked_softmax(fields):
    policy, length = small(**fields), jnp.asarray(VALID, jnp.int32)
    q, k, v = qkv(TEXT)
    run = run_of(policy)
    order = sequence_order(run, TEXT)

    @jax.jit
    def attended(q, k, v):
        return attend(q, k, v, run, layer=jnp.int32(1), grid=TEXT, kv_length=length)

    out, record = attended(*(x[:, order] for x in (q, k, v)))
    out = np.asarray(out)[:, np.argsort(order)]
    sees = visible(TEXT, (2, 2, 2), policy.window or (3, 2, 4))
    sees = np.pad(sees, ((0, TEXT.text), (0, 0)), constant_values=True)
    sees = sees[None] & (np.arange(202) < np.array(VALID)[:, None])[:, None]
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    weight = np.exp(np.einsum("btnh,bsnh->bnts", q, k) * H**-0.5) * sees[:, None]
    want = np.einsum("bnts,bsnh->btnh", weight / weight.sum(-1, keepdims=True), v)
    # float32 sums of 202 terms.
    np.testing.assert_allclose(out, want, atol=1e-5)
    if policy.window is None:
        np.testing.assert_allclose(out, dense(*map(jnp.float32, (q, k, v)), length), atol=1e-5)
    tiles = 24 if policy.window is None else 9
    # Prompt 1 has one text block fewer.
    np.testing.assert_allclose(record.density, (tiles + 1.5) / 26, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tile": (6, 0, 8)}, r"tile=\(6, 0, 8\) must be three numbers of tokens, 1 or more"),
        ({"tile": (6, 8)}, r"tile=\(6, 8\) must be three numbers of tokens, 1 or more"),
        ({"density": 0.0}, r"density=0.0 must be in \(0, 1\]"),
        ({"window": (1, 0, 3)}, r"window=\(1, 0, 3\) must be three numbers of tiles, 1 or more"),
        ({"window": (1, 3)}, r"window=\(1, 3\) must be three numbers of tiles, 1 or more"),
    ],
)
def test_bad_fields_are_refused(fields, message, untyped):
    with pytest.raises(ValueError, match=message):
        SlidingTile(**fields)


def test_the_grid_is_needed():
    q, k, v = qkv(VIDEO)
    with pytest.raises(ValueError, match="grid=None must be a TokenGrid: SlidingTile"):
        attend(q, k, v, run_of(small()), layer=jnp.int32(1))
