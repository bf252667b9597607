"""Sliding Tile Attention (arXiv:2502.04507): a box of tiles around each query tile, for all heads.

The lists of such a policy are constants. How they become a plan stands here for others of its kind.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pasa_jax.grid import TokenGrid, published_tile, seen_blocks, tile_grid, tile_order
from pasa_jax.pallas_kernels.blocks import BlockIndex, block_lengths
from pasa_jax.policies.base import Context, Plan, Policy, check_density, density_blocks

_TILE = (6, 8, 8)  # of 384 tokens, the published code's


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlidingTile(Policy):
    """Every query tile sees the key tiles of a box around it, and all text; the rest is dropped.

    The sequence runs tile by tile. Along an axis of n tiles a window of w keeps w tiles, centred on
    the query's except near the ends, where the window stops and the query moves off its centre: all
    queries see equally many.

    The paper pads videos that its tile does not divide; here no token is added: tiles at the far
    ends have what is left there. A query block takes every key block that holds a key which any of
    its queries sees. That is the published mask where blocks divide tiles and tiles the grid;
    elsewhere a block lies in two tiles or more, and takes what either of them sees: more than the
    published mask, never less.

    The published code searches a window per layer, head and step among a few, on a list that the
    paper does not give in full; here all share one, as in the paper's training-free table.

    Attributes:
        density: share of the key blocks, in (0, 1]. Without `window` the box of odd sides, or whole
            axes, with most tiles of those that keep up to this share, text included; of equals the
            one that is most even in shares of the axes. At least the query's own tile.
        window: tiles of the box along frames, rows and columns; an even side counts as the next odd
            one, and none more than the grid has. None: by density; else that is not read.
        tile: frames, rows and columns of a tile, in tokens. None: the paper's (6, 8, 8), and on
            videos of fewer tokens than eight of these `grid.tile_of` a key block's.
        dense_prefix: the paper's 12 of 50 steps.
        block_q, block_kv: tokens of a query block and of a key block; of the published kernel the
            tile's 384.

    Raises:
        ValueError: a field is out of range.
    """

    density: float = 0.417  # 30 × 40 × 40 tokens of HunyuanVideo's, the training-free window
    window: tuple[int, int, int] | None = None
    tile: tuple[int, int, int] | None = None
    dense_prefix: float = 0.24
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        check_density("density", self.density)
        if self.window is not None and (len(self.window) != 3 or min(self.window) < 1):
            raise ValueError(f"window={self.window} must be three numbers of tiles, 1 or more")
        check_tile(self.tile)

    def max_budget(
        self, num_steps: int, num_blocks: int, curve: Sequence[float] | np.ndarray | None = None
    ) -> int:
        """What the density allows; with a window, which knows no grid here, all blocks.

        The true number depends on the grid; the plan's lists have it, and every step's record.
        """
        return num_blocks if self.window is not None else density_blocks(self.density, num_blocks)

    def token_order(self, grid: TokenGrid) -> np.ndarray | None:
        """Tile by tile."""
        return tile_order(grid, self._tile(grid))

    def plan(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        v: Float[Array, "B S N H"],
        context: Context,
        state: Any,
    ) -> tuple[Plan, Any]:
        """The same box for all heads, layers and steps."""
        lists = _lists(self, context.need_grid(self))
        return static_plan(lists, q, k, context, self.block_kv), state

    def _tile(self, grid: TokenGrid) -> tuple[int, int, int]:
        """Tokens of a tile along the axes."""
        return self.tile or published_tile(grid, _TILE, self.block_kv)


def check_tile(tile: tuple[int, int, int] | None) -> None:
    """Raises ValueError unless a tile has three sides of at least a token, or is None."""
    if tile is not None and (len(tile) != 3 or min(tile) < 1):
        raise ValueError(f"{tile=} must be three numbers of tokens, 1 or more")


class StaticLists(NamedTuple):
    """Lists that all batch rows and heads share, known before compilation.

    Attributes:
        ids: int32 [I, L], key block numbers in rising order.
        count: int32 [I], how many of a row are valid.
    """

    ids: np.ndarray
    count: np.ndarray


def static_lists(mask: Bool[np.ndarray, "I J"]) -> StaticLists:
    """Lists of the blocks that a mask holds, as long as its fullest row."""
    count = mask.sum(1, dtype=np.int32)
    ids = np.argsort(~mask, axis=1, kind="stable")[:, : count.max()].astype(np.int32)
    return StaticLists(ids, count)


def static_plan(
    lists: StaticLists,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    context: Context,
    block_kv: int,
) -> Plan:
    """The plan of constant lists, less the key blocks that are padding alone."""
    ids, count = jnp.asarray(lists.ids), jnp.asarray(lists.count)[None]
    shape = (q.shape[0], q.shape[2], *ids.shape)
    if context.kv_length is not None:
        live = block_lengths(k.shape[1], block_kv, context.kv_length, k.shape[0]) > 0
        count = _live_count(ids, count, live.sum(1, dtype=jnp.int32))
    count = jnp.broadcast_to(count[:, None], shape[:3])
    return Plan(BlockIndex(jnp.broadcast_to(ids[None, None], shape), count))


def _live_count(
    ids: Int[Array, "I L"], count: Int[Array, "1 I"], live: Int[Array, " B"]
) -> Int[Array, "B I"]:
    """Listed blocks below `live`, which stand first in their lists."""
    listed = jnp.arange(ids.shape[1], dtype=jnp.int32)[None, None] < count[..., None]
    return (listed & (ids[None] < live[:, None, None])).sum(2, dtype=jnp.int32)


@functools.lru_cache(maxsize=8)
def _lists(policy: SlidingTile, grid: TokenGrid) -> StaticLists:
    """The policy's boxes on a grid, in the order of `grid.tile_order`, and all text."""
    tile = policy._tile(grid)
    tiles = tile_grid(grid, tile)
    windows = [policy.window] if policy.window else _odd_windows(tiles)
    for window in windows:
        seen = functools.reduce(np.kron, map(_near, tiles, window))
        mask = seen_blocks(seen, grid, tile, policy.block_q, policy.block_kv)
        if mask.mean() <= policy.density + 1e-9:
            break
    return static_lists(mask)


def _near(size: int, side: int) -> Bool[np.ndarray, "n n"]:
    """Which tiles of an axis a query tile sees through a window of `side`, clamped at the ends."""
    reach = side // 2
    place = np.arange(size)[None, :]
    start = np.minimum(np.maximum(place.T - reach, 0), size - 2 * reach - 1)
    return (start <= place) & (place <= start + 2 * reach)


def _odd_windows(tiles: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """Windows of odd sides, or whole axes, from most tiles to one; of equals the evenest first."""
    sides = [sorted({*range(1, size + 1, 2), size}) for size in tiles]

    def rank(window):
        shares = [side / size for side, size in zip(window, tiles, strict=True)]
        return math.prod(window), min(shares), -max(shares)

    return sorted(itertools.product(*sides), key=rank, reverse=True)
