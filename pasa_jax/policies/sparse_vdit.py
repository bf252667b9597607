"""Sparse-vDiT (arXiv:2506.03065): every head keeps one of a few patterns, chosen offline."""

import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pasa_jax.calibration import (
    CurveKey,
    json_fields,
    json_key,
    json_number,
    json_typed,
    read_json,
    write_json,
)
from pasa_jax.grid import TokenGrid, axis_order
from pasa_jax.pallas_kernels.blocks import BlockIndex, block_lengths
from pasa_jax.policies.base import (
    AttentionShape,
    Context,
    Plan,
    Policy,
    check_density,
    dense_prefix_steps,
)
from pasa_jax.policies.sliding_tile import StaticLists, static_lists, static_plan
from pasa_jax.routing import listed_blocks

FULL, SKIP, DIAGONAL, MULTI_DIAGONAL, STRIPES = range(5)
_MAX_BYTES = 1 << 25  # the stripes of Wan 14B at 720p, all heads striped, are two megabytes
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class HeadPatterns:
    """The pattern of every layer's every head, the same at all sparse steps.

    0, full: all keys. 1, skip: the output is 0. 2, diagonal: keys up to `width` tokens before or
    behind the query. 3, multi-diagonal: the same in the order that runs through all frames of a
    position before the next. 4, stripes: the head's own key blocks, for all queries. A block is
    exact if any of its pairs of tokens is. All but skipped heads see text.

    Attributes:
        key: the setting they were chosen in.
        block: tokens of a query block and of a key block.
        width: half of the band, in tokens.
        weight, max_loss: what the choice was made by (`vdit_search.Criterion`), resolved.
        prompts: how many it was made on.
        shape: [layers, heads].
        modes: int8 of that shape, the numbers above.
        columns: bool [layers, heads, V], exact key blocks of striped heads among the V that hold
            video alone; False for other heads.

    Raises:
        ValueError: a field out of range, or patterns that do not fit the grid.
    """

    key: CurveKey
    block: int
    width: int
    weight: float
    max_loss: float
    prompts: int
    shape: tuple[int, int] = dataclasses.field(repr=False)
    modes: bytes = dataclasses.field(repr=False)
    columns: bytes = dataclasses.field(repr=False)

    def __post_init__(self):
        for name in ("block", "prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.width < 0:
            raise ValueError(f"width={self.width} must be at least 0 tokens")
        size, video = math.prod(self.shape), int((~self._text).sum())
        if len(self.modes) != size or len(self.columns) != size * video or not size:
            raise ValueError(
                f"{len(self.modes)} modes and {len(self.columns)} columns must be those of "
                f"[layers, heads] = {self.shape} and {video=} key blocks"
            )
        if not ((0 <= self.table) & (self.table <= STRIPES)).all():
            raise ValueError(f"modes={self.table.tolist()} must be from 0 to {STRIPES}")
        if ((self.table == STRIPES) != self.stripes.any(-1)).any():
            raise ValueError("columns must be there for striped heads, and for no others")

    @functools.cached_property
    def table(self) -> np.ndarray:
        """int8 [layers, heads]."""
        return np.frombuffer(self.modes, np.int8).reshape(self.shape)

    @functools.cached_property
    def stripes(self) -> np.ndarray:
        """bool [layers, heads, J], `columns` with False for blocks that hold text."""
        columns = np.frombuffer(self.columns, np.int8).reshape(*self.shape, -1) != 0
        return np.pad(columns, ((0, 0), (0, 0), (0, int(self._text.sum()))))

    @functools.cached_property
    def band(self) -> np.ndarray:
        """bool [I, J], `near_blocks` of the width."""
        return near_blocks(self.key.grid, self.block, self.block, self.width)

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """int32 [layers, heads, I], exact key blocks of every query block."""
        band = self.band.sum(1, dtype=np.int32)
        striped = (self.stripes | self._text).sum(-1, dtype=np.int32)[..., None]
        fixed = np.stack([np.full_like(band, self.band.shape[1]), 0 * band, band, band])
        mode = self.table.astype(int)
        return np.where(mode[..., None] == STRIPES, striped, fixed[mode % STRIPES])

    @property
    def density(self) -> float:
        """Share of the key blocks that are exact, mean over layers and heads."""
        return float(self.counts.mean() / self.band.shape[1])

    @property
    def _text(self) -> np.ndarray:
        return self.key.grid.text_blocks(self.block)

    def check(self, key: CurveKey) -> None:
        """Raises ValueError, naming both settings, unless they were chosen in this one."""
        if self.key != key:
            raise ValueError(
                f"the patterns were chosen for {self.key}, not for {key}: choose some for it "
                "with `pasa-jax search sparse_vdit`, or sample without patterns"
            )

    def save(self, path: str | os.PathLike) -> None:
        """Writes JSON, beside the target first, so that no reader sees half a file."""
        record = dataclasses.asdict(self)
        del record["shape"]
        record["modes"] = self.table.tolist()
        record["columns"] = [
            [np.flatnonzero(head).tolist() for head in layer] for layer in self.stripes
        ]
        write_json(path, {"format": _FORMAT, **record})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "HeadPatterns":
        """Reads what `save` wrote.

        Raises:
            ValueError: the file does not hold patterns; the message says what is wrong.
            OSError: the file cannot be read.
        """
        return read_json(path, _MAX_BYTES, _from_json, "does not hold patterns")


def _from_json(record: Any) -> HeadPatterns:
    """Patterns from parsed JSON, every field of its type; ValueError says which is not."""
    names = {field.name for field in dataclasses.fields(HeadPatterns)} - {"shape"}
    fields = json_fields(record, "the file", names | {"format"})
    if fields["format"] != _FORMAT:
        raise ValueError(f"format={fields['format']!r} must be {_FORMAT}")
    modes = np.asarray(json_typed("modes", fields["modes"], list))
    if modes.ndim != 2 or modes.dtype.kind != "i" or (modes != modes.astype(np.int8)).any():
        raise ValueError("modes must be whole numbers [layers, heads]")
    whole = ("block", "width", "prompts")
    sizes = {name: json_typed(name, fields[name], int) for name in whole}
    key = json_key(fields["key"])
    video = int((~key.grid.text_blocks(sizes["block"])).sum())
    columns = _read_columns(fields["columns"], modes.shape, video)
    return HeadPatterns(
        key=key,
        **sizes,
        **{name: json_number(name, fields[name]) for name in ("weight", "max_loss")},
        shape=modes.shape,
        modes=modes.astype(np.int8).tobytes(),
        columns=columns.tobytes(),
    )


def _read_columns(lists: Any, shape: tuple[int, int], video: int) -> Bool[np.ndarray, "..."]:
    """bool [layers, heads, V] of lists of block numbers."""
    columns = np.zeros((*shape, video), bool)
    rule = f"columns must be lists of block numbers below {video} for [layers, heads] = {shape}"
    layers = json_typed("columns", lists, list)
    if len(layers) != shape[0] or any(
        len(json_typed("columns", x, list)) != shape[1] for x in layers
    ):
        raise ValueError(rule)
    for head, ids in zip(
        np.ndindex(shape), (ids for layer in layers for ids in layer), strict=True
    ):
        numbers = np.asarray(json_typed("columns", ids, list), int if ids == [] else None)
        if numbers.ndim != 1 or numbers.dtype.kind != "i":
            raise ValueError(rule)
        if not ((0 <= numbers) & (numbers < video)).all():
            raise ValueError(rule)
        columns[(*head, numbers)] = True
    return columns


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseVdit(Policy):
    """Each head attends by its pattern, at all sparse steps and for all prompts; no tail.

    The patterns come from `vdit_search.search_patterns` and belong to one model, grid and schedule.
    Of a skipped head the video's queries get 0, text's are dense as everywhere.

    The paper leaves open how wide bands and how many stripes are (see `vdit_search.Criterion`), and
    whether its table changes with the step; here it does not.

    Where any head is full, lists are as long as there are key blocks: 224 MB in a call of 1182
    blocks of keys and of queries and 40 heads.

    Attributes:
        masks: chosen patterns. None: the diagonal for all heads.
        density: without patterns, the share of the key blocks that the band keeps: the widest band
            that does not pass it, and at least one token to either side. Patterns bring their own
            density, and then this is not read.
        dense_prefix, dense_layers: the method needs none.
        block_q, block_kv: tokens of a query block and of a key block; those of the patterns.

    Raises:
        ValueError: a field is out of range.
    """

    masks: HeadPatterns | None = None
    density: float = 0.3
    dense_prefix: float = 0.0
    dense_layers: tuple[int, ...] = ()
    block_q: int = 128
    block_kv: int = 128

    def __post_init__(self):
        super().__post_init__()
        check_density("density", self.density)
        blocks = self.block_q, self.block_kv
        if self.masks is not None and blocks != (self.masks.block,) * 2:
            raise ValueError(
                f"block_q, block_kv={blocks} must be those of the patterns, {self.masks.block}"
            )

    def check_setting(self, key: CurveKey) -> None:
        """Raises ValueError for patterns of another setting."""
        if self.masks is not None:
            self.masks.check(key)

    def budgets(
        self, num_steps: int, num_blocks: int, curve: Sequence[float] | np.ndarray | None = None
    ) -> np.ndarray:
        """int32 [num_steps], key blocks that the patterns keep, mean over layers and heads.

        Rounded up. Without patterns density · num_blocks, which the band does not pass; the exact
        number depends on the grid, and every step's record has it.
        """
        kept = self.max_budget(num_steps, num_blocks)
        if self.masks is not None:
            kept = max(1, math.ceil(self.masks.counts.mean()))
        budgets = np.full(num_steps, kept, np.int32)
        budgets[: dense_prefix_steps(self.dense_prefix, num_steps)] = num_blocks
        return budgets

    def max_budget(
        self, num_steps: int, num_blocks: int, curve: Sequence[float] | np.ndarray | None = None
    ) -> int:
        """The most key blocks that any query block sees; without patterns the band's mean."""
        if self.masks is None:
            return max(1, math.ceil(round(self.density * num_blocks, 6)))
        return max(1, int(self.masks.counts.max()))

    def init_state(self, shape: AttentionShape) -> Any:
        """(): patterns are constants.

        Raises:
            ValueError: the patterns are of another number of layers or heads, or of another grid.
        """
        if self.masks is not None:
            if self.masks.key.grid != shape.grid:
                raise ValueError(f"patterns for {self.masks.key.grid} must be for {shape.grid}")
            if self.masks.shape != (shape.layers, shape.heads):
                raise ValueError(
                    f"patterns of [layers, heads] = {self.masks.shape} must have the model's "
                    f"{shape.layers} layers and {shape.heads} heads"
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
        """The layer's patterns, head by head, each in its own order of tokens."""
        grid = context.need_grid(self)
        if self.masks is None:
            return static_plan(_local_lists(self, grid), q, k, context, self.block_kv), state
        mode = jnp.asarray(self.masks.table, jnp.int32)[context.layer]
        lists = functools.partial(_head_lists, self.masks)
        # One head at a time: all blocks by all blocks of every head would be large.
        ids, count = jax.lax.map(lists, (mode, jnp.asarray(self.masks.stripes)[context.layer]))
        length = block_lengths(k.shape[1], self.block_kv, context.kv_length, len(k))
        # Blocks of padding alone are text's, which stand last in every list.
        padding = (length == 0).sum(1, dtype=jnp.int32)[:, None, None]
        count = jnp.maximum(count[None] - padding, 0)
        ids = jnp.broadcast_to(ids[None], (len(k), *ids.shape))
        return Plan(BlockIndex(ids, count), head_order=_head_order(self.masks, mode)), state


def near_blocks(grid: TokenGrid, block_q: int, block_kv: int, width: int) -> np.ndarray:
    """bool [I, J], blocks with a query and a key at most `width` tokens apart, and all text."""
    starts = [np.arange(0, grid.num_tokens, block) for block in (block_q, block_kv)]
    (query, query_last), (key, key_last) = (
        (x, np.minimum(x + block, grid.num_tokens) - 1)
        for x, block in zip(starts, (block_q, block_kv), strict=True)
    )
    gap = np.maximum(key - query_last[:, None], query[:, None] - key_last)
    text = grid.text_blocks(block_kv)
    near = np.pad(gap <= width, ((0, 0), (0, len(text) - len(key))))
    return near | text[None, :]


@functools.lru_cache(maxsize=8)
def _local_lists(policy: SparseVdit, grid: TokenGrid) -> StaticLists:
    """The widest band that does not pass the density."""
    blocks = functools.partial(near_blocks, grid, policy.block_q, policy.block_kv)
    low, high = 1, grid.num_tokens
    while low < high:
        middle = (low + high + 1) // 2
        fits = blocks(middle).mean() <= policy.density + 1e-9
        low, high = (middle, high) if fits else (low, middle - 1)
    return static_lists(blocks(low))


def _head_lists(
    patterns: HeadPatterns, own: tuple[Int[Array, ""], Bool[Array, " J"]]
) -> tuple[Int[Array, "I L"], Int[Array, " I"]]:
    """One head's lists, from its mode and its stripes."""
    mode, stripes = own
    band, text = (
        jnp.asarray(patterns.band),
        jnp.asarray(patterns.key.grid.text_blocks(patterns.block)),
    )
    near = (mode == DIAGONAL) | (mode == MULTI_DIAGONAL)
    mask = (band & near) | ((stripes | text) & (mode == STRIPES))[None] | (mode == FULL)
    ids, count = listed_blocks(mask[None, None], max(1, int(patterns.counts.max())))
    return ids[0, 0], count[0, 0]


def _head_order(patterns: HeadPatterns, mode: Int[Array, " N"]) -> Int[Array, "1 N T"] | None:
    """Raster order, but for multi-diagonal heads; None where no layer has any."""
    if not (patterns.table == MULTI_DIAGONAL).any():
        return None
    raster, by_position = (
        jnp.asarray(axis_order(patterns.key.grid, axes))[None] for axes in ((0, 1, 2), (1, 2, 0))
    )
    return jnp.where((mode == MULTI_DIAGONAL)[:, None], by_position, raster)[None]
