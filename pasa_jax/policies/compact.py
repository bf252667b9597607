"""Compact Attention (arXiv:2508.12969): windows per head and frame distance, searched offline."""

import bisect
import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pasa_jax import routing
from pasa_jax.calibration import (
    CurveKey,
    json_fields,
    json_key,
    json_number,
    json_typed,
    read_json,
    write_json,
)
from pasa_jax.grid import (
    TokenGrid,
    join_tiles,
    published_tile,
    seen_blocks,
    tile_grid,
    tile_order,
    tile_spans,
)
from pasa_jax.pallas_kernels.blocks import BlockIndex, block_lengths, num_blocks
from pasa_jax.policies.base import (
    AttentionShape,
    Context,
    Plan,
    Policy,
    check_density,
    dense_prefix_steps,
)
from pasa_jax.policies.sliding_tile import StaticLists, check_tile, static_lists, static_plan

TILE = (3, 8, 8)  # of 192 tokens
EMPTY = (-1, -1, -1, -1)
_MAX_TILES = 128  # along an axis: half-extents are int8
_MAX_BYTES = 1 << 25  # the masks of Wan 14B are a megabyte
_FORMAT = 2


@dataclasses.dataclass(frozen=True)
class CompactMasks:
    """Searched windows of every layer, step bucket, head and frame group.

    A window (a, b, c, d) lets a query tile see the key tiles with |dx| ≤ a and |dy| ≤ d, or
    |dx| ≤ c and |dy| ≤ b; (-1, -1, -1, -1) sees none. A rectangle has c = a and d = b, every other
    window c < a and d < b. Windows are cut off at the video's edges. Masks that are `exact` hold in
    place of a window the largest |dy| that is seen at each |dx|, -1 for none: any union of windows.

    Attributes:
        key: the setting they were searched in.
        tile: frames, rows and columns of a tile, in tokens; at the grid's far ends what is left.
        first: the first sparse step, and the first of bucket 0.
        reuse: consecutive steps that share a bucket.
        signed: frame groups are t' − t in −(Nt−1)..Nt−1, the key's less the query's tile; False:
            |t' − t| in 0..Nt−1.
        min_recall, max_cost: what the search was asked for (`compact_search.Criterion`), resolved.
        prompts: how many the windows cover.
        shape: [layers, buckets, heads, groups, 4], or Nx in place of 4 where `exact`.
        windows: int8 of that shape.
        exact: whether they are unions, not their cover by two windows.

    Raises:
        ValueError: a field out of range, or windows that do not fit the grid.
    """

    key: CurveKey
    tile: tuple[int, int, int]
    first: int
    reuse: int
    signed: bool
    min_recall: float
    max_cost: float
    prompts: int
    shape: tuple[int, int, int, int, int] = dataclasses.field(repr=False)
    windows: bytes = dataclasses.field(repr=False)
    exact: bool = False

    def __post_init__(self):
        for name in ("reuse", "prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.first < self.key.steps:
            raise ValueError(f"first={self.first} must be from 0 to {self.key.steps - 1}")
        buckets = -(-(self.key.steps - self.first) // self.reuse)
        groups = int(group_index(self.tiles[0], self.signed).max()) + 1
        last = self.tiles[2] if self.exact else 4
        want = (self.shape[0], buckets, self.shape[2], groups, last)
        if self.shape != want or len(self.windows) != math.prod(want) or not self.windows:
            raise ValueError(
                f"windows of {self.shape}, {len(self.windows)} bytes, must be [layers, buckets, "
                f"heads, groups, {last}] = {want}"
            )
        if self.exact:
            self._check_unions()
        else:
            self._check_windows()

    def _check_unions(self) -> None:
        rows, table = self.tiles[1], self.table
        bad = ((table < -1) | (table >= rows)).any(-1) | (table[..., 1:] > table[..., :-1]).any(-1)
        near = near_group(self.tiles[0], self.signed)
        bad[..., near] |= table[..., near, 0] < 0  # a tile must see itself
        if bad.any():
            place = tuple(np.argwhere(bad)[0].tolist())
            raise ValueError(
                f"union {table[place].tolist()} of layer, bucket, head, group {place} must "
                f"fall from at most {rows - 1} to no less than -1, and see the query's tile"
            )

    def _check_windows(self) -> None:
        a, b, c, d = np.moveaxis(self.table, -1, 0)
        _, rows, columns = self.tiles
        live = (0 <= c) & (0 <= d) & (a < columns) & (b < rows)
        live &= ((c < a) & (d < b)) | ((c == a) & (d == b))
        empty = (self.table == -1).all(-1)
        empty[..., near_group(self.tiles[0], self.signed)] = False  # a tile must see itself
        if not (live | empty).all():
            place = tuple(np.argwhere(~(live | empty))[0].tolist())
            raise ValueError(
                f"window {tuple(self.table[place].tolist())} of layer, bucket, head, group {place} "
                f"must be (a, b, c, d) with c < a < {columns} and d < b < {rows}, or c = a and "
                "d = b, or -1 throughout in another frame than the query's"
            )

    @functools.cached_property
    def table(self) -> np.ndarray:
        """int8 of `shape`."""
        return np.frombuffer(self.windows, np.int8).reshape(self.shape)

    @functools.cached_property
    def reach(self) -> np.ndarray:
        """int8 [layers, buckets, heads, groups, Nx], see `window_reach`."""
        return self.table if self.exact else window_reach(self.table, self.tiles[2])

    @functools.cached_property
    def tiles(self) -> tuple[int, int, int]:
        """Nt, Ny, Nx: tiles along the axes."""
        tiles = tile_grid(self.key.grid, self.tile)
        if max(tiles) > _MAX_TILES:
            raise ValueError(f"tile={self.tile} makes {tiles=}, must be at most {_MAX_TILES}")
        return tiles

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """int32 [layers, buckets, heads, Nt, Ny, Nx], key tiles that each query tile sees."""
        return visible_tiles(self.reach, self.tiles, self.signed)

    @property
    def density(self) -> float:
        """Share of the video's key tiles seen in sparse steps, mean over layers, steps, heads."""
        bucket = (np.arange(self.first, self.key.steps) - self.first) // self.reuse
        return float(self.counts[:, bucket].mean() / math.prod(self.tiles))

    def check(self, key: CurveKey) -> None:
        """Raises ValueError, naming both settings, unless the masks were searched in this one."""
        if self.key != key:
            raise ValueError(
                f"the masks were searched for {self.key}, not for {key}: search for it with "
                "`pasa-jax search compact`, or sample without masks"
            )

    def save(self, path: str | os.PathLike) -> None:
        """Writes JSON, beside the target first, so that no reader sees half a file."""
        record = dataclasses.asdict(self)
        del record["shape"]
        record["windows"] = self.table.tolist()
        write_json(path, {"format": _FORMAT, **record})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "CompactMasks":
        """Reads what `save` wrote.

        Raises:
            ValueError: the file does not hold masks; the message says what is wrong.
            OSError: the file cannot be read.
        """
        return read_json(path, _MAX_BYTES, _from_json, "does not hold masks")


def _from_json(record: Any) -> CompactMasks:
    """Masks from parsed JSON, every field of its type; ValueError says which is not."""
    names = {field.name for field in dataclasses.fields(CompactMasks)} - {"shape"}
    fields = json_fields(record, "the file", names | {"format"})
    if fields["format"] != _FORMAT:
        raise ValueError(f"format={fields['format']!r} must be {_FORMAT}")
    tile = tuple(json_typed("tile", size, int) for size in json_typed("tile", fields["tile"], list))
    if len(tile) != 3:
        raise ValueError(f"{tile=} must be three numbers")
    table = np.asarray(json_typed("windows", fields["windows"], list))
    if table.ndim != 5 or table.dtype.kind != "i" or not (abs(table) < 128).all():
        raise ValueError("windows must be whole numbers [layers, buckets, heads, groups, 4 or Nx]")
    return CompactMasks(
        key=json_key(fields["key"]),
        tile=tile,
        **{name: json_typed(name, fields[name], int) for name in ("first", "reuse", "prompts")},
        **{name: json_typed(name, fields[name], bool) for name in ("signed", "exact")},
        **{name: json_number(name, fields[name]) for name in ("min_recall", "max_cost")},
        shape=table.shape,
        windows=table.astype(np.int8).tobytes(),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compact(Policy):
    """Each head sees two rectangles of tiles around the query's, by frame distance; no tail.

    The sequence runs tile by tile, without padding: tiles at the far ends have what is left there.
    A query block takes every key block that holds a key which any of its queries sees. That is the
    windows' mask where blocks divide tiles and tiles the grid; elsewhere a block lies in two tiles
    or more, and takes what either of them sees: more than the mask, never less.

    The masks come from `pasa-jax search compact` and belong to one model, grid and schedule; one
    mask serves `masks.reuse` steps. The first of them follows the masks' own dense steps; under a
    shorter `dense_prefix` their first bucket serves the steps before as well.

    The paper publishes neither tile nor frame groups; here a tile has 192 tokens, 3 × 8 × 8, and a
    group is a distance in tiles of frames. What else it leaves open stands at
    `compact_search.Criterion`.

    Attributes:
        masks: searched windows. None: a plain local window for all layers, heads and steps.
        density: least share of the key blocks in the local window, text included, which grows strip
            by strip around the query's tile. With masks, whose density is their own, not read.
        tile: frames, rows and columns of the local window's tiles, in tokens. None: (3, 8, 8), and
            on videos of fewer tokens than eight of these `grid.tile_of` a key block's. Masks bring
            their own, and then this is not read.
        dense_prefix: the paper's 15 of 50 steps.
        block_q, block_kv: tokens of a query block and of a key block; of the published kernel a
            tile's.

    Raises:
        ValueError: a field is out of range.
    """

    masks: CompactMasks | None = None
    density: float = 0.38  # what the paper's masks keep of HunyuanVideo, sparsity 62.36 %
    tile: tuple[int, int, int] | None = None
    dense_prefix: float = 0.3
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        check_density("density", self.density)
        check_tile(self.tile)

    def check_setting(self, key: CurveKey) -> None:
        """Raises ValueError for masks of another setting."""
        if self.masks is not None:
            self.masks.check(key)

    def budgets(
        self, num_steps: int, num_blocks: int, curve: Sequence[float] | np.ndarray | None = None
    ) -> np.ndarray:
        """int32 [num_steps], key blocks that the masks keep, mean over layers, heads, query blocks.

        Rounded up. Without masks density · num_blocks, which the window reaches or exceeds; the
        exact number depends on the grid, and every step's record has it.
        """
        if self.masks is None:
            sparse = np.full(num_steps, self.max_budget(num_steps, num_blocks), np.int32)
        else:
            mean = np.ceil(self._counts().mean((0, 2, 3))).astype(np.int32)
            sparse = mean[self._bucket(np.arange(num_steps))]
        sparse[: dense_prefix_steps(self.dense_prefix, num_steps)] = num_blocks
        return sparse

    def max_budget(
        self, num_steps: int, num_blocks: int, curve: Sequence[float] | np.ndarray | None = None
    ) -> int:
        """The most key blocks that any query block sees; without masks the window's least."""
        if self.masks is None:
            return math.ceil(round(self.density * num_blocks, 6))
        return int(self._counts().max())

    def token_order(self, grid: TokenGrid) -> np.ndarray | None:
        """Tile by tile."""
        return tile_order(grid, self._tile(grid))

    def init_state(self, shape: AttentionShape) -> Any:
        """(): masks are constants.

        Raises:
            ValueError: the masks are of another number of layers or heads, or of another grid.
        """
        if self.masks is not None:
            self._tile(shape.grid)
            layers, _, heads, _, _ = self.masks.shape
            if (layers, heads) != (shape.layers, shape.heads):
                raise ValueError(
                    f"masks of {layers=} and {heads=} must have the model's {shape.layers} "
                    f"layers and {shape.heads} heads"
                )
        return ()

    def plan(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        v: Float[Array, "B S N H"],
        context: Context,
        state: Any,
    ) -> tuple[Plan, Any]:
        """The blocks of the layer's and bucket's windows, and all text blocks."""
        grid, masks = context.need_grid(self), self.masks
        if masks is None:
            lists = _local_lists(self, grid)
            return static_plan(lists, q, k, context, self.block_kv), state
        slots, sizes = int(self._counts().max()), (self.block_q, self.block_kv)

        def lists(reach: Int[Array, "G Nx"]) -> BlockIndex:
            seen = tile_mask(reach, masks.tiles, masks.signed)
            mask = seen_blocks(seen, grid, masks.tile, *sizes)
            return routing.listed_blocks(mask[None, None], slots)

        # One head at a time: all blocks by all blocks of every head would be large.
        reach = jnp.asarray(masks.reach)[context.layer, self._bucket(context.step)]
        ids, count = (x[:, 0, 0][None] for x in jax.lax.map(lists, reach))
        shape = (q.shape[0], *count.shape[1:])
        count = jnp.broadcast_to(count, shape) - self._padding(k, context, grid)
        return Plan(BlockIndex(jnp.broadcast_to(ids, (*shape, slots)), count)), state

    def _padding(self, k: jax.Array, context: Context, grid: TokenGrid) -> Int[Array, "_ 1 1"]:
        """Text blocks of padding alone, which stand last in every list."""
        length = block_lengths(k.shape[1], self.block_kv, context.kv_length, k.shape[0])
        dead = (length == 0) & grid.text_blocks(self.block_kv)[None, :]
        return dead.sum(1, dtype=jnp.int32)[:, None, None]

    def _counts(self) -> Int[np.ndarray, "layers buckets N I"]:
        """Key blocks of every list that the masks make."""
        return _block_counts(self.masks, self.block_q, self.block_kv)

    def _bucket(self, step: Any) -> Any:
        """The bucket of a step; of steps before the masks' first one, bucket 0."""
        masks = self.masks
        return (step - masks.first).clip(0, masks.key.steps - 1 - masks.first) // masks.reuse

    def _tile(self, grid: TokenGrid) -> tuple[int, int, int]:
        """Tokens of a tile along the axes."""
        if self.masks is None:
            return self.tile or published_tile(grid, TILE, self.block_kv)
        if self.masks.key.grid != grid:
            raise ValueError(f"masks for {self.masks.key.grid} must be for {grid}")
        return self.masks.tile


@functools.lru_cache(maxsize=8)
def _block_counts(
    masks: CompactMasks, block_q: int, block_kv: int
) -> Int[np.ndarray, "layers buckets N I"]:
    """Key blocks that each query block takes, text included; int32."""
    grid = masks.key.grid
    rows, text = num_blocks(grid.num_tokens, block_q), grid.text_blocks(block_kv)
    query = tile_spans(grid, masks.tile, block_q)[:rows]
    key = tile_spans(grid, masks.tile, block_kv)[~text]
    # Blocks in the same tiles are counted once.
    query, place = np.unique(query, axis=0, return_inverse=True)
    key, times = np.unique(key, axis=0, return_counts=True)

    def count(reach):
        seen = tile_mask(reach, masks.tiles, masks.signed)
        return join_tiles(seen, query, key) @ times

    reach = masks.reach
    counts = np.array([count(head) for head in reach.reshape(-1, *reach.shape[3:])])
    counts = counts[:, place.reshape(-1)] + text.sum()
    return counts.astype(np.int32).reshape(*reach.shape[:3], rows)


@functools.lru_cache(maxsize=8)
def _local_lists(policy: Compact, grid: TokenGrid) -> StaticLists:
    """The local window's blocks, and all text."""
    tile = policy._tile(grid)
    tiles = tile_grid(grid, tile)

    def mask(table):
        seen = tile_mask(window_reach(table, tiles[2]), tiles, False)
        return seen_blocks(seen, grid, tile, policy.block_q, policy.block_kv)

    tables = local_windows(tiles)
    enough = bisect.bisect_left(
        range(len(tables)), True, key=lambda i: mask(tables[i]).mean() >= policy.density - 1e-9
    )
    return static_lists(mask(tables[enough]))


def group_index(frames: int, signed: bool) -> np.ndarray:
    """int [Nt, Nt], the frame group of query tile frame t and key tile frame t'."""
    distance = np.arange(frames)[None, :] - np.arange(frames)[:, None]
    return distance + frames - 1 if signed else abs(distance)


def near_group(frames: int, signed: bool) -> int:
    """The group of the query's own tile frame."""
    return int(group_index(frames, signed)[0, 0])


def window_reach(windows: Int[np.ndarray, "*M 4"], columns: int) -> Int[np.ndarray, "*M Nx"]:
    """The largest |dy| that windows hold at each |dx|; -1: none. The union's is the larger one."""
    a, b, c, d = np.moveaxis(windows[..., None], -2, 0)
    x = np.arange(columns)
    return np.where(x <= c, b, np.where(x <= a, d, -1)).astype(windows.dtype)


def tile_mask(
    reach: Int[np.ndarray | Array, "G Nx"], tiles: tuple[int, int, int], signed: bool
) -> Bool[np.ndarray | Array, "M M"]:
    """Which key tiles every query tile sees, both in the order of `grid.tile_order`.

    Args:
        reach: see `window_reach`, of each frame group.
        tiles: Nt, Ny, Nx.
        signed: whether groups tell earlier from later frames.
    """
    frames, rows, columns = tiles
    dy, dx = (abs(x[None, :] - x[:, None]) for x in (np.arange(rows), np.arange(columns)))
    reach = reach.astype(np.int32)[group_index(frames, signed)][..., dx]  # [Nt, Nt, Nx, Nx]
    seen = dy.astype(np.int32)[None, None, :, :, None, None] <= reach[:, :, None, None]
    return einops.rearrange(seen, "t s y v x u -> (t y x) (s v u)")


def visible_tiles(
    reach: Int[np.ndarray, "*M G Nx"], tiles: tuple[int, int, int], signed: bool
) -> Int[np.ndarray, "*M Nt Ny Nx"]:
    """Key tiles that each query tile sees, int32; arguments as of `tile_mask`."""
    frames, rows, columns = tiles
    y, x, reach = np.arange(rows), np.arange(columns), reach.astype(np.int32)[..., None]
    tall = np.minimum(y + reach, rows - 1) - np.maximum(y - reach, 0) + 1
    tall = np.maximum(tall, 0)  # [..., G, Nx, Ny], rows seen at each |dx|
    times = (abs(x[None, :] - x[:, None])[..., None] == x).sum(1, dtype=np.int32)
    plane = np.einsum("xr,...gry->...gyx", times, tall.astype(np.int32))
    groups = group_index(frames, signed)
    times = (groups[..., None] == np.arange(plane.shape[-3])).sum(1, dtype=np.int32)
    return np.einsum("tg,...gyx->...tyx", times, plane)


def local_windows(tiles: tuple[int, int, int]) -> Int[np.ndarray, "steps G 4"]:
    """Boxes around the query's tile, from that tile alone to all tiles, growing strip by strip.

    The next strip is the nearest one: its distance is that in frames plus that in columns or rows,
    each as a share of the grid's.
    """
    frames, rows, columns = tiles
    strips = [(g / frames, g, axis, 0) for g in range(1, frames) for axis in (0, 1)]
    for axis, size in enumerate((columns, rows)):
        strips += [
            (g / frames + r / size, g, axis, r) for g in range(frames) for r in range(1, size)
        ]
    table = np.full((frames, 4), -1, np.int32)
    table[0] = 0
    tables = [table]
    for _, group, axis, reach in sorted(strips):
        table = table.copy()
        table[group, axis::2] = reach
        tables.append(table)
    return np.stack(tables)
