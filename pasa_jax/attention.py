"""The one door: a model's self-attention calls `attend`, which runs the policy's plan."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pasa_jax.pallas_kernels import api
from pasa_jax.policies.base import Context, Policy


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


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    attention: Attention | None,
    *,
    layer: Int[Array, ""],
    state: Any = (),
) -> tuple[Float[Array, "B T N H"], Any]:
    """Self-attention of one layer under a policy.

    Args:
        q, k, v: projected tokens after normalisation and rotation; f32 or bf16.
        attention: the policy at this step; None runs dense attention.
        layer: int32 scalar, index in the whole stack; may be traced, as inside a scan over layers.
        state: this layer's slice of `attention.state`.

    Returns:
        Attention output in q.dtype and the layer's new state. In mode "dense" and in the policy's
        dense layers the output is `dense_attention`'s, bit for bit.

    Raises:
        ValueError: `attention.keys` are not typed random keys [P] with P a divisor of B.
    """
    if attention is None or attention.mode == "dense":
        return api.dense_attention(q, k, v), state
    _check_keys(attention.keys, q.shape[0])
    policy = attention.policy

    def sparse(q, k, v, state):
        context = Context(
            attention.step, layer, attention.budget, attention.keys, attention.max_budget
        )
        plan, state = policy.plan(q, k, v, context, state)
        out = api.block_sparse_attention(
            q,
            k,
            v,
            plan.blocks,
            block_q=policy.block_q,
            block_kv=policy.block_kv,
            tail=plan.tail,
            order=plan.order,
        )
        return out, state

    def dense(q, k, v, state):
        return api.dense_attention(q, k, v), state

    if not policy.dense_layers:
        return sparse(q, k, v, state)
    is_dense = jnp.isin(layer, jnp.asarray(policy.dense_layers, jnp.int32))
    return jax.lax.cond(is_dense, dense, sparse, q, k, v, state)


def _check_keys(keys: jax.Array, batch: int) -> None:
    typed = jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
    if not typed or keys.ndim != 1 or keys.size == 0 or batch % keys.size:
        raise ValueError(
            f"keys={keys.dtype}{list(keys.shape)} must be typed random keys [P] that divide the "
            f"batch of {batch}, as jax.random.split(jax.random.key(0), P)"
        )
