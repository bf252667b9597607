"""PASA (arXiv:2604.12219): PISA with a budget that follows the velocity, noise and grouped H.

In a pipeline of one's own, `v_t` being the velocity the model predicts at step t:

    policy = Pasa(density=0.15)
    budgets = jnp.asarray(policy.budgets(num_steps, num_blocks, curve.mean))
    bound = policy.max_budget(num_steps, num_blocks, curve.mean)  # static length of block lists
    run = Attention(policy, policy.modes(num_steps)[step], step, budgets[step], keys, bound)
    out, _ = attend(q, k, v, run, layer=layer)
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pasa_jax import budget as budget_rules
from pasa_jax import routing
from pasa_jax.policies.base import (
    Context,
    Plan,
    Policy,
    check_choice,
    check_density,
    dense_prefix_steps,
)
from pasa_jax.policies.pisa import ROUTE_BIASES, check_route, taylor_plan

_ONLINE_CEILING = 3.0  # times the mean density; the published curves reach 2.7 times their mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pasa(Policy):
    """Budget by velocity, noisy top-k, one first-order matrix per group of key blocks.

    Attributes:
        density: exact share of the key blocks, in (0, 1], mean over the sparse steps.
        group: key blocks that share a first-order matrix.
        order: order of the Taylor expansion, 0 or 1.
        route_bias: "global" adds log(‖H_j − Hbar‖ + epsilon) to a block's score, Hbar the mean over
            all blocks; "group" takes the mean of the block's group, "none" scores by the logit
            alone and is the cheapest.
        epsilon: inside that logarithm.
        noise: law of the random bias on scores: "none", "gumbel", "gaussian", "uniform".
        noise_scale: its standard deviation over the spread of the row's scores.
        sink: "first" or "last" key block always exact, at the budget's expense; None forces none.
        budget: "curve" follows a recorded velocity curve (equal steps without one), "online" the
            velocities of the run itself.
        min_density, max_density: bounds of one step's density; the total goes before them. None is
            1 with "curve", 3 · density with "online", where block lists are as long as the bound.

    Raises:
        ValueError: a field is out of range.
    """

    density: float = 0.15
    group: int = 32
    order: Literal[0, 1] = 1
    route_bias: Literal["none", "global", "group"] = "global"
    epsilon: float = 1e-5
    noise: Literal["none", "gumbel", "gaussian", "uniform"] = "gumbel"
    noise_scale: float = 0.2
    sink: Literal["first", "last"] | None = None
    budget: Literal["curve", "online"] = "curve"
    min_density: float = 0.02
    max_density: float | None = None

    def __post_init__(self):
        super().__post_init__()
        check_density("density", self.density)
        check_route(self, ROUTE_BIASES)
        routing.Noise(self.noise, self.noise_scale)
        check_choice("budget", self.budget, ("curve", "online"))
        if self.group < 1:
            raise ValueError(f"group={self.group} must be at least 1 block")
        if self.max_density is not None:
            check_density("max_density", self.max_density)
        if not 0 <= self.min_density <= self._ceiling():
            raise ValueError(
                f"min_density={self.min_density!r} must be from 0 to max_density={self._ceiling()}"
            )

    @property
    def reads_curve(self) -> bool:
        """Not with the budget "online"."""
        return self.budget == "curve"

    def budgets(
        self, num_steps: int, num_blocks: int, curve: Sequence[float] | np.ndarray | None = None
    ) -> np.ndarray:
        """int32 [num_steps] by `budget.step_budgets`.

        Args:
            num_steps: denoising steps.
            num_blocks: key blocks of the sequence.
            curve: ℓ_t [num_steps], `VelocityCurve.mean`; None gives every sparse step the same.

        Raises:
            ValueError: budget is "online", or the curve is not num_steps finite numbers ≥ 0.
        """
        if self.budget == "online":
            raise ValueError("budget='online' is known step by step only: use online_budget")
        dense = dense_prefix_steps(self.dense_prefix, num_steps)
        curve = np.ones(num_steps) if curve is None else np.asarray(curve, np.float64)
        largest = np.finfo(np.float32).max
        if curve.shape != (num_steps,) or not (0 <= curve).all() or not (curve <= largest).all():
            raise ValueError(
                f"curve={curve.tolist()} must be {num_steps=} finite numbers, 0 or more"
            )
        budgets = budget_rules.step_budgets(
            jnp.asarray(curve, jnp.float32), self.density, num_blocks, dense, **self._bounds()
        )
        return np.asarray(budgets)

    def max_budget(
        self, num_steps: int, num_blocks: int, curve: Sequence[float] | np.ndarray | None = None
    ) -> int:
        """The largest budget of a sparse step; with "online" the bound of any run."""
        dense = dense_prefix_steps(self.dense_prefix, num_steps)
        if dense >= num_steps:
            return num_blocks
        if self.budget == "online":
            return int(self.online_budget(num_blocks, np.arange(num_steps + 1)).high)
        return int(self.budgets(num_steps, num_blocks, curve)[dense:].max())

    def online_budget(
        self, num_blocks: int, sigmas: Sequence[float] | np.ndarray
    ) -> budget_rules.OnlineBudget | None:
        """The running budget before the first step; None unless budget is "online".

        Args:
            num_blocks: key blocks of the sequence.
            sigmas: noise levels [num_steps + 1] of the schedule.
        """
        if self.budget != "online":
            return None
        dense = dense_prefix_steps(self.dense_prefix, len(sigmas) - 1)
        return budget_rules.start_online(sigmas, self.density, num_blocks, dense, **self._bounds())

    def plan(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        v: Float[Array, "B S N H"],
        context: Context,
        state: Any,
    ) -> tuple[Plan, Any]:
        """The blocks of highest noisy score, and a first-order matrix per group for all others."""
        noise = routing.Noise(self.noise, self.noise_scale)
        return taylor_plan(self, q, k, v, context, self.group, noise), state

    def _ceiling(self) -> float:
        """`max_density` with None resolved."""
        if self.max_density is not None:
            return self.max_density
        return 1.0 if self.budget == "curve" else min(1.0, _ONLINE_CEILING * self.density)

    def _bounds(self) -> dict[str, float]:
        return {"min_density": self.min_density, "max_density": self._ceiling()}
