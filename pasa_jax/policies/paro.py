"""PAROAttention (arXiv:2506.16054): the order of axes that suits a head, and static block masks."""

import base64
import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

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
from pasa_jax.grid import TokenGrid, axis_order
from pasa_jax.pallas_kernels.blocks import BlockIndex, block_lengths, num_blocks
from pasa_jax.policies.base import (
    AttentionShape,
    Context,
    Plan,
    Policy,
    check_density,
    check_share,
    dense_prefix_steps,
    density_blocks,
)

# Axes from slowest to fastest: 0 frames, 1 rows, 2 columns.
AXES = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
_MAX_BYTES = 1 << 28
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class ParoMasks:
    """Calibrated orders of every layer and head, and masks of every layer, step bucket and head.

    Attributes:
        key: the setting they were calibrated in.
        block: tokens of a query block and of a key block.
        starts: first step of each bucket, rising from 0; the last one lasts to the end.
        density, alpha, small, share: what the calibration was asked for (`paro_search.Criterion`).
        prompts: how many were recorded.
        orders: number in `AXES` by layer and head.
        bits: uint8 [layers, buckets, heads, I, ceil(J / 8)], masks as `numpy.packbits` packs rows.

    Raises:
        ValueError: a field out of range, or bits that do not fit the grid.
    """

    key: CurveKey
    block: int
    starts: tuple[int, ...]
    density: float
    alpha: float
    small: float
    share: float
    prompts: int
    orders: tuple[tuple[int, ...], ...] = dataclasses.field(repr=False)
    bits: bytes = dataclasses.field(repr=False)

    def __post_init__(self):
        for name in ("block", "prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        check_density("density", self.density)
        for name in ("alpha", "small", "share"):
            check_share(name, getattr(self, name))
        starts = self.starts
        rising = all(a < b for a, b in zip(starts, starts[1:], strict=False))
        if not starts or starts[0] != 0 or not rising or starts[-1] >= self.key.steps:
            raise ValueError(f"{starts=} must rise from 0 and be below {self.key.steps} steps")
        heads = {len(layer) for layer in self.orders}
        known = all(0 <= order < len(AXES) for layer in self.orders for order in layer)
        if len(heads) != 1 or heads == {0} or not known:
            raise ValueError("orders must be numbers from 0 to 5 by layer and head")
        *shape, columns = self.shape
        size = int(np.prod(shape)) * -(-columns // 8)
        if len(self.bits) != size:
            raise ValueError(f"{len(self.bits)=} must be {size}, for masks of {self.shape}")
        text = np.packbits(self.key.grid.text_blocks(self.block))
        if self.counts.min() < 1 or (self.table & text != text).any():
            raise ValueError("bits must keep all text, and a key block for every query block")

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Layers, buckets, heads, query blocks, key blocks."""
        grid, layers, heads = self.key.grid, len(self.orders), len(self.orders[0])
        rows, columns = num_blocks(grid.num_tokens, self.block), grid.num_blocks(self.block)
        return layers, len(self.starts), heads, rows, columns

    @functools.cached_property
    def table(self) -> UInt8[np.ndarray, "layers buckets N I bytes"]:
        """The bits as an array."""
        return np.frombuffer(self.bits, np.uint8).reshape(*self.shape[:4], -1)

    @functools.cached_property
    def counts(self) -> Int[np.ndarray, "layers buckets N I"]:
        """Key blocks that each query block sees, int32."""
        columns = self.shape[4]
        # Layer by layer: bools take eight times the bits.
        return np.stack(
            [
                np.unpackbits(layer, axis=-1, count=columns).sum(-1, dtype=np.int32)
                for layer in self.table
            ]
        )

    def check(self, key: CurveKey) -> None:
        """Raises ValueError, naming both settings, unless they were calibrated in this one."""
        if self.key != key:
            raise ValueError(
                f"the masks were calibrated for {self.key}, not for {key}: calibrate for it with "
                "`pasa-jax search paro`, or sample without masks"
            )

    def save(self, path: str | os.PathLike) -> None:
        """Writes JSON, beside the target first, so that no reader sees half a file."""
        record = dataclasses.asdict(self)
        record["bits"] = base64.b64encode(self.bits).decode()
        write_json(path, {"format": _FORMAT, **record})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ParoMasks":
        """Reads what `save` wrote.

        Raises:
            ValueError: the file does not hold such masks; the message says what is wrong.
            OSError: the file cannot be read.
        """
        return read_json(path, _MAX_BYTES, _from_json, "does not hold PARO masks")


def _from_json(record: Any) -> ParoMasks:
    """Masks from parsed JSON, every field of its type; ValueError says which is not."""
    names = {field.name for field in dataclasses.fields(ParoMasks)}
    fields = json_fields(record, "the file", names | {"format"})
    if fields["format"] != _FORMAT:
        raise ValueError(f"format={fields['format']!r} must be {_FORMAT}")
    orders = json_typed("orders", fields["orders"], list)
    return ParoMasks(
        key=json_key(fields["key"]),
        **{name: json_typed(name, fields[name], int) for name in ("block", "prompts")},
        **{
            name: json_number(name, fields[name]) for name in ("density", "alpha", "small", "share")
        },
        starts=_whole("starts", fields["starts"]),
        orders=tuple(_whole("orders", layer) for layer in orders),
        bits=base64.b64decode(json_typed("bits", fields["bits"], str), validate=True),
    )


def _whole(name: str, values: Any) -> tuple[int, ...]:
    return tuple(json_typed(name, value, int) for value in json_typed(name, values, list))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paro(Policy):
    """Each head's tokens run along the axes in its own order, under a block mask fixed offline.

    Orders and masks come from `pasa-jax search paro` and belong to one model, grid and schedule.
    Without them the order is raster's for all heads and each query block takes the key blocks of
    the largest product of block means, at `density`: no method of the paper's, but one that runs
    anywhere. The paper's low-bit products are not here.

    Attributes:
        masks: calibrated orders and masks. They are constants of the compiled step: a bucket of
            Wan 1.3B at 480p is 12 MB; of a larger model calibrate with few buckets.
        density: share of the key blocks, in (0, 1], of query blocks without masks. Masks bring
            their own, and then this is not read.
        dense_prefix: the paper compresses all steps.
        block_q, block_kv: tokens of a query block and of a key block; the masks' own, with masks.

    Raises:
        ValueError: a field is out of range, or not that of the masks.
    """

    masks: ParoMasks | None = None
    density: float = 0.5
    dense_prefix: float = 0.0
    dense_layers: tuple[int, ...] = ()
    block_q: int = 64
    block_kv: int = 64

    def __post_init__(self):
        super().__post_init__()
        check_density("density", self.density)
        blocks = self.block_q, self.block_kv
        if self.masks is not None and blocks != (self.masks.block,) * 2:
            raise ValueError(
                f"block_q, block_kv={blocks} must be those of the masks, {self.masks.block}"
            )

    def check_setting(self, key: CurveKey) -> None:
        """Raises ValueError for masks of another setting."""
        if self.masks is not None:
            self.masks.check(key)

    def budgets(
        self, num_steps: int, num_blocks: int, curve: Sequence[float] | np.ndarray | None = None
    ) -> np.ndarray:
        """int32 [num_steps], key blocks that the masks keep, mean over layers and heads.

        Rounded up. Without masks floor(density · num_blocks), at least 1.
        """
        if self.masks is None:
            return super().budgets(num_steps, num_blocks, curve)
        mean = np.ceil(self.masks.counts.mean((0, 2, 3))).astype(np.int32)
        bucket = np.searchsorted(self.masks.starts, np.arange(num_steps), side="right") - 1
        sparse = mean[bucket]
        sparse[: dense_prefix_steps(self.dense_prefix, num_steps)] = num_blocks
        return sparse

    def max_budget(
        self, num_steps: int, num_blocks: int, curve: Sequence[float] | np.ndarray | None = None
    ) -> int:
        """The most key blocks that any query block sees."""
        if self.masks is None:
            return density_blocks(self.density, num_blocks)
        return int(self.masks.counts.max())

    def init_state(self, shape: AttentionShape) -> Any:
        """(): masks are constants.

        Raises:
            ValueError: the masks are of another number of layers or heads, or of another grid.
        """
        if self.masks is not None:
            self._check_grid(shape.grid)
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
        """The orders and masks of the layer's heads at this step, or pooled top-k in raster."""
        if self.masks is None:
            return Plan(self._pooled(q, k, context)), state
        grid = context.need_grid(self)
        self._check_grid(grid)
        bucket = (jnp.asarray(self.masks.starts, jnp.int32) <= context.step).sum() - 1
        bits = jnp.asarray(self.masks.table)[context.layer, bucket]
        slots, columns = int(self.masks.counts.max()), self.masks.shape[4]

        def lists(bits: UInt8[Array, "I bytes"]) -> BlockIndex:
            mask = jnp.unpackbits(bits, axis=-1, count=columns).astype(bool)
            return routing.listed_blocks(mask[None, None], slots)

        # One head at a time, as all blocks by all blocks of every head would be large.
        ids, count = (x[None, :, 0, 0] for x in jax.lax.map(lists, bits))
        orders = jnp.asarray(self.masks.orders, jnp.int32)[context.layer]
        head_order = jnp.asarray(order_table(grid))[orders][None]
        shape = (q.shape[0], *count.shape[1:])
        length = block_lengths(k.shape[1], self.block_kv, context.kv_length, k.shape[0])
        dead = (length == 0).sum(1, dtype=jnp.int32)  # text of padding alone, last in every list
        count = jnp.broadcast_to(count, shape) - dead[:, None, None]
        blocks = BlockIndex(jnp.broadcast_to(ids, (*shape, ids.shape[3])), count)
        return Plan(blocks, head_order=head_order), state

    def _pooled(self, q: jax.Array, k: jax.Array, context: Context) -> BlockIndex:
        """The key blocks of largest pooled score."""
        length = block_lengths(k.shape[1], self.block_kv, context.kv_length, k.shape[0])
        text = None if context.grid is None else context.grid.text_blocks(self.block_kv)
        return routing.select_blocks(
            routing.block_mean(q, self.block_q),
            routing.block_mean(k, self.block_kv),
            length,
            budget=context.budget,
            max_budget=context.max_budget,
            forced=routing.forced_blocks(length, None, text),
        )

    def _check_grid(self, grid: TokenGrid) -> None:
        """Raises ValueError unless the masks are of that grid."""
        if self.masks.key.grid != grid:
            raise ValueError(f"masks for {self.masks.key.grid} must be for {grid}")


def order_table(grid: TokenGrid) -> Int[np.ndarray, "six T"]:
    """int32, the raster token at each place, for every entry of `AXES`."""
    return np.stack([axis_order(grid, axes) for axes in AXES])
