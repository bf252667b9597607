"""Radial Attention (arXiv:2506.19852): bands that narrow with the distance between frames."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pasa_jax.grid import TokenGrid
from pasa_jax.pallas_kernels.blocks import num_blocks as blocks_of
from pasa_jax.policies.base import Context, Plan, Policy, check_density, density_blocks
from pasa_jax.policies.sliding_tile import StaticLists, static_lists, static_plan

_BISECTIONS = 16  # with 21 frames of 3600 tokens to half a token of the widest band


@dataclasses.dataclass(frozen=True, kw_only=True)
class Radial(Policy):
    """One mask for all heads, layers and steps: the further two frames apart, the fewer keys.

    A frame sees itself and the frames next to it whole. Of a frame at distance d it sees the
    positions up to Q / 2^g · decay_factor from its own, and at least a block, with g the bits of d
    and Q the power of two above the tokens of a frame. Where Q / 2^g is below a block, only every
    floor(block · 2^g / Q)-th distance remains. A block is exact if, of its keys that any query
    sees, more than 0.6 are seen by more than a third of its queries. Text is always exact.

    This is the published code's mask, not quite the paper's formula. The code's 128 tokens are the
    larger block here. Where a frame is not a multiple of the block, a block of two frames is judged
    frame pair by frame pair, on the queries and keys of the pair, and exact if one pair is; the
    code judges such a part by the tokens of a whole block, and loses the ends of frames.

    Attributes:
        density: share of the key blocks, in (0, 1]: sets the decay factor whose mask comes nearest
            without passing it. Below what the narrowest bands keep (0.29 on 18 × 48 × 80 tokens),
            those; above what the widest keep, those, but 1 keeps all. None: by decay_factor.
        decay_factor: width of the bands, 0 or more: the code has 0.2 for Wan 2.1, 0.8 for Wan 2.2,
            0.95 for HunyuanVideo. Read where `density` is None.
        sink: whether all queries see the first frame whole; not so for HunyuanVideo.
        dense_prefix: the code's 12 of 50 steps.
        block_q, block_kv: tokens of a query block and of a key block.

    Raises:
        ValueError: a field is out of range.
    """

    density: float | None = None
    decay_factor: float = 0.2
    sink: bool = True
    dense_prefix: float = 0.24
    dense_layers: tuple[int, ...] = (0,)
    block_q: int = 128
    block_kv: int = 128

    def __post_init__(self):
        super().__post_init__()
        if self.density is not None:
            check_density("density", self.density)
        if not 0 <= self.decay_factor < math.inf:
            raise ValueError(f"decay_factor={self.decay_factor!r} must be 0 or more and finite")

    def max_budget(
        self, num_steps: int, num_blocks: int, curve: Sequence[float] | np.ndarray | None = None
    ) -> int:
        """What the density asks for; without one, as no grid is known here, all blocks.

        The true number depends on the grid; the plan's lists have it, and every step's record.
        """
        return num_blocks if self.density is None else density_blocks(self.density, num_blocks)

    def plan(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        v: Float[Array, "B S N H"],
        context: Context,
        state: Any,
    ) -> tuple[Plan, Any]:
        """The same lists for all heads, layers and steps."""
        lists = _lists(self, context.need_grid(self))
        return static_plan(lists, q, k, context, self.block_kv), state


@functools.lru_cache(maxsize=8)
def _lists(policy: Radial, grid: TokenGrid) -> StaticLists:
    """The policy's mask on a grid, as lists."""
    if policy.density is None:
        return static_lists(_mask(policy, grid, policy.decay_factor))
    if policy.density == 1:
        return static_lists(np.ones_like(_mask(policy, grid, 0.0)))
    return static_lists(_mask(policy, grid, _decay(policy, grid)))


def _decay(policy: Radial, grid: TokenGrid) -> float:
    """The largest decay factor whose mask does not pass the density; 0 where all do."""
    low, high = 0.0, 2.0 ** grid.frames.bit_length()  # at which every band is a whole frame
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        fits = _mask(policy, grid, middle).mean() <= policy.density + 1e-9
        low, high = (middle, high) if fits else (low, middle)
    return low


def _mask(policy: Radial, grid: TokenGrid, decay: float) -> Bool[np.ndarray, "I J"]:
    """Which key blocks are exact, frame by frame of the queries."""
    query, key = _parts(grid, policy.block_q), _parts(grid, policy.block_kv)
    reaches = _reaches(policy, grid, decay)
    columns = grid.num_blocks(policy.block_kv)
    mask = np.zeros((blocks_of(grid.num_tokens, policy.block_q), columns), bool)
    first = np.flatnonzero(np.diff(key.block, prepend=-1))  # part of each key block
    for frame in range(grid.frames):
        reach = reaches[abs(frame - key.frame)]
        if policy.sink:
            reach[key.frame == 0] = reaches[0]
        rows = _Parts(*(x[query.frame == frame] for x in query))
        exact = np.logical_or.reduceat(_exact_parts(rows, key, reach), first, axis=1)
        mask[rows.block, : len(first)] |= exact  # no two parts of a frame are in one block
    return mask | grid.text_blocks(policy.block_kv)[None, :]


def _reaches(policy: Radial, grid: TokenGrid, decay: float) -> Int[np.ndarray, " F"]:
    """By distance of frames, tokens between positions that see one another; -1 where none do."""
    frame, block = grid.rows * grid.columns, max(policy.block_q, policy.block_kv)
    distance = np.arange(grid.frames)
    bits = np.frexp(distance)[1]
    band = 2.0 ** (frame.bit_length() - bits)
    reach = np.minimum(np.maximum(block, band * decay), frame).astype(np.int32)
    every = np.maximum(1, block // band)
    reach[distance % every > 0] = -1
    reach[:2] = frame
    return reach


class _Parts(NamedTuple):
    """What blocks and frames have in common, in raster order; int32 [P] each.

    Attributes:
        block, frame: their numbers.
        start, end: the part's tokens, counted in its frame.
    """

    block: np.ndarray
    frame: np.ndarray
    start: np.ndarray
    end: np.ndarray


def _parts(grid: TokenGrid, block: int) -> _Parts:
    """The parts that blocks and frames cut the video into."""
    tokens, frame = grid.num_tokens, grid.rows * grid.columns
    starts = np.union1d(np.arange(0, tokens, block), np.arange(0, tokens, frame)).astype(np.int32)
    ends = np.append(starts[1:], np.int32(tokens))
    number = starts // frame
    return _Parts(starts // block, number, starts - number * frame, ends - number * frame)


def _exact_parts(query: _Parts, key: _Parts, reach: np.ndarray) -> Bool[np.ndarray, "P R"]:
    """Whether enough queries of one frame's parts see the keys of other parts, at that reach."""
    start, end = query.start[:, None], query.end[:, None]

    def keys_seen_by(least):
        """Keys within reach of at least that many queries: one run of tokens."""
        low = np.maximum(key.start, start + least - 1 - reach)
        high = np.minimum(key.end, end - least + 1 + reach)
        return np.maximum(high - low, 0)

    third = (end - start) // 3 + 1
    return (5 * keys_seen_by(third) > 3 * keys_seen_by(1)) & (reach >= 0)
