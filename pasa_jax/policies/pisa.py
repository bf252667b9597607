"""PISA (arXiv:2602.01077): a fixed share of key blocks exact, a Taylor expansion for the rest."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pasa_jax import routing
from pasa_jax.pallas_kernels import api, blocks
from pasa_jax.policies.base import (
    Context,
    Plan,
    Policy,
    check_choice,
    check_density,
    density_blocks,
)

ROUTE_BIASES = ("none", "global", "group")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pisa(Policy):
    """Plain top-k routing, the same number of blocks at every sparse step, one first-order matrix.

    Attributes:
        density: exact share of the key blocks, in (0, 1]: floor(density · J) of them, at least 1.
        order: order of the Taylor expansion, 0 or 1.
        route_bias: "none" scores by the logit of the means (the paper's setting for video),
            "global" adds log(‖H_j − Hbar‖ + epsilon), Hbar the mean over all blocks (for images).
        epsilon: inside that logarithm.
        sink: "first" or "last" key block always exact, at the budget's expense; None forces none.

    Raises:
        ValueError: a field is out of range.
    """

    density: float = 0.125
    order: Literal[0, 1] = 1
    route_bias: Literal["none", "global"] = "none"
    epsilon: float = 1e-5
    sink: Literal["first", "last"] | None = None

    def __post_init__(self):
        super().__post_init__()
        check_density("density", self.density)
        check_route(self, ("none", "global"))

    def max_budget(
        self, num_steps: int, num_blocks: int, curve: Sequence[float] | np.ndarray | None = None
    ) -> int:
        """max(1, floor(density · num_blocks))."""
        return density_blocks(self.density, num_blocks)

    def plan(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        v: Float[Array, "B S N H"],
        context: Context,
        state: Any,
    ) -> tuple[Plan, Any]:
        """The blocks of highest score, and one first-order matrix for all others."""
        group = blocks.num_blocks(k.shape[1], self.block_kv)
        return taylor_plan(self, q, k, v, context, group, routing.Noise()), state


def check_route(policy: Any, biases: tuple[str, ...]) -> None:
    """Raises ValueError unless the fields that `taylor_plan` reads are in range."""
    check_choice("order", policy.order, (0, 1))
    check_choice("route_bias", policy.route_bias, biases)
    check_choice("sink", policy.sink, routing.SINKS)
    if not 0 < policy.epsilon < math.inf:
        raise ValueError(f"epsilon={policy.epsilon!r} must be positive and finite")


def taylor_plan(
    policy: Any,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    context: Context,
    group: int,
    noise: routing.Noise,
) -> Plan:
    """Routes by block means and leaves the rest to the expansion, `group` key blocks a matrix."""
    text = None if context.grid is None else context.grid.text_blocks(policy.block_kv)
    sizes = {"block_kv": policy.block_kv, "kv_length": context.kv_length}
    statistics = api.block_statistics(k, v, group=group, **sizes)
    selected = routing.select_blocks(
        routing.block_mean(q, policy.block_q),
        statistics.key_mean,
        statistics.length,
        budget=context.budget,
        max_budget=context.max_budget,
        bias=_covariance_bias(policy, k, v, statistics, context.kv_length),
        forced=routing.forced_blocks(statistics.length, policy.sink, text),
        noise=noise,
        keys=routing.call_keys(context.keys, context.step, context.layer),
    )
    return Plan(selected, statistics, policy.order)


def _covariance_bias(
    policy: Any,
    k: jax.Array,
    v: jax.Array,
    statistics: blocks.BlockStatistics,
    kv_length: jax.Array | None,
):
    """log(‖H_j − mean H‖ + ε) [B, N, J], the mean over all blocks or over the block's group."""
    if policy.route_bias == "none":
        return None
    every = blocks.num_blocks(k.shape[1], policy.block_kv)
    group = every if policy.route_bias == "global" else statistics.group
    norm = api.block_covariance_norm(
        k,
        v,
        block_kv=policy.block_kv,
        group=group,
        kv_length=kv_length,
        statistics=statistics,
    )
    return jnp.log(norm.astype(jnp.float32) + policy.epsilon)
