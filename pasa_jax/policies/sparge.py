"""SpargeAttn (arXiv:2502.18137): pooled attention chooses the blocks, where it can be trusted."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pasa_jax.grid import TokenGrid, gilbert_order
from pasa_jax.pallas_kernels.blocks import BlockIndex, block_lengths, pad_axis
from pasa_jax.policies.base import (
    Context,
    Plan,
    Policy,
    check_density,
    check_share,
    density_blocks,
)
from pasa_jax.routing import forced_blocks, listed_blocks

# Entries of an array of scores, 16 MiB of float32; beyond it one head is planned at a time.
_MAX_SCORES = 1 << 22
_FLOOR = float(np.finfo(np.float32).min)  # the score of what is not there; finite, so never NaN


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparge(Policy):
    """The heaviest blocks of pooled attention, and all whose tokens are too unlike to be pooled.

    A block is alike if the mean cosine of its pairs of tokens lies above a threshold. Query and key
    blocks that are not are computed whole, whatever the density; the keys are taken less their mean
    for this and for the scores. Text, and the first block if asked for, use up the density, or come
    beside `cdf`. The rest is dropped.

    Here are the method's first two filters, in float32 throughout. Its third, which skips blocks
    inside the kernel as the running maximum grows, depends on the shape of the kernel's warps and
    is left out, as are INT8 and FP8 products and the tuning of thresholds per layer and head.

    Where blocks may be computed whole (`similarity` of 0 or more, or `cdf`), lists are as long as
    there are key blocks: 224 MB in a call of 1182 blocks of keys and of queries and 40 heads.

    Attributes:
        density: share of the key blocks kept, in (0, 1]: floor(density · J), at least 1.
        cdf: share of the pooled attention, in [0, 1]: a query block takes its heaviest blocks as
            long as they hold no more than that, and one at least; the published code has 0.98.
            `density` is not read then, and every step's record has the real one. None: by density.
        similarity: threshold, in [-1, 1]: below 0 all blocks are alike, at 1 none is. None takes
            the published code's, -0.1 with density and 0.6 with cdf.
        sink: whether the first key block is always exact.
        hilbert: whether tokens follow a Hilbert curve, as the paper advises for video; False keeps
            raster order.
        dense_prefix, dense_layers: the method has none.

    Raises:
        ValueError: a field is out of range.
    """

    density: float = 0.5
    cdf: float | None = None
    similarity: float | None = None
    sink: bool = False
    hilbert: bool = True
    dense_prefix: float = 0.0
    dense_layers: tuple[int, ...] = ()
    block_q: int = 128
    block_kv: int = 64

    def __post_init__(self):
        super().__post_init__()
        check_density("density", self.density)
        if self.cdf is not None:
            check_share("cdf", self.cdf)
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"similarity={self.similarity!r} must be in [-1, 1]")

    @property
    def threshold(self) -> float:
        """`similarity` with None resolved."""
        if self.similarity is not None:
            return self.similarity
        return -0.1 if self.cdf is None else 0.6

    def max_budget(
        self, num_steps: int, num_blocks: int, curve: Sequence[float] | np.ndarray | None = None
    ) -> int:
        """max(1, floor(density · num_blocks)), without blocks computed whole; with cdf all."""
        return num_blocks if self.cdf is not None else density_blocks(self.density, num_blocks)

    def token_order(self, grid: TokenGrid) -> np.ndarray | None:
        """`grid.gilbert_order`, or None for raster order."""
        return gilbert_order(grid) if self.hilbert else None

    def plan(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        v: Float[Array, "B S N H"],
        context: Context,
        state: Any,
    ) -> tuple[Plan, Any]:
        """The heaviest blocks, text, and all blocks of tokens unlike each other; no tail."""
        (batch, tokens, heads, _), keys = q.shape, k.shape[1]
        length = block_lengths(keys, self.block_kv, context.kv_length, batch)
        rows = block_lengths(tokens, self.block_q, None, batch)
        text = None if context.grid is None else context.grid.text_blocks(self.block_kv)
        forced = forced_blocks(length, "first" if self.sink else None, text)
        slots = self._slots(context, length.shape[1], text)
        q, k = jax.lax.stop_gradient((q, k))

        def one_head(head: jax.Array) -> BlockIndex:
            query, key = (jax.lax.dynamic_index_in_dim(x, head, 2, keepdims=False) for x in (q, k))
            query = _pool(query, rows, self.block_q)
            key = _pool(_centred(key, context.kv_length), length, self.block_kv)
            mask = self._chosen(query, key, length > 0, forced, context)
            return jax.tree.map(lambda x: x[:, 0], listed_blocks(mask[:, None], slots))

        number = jnp.arange(heads, dtype=jnp.int32)
        large = batch * heads * rows.shape[1] * length.shape[1] > _MAX_SCORES
        blocks = jax.lax.map(one_head, number) if large else jax.vmap(one_head)(number)
        return Plan(jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), blocks)), state

    def _slots(self, context: Context, blocks: int, text: np.ndarray | None) -> int:
        """Length of the lists."""
        if self.cdf is not None or self.threshold >= 0:
            return blocks
        forced = self.sink + (0 if text is None else int(text.sum()))
        return min(blocks, max(context.max_budget, forced))

    def _chosen(
        self,
        query: "_Pooled",
        key: "_Pooled",
        live: Bool[Array, "B J"],
        forced: Bool[Array, "B J"],
        context: Context,
    ) -> Bool[Array, "B I J"]:
        """One head's exact blocks."""
        # Rounding to bf16 or tf32, the default of matrix units, would reorder close scores.
        score = jnp.einsum(
            "bih,bjh->bij", query.mean, key.mean, precision=jax.lax.Precision.HIGHEST
        )
        score = score * jnp.float32(query.mean.shape[-1] ** -0.5)
        alike = key.similarity > self.threshold  # False for NaN
        score = jnp.where(jnp.isfinite(score) & (alike & live)[:, None, :], score, _FLOOR)
        if self.cdf is None:
            score = jnp.where(forced[:, None, :], jnp.inf, score)
            chosen = _heaviest(score, context.budget)
        else:
            chosen = _heaviest_holding(jax.nn.softmax(score, axis=-1), self.cdf)
        whole = ~(query.similarity > self.threshold)
        chosen = chosen | (forced | ~alike)[:, None, :] | whole[:, :, None]
        return chosen & live[:, None, :]


class _Pooled(NamedTuple):
    """One head's blocks in float32: means, and mean cosines of all pairs of a block's tokens."""

    mean: Float[Array, "B I H"]
    similarity: Float[Array, "B I"]


def _centred(
    key: Float[Array, "B S H"], kv_length: Int[Array, " B"] | None
) -> Float[Array, "B S H"]:
    """One head's keys less the mean of the valid ones, in float32."""
    key = key.astype(jnp.float32)
    valid = block_lengths(key.shape[1], 1, kv_length, len(key))[..., None] > 0
    number = jnp.maximum(valid.sum(1, keepdims=True), 1).astype(jnp.float32)
    return key - jnp.where(valid, key, 0).sum(1, keepdims=True) / number


def _pool(x: Float[Array, "B T H"], length: Int[Array, "B I"], block: int) -> _Pooled:
    """Every block's mean and similarity, by its valid tokens; a token of zeros is like no other."""
    batch, blocks = length.shape
    x = pad_axis(x.astype(jnp.float32), 1, blocks * block).reshape(batch, blocks, block, -1)
    valid = jnp.arange(block).reshape(1, 1, block, 1) < length[..., None, None]
    number = jnp.maximum(length, 1).astype(jnp.float32)[..., None]
    x = jnp.where(valid, x, 0)
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    unit = x / jnp.where(norm > 0, norm, 1)
    # The mean of all pairs' cosines is the square of the mean unit vector.
    similarity = ((unit.sum(2) / number) ** 2).sum(-1)
    return _Pooled(x.sum(2) / number, jnp.minimum(similarity, 1))


def _heaviest(score: Float[Array, "B I J"], number: Int[Array, "*I"]) -> Bool[Array, "B I J"]:
    """The `number` largest of every row; of equals the first."""
    # One array: XLA may compute the scores that are compared anew, in other roundings than sorted.
    score = jax.lax.optimization_barrier(score)
    number = jnp.broadcast_to(jnp.minimum(number, score.shape[-1]), score.shape[:2])[..., None]
    # A sort of one operand, which a CPU does far faster than top_k.
    best = jnp.sort(score, axis=-1, descending=True)
    least = jnp.take_along_axis(best, number - 1, axis=-1)
    above, equal = score > least, score == least
    room = number - above.sum(-1, keepdims=True, dtype=jnp.int32)
    return above | (equal & (jnp.cumsum(equal, axis=-1, dtype=jnp.int32) <= room))


def _heaviest_holding(weight: Float[Array, "B I J"], share: float) -> Bool[Array, "B I J"]:
    """Of every row the heaviest that together hold no more than a share of it, at least one."""
    # By what the rest holds, summed from the lightest: nothing is lost next to a share of 1.
    held = jnp.cumsum(jnp.sort(weight, axis=-1), axis=-1)[..., ::-1]
    rest = jnp.pad(held[..., 1:], ((0, 0), (0, 0), (0, 1)))
    number = (rest >= 1 - share).sum(-1, dtype=jnp.int32)
    return _heaviest(weight, jnp.maximum(number, 1))
