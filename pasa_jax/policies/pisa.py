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
    check_blocks,
    check_choice,
    check_density,
    check_prefix,
    dense_prefix_steps,
    prefix_modes,
)

ROUTE_BIASES = ("none", "global", "group")


@dataclasses.dataclass(frozen=True)
class Pisa:
    """Plain top-k routing, the same number of blocks at every sparse step, one first-order matrix.

    Attributes:
        density: exact share of the key blocks, in (0, 1]: floor(density · J) of them, at least 1.
        dense_prefix: share of the steps that run dense first, in [0, 1]; rounded to at least one
            step unless 0.
        dense_layers: layers that run dense at every step, indices in the whole stack.
        block_q, block_kv: tokens of a query block and of a key block.
        order: order of the Taylor expansion, 0 or 1.
        route_bias: "none" scores by the logit of the means (the paper's setting for video),
            "global" adds log(‖H_j − Hbar‖ + epsilon), Hbar the mean over all blocks (for images).
        epsilon: inside that logarithm.
        sink: "first" or "last" key block always exact, at the budget's expense; None forces none.

    Raises:
        ValueError: a field is out of range.
    """

    density: float = 0.125
    dense_prefix: float = 0.2
    dense_layers: tuple[int, ...] = (0,)
    block_q: int = 64
    block_kv: int = 64
    order: Literal[0, 1] = 1
    route_bias: Literal["none", "global"] = "none"
    epsilon: float = 1e-5
    sink: Literal["first", "last"] | None = None

    def __post_init__(self):
        check_blocks(self)
        check_density("density", self.density)
        check_prefix(self.dense_prefix)
        check_route(self, ("none", "global"))

    @property
    def reads_curve(self) -> bool:
        """False: the budget is constant."""
        return False

    def modes(self, num_steps: int) -> tuple[str, ...]:
        """ "dense" for the first `dense_prefix` of the steps, then "sparse"."""
        return prefix_modes(self.dense_prefix, num_steps)

    def budgets(
        self, num_steps: int, num_blocks: int, curve: Sequence[float] | np.ndarray | None = None
    ) -> np.ndarray:
        """int32 [num_steps]: num_blocks in dense steps, one constant in all others."""
        budgets = np.full(num_steps, self.max_budget(num_steps, num_blocks), np.int32)
        budgets[: dense_prefix_steps(self.dense_prefix, num_steps)] = num_blocks
        return budgets

    def max_budget(
        self, num_steps: int, num_blocks: int, curve: Sequence[float] | np.ndarray | None = None
    ) -> int:
        """max(1, floor(density · num_blocks))."""
        # Rounded first: 0.29 · 100 is 28.999999999999996 in floating point.
        return max(1, math.floor(round(self.density * num_blocks, 6)))

    def online_budget(self, num_blocks: int, sigmas: Sequence[float] | np.ndarray) -> None:
        """None: the budget is constant."""

    def init_state(self, num_layers: int) -> tuple[()]:
        """(): no state."""
        return ()

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
    statistics = api.block_statistics(k, v, block_kv=policy.block_kv, group=group)
    selected = routing.select_blocks(
        routing.block_mean(q, policy.block_q),
        statistics.key_mean,
        statistics.length,
        budget=context.budget,
        max_budget=context.max_budget,
        bias=_covariance_bias(policy, k, v, statistics),
        forced=routing.forced_blocks(statistics.length, policy.sink),
        noise=noise,
        keys=routing.call_keys(context.keys, context.step, context.layer),
    )
    return Plan(selected, statistics, policy.order)


def _covariance_bias(policy: Any, k: jax.Array, v: jax.Array, statistics: blocks.BlockStatistics):
    """log(‖H_j − mean H‖ + ε) [B, N, J], the mean over all blocks or over the block's group."""
    if policy.route_bias == "none":
        return None
    every = blocks.num_blocks(k.shape[1], policy.block_kv)
    group = every if policy.route_bias == "global" else statistics.group
    norm = api.block_covariance_norm(
        k, v, block_kv=policy.block_kv, group=group, statistics=statistics
    )
    return jnp.log(norm.astype(jnp.float32) + policy.epsilon)
