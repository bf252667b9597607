"""What a policy is: a frozen record of a method's parameters that turns q, k, v into a plan."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from pasa_jax.budget import OnlineBudget
from pasa_jax.calibration import CurveKey
from pasa_jax.grid import TokenGrid
from pasa_jax.pallas_kernels.blocks import BlockIndex, BlockStatistics


class Rectification(NamedTuple):
    """A correction that the rows of a query block share: out = share · out + compensation.

    Attributes:
        share: f32 [B, N, I], weight of the exact part.
        compensation: f32 [B, N, I, H], what is added for the rest.
    """

    share: Float[Array, "B N I"]
    compensation: Float[Array, "B N I H"]


class Plan(NamedTuple):
    """Which key blocks are exact, and what stands for the rest.

    Attributes:
        blocks: the exact key blocks of every query block.
        tail: statistics of all key blocks; None drops the rest and renormalises.
        order: Taylor order of the tail, 0 or 1.
        rectification: block-wise correction of the output; None leaves it.
        head_order: int32 [B, N, T] or [1, N, T], token at each place of a head's own
            order, in which its query and key blocks count (T = S then); None keeps the model's.
    """

    blocks: BlockIndex
    tail: BlockStatistics | None = None
    order: int = 0
    rectification: Rectification | None = None
    head_order: Int[Array, "_ N T"] | None = None


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
        mode: static, this step's entry of `Policy.modes`.
        grid: static, the video's tokens and the text tokens behind them; None where the caller did
            not tell.
        kv_length: int32 [B], valid keys of each batch row, from the start; None means all.
    """

    step: Int[Array, ""]
    layer: Int[Array, ""]
    budget: Int[Array, ""]
    keys: jax.Array
    max_budget: int = dataclasses.field(metadata={"static": True})
    mode: str = dataclasses.field(default="sparse", metadata={"static": True})
    grid: TokenGrid | None = dataclasses.field(default=None, metadata={"static": True})
    kv_length: Int[Array, " B"] | None = None

    def need_grid(self, policy: "Policy") -> TokenGrid:
        """The grid.

        Raises:
            ValueError: there is none; the message names the policy that wants it.
        """
        if self.grid is None:
            name = type(policy).__name__
            raise ValueError(f"grid=None must be a TokenGrid: {name} works on the video's axes")
        return self.grid


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """Sizes that a policy's state depends on.

    Attributes:
        layers: self-attention layers of the model.
        batch: B, guidance branches included.
        heads, head_dim: N and H.
        grid: the sequence's tokens.
    """

    layers: int
    batch: int
    heads: int
    head_dim: int
    grid: TokenGrid


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """One attention method; every field is a parameter of the method, so policies compare and hash.

    `plan` runs inside jit, once per layer call, on rotated and normalised q and k. What it needs
    between steps lives in `state`, a pytree stacked over layers by `init_state`. Rules for all:
    with every block selected the output equals dense attention; text keys are visible to all.

    Attributes:
        dense_prefix: share of the steps that run dense first, in [0, 1]; rounded to at least one
            step unless 0.
        dense_layers: layers that run dense at every step, indices in the whole stack.
        block_q, block_kv: tokens of a query block and of a key block.

    Raises:
        ValueError: a field is out of range.
    """

    dense_prefix: float = 0.2
    dense_layers: tuple[int, ...] = (0,)
    block_q: int = 64
    block_kv: int = 64

    def __post_init__(self):
        for name in ("block_q", "block_kv"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1 token")
        layers = self.dense_layers
        if not isinstance(layers, tuple) or any(layer < 0 for layer in layers):
            raise ValueError(f"dense_layers={layers!r} must be a tuple of layer indices, 0 or more")
        check_share("dense_prefix", self.dense_prefix)

    @property
    def reads_curve(self) -> bool:
        """Whether a recorded velocity curve changes the budgets; here False: they are constant."""
        return False

    def check_setting(self, key: CurveKey) -> None:
        """Raises ValueError if the policy cannot run in that setting; here it can in any.

        Called before a model is loaded, for policies that hold records of one setting.
        """

    def modes(self, num_steps: int) -> tuple[str, ...]:
        """Per denoising step a name; the sampler compiles one function per name.

        "dense" runs dense attention and leaves the state alone, "search" calls `search`, every
        other name calls `plan`. Here "dense" for the first `dense_prefix` of the steps, then
        "sparse".
        """
        dense = dense_prefix_steps(self.dense_prefix, num_steps)
        return ("dense",) * dense + ("sparse",) * (num_steps - dense)

    def budgets(
        self, num_steps: int, num_blocks: int, curve: Sequence[float] | np.ndarray | None = None
    ) -> np.ndarray:
        """int32 [num_steps], exact key blocks per query block; here one constant in sparse steps.

        Args:
            num_steps: denoising steps.
            num_blocks: key blocks of the sequence; the budget of dense steps.
            curve: recorded velocity distances [num_steps] (`VelocityCurve.mean`); None: none known.
        """
        budgets = np.full(num_steps, self.max_budget(num_steps, num_blocks), np.int32)
        budgets[: dense_prefix_steps(self.dense_prefix, num_steps)] = num_blocks
        return budgets

    def max_budget(
        self, num_steps: int, num_blocks: int, curve: Sequence[float] | np.ndarray | None = None
    ) -> int:
        """The largest budget a sparse step can get; here all blocks, for methods without one."""
        return num_blocks

    def online_budget(
        self, num_blocks: int, sigmas: Sequence[float] | np.ndarray
    ) -> OnlineBudget | None:
        """The running budget of a policy that follows the velocities; here None."""
        return None

    def token_order(self, grid: TokenGrid) -> np.ndarray | None:
        """int32 [T], the token that stands at each place of the sequence the policy works on.

        The model reorders its tokens and rotary tables once a pass, and turns back at the end. Text
        keeps its place behind the video. Here None: raster order.
        """
        return None

    def init_state(self, shape: AttentionShape) -> Any:
        """State before the first step, leaves stacked [layers, ...]; here (), none."""
        return ()

    def plan(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        v: Float[Array, "B S N H"],
        context: Context,
        state: Any,
    ) -> tuple[Plan, Any]:
        """Chooses the blocks of one attention call.

        Args:
            q: the video's queries; text queries run dense and are not here.
            k, v: all keys, the text's last.
            context: step, layer, budget.
            state: this layer's.

        Returns:
            The plan and the layer's new state.
        """
        raise NotImplementedError(f"{type(self).__name__} has no plan")

    def search(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        v: Float[Array, "B S N H"],
        context: Context,
        state: Any,
    ) -> tuple[Float[Array, "B T N H"], Any]:
        """Dense output of a "search" step, and the state that it leaves for later ones."""
        raise NotImplementedError(f"{type(self).__name__} has no search")


def density_blocks(density: float, num_blocks: int) -> int:
    """max(1, floor(density · num_blocks))."""
    # Rounded first: 0.29 · 100 is 28.999999999999996 in floating point.
    return max(1, math.floor(round(density * num_blocks, 6)))


def dense_prefix_steps(prefix: float, num_steps: int) -> int:
    """Dense steps before the sparse ones: round(prefix · steps), at least 1 unless prefix is 0."""
    if num_steps < 1:
        raise ValueError(f"{num_steps=} must be at least 1")
    return 0 if prefix == 0 else max(1, round(prefix * num_steps))


def check_choice(name: str, value: Any, choices: tuple) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {choices}")


def check_density(name: str, value: float) -> None:
    """Raises ValueError unless `value` is a share of the blocks, in (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError(f"{name}={value!r} must be in (0, 1]")


def check_share(name: str, value: float) -> None:
    """Raises ValueError unless `value` is in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r} must be in [0, 1]")
