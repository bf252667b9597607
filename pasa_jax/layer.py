"""One self-attention layer under a policy, alone: what its calls cost, and its planning of them."""

import dataclasses
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
    """A layer that runs sparse under a policy, with the budget of an average sparse step.

    Attributes:
        policy: its `dense_layers` are not read.
        grid: the sequence's tokens.
        steps: denoising steps of the run.
        curve: velocity curve [steps] of the run; None for none.
    """

    policy: Policy
    grid: TokenGrid
    steps: int = 50
    curve: np.ndarray | None = None

    @property
    def modes(self) -> tuple[str, ...]:
        """The policy's modes of calls other than "dense", each once."""
        modes = dict.fromkeys(self.policy.modes(self.steps))
        return tuple(mode for mode in modes if mode != "dense")

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        v: Float[Array, "B S N H"],
        state: Any,
        mode: str,
    ) -> tuple[Float[Array, "B T N H"], Any]:
        """A whole call: output, and the layer's record."""
        context = self._context(mode)
        policy = dataclasses.replace(self.policy, dense_layers=())
        run = Attention(
            policy, mode, context.step, context.budget, context.keys, context.max_budget
        )
        return attend(q, k, v, run, layer=context.layer, state=state, grid=self.grid)

    def plan(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        v: Float[Array, "B S N H"],
        state: Any,
        mode: str,
    ) -> Plan:
        """The planning of a call alone."""
        video = q[:, : self.grid.num_tokens]
        return self.policy.plan(video, k, v, self._context(mode), state)[0]

    def state(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        v: Float[Array, "B S N H"],
    ) -> Any:
        """What the layer's calls find: the state behind a search, where the policy has one."""
        shape = AttentionShape(1, q.shape[0], *q.shape[2:], self.grid)
        state = jax.tree.map(lambda x: x[0], self.policy.init_state(shape))
        if "search" not in self.modes:
            return state
        return jax.jit(self.attend, static_argnums=4)(q, k, v, state, "search")[1].state

    def _context(self, mode: str) -> Context:
        """An average sparse step of layer 0."""
        with jax.ensure_compile_time_eval():  # budgets are numbers, also while a call is traced
            return self._average(mode)

    def _average(self, mode: str) -> Context:
        policy, blocks = self.policy, self.grid.num_blocks(self.policy.block_kv)
        curve = self.curve if policy.reads_curve else None
        bound = policy.max_budget(self.steps, blocks, curve)
        if policy.online_budget(blocks, np.linspace(1, 0, self.steps + 1)) is not None:
            budget = density_blocks(policy.density, blocks)
        else:
            modes, budgets = policy.modes(self.steps), policy.budgets(self.steps, blocks, curve)
            sparse = [b for b, one in zip(budgets, modes, strict=True) if one not in DENSE_MODES]
            budget = max(1, round(float(np.mean(sparse)))) if sparse else bound
        keys, zero = jax.random.split(jax.random.key(0), 1), jnp.int32(0)
        return Context(zero, zero, jnp.int32(budget), keys, bound, mode, self.grid)
