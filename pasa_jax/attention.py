"""The one door: a model's self-attention calls `attend`, which runs the policy's plan."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pasa_jax.grid import TokenGrid
from pasa_jax.pallas_kernels import api
from pasa_jax.pallas_kernels.blocks import num_blocks
from pasa_jax.policies.base import Context, Plan, Policy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Attention:
    """How the self-attention of one forward pass runs: a policy at one step of the sampling run.

    Attributes:
        policy: the method and its parameters (static).
        mode: this step's entry of `policy.modes` (static).
        step, budget, keys, max_budget: see `policies.base.Context`.
        state: the policy's state, leaves stacked over layers; () when it keeps none.
    """

    policy: Policy = dataclasses.field(metadata={"static": True})
    mode: str = dataclasses.field(metadata={"static": True})
    step: Int[Array, ""]
    budget: Int[Array, ""]
    keys: jax.Array
    max_budget: int = dataclasses.field(metadata={"static": True})
    state: Any = ()


class LayerRecord(NamedTuple):
    """What a layer's attention leaves behind; a scan stacks it over the layers.

    Attributes:
        state: the policy's new state.
        density: f32 scalar, share of the key blocks that were exact, mean over batch, heads and
            query blocks; 1 where attention ran dense.
    """

    state: Any
    density: Float[Array, "..."]


def sequence_order(attention: Attention | None, grid: TokenGrid) -> np.ndarray | None:
    """The policy's order of the whole sequence at this step, text behind; None is raster order.

    Returns:
        int32 [T], the raster token at each place. A model takes its tokens and rotary tables in
        this order before its first layer, and turns back (`argsort`) behind its last.
    """
    if attention is None or attention.mode == "dense":
        return None
    return policy_order(attention.policy, grid)


def policy_order(policy: Policy, grid: TokenGrid) -> np.ndarray | None:
    """`sequence_order` of a policy's own steps."""
    order = policy.token_order(grid)
    if order is None:
        return None
    text = np.arange(grid.num_tokens, grid.num_tokens + grid.text, dtype=np.int32)
    return np.concatenate([order, text])


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    attention: Attention | None,
    *,
    layer: Int[Array, ""],
    state: Any = (),
    grid: TokenGrid | None = None,
    kv_length: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B T N H"], LayerRecord]:
    """Self-attention of one layer under a policy.

    Args:
        q, k, v: projected tokens after normalisation and rotation, f32 or bf16, in the order of
            `sequence_order`.
        attention: the policy at this step; None runs dense attention.
        layer: int32 scalar, index in the whole stack; may be traced, as inside a scan over layers.
        state: this layer's slice of `attention.state`.
        grid: the video's tokens, and the text tokens behind them, whose queries run dense; None
            where all are video and the policy does not ask for the axes.
        kv_length: valid keys of each batch row, from the start; None means all.

    Returns:
        Attention output in q.dtype, and the layer's record. In mode "dense" and in the policy's
        dense layers the output is `dense_attention`'s, bit for bit.

    Raises:
        ValueError: `attention.keys` are not typed random keys [P] with P a divisor of B, or the
            grid is not of q's tokens, or missing where the policy needs it.
    """
    if grid is not None and q.shape[1] != grid.num_tokens + grid.text:
        raise ValueError(f"{grid=} must have the {q.shape[1]} tokens of q")

    def dense(q, k, v, state):
        return api.dense_attention(q, k, v, kv_length=kv_length), _record(state)

    if attention is None or attention.mode == "dense":
        return dense(q, k, v, state)
    _check_keys(attention.keys, q.shape[0])
    policy = attention.policy
    video = q.shape[1] if grid is None else grid.num_tokens

    def sparse(q, k, v, state):
        context = Context(
            attention.step,
            layer,
            attention.budget,
            attention.keys,
            attention.max_budget,
            attention.mode,
            grid,
            kv_length,
        )
        out, record = _follow(policy, q[:, :video], k, v, context, state)
        if video == q.shape[1]:
            return out, record
        text = api.dense_attention(q[:, video:], k, v, kv_length=kv_length)
        return jnp.concatenate([out, text], axis=1), record

    if not policy.dense_layers:
        return sparse(q, k, v, state)
    is_dense = jnp.isin(layer, jnp.asarray(policy.dense_layers, jnp.int32))
    return jax.lax.cond(is_dense, dense, sparse, q, k, v, state)


def _record(state: Any) -> LayerRecord:
    return LayerRecord(state, jnp.float32(1))


def _follow(
    policy: Policy, q: jax.Array, k: jax.Array, v: jax.Array, context: Context, state: Any
) -> tuple[jax.Array, LayerRecord]:
    """Searches or plans, as the mode says, and runs the plan."""
    if context.mode == "search":
        out, state = policy.search(q, k, v, context, state)
        return out, _record(state)
    plan, state = policy.plan(q, k, v, context, state)
    columns = num_blocks(k.shape[1], policy.block_kv)
    density = plan.blocks.count.astype(jnp.float32).mean() / columns
    return _run(policy, plan, q, k, v, context.kv_length), LayerRecord(state, density)


def _run(
    policy: Policy,
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_length: jax.Array | None,
) -> jax.Array:
    """The plan's attention: its own order of tokens, the kernel, its correction."""
    order = plan.head_order
    if order is not None:
        q, k, v = (_take_tokens(x, order) for x in (q, k, v))
    out = api.block_sparse_attention(
        q,
        k,
        v,
        plan.blocks,
        block_q=policy.block_q,
        block_kv=policy.block_kv,
        tail=plan.tail,
        order=plan.order,
        kv_length=kv_length,
    )
    if plan.rectification is not None:
        share, compensation = (
            jnp.repeat(jnp.moveaxis(x, 1, 2), policy.block_q, axis=1)[:, : out.shape[1]]
            for x in plan.rectification
        )
        out = (share[..., None] * out.astype(jnp.float32) + compensation).astype(out.dtype)
    return out if order is None else _take_tokens(out, jnp.argsort(order, axis=-1))


def _take_tokens(x: jax.Array, order: jax.Array) -> jax.Array:
    """x [B, T, N, H] with each head's tokens in its own order [B or 1, N, T]; the rest stay."""
    index = jnp.moveaxis(order, 1, 2)[..., None]
    moved = jnp.take_along_axis(x[:, : index.shape[1]], index, axis=1)
    return jnp.concatenate([moved, x[:, index.shape[1] :]], axis=1)


def _check_keys(keys: jax.Array, batch: int) -> None:
    typed = jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
    if not typed or keys.ndim != 1 or keys.size == 0 or batch % keys.size:
        raise ValueError(
            f"keys={keys.dtype}{list(keys.shape)} must be typed random keys [P] that divide the "
            f"batch of {batch}, as jax.random.split(jax.random.key(0), P)"
        )
