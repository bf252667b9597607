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

from pasa_jax.calibration import CurveKey
from pasa_jax.grid import TokenGrid, tile_of, tile_order
from pasa_jax.pallas_kernels.blocks import BlockIndex, block_lengths
from pasa_jax.policies.base import Context, Plan, Policy, check_density, density_blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlidingTile(Policy):
    """Every query tile sees the key tiles of a box around it, and all text; the rest is dropped.

    A query block and a key block are one tile of tokens, and the sequence runs tile by tile. Along
    an axis of n tiles a window of w keeps w tiles, centred on the query's except near the ends,
    where the window stops and the query moves off its centre: all queries see equally many.

    The published code searches a window per layer, head and step among a few, on a list that the
    paper does not give in full; here all share one, as in the paper's training-free table.

    Attributes:
        density: share of the key blocks, in (0, 1]. Without `window` the box of odd sides, or whole
            axes, that keeps most tiles up to this share, text included; of equals the one that is
            most even in shares of the axes. At least the query's own tile.
        window: tiles of the box along frames, rows and columns; an even side counts as the next odd
            one, and none more than the grid has. None: by density; else that is not read.
        tile: frames, rows and columns of a tile, of block_kv tokens, which divide the grid's; None
            takes `grid.tile_of`'s, for 384 tokens of 30 × 48 × 80 the paper's (6, 8, 8).
        dense_prefix: the paper's 12 of 50 steps.
        block_q, block_kv: tokens of a tile; equal.

    Raises:
        ValueError: a field is out of range.
    """

    density: float = 0.417  # 30 × 40 × 40 tokens of HunyuanVideo's, the training-free window
    window: tuple[int, int, int] | None = None
    tile: tuple[int, int, int] | None = None
    dense_prefix: float = 0.24
    dense_layers: tuple[int, ...] = ()
    block_q: int = 384
    block_kv: int = 384

    def __post_init__(self):
        super().__post_init__()
        check_density("density", self.density)
        if self.block_q != self.block_kv:
            raise ValueError(
                f"block_q={self.block_q} must be block_kv={self.block_kv}: a block is a tile"
            )
        if self.window is not None and (len(self.window) != 3 or min(self.window) < 1):
            raise ValueError(f"window={self.window} must be three numbers of tiles, 1 or more")

    def check_setting(self, key: CurveKey) -> None:
        """Raises ValueError for a grid that no such tile divides."""
        self.token_order(key.grid)

    def max_budget(
        self, num_steps: int, num_blocks: int, curve: Sequence[float] | np.ndarray | None = None
    ) -> int:
        """What the density allows; with a window, which knows no grid here, all blocks.

        The true number depends on the grid; the plan's lists have it, and every step's record.
        """
        return num_blocks if self.window is not None else density_blocks(self.density, num_blocks)

    def token_order(self, grid: TokenGrid) -> np.ndarray | None:
        """Whole tiles one after another.

        Raises:
            ValueError: no tile of block_kv tokens divides the grid, or `tile` does not or is of
                another number of tokens.
        """
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
        if self.tile is None:
            return tile_of(grid, self.block_kv)
        # Not in __post_init__: the command line builds a policy before it knows the block.
        if math.prod(self.tile) != self.block_kv:
            raise ValueError(f"tile={self.tile} must have block_kv={self.block_kv} tokens")
        return self.tile


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
    tiles = tuple(size // part for size, part in zip(grid.sizes, tile, strict=True))
    blocks = grid.num_blocks(policy.block_kv)
    text = blocks - math.prod(tiles)
    window = policy.window or _even_window(tiles, policy.density * blocks - text + 1e-6)
    mask = np.ones((1, 1), bool)
    for size, side in zip(tiles, window, strict=True):
        mask = np.kron(mask, _near(size, side))
    return static_lists(np.pad(mask, ((0, 0), (0, text)), constant_values=True))


def _near(size: int, side: int) -> Bool[np.ndarray, "n n"]:
    """Which tiles of an axis a query tile sees through a window of `side`, clamped at the ends."""
    reach = side // 2
    place = np.arange(size)[None, :]
    start = np.minimum(np.maximum(place.T - reach, 0), size - 2 * reach - 1)
    return (start <= place) & (place <= start + 2 * reach)


def _even_window(tiles: tuple[int, int, int], room: float) -> tuple[int, int, int]:
    """Odd sides, or whole axes, that keep most tiles up to `room`; of equals the most even."""
    sides = [sorted({*range(1, size + 1, 2), size}) for size in tiles]
    fitting = [window for window in itertools.product(*sides) if math.prod(window) <= room]

    def rank(window):
        shares = [side / size for side, size in zip(window, tiles, strict=True)]
        return math.prod(window), min(shares), -max(shares)

    return max(fitting, key=rank, default=(1, 1, 1))
