"""Sparse VideoGen (arXiv:2502.01776): each head is spatial or temporal, told from a few rows."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pasa_jax import routing
from pasa_jax.grid import TokenGrid, axis_order
from pasa_jax.pallas_kernels.blocks import BlockIndex, num_blocks
from pasa_jax.policies.base import Context, Plan, Policy, check_density, density_blocks
from pasa_jax.policies.sliding_tile import StaticLists, static_lists, static_plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Svg(Policy):
    """A band of near tokens for every head, in the order of tokens that suits the head.

    A spatial head keeps the order of frames, where the band holds near frames; a temporal head
    runs through all frames of a position before the next one, where it holds near positions. Which
    one a head is, every call decides for each batch row: some rows of queries attend to all keys
    and to those of either mask, and the smaller mean squared error wins (spatial in a tie).

    A block is in the band if the centres of the query and key block are near enough. The published
    code masks by token, rounded up to 128, and tells the heads apart by a band of a fixed two
    frames; here the masks compared are those that run.

    With `sink` all queries see the first frame. In a temporal head its tokens lie scattered over
    all blocks (the code marks the first positions instead, which are another thing), so there the
    first frame stands in front, in raster order, and the other frames follow position by position.
    Its queries see the keys that are near their positions, as all others do.

    Attributes:
        density: share of the key blocks, in (0, 1]; text and first frame count. The widest band
            that does not pass it, and at least a query's own block, first frame and text. The
            code's figure counts the band alone, of tokens: it keeps about (1 − s) / F more.
        sink: whether all queries see the first frame, as in the code for Wan; not so for
            HunyuanVideo.
        num_rows: query rows that tell the heads apart, drawn anew for each prompt, step and layer;
            guidance branches share them.
        max_row: they are drawn from the first `max_row` tokens.
        dense_prefix: the code's 10 of 50 steps for Wan; the paper has a quarter.
        block_q, block_kv: tokens of a query block and of a key block.

    Raises:
        ValueError: a field is out of range.
    """

    density: float = 0.3
    sink: bool = True
    num_rows: int = 64
    max_row: int = 10_000
    dense_prefix: float = 0.2
    dense_layers: tuple[int, ...] = (0,)
    block_q: int = 128
    block_kv: int = 128

    def __post_init__(self):
        super().__post_init__()
        check_density("density", self.density)
        for name in ("num_rows", "max_row"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def max_budget(
        self, num_steps: int, num_blocks: int, curve: Sequence[float] | np.ndarray | None = None
    ) -> int:
        """What the density asks for.

        The true number depends on the grid; the plan's lists have it, and every step's record.
        """
        return density_blocks(self.density, num_blocks)

    def plan(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        v: Float[Array, "B S N H"],
        context: Context,
        state: Any,
    ) -> tuple[Plan, Any]:
        """Of two orders and lists the head's own."""
        kinds = _kinds(self, context.need_grid(self))
        temporal = _is_temporal(self, kinds, q, k, v, context)

        def choose(spatial, other):
            spare = (1,) * (spatial.ndim - 2)
            return jnp.where(temporal.reshape(*temporal.shape, *spare), other, spatial)

        lists = (static_plan(kind.lists, q, k, context, self.block_kv).blocks for kind in kinds)
        order = choose(*(jnp.asarray(kind.order)[None, None] for kind in kinds))
        return Plan(BlockIndex(*map(choose, *lists)), head_order=order), state


class _Kind(NamedTuple):
    """What is fixed for spatial, or for temporal heads.

    Attributes:
        order: int32 [T], raster token at each place.
        mask: bool [I, J], the exact key blocks, counted in that order.
        lists: the same, as long for both kinds.
    """

    order: np.ndarray
    mask: np.ndarray
    lists: StaticLists


@functools.lru_cache(maxsize=8)
def _kinds(policy: Svg, grid: TokenGrid) -> tuple[_Kind, _Kind]:
    """Spatial and temporal heads on a grid."""
    raster, by_position = axis_order(grid, (0, 1, 2)), axis_order(grid, (1, 2, 0))
    front = grid.rows * grid.columns * policy.sink
    orders = raster, np.concatenate([raster[:front], by_position[by_position >= front]])
    places = raster, np.argsort(by_position)[orders[1]]
    masks = [_band(policy, grid, place, raster < front) for place in places]
    lists = [static_lists(mask) for mask in masks]
    slots = max(one.ids.shape[1] for one in lists)
    spare = [((0, 0), (0, slots - one.ids.shape[1])) for one in lists]
    lists = [StaticLists(np.pad(x.ids, pad), x.count) for x, pad in zip(lists, spare, strict=True)]
    spatial, temporal = map(_Kind, orders, masks, lists)
    return spatial, temporal


def _band(
    policy: Svg, grid: TokenGrid, place: Int[np.ndarray, " T"], first: Bool[np.ndarray, " T"]
) -> Bool[np.ndarray, "I J"]:
    """Text, sink, own blocks, and the nearest others up to the density.

    `place` is each token's coordinate on the line that the band follows, `first` whether it is of
    the frame that all see; both in the order of blocks.
    """
    rows, columns = num_blocks(grid.num_tokens, policy.block_q), grid.num_blocks(policy.block_kv)
    query, key = (_centres(place, first, block) for block in (policy.block_q, policy.block_kv))
    # A block may hold the end of the first frame and the start of the rest, which are far apart.
    pairs = [abs(one[:, None] - other[None, :]) for one in query for other in key]
    distance = np.full((rows, columns), -1.0)  # text
    distance[:, : len(key[0])] = np.fmin.reduce(pairs)
    token = np.arange(grid.num_tokens)
    distance[token // policy.block_q, token // policy.block_kv] = -1
    distance[:, np.unique(token[first] // policy.block_kv)] = -1
    distance[:, grid.text_blocks(policy.block_kv)] = -1
    kept = int(policy.density * distance.size + 1e-6)
    if kept == distance.size:
        return np.ones_like(distance, bool)
    return distance < max(0.0, np.partition(distance, kept, axis=None)[kept])


def _centres(place: np.ndarray, first: np.ndarray, block: int) -> list[np.ndarray]:
    """Mean place [I] of each block's tokens in the first frame, and of the others; NaN for none."""
    number = np.arange(len(place)) // block
    sums = [(np.bincount(number, x * place), np.bincount(number, x)) for x in (first, ~first)]
    return [np.divide(a, n, out=np.full_like(a, np.nan), where=n > 0) for a, n in sums]


def _is_temporal(
    policy: Svg, kinds: tuple[_Kind, _Kind], q: Any, k: Any, v: Any, context: Context
) -> Bool[Array, "B N"]:
    """Whether the temporal mask changes the sampled rows' output less than the spatial one."""
    batch, tokens, _, width = q.shape
    keys = routing.call_keys(context.keys, context.step, context.layer)
    last = min(tokens, policy.max_row)

    def draw(key):
        return jax.random.randint(key, (policy.num_rows,), 0, last, jnp.int32)

    rows = jnp.tile(jax.vmap(draw)(keys), (batch // len(keys), 1))  # [B, R]
    valid = jnp.full((batch, 1), k.shape[1], jnp.int32)
    if context.kv_length is not None:
        valid = context.kv_length[:, None]
    live = jnp.arange(k.shape[1], dtype=jnp.int32)[None] < valid
    seen = [live[:, None], *(_seen(policy, kind, rows, k.shape[1]) for kind in kinds)]
    q = jnp.take_along_axis(q, rows[:, :, None, None], axis=1)

    def closer(operands):
        query, key, value = (x.astype(jnp.float32) for x in operands)
        logits = jnp.einsum("brh,bsh->brs", query, key) * width**-0.5
        logits = jnp.where(live[:, None], logits, jnp.finfo(jnp.float32).min)
        full, *masked = (
            jnp.einsum("brs,bsh->brh", jax.nn.softmax(logits, where=mask), value) for mask in seen
        )
        spatial, temporal = (jnp.square(out - full).mean((1, 2)) for out in masked)
        return temporal < spatial

    # One head at a time: rows by keys of all heads would be large.
    return jax.lax.map(closer, tuple(jnp.moveaxis(x, 2, 0) for x in (q, k, v))).T


def _seen(policy: Svg, kind: _Kind, rows: Int[Array, "B R"], keys: int) -> Bool[Array, "B R S"]:
    """Which keys, numbered in raster order, sampled queries see under one kind's mask."""
    place = jnp.asarray(np.argsort(kind.order), jnp.int32)  # of each token
    text = jnp.arange(len(kind.order), keys, dtype=jnp.int32)
    seen = jnp.asarray(kind.mask)[place[rows] // policy.block_q]
    return jnp.take(seen, jnp.concatenate([place, text]) // policy.block_kv, axis=2)
