"""Dense attention as a policy: the rival every other one is measured against."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pasa_jax.pallas_kernels.blocks import BlockIndex, num_blocks
from pasa_jax.policies.base import Context, Plan, Policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense(Policy):
    """Every key for every query at every step. `plan` lists all blocks, for tests and dry runs."""

    dense_prefix: float = 1.0
    dense_layers: tuple[int, ...] = ()

    def budgets(
        self, num_steps: int, num_blocks: int, curve: Sequence[float] | np.ndarray | None = None
    ) -> np.ndarray:
        """num_blocks for all steps."""
        return np.full(num_steps, num_blocks, np.int32)

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
        return Plan(BlockIndex(ids, count)), state
