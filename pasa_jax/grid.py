"""The grid of video tokens: its size from a video's size, blocks of it, and orders of tokens."""

import dataclasses
import functools

import einops
import numpy as np

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

    def num_blocks(self, block: int) -> int:
        """Blocks of `block` tokens that cover video and text; the last one may be ragged."""
        if block < 1:
            raise ValueError(f"{block=} must be at least 1 token")
        return blocks.num_blocks(self.num_tokens + self.text, block)

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


def tile_order(grid: TokenGrid, tile: tuple[int, int, int]) -> np.ndarray:
    """int32 [F·Y·X], the raster token at each place when whole tiles follow one another.

    Args:
        grid: of the video.
        tile: frames, rows and columns of a tile, which divide the grid's; raster order in a tile
            and among tiles.
    """
    for name, size, part in zip(("frames", "rows", "columns"), grid.sizes, tile, strict=True):
        if part < 1 or size % part:
            raise ValueError(f"{tile=} must divide the grid {grid.sizes}: {name}={size} by {part}")
    sizes = dict(zip("tyx", tile, strict=True))
    return einops.rearrange(grid.raster(), "(a t) (b y) (c x) -> (a b c t y x)", **sizes)


def tile_of(grid: TokenGrid, tokens: int) -> tuple[int, int, int]:
    """The most compact tile of `tokens` tokens that divides the grid: least sum of sides.

    Raises:
        ValueError: none does; the message names the sizes next to it that can.
    """
    tiles = _tiles(grid)
    if tokens not in tiles:
        sizes = sorted(tiles, key=lambda size: abs(size - tokens))[:4]
        raise ValueError(
            f"no tile of {tokens} tokens divides the grid {grid.sizes}; tiles of "
            f"{', '.join(map(str, sorted(sizes)))} tokens do"
        )
    return tiles[tokens]


def _tiles(grid: TokenGrid) -> dict[int, tuple[int, int, int]]:
    """By number of tokens, the most compact tile that divides the grid."""
    frames, rows, columns = ([d for d in range(1, n + 1) if n % d == 0] for n in grid.sizes)
    found: dict[int, tuple[int, int, int]] = {}
    for tile in ((t, y, x) for t in frames for y in rows for x in columns):
        size = tile[0] * tile[1] * tile[2]
        if size not in found or sum(tile) < sum(found[size]):
            found[size] = tile
    return found


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
