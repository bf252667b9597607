"""Token grids: sizes of known models, and messages that name the nearest valid size."""

import itertools

import numpy as np
import pytest

from pasa_jax.grid import (
    TokenGrid,
    axis_order,
    gilbert_order,
    neighbour_blocks,
    published_tile,
    tile_grid,
    tile_of,
    tile_order,
    tile_spans,
)


def test_wan_sizes():
    # Specification: 32 760 tokens at 480p and 75 600 at 720p, 512 and 1182 blocks of 64.
    small, large = TokenGrid.for_video(81, 480, 832), TokenGrid.for_video(81, 720, 1280)
    assert small == TokenGrid(21, 30, 52)
    assert (small.num_tokens, large.num_tokens) == (32_760, 75_600)
    assert (small.num_blocks(64), large.num_blocks(64)) == (512, 1182)


def test_a_latent_frame_for_every_four():
    grid = TokenGrid.for_video(
        16, 64, 96, strides=(4, 4, 4), patch=(1, 2, 2), first_frame_alone=False
    )
    assert grid == TokenGrid(4, 8, 12)


def test_one_image():
    assert TokenGrid.for_video(1, 16, 16) == TokenGrid(1, 1, 1)


@pytest.mark.parametrize(
    ("size", "alone", "message"),
    [
        ((80, 480, 832), True, "frames=80 must be a positive multiple of 4, less 3; nearest is 81"),
        ((82, 480, 832), True, "frames=82 .* nearest is 81"),
        ((81, 480, 832), False, "frames=81 must be a positive multiple of 4; nearest is 80"),
        ((0, 480, 832), True, "frames=0 .* nearest is 1"),
        ((-5, 480, 832), True, "frames=-5 .* nearest is 1"),
        ((81, 479, 832), True, "height=479 must be a positive multiple of 16; nearest is 480"),
        ((81, 480, 7), True, "width=7 must be a positive multiple of 16; nearest is 16"),
    ],
)
def test_for_video_refuses_and_names_the_nearest(size, alone, message):
    with pytest.raises(ValueError, match=message):
        TokenGrid.for_video(*size, first_frame_alone=alone)


def test_refuses_an_empty_axis():
    with pytest.raises(ValueError, match="rows=0 must be at least 1 token"):
        TokenGrid(1, 0, 1)


def test_num_blocks_refuses_an_empty_block():
    with pytest.raises(ValueError, match="block=0 must be at least 1 token"):
        TokenGrid(1, 1, 1).num_blocks(0)


def test_text_stands_behind_the_video():
    grid = TokenGrid(2, 3, 4, text=10)  # 24 + 10 tokens
    assert (grid.num_tokens, grid.num_blocks(8)) == (24, 5)
    assert grid.text_blocks(8).tolist() == [False, False, False, True, True]
    assert grid.text_blocks(10).tolist() == [False, False, True, True]  # one holds both
    assert not TokenGrid(2, 3, 4).text_blocks(7).any()


def test_axis_order_counts_the_last_axis_fastest():
    grid = TokenGrid(2, 3, 4)
    assert axis_order(grid, (0, 1, 2)).tolist() == list(range(24))
    # Frames fastest: tokens 0 and 12 are one place in two frames.
    assert axis_order(grid, (1, 2, 0))[:4].tolist() == [0, 12, 1, 13]
    for axes in itertools.permutations(range(3)):
        assert np.array_equal(np.sort(axis_order(grid, axes)), np.arange(24))


def test_tile_order_keeps_whole_tiles_together():
    grid = TokenGrid(2, 4, 6)
    order = tile_order(grid, (1, 2, 3)).reshape(-1, 6)
    assert order[:3].tolist() == [
        [0, 1, 2, 6, 7, 8],
        [3, 4, 5, 9, 10, 11],
        [12, 13, 14, 18, 19, 20],
    ]
    assert np.array_equal(np.sort(order.reshape(-1)), np.arange(48))


def test_tiles_at_the_far_ends_are_smaller():
    grid, tile = TokenGrid(3, 4, 5), (2, 3, 4)
    assert tile_grid(grid, tile) == (2, 2, 2)
    order = tile_order(grid, tile)
    assert order.dtype == np.int32 and np.array_equal(np.sort(order), np.arange(60))
    # 2 frames of 3 rows of 4 columns, beside them one column, below them one row.
    assert order[:5].tolist() == [0, 1, 2, 3, 5] and order[24:30].tolist() == [4, 9, 14, 24, 29, 34]
    assert order[30:38].tolist() == [15, 16, 17, 18, 35, 36, 37, 38]
    assert order[-1] == 59
    # A side longer than the grid's is the whole axis.
    assert np.array_equal(tile_order(grid, (9, 9, 9)), np.arange(60))


@pytest.mark.parametrize("block", [1, 7, 8, 30])
def test_spans_are_the_tiles_of_a_block_s_tokens(block):
    grid, tile = TokenGrid(3, 4, 5, text=9), (2, 3, 4)
    path = np.stack(np.unravel_index(tile_order(grid, tile), grid.sizes), 1) // tile
    numbers = np.ravel_multi_index(path.T, (2, 2, 2))
    spans = tile_spans(grid, tile, block)
    assert spans.shape == (grid.num_blocks(block), 2) and not spans.flags.writeable
    for i, (first, last) in enumerate(spans):
        # Of a block of text alone the last tile.
        own = numbers[i * block : (i + 1) * block] if i * block < 60 else [7]
        assert set(own) == set(range(first, last + 1))


@pytest.mark.parametrize(
    ("sizes", "tokens", "tile"),
    [
        ((4, 16, 16), 64, (4, 4, 4)),
        ((1, 8, 16), 32, (1, 4, 8)),
        ((1, 6, 8), 16, (1, 2, 8)),  # which divides the grid; (1, 4, 4) is more compact
        ((21, 30, 52), 64, (4, 4, 4)),  # none divides
        ((3, 5, 7), 17, (2, 2, 4)),  # nor do 17 tokens fit
        ((1, 1, 5), 64, (1, 1, 5)),
    ],
)
def test_tile_of_divides_or_is_compact_or_fits(sizes, tokens, tile):
    assert tile_of(TokenGrid(*sizes), tokens) == tile


def test_a_paper_s_tile_serves_videos_of_eight():
    assert published_tile(TokenGrid(6, 16, 32), (6, 8, 8), 64) == (6, 8, 8)
    assert published_tile(TokenGrid(6, 16, 31), (6, 8, 8), 64) == tile_of(TokenGrid(6, 16, 31), 64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TokenGrid(1, 1, 1, text=-1), "text=-1 must be at least 0 tokens"),
        (lambda: axis_order(TokenGrid(1, 1, 1), (0, 1, 1)), r"axes=\(0, 1, 1\) must be a permut"),
        (
            lambda: tile_order(TokenGrid(4, 4, 6), (2, 0, 4)),
            r"tile=\(2, 0, 4\) must be three numbers of tokens, 1 or more",
        ),
        (lambda: tile_of(TokenGrid(2, 2, 2), 0), "tokens=0 must be at least 1"),
    ],
)
def test_orders_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


WAN = (21, 30, 52)


@pytest.mark.parametrize(
    "sizes",
    [*itertools.product((1, 2, 3, 5, 6), repeat=3), (7, 9, 4), (9, 7, 11), (2, 45, 21), WAN],
)
def test_gilbert_order_takes_only_unit_steps(sizes):
    grid = TokenGrid(*sizes)
    order = gilbert_order(grid)
    assert order.dtype == np.int32 and order[0] == 0
    assert np.array_equal(np.sort(order), np.arange(grid.num_tokens))
    path = np.stack(np.unravel_index(order, sizes), 1)
    assert (np.abs(np.diff(path, axis=0)).sum(1) == 1).all()


def test_gilbert_order_makes_compact_blocks():
    # Root mean square distance to the block's middle; a ball of 128 tokens has 2.42, a block of
    # the raster 15.3.
    path = np.stack(np.unravel_index(gilbert_order(TokenGrid(*WAN)), WAN), 1)[: 255 * 128]
    blocks = path.reshape(255, 128, 3) - path.reshape(255, 128, 3).mean(1, keepdims=True)
    assert np.sqrt((blocks**2).sum(-1).mean()) < 3


def test_gilbert_order_is_one_array_nobody_writes_to():
    order = gilbert_order(TokenGrid(2, 2, 2))
    assert order is gilbert_order(TokenGrid(2, 2, 2)) and not order.flags.writeable


@pytest.mark.parametrize(("block_q", "block_kv"), [(4, 4), (4, 6), (7, 7)])
def test_neighbour_blocks_are_those_with_tokens_next_to_each_other(block_q, block_kv):
    grid = TokenGrid(3, 4, 5)
    order = gilbert_order(grid)
    path = np.stack(np.unravel_index(order, grid.sizes), 1)
    near = neighbour_blocks(grid, order, block_q, block_kv)
    want = np.zeros_like(near)
    for i, j in itertools.product(range(60), repeat=2):
        want[i // block_q, j // block_kv] |= np.abs(path[i] - path[j]).max() <= 1
    assert np.array_equal(near, want)
    if block_q == block_kv:
        assert near.diagonal().all() and (near == near.T).all() and not near.all()
