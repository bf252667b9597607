"""The offline search of Compact Attention's masks (arXiv:2508.12969): dense runs → windows."""

import dataclasses
import hashlib
import itertools
import json
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num
from tqdm import tqdm

from pasa_jax.grid import TokenGrid, published_tile, tile_grid, tile_order, tile_spans
from pasa_jax.pallas_kernels import api
from pasa_jax.pallas_kernels.blocks import num_blocks
from pasa_jax.pipeline import Pipeline, recorded_steps
from pasa_jax.policies import AttentionShape, CompactMasks, Context, Policy
from pasa_jax.policies.base import check_choice, check_share, dense_prefix_steps
from pasa_jax.policies.compact import EMPTY, TILE, near_group, window_reach
from pasa_jax.policies.sliding_tile import check_tile
from pasa_jax.settings import Card, Settings, check_prompts, check_seeds
from pasa_jax.video import atomic

# The paper's 0.011 for Wan, at 420 tiles: a strip goes while it is lighter than 4.62 times as many
# tiles of even attention.
_COST_OF_MEAN = 0.011 * 420
_PART = 32  # tokens of a recorded block where none fits the tiles: finer maps blur less

Window = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Criterion:
    """How far windows shrink, and what one mask serves.

    Attributes:
        min_recall: least share of the attention's mass that each prompt's own windows keep, τ.
        max_cost: most recall that one more unit of dropped tiles may cost, λ. None is 0.011, the
            paper's for Wan; with "tile" times 420, the tiles it was stated for, over the video's.
        cost_unit: "tile", one key tile per query tile; or "share", all tiles of the video, a
            reading that cannot reach the published sparsity.
        recall_scope: "head" counts the mass of all frame groups together, so that distant ones may
            vanish; "group" holds each group to `min_recall` of its own.
        signed: tell keys of earlier from keys of later frames; False: by distance alone.
        frame_groups: the first distance of each frame group, rising from 0, in tiles; those beyond
            the video fall away. Empty: each distance is a group. Sign does not split the first.
        exact_union: merge prompts' windows to their union; False: to the smallest two windows over
            it, the family of the paper.
        reuse: consecutive steps that share a mask, searched at the first of them.
        dense_prefix: share of the steps that stay dense and get no mask.
        tile: frames, rows and columns of a tile, in tokens; None is (3, 8, 8), and for videos of
            fewer tokens than eight of these the most compact one of the model's block size.

    Raises:
        ValueError: a field is out of range.

    The paper leaves open: the unit of λ, recall's scope, frame groups, tile, reuse interval (here 5
    steps) and the prompts, of which four or more, other than those to be made, are advisable.
    """

    min_recall: float = 0.9
    max_cost: float | None = None
    cost_unit: Literal["tile", "share"] = "tile"
    recall_scope: Literal["head", "group"] = "head"
    signed: bool = False
    frame_groups: tuple[int, ...] = ()
    exact_union: bool = False
    reuse: int = 5
    dense_prefix: float = 0.3
    tile: tuple[int, int, int] | None = None

    def __post_init__(self):
        check_share("min_recall", self.min_recall)
        check_share("dense_prefix", self.dense_prefix)
        check_choice("cost_unit", self.cost_unit, ("tile", "share"))
        check_choice("recall_scope", self.recall_scope, ("head", "group"))
        if self.max_cost is not None and not 0 <= self.max_cost < math.inf:
            raise ValueError(f"max_cost={self.max_cost!r} must be 0 or more and finite")
        if self.reuse < 1:
            raise ValueError(f"reuse={self.reuse} must be at least 1 step")
        check_tile(self.tile)
        starts = self.frame_groups
        if starts and (starts[0] != 0 or any(b <= a for a, b in itertools.pairwise(starts))):
            raise ValueError(f"frame_groups={starts!r} must rise from 0")

    def groups(self, frames: int) -> Int[np.ndarray, " G"]:
        """The number of the group of each frame distance, signed or not."""
        near = np.arange(frames)
        if self.frame_groups:
            near = np.searchsorted(self.frame_groups, near, side="right") - 1
        return np.concatenate([-near[:0:-1], near]) + near[-1] if self.signed else near

    def cost_per_tile(self, num_tiles: int) -> float:
        """λ of "tile", with None and the unit resolved."""
        if self.cost_unit == "tile":
            return _COST_OF_MEAN / num_tiles if self.max_cost is None else self.max_cost
        return (0.011 if self.max_cost is None else self.max_cost) / num_tiles


class Found(NamedTuple):
    """Windows of many heads, and the share of their video mass that these keep.

    Attributes:
        windows: int8 [..., groups, 4].
        recall: f64 [...].
    """

    windows: Int[np.ndarray, "*M G 4"]
    recall: Float[np.ndarray, "*M"]


def contract(
    mass: Float[np.ndarray, "G dy dx"],
    size: Float[np.ndarray, "G dy dx"],
    frames: int,
    criterion: Criterion,
    max_cost: float,
) -> tuple[list[Window], float]:
    """Shrinks full windows strip by strip, the cheapest first, far groups before near ones.

    Args:
        mass: share of a head's attention by frame group and offset (2Ny−1 by 2Nx−1); sums to 1.
        size: mean key tiles per query tile at each offset.
        frames: Nt, or of coarser groups those of one sign.
        criterion: τ, its scope, and whether groups are signed.
        max_cost: λ per key tile.

    Returns:
        A window for each group, and the mass that they keep.
    """
    groups, height, width = mass.shape
    rows, columns = height // 2 + 1, width // 2 + 1
    near = near_group(frames, criterion.signed)
    own = criterion.recall_scope == "group"
    total = mass.sum((1, 2)) if own else np.ones(groups)
    loss, gain = (_strips(fold(x)) for x in (mass, size))
    windows = [(columns - 1, rows - 1) * 2] * groups
    flags = [[True] * 4 for _ in range(groups)]
    left = [1.0] * groups  # only the first counts where recall is the whole head's
    far_first = sorted(range(groups), key=lambda g: (-abs(g - near), g))
    while any(map(any, flags)):
        for g in far_first:
            choice = _cheapest(windows[g], flags[g], loss[g], gain[g], g == near)
            if choice is None:
                continue
            cost, lost, move, window = choice
            scope = g if own else 0
            lost = lost / total[g] if total[g] > 0 else 0.0
            cost = cost / total[g] if total[g] > 0 else 0.0
            if left[scope] - lost >= criterion.min_recall and cost <= max_cost:
                windows[g] = window
                left[scope] -= lost
            else:
                flags[g][move] = False
    kept = (window_offsets(np.array(windows), rows, columns) * mass).sum()
    return windows, float(kept)


def _cheapest(
    window: Window, flags: list[bool], loss: Any, gain: Any, near: bool
) -> tuple[float, float, int, Window] | None:
    """Cost, lost mass, number and result of the best move that is left; clears illegal flags."""
    best = None
    for move in range(4):
        if not flags[move]:
            continue
        shrunk = shrink(window, move)
        if shrunk is None or (near and shrunk[0] == EMPTY):
            flags[move] = False
            continue
        smaller, (axis, line, start, stop) = shrunk
        lost = loss[axis][line][stop] - loss[axis][line][start]
        cost = lost / (gain[axis][line][stop] - gain[axis][line][start])
        if best is None or cost < best[0]:
            best = cost, lost, move, smaller
    return best


def shrink(window: Window, move: int) -> tuple[Window, tuple[int, int, int, int]] | None:
    """A window with one strip less, and that strip; None where the move is not possible.

    Args:
        window: (a, b, c, d), see `CompactMasks`.
        move: 0 shortens the wide arms, 1 the tall ones; 2 thins the tall arms, 3 the wide ones; of
            a rectangle, 2 and 3 take its corners. One tile alone goes by 0 or 1.

    Returns:
        The smaller window; and (0, x, y from, y to) for a strip of columns |dx| = x, or
        (1, y, x from, x to) for one of rows |dy| = y, ends exclusive.
    """
    a, b, c, d = window
    rectangle = c == a
    if move == 0 and rectangle:
        if a == 0 and b == 0:
            return EMPTY, (0, 0, 0, 1)
        return ((a - 1, b, a - 1, b), (0, a, 0, b + 1)) if a > 0 else None
    if move == 1 and rectangle:
        if a == 0 and b == 0:
            return EMPTY, (1, 0, 0, 1)
        return ((a, b - 1, a, b - 1), (1, b, 0, a + 1)) if b > 0 else None
    if rectangle:
        return ((a, b, a - 1, b - 1), (0, a, b, b + 1)) if a > 0 and b > 0 else None
    if move == 0:
        return ((a - 1, b, c, d) if a - 1 > c else (c, b, c, b)), (0, a, 0, d + 1)
    if move == 1:
        return ((a, b - 1, c, d) if b - 1 > d else (a, d, a, d)), (1, b, 0, c + 1)
    if move == 2:
        return ((a, b, c - 1, d), (0, c, d + 1, b + 1)) if c > 0 else None
    return ((a, b, c, d - 1), (1, d, c + 1, a + 1)) if d > 0 else None


def fold(table: Num[np.ndarray, "*G dy dx"]) -> Num[np.ndarray, "*G Ny Nx"]:
    """Sums over the signs of dy and dx: entry [y, x] is that of |dy| = y, |dx| = x."""
    rows, columns = table.shape[-2] // 2, table.shape[-1] // 2
    half = table[..., rows:, :].copy()
    half[..., 1:, :] += table[..., :rows, :][..., ::-1, :]
    quarter = half[..., columns:].copy()
    quarter[..., 1:] += half[..., :columns][..., ::-1]
    return quarter


def _strips(quarter: np.ndarray) -> list[list[list[list[float]]]]:
    """By group: running sums down each column, and along each row, a zero first."""
    # Plain sums of one strip: exactly 0 for a strip without mass, which λ = 0 may drop.
    down = np.cumsum(np.moveaxis(quarter, -1, -2), axis=-1)
    along = np.cumsum(quarter, axis=-1)
    pad = ((0, 0), (0, 0), (1, 0))
    down, along = (np.pad(x, pad).tolist() for x in (down, along))
    return [list(pair) for pair in zip(down, along, strict=True)]


def offset_counts(tiles: tuple[int, int, int]) -> Int[np.ndarray, "dt dy dx"]:
    """How many query tiles have a key tile at each offset, from −(n−1) to n−1 along each axis."""
    axes = (n - abs(np.arange(1 - n, n)) for n in tiles)
    return np.einsum("t,y,x->tyx", *axes)


def grouped(table: np.ndarray, signed: bool) -> np.ndarray:
    """[..., dt, dy, dx] summed over the frame offsets of each group: [..., G, dy, dx]."""
    if signed:
        return table
    last = table.shape[-3] // 2
    half = table[..., last:, :, :].copy()
    half[..., 1:, :, :] += table[..., :last, :, :][..., ::-1, :, :]
    return half


def window_offsets(
    windows: Int[np.ndarray, "*M 4"], rows: int, columns: int
) -> Bool[np.ndarray, "*M dy dx"]:
    """Which offsets in the plane a window holds."""
    a, b, c, d = np.moveaxis(windows.astype(int)[..., None, None], -3, 0)
    y = abs(np.arange(1 - rows, rows))[:, None]
    x = abs(np.arange(1 - columns, columns))[None, :]
    return ((x <= a) & (y <= d)) | ((x <= c) & (y <= b))


def merge(
    tables: list[Int[np.ndarray, "*M G 4"]], tiles: tuple[int, int, int], signed: bool
) -> Int[np.ndarray, "*M G 4"]:
    """The smallest windows that hold all of the tables', group by group; int8.

    The union of windows is a staircase, see `union`. Of the windows over it the one with fewest
    tiles is taken, of equals the thinnest.
    """
    columns = tiles[2]
    reach = union(tables, columns)

    def size(table):
        return window_pairs(window_reach(table, columns), tiles, signed)

    a, b = (reach >= 0).sum(-1) - 1, reach[..., 0]
    best = np.stack([a, b, a, b], -1)
    fewest = size(best)
    for c in range(columns - 1):
        d = reach[..., c + 1]
        cross = np.stack([a, b, np.full_like(a, c), d], -1)
        better = (c < a) & (d < b) & (size(cross) < fewest)
        best, fewest = (
            np.where(better[..., None], cross, best),
            np.where(better, size(cross), fewest),
        )
    return best.astype(np.int8)


def union(tables: list[Int[np.ndarray, "*M G 4"]], columns: int) -> Int[np.ndarray, "*M G Nx"]:
    """What any of the windows holds: at each |dx| up to some |dy|, no further than at a smaller."""
    return np.max([window_reach(table, columns) for table in tables], axis=0)


def window_pairs(
    reach: Int[np.ndarray, "*M G Nx"], tiles: tuple[int, int, int], signed: bool
) -> Int[np.ndarray, "*M G"]:
    """How many pairs of tiles, a query's and a key's, windows or their unions hold."""
    counts = fold(grouped(offset_counts(tiles), signed))
    down = np.pad(np.cumsum(np.moveaxis(counts, -1, -2), axis=-1), ((0, 0), (0, 0), (1, 0)))
    group = np.arange(len(counts))[:, None]
    return down[group, np.arange(tiles[2]), reach.astype(int) + 1].sum(-1)


def similarity(
    one: Int[np.ndarray, "*M G 4"],
    other: Int[np.ndarray, "*M G 4"],
    tiles: tuple[int, int, int],
    signed: bool,
) -> Float[np.ndarray, "*M"]:
    """|A ∩ B| / |A ∪ B| of the tiles that two heads' windows hold, in [0, 1].

    Source: Compact Attention (arXiv:2508.12969), by which masks belong to heads, not to prompts.
    """
    one, other = (window_reach(x, tiles[2]) for x in (one, other))
    both, either = (
        window_pairs(join(one, other), tiles, signed).sum(-1) for join in (np.minimum, np.maximum)
    )
    return both / either


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorder(Policy):
    """Dense attention that leaves in its state how much mass lies at each offset between tiles.

    The state is f32 [layers, B, N, 2Nt−1, 2Ny−1, 2Nx−1]: each entry the mass that a query gives the
    keys of the tile at that offset from its own, mean over all queries, where the mass of the
    video's keys is 1. It is the only thing the search needs, as windows know offsets alone.

    Masses are taken by blocks of tokens. Those of a block in several tiles are shared among them by
    tokens, an approximation; they are exact where every block lies in one tile.

    Attributes:
        tile: frames, rows and columns of a tile, in tokens.
        block_q, block_kv: tokens of a block by which masses are taken.
    """

    tile: tuple[int, int, int]
    dense_layers: tuple[int, ...] = ()

    def token_order(self, grid: Any) -> np.ndarray | None:
        """Tile by tile."""
        return tile_order(grid, self.tile)

    def init_state(self, shape: AttentionShape) -> Float[Array, "layers B N dt dy dx"]:
        """Zeros."""
        offsets = (2 * n - 1 for n in tile_grid(shape.grid, self.tile))
        return jnp.zeros((shape.layers, shape.batch, shape.heads, *offsets), jnp.float32)

    def search(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        v: Float[Array, "B S N H"],
        context: Context,
        state: Any,
    ) -> tuple[Float[Array, "B T N H"], Any]:
        """Dense output, and this step's masses in place of the state."""
        grid, length = context.need_grid(self), context.kv_length
        out, lse = api.dense_attention(q, k, v, kv_length=length, return_lse=True)
        if grid.text:
            k, v = (x[:, : grid.num_tokens] for x in (k, v))
            length = None if length is None else jnp.minimum(length, grid.num_tokens)
            _, lse = api.dense_attention(q, k, v, kv_length=length, return_lse=True)
        tiles = tile_grid(grid, self.tile)
        video = dataclasses.replace(grid, text=0)
        query, key = (tile_shares(video, self.tile, x) for x in (self.block_q, self.block_kv))
        sizes = {"block_q": self.block_q, "block_kv": self.block_kv, "kv_length": length}

        def head(operands):
            blocks = block_masses(*operands, **sizes)
            by_tile = jnp.einsum("im,bij,jn->bmn", query, blocks, key, precision="highest")
            return offset_mass(by_tile, tiles) / jnp.float32(grid.num_tokens)

        # One head at a time, as the map of all blocks by all blocks is large.
        by_head = (jnp.moveaxis(x, 2, 0) for x in (q, k, lse))
        return out, jnp.moveaxis(jax.lax.map(head, tuple(by_head)), 0, 1)


def tile_shares(
    grid: TokenGrid, tile: tuple[int, int, int], block: int
) -> Float[np.ndarray, "I M"]:
    """Share of every block's tokens that lies in each tile, f32; blocks of `grid.tile_order`."""
    at = tile_spans(grid, tile, 1)[:, 0]
    tokens = np.zeros((grid.num_blocks(block), math.prod(tile_grid(grid, tile))), np.float32)
    np.add.at(tokens, (np.arange(len(at)) // block, at), 1)
    return tokens / tokens.sum(1, keepdims=True)


def block_masses(
    q: Float[Array, "B T H"],
    k: Float[Array, "B T H"],
    lse: Float[Array, "B T"],
    *,
    block_q: int,
    block_kv: int,
    kv_length: Int[Array, " B"] | None = None,
) -> Float[Array, "B I J"]:
    """One head's attention mass from every query block to every key block, sums over queries."""
    top = num_blocks(k.shape[1], block_kv)
    sizes = {"block_q": block_q, "block_kv": block_kv, "top": top}
    found = api.block_mass(
        q[:, :, None], k[:, :, None], lse[:, :, None], kv_length=kv_length, **sizes
    )
    return jnp.put_along_axis(
        jnp.zeros_like(found.mass), found.ids, found.mass, axis=-1, inplace=False
    )[:, 0]


def offset_mass(
    mass: Float[Array, "B M M"], tiles: tuple[int, int, int]
) -> Float[Array, "B dt dy dx"]:
    """Sums of what query tiles give key tiles at each offset between them."""
    _, rows, columns = tiles
    t, y, x = np.unravel_index(np.arange(math.prod(tiles)), tiles)
    code = (t * (2 * rows - 1) + y) * (2 * columns - 1) + x
    # Differences of these codes number the offsets, as in a base that no offset overflows.
    offset = jnp.asarray((code[None, :] - code[:, None] + code[-1]).reshape(-1), jnp.int32)
    offsets = tuple(2 * n - 1 for n in tiles)
    total = jnp.zeros((len(mass), math.prod(offsets)), jnp.float32)
    total = total.at[:, offset].add(mass.reshape(len(mass), -1))
    return total.reshape(len(mass), *offsets)


class Parts:
    """What a search has found so far, a file a prompt, so that an interrupted one goes on.

    Args:
        folder: made when the first prompt is done; it belongs to the search alone.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.used = set()

    def read(self, name: str, shape: tuple[int, ...]) -> Found | None:
        """Windows int8 [branches, layers, buckets, heads, groups, 4] and recalls; None: none."""
        try:
            with np.load(self._path(name), allow_pickle=False) as file:
                windows, recall = file["windows"], file["recall"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        if windows.shape != shape or windows.dtype != np.int8 or recall.shape != shape[:-2]:
            return None
        return Found(windows, recall)

    def write(self, name: str, found: Found) -> None:
        """Keeps a prompt's result, whole or not at all."""
        self.folder.mkdir(exist_ok=True)
        with atomic(self._path(name)) as temporary:
            np.savez(temporary, windows=found.windows, recall=found.recall)

    def clear(self) -> None:
        """Removes the files of this search, and the folder when nothing else is in it."""
        for path in self.used:
            path.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _path(self, name: str) -> Path:
        path = self.folder / f"{name}.npz"
        self.used.add(path)
        return path


@dataclasses.dataclass(frozen=True)
class Search:
    """A checked search: what is the same for all prompts.

    Attributes:
        card: of the model.
        settings: of the dense runs.
        criterion: how far windows shrink.
        tile: frames, rows and columns of a tile, in tokens.
        tiles: Nt, Ny, Nx, tiles of the grid.
        block: tokens of a block by which masses are recorded; a tile's where it divides the grid.
        steps: those that are searched, one a bucket.
    """

    card: Card
    settings: Settings
    criterion: Criterion
    tile: tuple[int, int, int]
    tiles: tuple[int, int, int]
    block: int
    steps: range

    @classmethod
    def start(cls, card: Card, settings: Settings, criterion: Criterion) -> "Search":
        """Raises ValueError if no step is sparse."""
        first = dense_prefix_steps(criterion.dense_prefix, settings.steps)
        if first >= settings.steps:
            raise ValueError(
                f"dense_prefix={criterion.dense_prefix} must leave one of the {settings.steps} "
                "steps sparse"
            )
        grid, block = card.grid(settings), card.block(settings)
        tile = criterion.tile or published_tile(grid, TILE, block)
        tiles, whole = tile_grid(grid, tile), math.prod(tile)
        block = whole if math.prod(tiles) * whole == grid.num_tokens else min(_PART, block)
        steps = range(first, settings.steps, criterion.reuse)
        return cls(card, settings, criterion, tile, tiles, block, steps)

    @property
    def max_cost(self) -> float:
        """λ per key tile."""
        return self.criterion.cost_per_tile(math.prod(self.tiles))

    def shape(self, branches: int) -> tuple[int, ...]:
        """Of the windows of one prompt."""
        config, frames = self.card.config, self.tiles[0]
        groups = 2 * frames - 1 if self.criterion.signed else frames
        return branches, config.num_layers, len(self.steps), config.num_heads, groups, 4

    def name(self, text: Float[Array, "B E D"], seed: int) -> str:
        """Of a prompt's result: differs where the result may."""
        told = dataclasses.asdict(self.criterion) | {"seed": seed, "shape": text.shape}
        told |= dataclasses.asdict(self.card.curve_key(self.settings)) | {"tile": self.tile}
        states = np.asarray(text, np.float32).tobytes()
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode() + states).hexdigest()[:24]

    def prompt(
        self, pipeline: Pipeline, text: Float[Array, "B E D"], seed: int, tick: Any
    ) -> Found:
        """Samples one prompt densely and searches its windows; `tick()` follows every step."""
        found = []
        for mass in self.sample(pipeline, text, seed):
            if mass is not None:
                found.append(self.contract(np.asarray(mass)))
            tick()
        return Found(*(np.stack(x, axis=2) for x in zip(*found, strict=True)))

    def sample(self, pipeline: Pipeline, text: Float[Array, "B E D"], seed: int) -> Iterator[Any]:
        """Step by step the masses [layers, B, N, dt, dy, dx] of a searched step, else None."""
        recorder = Recorder(tile=self.tile, block_q=self.block, block_kv=self.block)
        run = (self.settings, text, seed, recorder, self.steps, self.steps[-1])
        return recorded_steps(pipeline, *run)

    def contract(self, mass: Float[np.ndarray, "layers B N dt dy dx"]) -> Found:
        """Windows int8 [B, layers, heads, groups, 4] and recalls of one step."""
        signed, group = self.criterion.signed, self.criterion.groups(self.tiles[0])
        first = np.flatnonzero(np.diff(group, prepend=-1))
        mass = mass.swapaxes(0, 1).astype(np.float64)
        mass = grouped(mass / mass.sum((-3, -2, -1), keepdims=True), signed)
        size = grouped(offset_counts(self.tiles), signed) / math.prod(self.tiles)
        mass, size = (np.add.reduceat(x, first, axis=-3) for x in (mass, size))
        frames = (len(first) + 1) // 2 if signed else len(first)
        heads = [
            contract(head, size, frames, self.criterion, self.max_cost)
            for head in mass.reshape(-1, *size.shape)
        ]
        windows, recall = (np.array(x) for x in zip(*heads, strict=True))
        shape = mass.shape[:3]
        windows = windows.astype(np.int8)[:, group]
        return Found(windows.reshape(*shape, -1, 4), recall.reshape(shape))


def search_masks(
    pipeline: Pipeline,
    prompts: list[str],
    *,
    criterion: Criterion = Criterion(),
    parts: Parts | None = None,
    seeds: list[int] | None = None,
    negative_prompt: str = "",
    states: list[np.ndarray] | None = None,
    negative_states: Float[np.ndarray, "U D"] | None = None,
    progress: bool = True,
    **settings,
) -> tuple[CompactMasks, Float[np.ndarray, "prompts branches layers buckets heads"]]:
    """Searches windows on dense sampling, prompt by prompt, and merges them.

    Args:
        pipeline: its model is sampled.
        prompts: other ones than those to be made; four or more are advisable.
        criterion: how far windows shrink.
        parts: where each prompt's result is kept as soon as it is known, and looked for first; None
            keeps nothing.
        seeds: one a prompt; None counts from 0.
        negative_prompt, negative_states, progress, settings: as in `Pipeline.generate`.
        states: one array [E, D] a prompt, in place of encoded prompts.

    Returns:
        Masks that hold every prompt's and guidance branch's windows, and the recall of each one's
        own windows, which the masks reach or exceed. Progress tells how much of the last prompt's
        windows the first one's share (`similarity`).

    Raises:
        ValueError: as `Pipeline.generate`, or no step is sparse, or the tile does not fit the grid.

    Source: Compact Attention (arXiv:2508.12969). Masks are searched along dense trajectories; the
    union of the prompts' windows is covered by the smallest window over it, or stays.
    """
    check_prompts(prompts)
    seeds = list(range(len(prompts))) if seeds is None else seeds
    check_seeds(seeds)
    if len(seeds) != len(prompts):
        raise ValueError(f"{seeds=} must be one for each of the {len(prompts)} prompts")
    search = Search.start(pipeline.card, pipeline.card.settings(**settings), criterion)
    guidance, each = search.settings.guidance, search.steps[-1] + 1
    found = []
    with tqdm(total=len(prompts) * each, disable=not progress, unit="step") as bar:
        for i, prompt in enumerate(prompts):
            own = None if states is None else states[i][None]
            text = pipeline.encode([prompt], negative_prompt, guidance, own, negative_states)
            name = search.name(text, seeds[i])
            result = None if parts is None else parts.read(name, search.shape(len(text)))
            if result is None:
                result = search.prompt(pipeline, text, seeds[i], bar.update)
                if parts is not None:
                    parts.write(name, result)
            else:
                bar.update(each)
            found.append(result)
            alike = similarity(found[0].windows, result.windows, search.tiles, criterion.signed)
            told = f"{i + 1} of {len(prompts)} prompts"
            bar.set_postfix_str(f"{told}, {alike.mean():.0%} as the first" if i else told)
    windows = [branch for part in found for branch in part.windows]
    if criterion.exact_union:
        table = union(windows, search.tiles[2])
    else:
        table = merge(windows, search.tiles, criterion.signed)
    masks = CompactMasks(
        key=pipeline.card.curve_key(search.settings),
        tile=search.tile,
        first=search.steps[0],
        reuse=criterion.reuse,
        signed=criterion.signed,
        min_recall=criterion.min_recall,
        max_cost=search.max_cost,
        prompts=len(prompts),
        shape=table.shape,
        windows=table.tobytes(),
        exact=criterion.exact_union,
    )
    return masks, np.stack([part.recall for part in found])
