"""What a policy is: a frozen record of a method's parameters that turns q, k, v into a plan."""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
from jaxtyping import Array, Float, Int

from pasa_jax.pallas_kernels.blocks import BlockIndex, BlockStatistics


class Plan(NamedTuple):
    """Which key blocks are exact, and what stands for the rest.

    Attributes:
        blocks: the exact key blocks of every query block.
        tail: statistics of all key blocks; None drops the rest and renormalises.
        order: Taylor order of the tail, 0 or 1.
    """

    blocks: BlockIndex
    tail: BlockStatistics | None
    order: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Where in the sampling run an attention call stands.

    Attributes:
        step: int32 scalar, denoising step, 0 the noisiest.
        layer: int32 scalar, index in the whole stack.
        budget: int32 scalar, exact key blocks per query block at this step (k_t).
        keys: typed random keys [P], one a prompt, from its seed alone. The batch is branch-major:
            B = branches · P, first all prompts conditional, then all unconditional.
        max_budget: static bound of `budget` over the run: the length L of block lists.
    """

    step: Int[Array, ""]
    layer: Int[Array, ""]
    budget: Int[Array, ""]
    keys: jax.Array
    max_budget: int = dataclasses.field(metadata={"static": True})


class Policy(Protocol):
    """One attention method; every field is a parameter of the method, so policies compare and hash.

    `plan` runs inside jit, once per layer call, on rotated and normalised q and k. What it needs
    between steps lives in `state`, a pytree stacked over layers by `init_state`.
    """

    block_q: int
    block_kv: int
    dense_layers: tuple[int, ...]

    def modes(self, num_steps: int) -> tuple[str, ...]:
        """Per denoising step "dense" or "sparse"; the sampler compiles one function per name."""
        ...

    def init_state(self, num_layers: int) -> Any:
        """State before the first step, leaves stacked [num_layers, ...]; () when there is none."""
        ...

    def plan(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        v: Float[Array, "B S N H"],
        context: Context,
        state: Any,
    ) -> tuple[Plan, Any]:
        """Chooses the blocks of one attention call."""
        ...
