"""One self-attention layer under a policy, alone: what its calls cost, and its planning of them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pasa_jax.attention import Attention, attend
from pasa_jax.grid import TokenGrid
from pasa_jax.policies import AttentionShape, Context, Plan, Policy
from pasa_jax.policies.base import density_blocks

DENSE_MODES = ("dense", "search")  # attention itself runs dense


@dataclasses.dataclass(frozen=True)
class Layer:
    """The first layer that a policy runs sparse, with the budget of an average sparse step.

    Attributes:
        policy: its method.
        grid: the sequence's tokens.
        layers: of the whole model.
        steps: denoising steps of the run.
        budget: exact key blocks per query block.
        bound: length of the block lists.
    """

    policy: Policy
    grid: TokenGrid
    layers: int
    steps: int
    budget: int
    bound: int

    @classmethod
    def of(
        cls,
        policy: Policy,
        grid: TokenGrid,
        *,
        layers: int | None = None,
        steps: int = 50,
        curve: np.ndarray | None = None,
    ) -> "Layer":
        """The layer of a run.

        Args:
            policy, grid: as the attributes.
            layers: of the whole model; None takes as many as the policy's masks have, or as leave
                one that runs sparse.
            steps: denoising steps.
            curve: velocity curve [steps], for policies that read one; None for none.
        """
        if layers is None:
            masks = getattr(policy, "masks", None)
            layers = 2 + max(policy.dense_layers, default=-1) if masks is None else masks.shape[0]
        blocks = grid.num_blocks(policy.block_kv)
        curve = curve if policy.reads_curve else None
        bound = policy.max_budget(steps, blocks, curve)
        if policy.online_budget(blocks, np.linspace(1, 0, steps + 1)) is not None:
            budget = density_blocks(policy.density, blocks)
        else:
            modes, budgets = policy.modes(steps), policy.budgets(steps, blocks, curve)
            sparse = [b for b, mode in zip(budgets, modes, strict=True) if mode not in DENSE_MODES]
            budget = max(1, round(float(np.mean(sparse)))) if sparse else bound
        return cls(policy, grid, layers, steps, budget, bound)

    @property
    def modes(self) -> tuple[str, ...]:
        """The policy's modes of calls other than "dense", each once."""
        modes = dict.fromkeys(self.policy.modes(self.steps))
        return tuple(mode for mode in modes if mode != "dense")

    @property
    def place(self) -> int:
        """The layer's number: the first that does not always run dense, if there is one."""
        sparse = (i for i in range(self.layers) if i not in self.policy.dense_layers)
        return next(sparse, 0)

    def context(self, mode: str) -> Context:
        """A call at the first step of a mode."""
        step, keys = (
            self.policy.modes(self.steps).index(mode),
            jax.random.split(jax.random.key(0), 1),
        )
        numbers = (jnp.int32(x) for x in (step, self.place, self.budget))
        return Context(*numbers, keys, self.bound, mode, self.grid)

    def state(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        v: Float[Array, "B S N H"],
    ) -> Any:
        """What the layer's calls find: the state behind a search, where the policy has one."""
        shape = AttentionShape(self.layers, q.shape[0], *q.shape[2:], self.grid)
        state = jax.tree.map(lambda x: x[self.place], self.policy.init_state(shape))
        if "search" not in self.modes:
            return state
        return attend_layer(self, "search", state, q, k, v)[1].state


@functools.partial(jax.jit, static_argnums=(0, 1))
def attend_layer(
    layer: Layer,
    mode: str,
    state: Any,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
) -> tuple[Float[Array, "B T N H"], Any]:
    """A whole call: output, and the layer's record."""
    at, policy = layer.context(mode), dataclasses.replace(layer.policy, dense_layers=())
    attention = Attention(policy, mode, at.step, at.budget, at.keys, at.max_budget)
    return attend(q, k, v, attention, layer=at.layer, state=state, grid=at.grid)


@functools.partial(jax.jit, static_argnums=(0, 1))
def plan_layer(
    layer: Layer,
    mode: str,
    state: Any,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
) -> Plan:
    """The planning of a call alone."""
    video = q[:, : layer.grid.num_tokens]
    return layer.policy.plan(video, k, v, layer.context(mode), state)[0]
