"""Rectified SpaAttn (arXiv:2511.19835): block-sparse attention, corrected by pooled attention."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pasa_jax.grid import TokenGrid, gilbert_order, neighbour_blocks
from pasa_jax.pallas_kernels.blocks import BlockIndex, block_lengths, num_blocks, pad_axis
from pasa_jax.policies.base import (
    Context,
    Plan,
    Policy,
    Rectification,
    check_choice,
    check_density,
    check_share,
    density_blocks,
)
from pasa_jax.routing import listed_blocks

CREDITS = ("kept", "literal")
TESTS = ("signed", "bound", "none")
# Entries of an array of scores, 16 MiB of float32; beyond it heads are planned in turn.
_MAX_SCORES = 1 << 22
_MAX_POOLED = 1 << 21  # entries of q, k or v that are pooled at a time, in a small sequence
_FLOOR = float(np.finfo(np.float32).min)  # the logit of what is not there; finite, so never NaN


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rectified(Policy):
    """The heaviest blocks exact, weighed by their share of attention that is pooled by blocks.

    Tokens follow a Hilbert curve. Pooled attention gives every video block a column whose logit is
    that of the means plus the log of its number of tokens, and every text token one of its own (the
    paper's IPAR). It chooses the exact blocks, scales their output to the share they hold of it,
    and adds the mean value of every other block at its pooled weight. A test of each pair of blocks
    (GAPR) leaves out those whose logit of means is less than what pooling loses. Defaults are those
    for Wan 2.1.

    Blocks that touch the query block, and text, are exact beside the budget, so that the real
    density lies above `density`. In a sequence without text, as Wan's, so are the first J / F key
    blocks for the first I / F query blocks: the published code's rule for the first frame, although
    along the curve they are not quite it.

    What the paper leaves open follows the published code, except that a ragged last block is pooled
    over its true tokens. The test depends on a shift of all keys, which attention does not: keys
    must come as the model makes them.

    Attributes:
        density: share of the key blocks, in (0, 1], that a query block takes by weight: 1 less the
            paper's drop rate.
        p_remain: a query block takes more where its share holds no more than this pooled weight, in
            [0, 1].
        test: what pooling loses of a pair: "signed" lets channels cancel, as published code does,
            "bound" does not and rejects nearly all, "none" trusts every pair (IPAR alone).
        credit: what becomes of the weight of rejected blocks: "kept" gives it to the exact part, as
            published code does, "literal" to none, as the paper reads.
        neighbours: whether blocks that touch are exact.

    Raises:
        ValueError: a field is out of range.
    """

    dense_prefix: float = 0.1
    dense_layers: tuple[int, ...] = (0, 1)
    block_q: int = 128
    block_kv: int = 128
    density: float = 0.25
    p_remain: float = 0.3
    test: Literal["signed", "bound", "none"] = "signed"
    credit: Literal["kept", "literal"] = "kept"
    neighbours: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_density("density", self.density)
        check_share("p_remain", self.p_remain)
        check_choice("test", self.test, TESTS)
        check_choice("credit", self.credit, CREDITS)

    def max_budget(
        self, num_steps: int, num_blocks: int, curve: Sequence[float] | np.ndarray | None = None
    ) -> int:
        """max(1, floor(density · num_blocks)), before what `p_remain` and touching blocks add."""
        return density_blocks(self.density, num_blocks)

    def token_order(self, grid: TokenGrid) -> np.ndarray | None:
        """`grid.gilbert_order`."""
        return gilbert_order(grid)

    def plan(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        v: Float[Array, "B S N H"],
        context: Context,
        state: Any,
    ) -> tuple[Plan, Any]:
        """Exact blocks, their share of pooled attention, and the compensation for all others."""
        grid = context.need_grid(self)
        video, batch = grid.num_tokens, k.shape[0]
        length = block_lengths(video, self.block_kv, context.kv_length, batch)
        pooled = _pool_all(self, q, k[:, :video], v[:, :video], length)
        forced = _forced(self, grid)
        head = functools.partial(
            _plan_head,
            policy=self,
            forced=forced,
            length=length,
            live=block_lengths(k.shape[1], self.block_kv, context.kv_length, batch) > 0,
            budget=context.budget,
            max_budget=context.max_budget,
        )
        size = max(1, _MAX_SCORES // (batch * forced.size))
        planned = jax.lax.map(
            lambda operands: head(*operands),
            (pooled, _text_score(pooled.query, k, grid, context.kv_length)),
            batch_size=min(q.shape[2], size),
        )
        blocks, rectification = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), planned)
        return Plan(blocks, rectification=rectification), state


def _forced(policy: Rectified, grid: TokenGrid) -> Bool[np.ndarray, "I V"]:
    """The video's key blocks that are exact whatever their weight."""
    sizes = policy.block_q, policy.block_kv
    forced = np.zeros([num_blocks(grid.num_tokens, block) for block in sizes], bool)
    if policy.neighbours:
        forced = neighbour_blocks(grid, policy.token_order(grid), *sizes)
    rows, columns = forced.shape
    if grid.text == 0:
        forced[: rows // grid.frames, : columns // grid.frames] = True
    return forced | grid.text_blocks(policy.block_kv)[None, :columns]


class _Pooled(NamedTuple):
    """Blocks' means, and mean absolute deviations from them, in f32.

    Heads lead, to be mapped over; one head's slice has no N.
    """

    query: Float[Array, "*N B I H"]
    query_spread: Float[Array, "*N B I H"]
    key: Float[Array, "*N B V H"]
    key_spread: Float[Array, "*N B V H"]
    value: Float[Array, "*N B V H"]


def _pool_all(
    policy: Rectified, q: jax.Array, k: jax.Array, v: jax.Array, length: jax.Array
) -> _Pooled:
    """The video's pooled queries, keys and values."""
    rows = block_lengths(q.shape[1], policy.block_q, None, 1)
    value, _ = _pool(v, length, policy.block_kv)
    return _Pooled(*_pool(q, rows, policy.block_q), *_pool(k, length, policy.block_kv), value)


def _pool(
    x: Float[Array, "B T N H"], length: Int[Array, "_ I"], block: int
) -> tuple[Float[Array, "N B I H"], Float[Array, "N B I H"]]:
    """Mean of each block's valid tokens and mean absolute deviation from it, in float32."""
    blocks = length.shape[1]
    # In parts: on a CPU |x - mean| of all tokens would be kept, in memory asked for anew at every
    # call, which takes ten times as long. Few, as a GPU starts kernels for each.
    size = num_blocks(blocks, min(16, num_blocks(x.size, _MAX_POOLED)))
    parts = num_blocks(blocks, size)
    x = pad_axis(x, 1, parts * size * block)
    length = einops.rearrange(pad_axis(length, 1, parts * size), "b (c i) -> c b i", i=size)

    def pool(operands):
        part, length = operands
        tokens = jax.lax.dynamic_slice_in_dim(x, part * size * block, size * block, axis=1)
        return _pool_part(einops.rearrange(tokens, "b (i t) n h -> b i t n h", t=block), length)

    pooled = jax.lax.map(pool, (jnp.arange(parts), length))
    return tuple(einops.rearrange(y, "c b i 1 n h -> n b (c i) h")[:, :, :blocks] for y in pooled)


def _pool_part(
    x: Float[Array, "B I t N H"], length: Int[Array, "_ I"]
) -> tuple[Float[Array, "B I 1 N H"], Float[Array, "B I 1 N H"]]:
    """`_pool` of tokens that are parted into blocks."""
    x = x.astype(jnp.float32)
    valid = jnp.arange(x.shape[2]).reshape(1, 1, -1) < length[..., None]  # [B, I, t]
    number = jnp.maximum(length, 1).astype(jnp.float32)[..., None, None, None]

    def mean(x):
        return jnp.where(valid[..., None, None], x, 0).sum(2, keepdims=True) / number

    middle = mean(x)
    return middle, mean(jnp.abs(x - middle))


def _text_score(
    query: Float[Array, "N B I H"],
    k: Float[Array, "B S N H"],
    grid: TokenGrid,
    kv_length: Int[Array, " B"] | None,
) -> Float[Array, "N B I"] | None:
    """Log-sum-exp of the query means' logits with the valid text tokens; None without text."""
    if grid.text == 0:
        return None
    keys = k[:, grid.num_tokens :].astype(jnp.float32)
    score = _product("nbih,benh->nbie", query, keys) * k.shape[-1] ** -0.5
    valid = block_lengths(k.shape[1], 1, kv_length, k.shape[0])[:, grid.num_tokens :] > 0
    return jax.nn.logsumexp(jnp.where(valid[None, :, None, :], score, _FLOOR), axis=-1)


def _plan_head(
    pooled: _Pooled,
    text: Float[Array, "B I"] | None,
    *,
    policy: Rectified,
    forced: Bool[np.ndarray, "I V"],
    length: Int[Array, "B V"],
    live: Bool[Array, "B J"],
    budget: Int[Array, ""],
    max_budget: int,
) -> tuple[BlockIndex, Rectification]:
    """One head's exact blocks and correction; V key blocks hold video, others text alone."""
    videos, blocks = length.shape[1], live.shape[1]
    score = _log_weight(pooled, text, length)
    most = score.shape[-1]
    if max_budget < blocks:  # n columns of falling weight hold at least n / columns of it
        most = min(most, max(max_budget, int(policy.p_remain * most) + 1))
    budget = jnp.where(budget < blocks, budget, most)
    exact = _heaviest(score, policy.p_remain, budget, most)[..., :videos] | forced[None]
    exact = jnp.pad(exact, ((0, 0), (0, 0), (0, blocks - videos)), constant_values=True)
    exact = exact & live[:, None, :]
    slots = most + int(forced.sum(1).max()) + blocks - videos
    ids, count = listed_blocks(exact[:, None], slots)
    correction = _correct(policy, pooled, jnp.exp(score), exact[..., :videos])
    return BlockIndex(ids[:, 0], count[:, 0]), correction


def _log_weight(
    pooled: _Pooled, text: Float[Array, "B I"] | None, length: Int[Array, "B V"]
) -> Float[Array, "B I C"]:
    """Log of pooled attention: a column for each video block, then one for the text if any."""
    score = _product("bih,bjh->bij", pooled.query, pooled.key) * pooled.query.shape[-1] ** -0.5
    # A column stands for all tokens of its block.
    score = score + jnp.log(length.astype(jnp.float32))[:, None, :]
    score = jnp.where((length > 0)[:, None, :], score, _FLOOR)
    if text is not None:
        score = jnp.concatenate([score, text[..., None]], axis=-1)
    return score - jax.nn.logsumexp(score, axis=-1, keepdims=True)


def _heaviest(
    score: Float[Array, "B I C"], p_remain: float, budget: Int[Array, ""], most: int
) -> Bool[Array, "B I C"]:
    """A row's `budget` columns of highest score, or as many as pass `p_remain`; `most` at most."""
    best, columns = jax.lax.top_k(score, most)
    within = jnp.cumsum(jnp.exp(best), axis=-1) <= p_remain
    number = within.sum(-1, keepdims=True, dtype=jnp.int32) + 1  # with the one that passes it
    number = jnp.minimum(jnp.maximum(number, budget), most)
    # By place, not by `score >= least`: XLA may compute the scores of a comparison anew, in other
    # roundings than those that were sorted.
    chosen = jnp.arange(most, dtype=jnp.int32)[None, None] < number
    return jnp.put_along_axis(jnp.zeros(score.shape, bool), columns, chosen, -1, inplace=False)


def _correct(
    policy: Rectified,
    pooled: _Pooled,
    weight: Float[Array, "B I C"],
    exact: Bool[Array, "B I V"],
) -> Rectification:
    """The exact part's share of pooled attention, and the rest's weighted mean values."""
    video, text = jnp.split(weight, [exact.shape[-1]], axis=-1)
    held = exact if policy.test == "none" else exact | ~_passes(pooled, policy.test)
    credited = exact if policy.credit == "literal" else held
    share = jnp.where(credited, video, 0).sum(-1) + text.sum(-1)
    rest = jnp.where(held, 0, video)
    return Rectification(share, _product("bij,bjh->bih", rest, pooled.value))


def _passes(pooled: _Pooled, test: str) -> Bool[Array, "B I V"]:
    """Whether the logit of a pair's means is larger than the spread that pooling loses."""
    query, key = pooled.query, pooled.key
    gain = jnp.abs(_product("bih,bjh->bij", query, key))
    if test == "bound":
        query, key = jnp.abs(query), jnp.abs(key)
    by_query = _product("bih,bjh->bij", pooled.query_spread, key)
    by_key = _product("bih,bjh->bij", query, pooled.key_spread)
    return gain > jnp.abs(by_query) + jnp.abs(by_key)


def _product(axes: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """An einsum in full float32: rounding to bf16 or tf32 would reorder close scores."""
    return jnp.einsum(axes, left, right, precision=jax.lax.Precision.HIGHEST)
