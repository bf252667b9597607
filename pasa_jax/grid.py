"""The grid of video tokens: its size from a video's size, blocks of it, and orders of tokens."""

import dataclasses
import functools
import itertools
import math
import operator
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int

from pasa_jax.pallas_kernels import blocks


@dataclasses.dataclass(frozen=True)
class TokenGrid:
    """Video tokens of one sequence in raster order, frames outermost, columns innermost, then text.

    Attributes:
        frames, rows, columns: F, Y, X, counted in tokens.
        text: E, text tokens behind the video's; 0 where text is not part of self-attention.
    """

    frames: int
    rows: int
    columns: int
    text: int = 0

    def __post_init__(self):
        for name in ("frames", "rows", "columns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1 token")
        if self.text < 0:
            raise ValueError(f"text={self.text} must be at least 0 tokens")

    @property
    def sizes(self) -> tuple[int, int, int]:
        """F, Y, X."""
        return self.frames, self.rows, self.columns

    @property
    def num_tokens(self) -> int:
        """Video tokens, F · Y · X."""
        return self.frames * self.rows * self.columns

    @property
    def length(self) -> int:
        """All tokens, F · Y · X + E."""
        return self.num_tokens + self.text

    def num_blocks(self, block: int) -> int:
        """Blocks of `block` tokens that cover video and text; the last one may be ragged."""
        if block < 1:
            raise ValueError(f"{block=} must be at least 1 token")
        return blocks.num_blocks(self.length, block)

    def text_blocks(self, block: int) -> np.ndarray:
        """bool [J], whether a block of `block` tokens holds text, be it beside video."""
        ends = np.arange(1, self.num_blocks(block) + 1) * block
        return (ends > self.num_tokens) & (self.text > 0)

    def raster(self) -> np.ndarray:
        """int32 [F, Y, X], the video tokens' numbers."""
        return np.arange(self.num_tokens, dtype=np.int32).reshape(self.sizes)

    @classmethod
    def for_video(
        cls,
        frames: int,
        height: int,
        width: int,
        *,
        strides: tuple[int, int, int] = (4, 8, 8),
        patch: tuple[int, int, int] = (1, 2, 2),
        first_frame_alone: bool = True,
    ) -> "TokenGrid":
        """The grid of a video, by default Wan's: 81 × 480 × 832 gives 21 × 30 × 52.

        Args:
            frames, height, width: of the video, in frames and pixels.
            strides: frames, rows and columns of the video in one cell of the latents.
            patch: frames, rows and columns of the latents in one token.
            first_frame_alone: the first frame has a latent frame of its own (Wan's causal VAE):
                frames = stride · (F − 1) + 1. False: frames = stride · F.

        Raises:
            ValueError: a size the grid cannot hold; the message has the nearest one it can.
        """
        lead = strides[0] - 1 if first_frame_alone else 0
        return cls(
            _tokens("frames", frames, strides[0] * patch[0], lead),
            _tokens("height", height, strides[1] * patch[1], 0),
            _tokens("width", width, strides[2] * patch[2], 0),
        )


def _tokens(name: str, size: int, unit: int, lead: int) -> int:
    """size = unit · tokens − lead, solved for tokens."""
    tokens, rest = divmod(size + lead, unit)
    if rest or tokens < 1:
        nearest = max(1, tokens + (2 * rest > unit)) * unit - lead
        rule = f"a positive multiple of {unit}" + (f", less {lead}" if lead else "")
        raise ValueError(f"{name}={size} must be {rule}; nearest is {nearest}")
    return tokens


def axis_order(grid: TokenGrid, axes: tuple[int, int, int]) -> np.ndarray:
    """int32 [F·Y·X], the raster token at each place when `axes` run from slowest to fastest.

    Args:
        grid: of the video.
        axes: a permutation of 0 (frames), 1 (rows), 2 (columns).
    """
    if sorted(axes) != [0, 1, 2]:
        raise ValueError(f"{axes=} must be a permutation of (0, 1, 2)")
    return grid.raster().transpose(axes).reshape(-1)


def tile_grid(grid: TokenGrid, tile: tuple[int, int, int]) -> tuple[int, int, int]:
    """Nt, Ny, Nx: tiles along the axes, those that the grid's far ends cut off counted.

    Args:
        grid: of the video.
        tile: frames, rows and columns of a tile, in tokens.
    """
    if len(tile) != 3 or min(tile) < 1:
        raise ValueError(f"{tile=} must be three numbers of tokens, 1 or more")
    frames, rows, columns = (-(-n // part) for n, part in zip(grid.sizes, tile, strict=True))
    return frames, rows, columns


def tile_order(grid: TokenGrid, tile: tuple[int, int, int]) -> np.ndarray:
    """int32 [F·Y·X], the raster token at each place when tiles follow one another, packed.

    Args:
        grid: of the video.
        tile: frames, rows and columns of a tile; those at the grid's far ends have what is left
            there. Raster order in a tile and among tiles.
    """
    return np.argsort(_tile_numbers(grid, tile), kind="stable").astype(np.int32)


def _tile_numbers(grid: TokenGrid, tile: tuple[int, int, int]) -> np.ndarray:
    """int64 [F·Y·X], the tile of every raster token."""
    tiles = tile_grid(grid, tile)
    place = np.unravel_index(grid.raster().reshape(-1), grid.sizes)
    number = [x // part for x, part in zip(place, tile, strict=True)]
    return np.ravel_multi_index(number, tiles)


@functools.lru_cache(maxsize=16)
def tile_spans(grid: TokenGrid, tile: tuple[int, int, int], block: int) -> np.ndarray:
    """int32 [J, 2], the first and the last tile that each block of tokens in `tile_order` touches.

    Args:
        grid: of the video; of a block of text alone both are the last tile.
        tile: frames, rows and columns of a tile, in tokens.
        block: tokens of a block.

    Returns:
        A shared array that cannot be written to.
    """
    start = np.arange(grid.num_blocks(block)) * block
    ends = np.minimum(np.stack([start, start + block - 1], 1), grid.num_tokens - 1)
    spans = np.sort(_tile_numbers(grid, tile))[ends].astype(np.int32)
    spans.flags.writeable = False
    return spans


def seen_blocks(
    seen: Bool[np.ndarray | jax.Array, "M M"],
    grid: TokenGrid,
    tile: tuple[int, int, int],
    block_q: int,
    block_kv: int,
) -> Bool[np.ndarray | jax.Array, "I J"]:
    """Which key blocks a query block takes, of tokens in `tile_order`: see `join_tiles`; all text.

    Args:
        seen: whether a query tile sees a key tile.
        grid: of the video, and the text behind it.
        tile: frames, rows and columns of a tile, in tokens.
        block_q, block_kv: tokens of a query block and of a key block.
    """
    query, key = (tile_spans(grid, tile, block) for block in (block_q, block_kv))
    query = query[: blocks.num_blocks(grid.num_tokens, block_q)]
    return join_tiles(seen, query, key) | grid.text_blocks(block_kv)[None, :]


def join_tiles(
    seen: Bool[np.ndarray | jax.Array, "M M"],
    query: Int[np.ndarray, "I 2"],
    key: Int[np.ndarray, "J 2"],
) -> Bool[np.ndarray | jax.Array, "I J"]:
    """Whether any tile that a query block touches sees any tile that a key block touches.

    Args:
        seen: whether a query tile sees a key tile, M tiles.
        query, key: first and last tile of each block, as `tile_spans`.
    """
    return _any_tile(_any_tile(seen, query).T, key).T


def _any_tile(seen: Any, spans: np.ndarray) -> Any:
    """Rows of tiles [M, ...] joined to those of blocks."""
    first, last = spans.T
    steps = range(int((last - first).max()) + 1)
    return functools.reduce(operator.or_, (seen[np.minimum(first + i, last)] for i in steps))


def tile_of(grid: TokenGrid, tokens: int) -> tuple[int, int, int]:
    """The tile of at most `tokens` tokens that fits inside the grid with most tokens.

    Of equals one that divides the grid, then the most compact: least sum of sides.
    """
    if tokens < 1:
        raise ValueError(f"{tokens=} must be at least 1")
    sides = (range(1, min(n, tokens) + 1) for n in grid.sizes)

    def rank(tile):
        divides = not any(n % part for n, part in zip(grid.sizes, tile, strict=True))
        return math.prod(tile), divides, -sum(tile)

    return max((tile for tile in itertools.product(*sides) if math.prod(tile) <= tokens), key=rank)


def published_tile(grid: TokenGrid, tile: tuple[int, int, int], block: int) -> tuple[int, int, int]:
    """`tile`, a paper's, where the video has the tokens of eight; else `tile_of` a block's."""
    return tile if grid.num_tokens >= 8 * math.prod(tile) else tile_of(grid, block)


@functools.lru_cache(maxsize=16)
def gilbert_order(grid: TokenGrid) -> np.ndarray:
    """int32 [F·Y·X], the raster token at each place of a Hilbert curve through a grid of any size.

    The curve begins at token 0, and every step goes to one of the six nearest tokens.

    Args:
        grid: of the video.

    Returns:
        A shared array that cannot be written to.

    Source: the idea of J. Červený's generalised Hilbert curve ("gilbert"), which Jenga
    (arXiv:2505.16864) and Rectified SpaAttn (arXiv:2511.19835) run along the longest axis. Here it
    runs along the longest even axis, where there is one, which spares it their diagonal steps;
    blocks of its tokens are as compact.
    """
    main = max(range(3), key=lambda axis: (grid.sizes[axis] % 2 == 0, grid.sizes[axis]))
    sides = np.roll(np.diag(grid.sizes), -main, axis=0)
    order = grid.raster()[tuple(_hilbert(np.zeros(3, int), *sides).T)]
    order.flags.writeable = False
    return order


def _hilbert(start: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """[n, 3], a path through the box of signed sides a, b, c, from `start` to the end of side a."""
    # Side a is even, or all three are odd, and it is 1 in a single place alone: a path of unit
    # steps needs that, and every part below keeps it.
    if np.abs(b).sum() < np.abs(c).sum():
        b, c = c, b
    length, width = np.abs(a).sum(), np.abs(b).sum()
    one, two = np.sign(a), np.sign(b)
    if width == 1:
        return start + one * np.arange(length)[:, None]
    if 2 * length > 3 * width:  # one part behind the other
        half = _even_half(a)
        return np.concatenate([_hilbert(start, half, b, c), _hilbert(start + half, a - half, b, c)])
    if width == 2:  # and so is a: over one layer, and back over the other
        there = np.stack([0 * b, two, two + np.sign(c), np.sign(c)])[: 2 * np.abs(c).sum()]
        return start + np.concatenate([there, there[::-1] + one])
    half, part = _even_half(b), one * (length // 2)
    there = _hilbert(start, half, part, c)
    across = _hilbert(start + half, a, b - half, c)
    back = _hilbert(start + a - one + half - two, -half, part - a, c)
    return np.concatenate([there, across, back])


def _even_half(side: np.ndarray) -> np.ndarray:
    """An even part, about half, of a signed side of 3 or more."""
    return np.sign(side) * 2 * max(1, round(np.abs(side).sum() / 4))


def neighbour_blocks(grid: TokenGrid, order: np.ndarray, block_q: int, block_kv: int) -> np.ndarray:
    """bool [I, J], whether a token of a query block is, or lies next to, one of a key block.

    Next to it are the 26 tokens that differ by at most one in frame, row and column. Blocks of the
    video alone.

    Args:
        grid: of the video.
        order: the raster token at each place, as `gilbert_order`.
        block_q, block_kv: tokens of a query block and of a key block.
    """
    tokens = grid.num_tokens
    place = np.argsort(order).reshape(grid.sizes)
    padded = np.pad(place, 1, mode="edge")  # beyond the edge stands a token next to it
    near = np.zeros((blocks.num_blocks(tokens, block_q), blocks.num_blocks(tokens, block_kv)), bool)
    for offset in np.ndindex(3, 3, 3):
        window = tuple(slice(o, o + n) for o, n in zip(offset, grid.sizes, strict=True))
        near[place // block_q, padded[window] // block_kv] = True
    return near
