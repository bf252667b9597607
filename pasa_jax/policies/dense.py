"""Dense attention as a policy: the rival every other one is measured against."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pasa_jax.pallas_kernels.blocks import BlockIndex, num_blocks
from pasa_jax.policies.base import Context, Plan, check_blocks, prefix_modes


@dataclasses.dataclass(frozen=True)
class Dense:
    """Every key for every query at every step. `plan` lists all blocks, for tests and dry runs."""

    block_q: int = 64
    block_kv: int = 64
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self):
        check_blocks(self)

    @property
    def reads_curve(self) -> bool:
        """False: the budget is constant."""
        return False

    def modes(self, num_steps: int) -> tuple[str, ...]:
        """ "dense" for all steps."""
        return prefix_modes(1.0, num_steps)

    def budgets(
        self, num_steps: int, num_blocks: int, curve: Sequence[float] | np.ndarray | None = None
    ) -> np.ndarray:
        """num_blocks for all steps."""
        return np.full(num_steps, num_blocks, np.int32)

    def max_budget(
        self, num_steps: int, num_blocks: int, curve: Sequence[float] | np.ndarray | None = None
    ) -> int:
        """num_blocks."""
        return num_blocks

    def online_budget(self, num_blocks: int, sigmas: Sequence[float] | np.ndarray) -> None:
        """None: nothing follows the velocities."""

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
        """All key blocks for every query block, and no tail."""
        batch, tokens, heads, _ = q.shape
        rows, columns = num_blocks(tokens, self.block_q), num_blocks(k.shape[1], self.block_kv)
        every = jnp.arange(columns, dtype=jnp.int32).reshape(1, 1, 1, columns)
        ids = jnp.broadcast_to(every, (batch, heads, rows, columns))
        count = jnp.full((batch, heads, rows), columns, jnp.int32)
        return Plan(BlockIndex(ids, count), None, 0), state
