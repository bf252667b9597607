"""Token grids: sizes of known models, and messages that name the nearest valid size."""

import pytest

from pasa_jax.grid import TokenGrid


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
