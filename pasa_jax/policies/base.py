"""What a policy is: a frozen record of a method's parameters that turns q, k, v into a plan."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from pasa_jax.budget import OnlineBudget
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


@runtime_checkable
class Policy(Protocol):
    """One attention method; every field is a parameter of the method, so policies compare and hash.

    `plan` runs inside jit, once per layer call, on rotated and normalised q and k. What it needs
    between steps lives in `state`, a pytree stacked over layers by `init_state`. Rules for all:
    with every block selected the output equals dense attention; text keys are visible to all.
    """

    block_q: int
    block_kv: int
    dense_layers: tuple[int, ...]

    @property
    def reads_curve(self) -> bool:
        """Whether a recorded velocity curve changes the budgets."""
        ...

    def modes(self, num_steps: int) -> tuple[str, ...]:
        """Per denoising step "dense" or "sparse"; the sampler compiles one function per name."""
        ...

    def budgets(
        self, num_steps: int, num_blocks: int, curve: Sequence[float] | np.ndarray | None = None
    ) -> np.ndarray:
        """int32 [num_steps], exact key blocks per query block; `num_blocks` in dense steps.

        Args:
            num_steps: denoising steps.
            num_blocks: key blocks, `blocks.num_blocks(tokens, block_kv)`.
            curve: recorded velocity distances [num_steps] (`VelocityCurve.mean`); None: none known.
        """
        ...

    def max_budget(
        self, num_steps: int, num_blocks: int, curve: Sequence[float] | np.ndarray | None = None
    ) -> int:
        """The largest budget a sparse step can get: the static length L of block lists."""
        ...

    def online_budget(
        self, num_blocks: int, sigmas: Sequence[float] | np.ndarray
    ) -> OnlineBudget | None:
        """The running budget of a policy that follows the velocities; None for all others."""
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


def dense_prefix_steps(prefix: float, num_steps: int) -> int:
    """Dense steps before the sparse ones: round(prefix · steps), at least 1 unless prefix is 0."""
    if num_steps < 1:
        raise ValueError(f"{num_steps=} must be at least 1")
    return 0 if prefix == 0 else max(1, round(prefix * num_steps))


def prefix_modes(prefix: float, num_steps: int) -> tuple[str, ...]:
    """ "dense" for the first `dense_prefix_steps`, then "sparse"."""
    dense = dense_prefix_steps(prefix, num_steps)
    return ("dense",) * dense + ("sparse",) * (num_steps - dense)


def check_blocks(policy: Policy) -> None:
    """Raises ValueError unless the fields every policy has are in range."""
    for name in ("block_q", "block_kv"):
        if getattr(policy, name) < 1:
            raise ValueError(f"{name}={getattr(policy, name)} must be at least 1 token")
    layers = policy.dense_layers
    if not isinstance(layers, tuple) or any(layer < 0 for layer in layers):
        raise ValueError(f"dense_layers={layers!r} must be a tuple of layer indices, 0 or more")


def check_choice(name: str, value: Any, choices: tuple) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {choices}")


def check_density(name: str, value: float) -> None:
    """Raises ValueError unless `value` is a share of the blocks, in (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError(f"{name}={value!r} must be in (0, 1]")


def check_prefix(value: float) -> None:
    """Raises ValueError unless `value` is a share of the steps, in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"dense_prefix={value!r} must be in [0, 1]")
